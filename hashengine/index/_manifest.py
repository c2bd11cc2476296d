"""The manifest of an index's folder: reading it, and every check of it before a byte of another file is trusted."""

from __future__ import annotations

import json
import re
import zlib
from pathlib import Path
from reprlib import repr as brief  # a damaged value may be as long as the file
from typing import Any

from hashengine.errors import InputError

FORMAT = "hashengine-index"
VERSION = 2
MANIFEST = "manifest.json"
_FIELDS = {
    1: {"format", "version", "bits", "bit_order", "count", "codes", "ids"},
    2: {"format", "version", "bits", "bit_order", "count", "next_id", "codes", "ids", "live", "crc32"},
}
_FILE = re.compile(r"(codes|ids|live)-[0-9A-Za-z]{1,32}\.bin")  # never a way out of the folder


def text(manifest: dict[str, Any]) -> str:
    return json.dumps(manifest, indent=2)


def checksummed(manifest: dict[str, Any]) -> dict[str, Any]:
    """``manifest`` with the checksum of its text without one."""
    body = {name: value for name, value in manifest.items() if name != "crc32"}
    return body | {"crc32": zlib.crc32(text(body).encode())}


def read(path: Path) -> dict[str, Any]:
    """The manifest of the folder ``path``, in the words of this version whichever it has."""
    file = path / MANIFEST
    try:
        contents = file.read_bytes()
        manifest = json.loads(contents.decode())
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"load: expected the folder of an index, got {path}, which has no {MANIFEST}") from None
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested without end
        raise InputError(f"load: {file} is damaged: it must be JSON ({error})") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(f"load: {file} must be the manifest of a {FORMAT}, got another file")
    version = manifest.get("version")
    if type(version) is not int or version not in _FIELDS:
        raise InputError(
            f"load: {file} has version {brief(version)}, this release reads 1 to {VERSION}; update hashengine"
        )
    if version == 1 and manifest.keys() == _FIELDS[1]:
        manifest |= {"next_id": manifest["count"] if manifest["ids"] is None else None, "live": None}
        _check(file, manifest)
        return manifest
    _check(file, manifest)
    # The text too, where the values are right: a byte that says the same in another way was changed all the same.
    if manifest.keys() != _FIELDS[2] or text(checksummed(manifest)).encode() != contents:
        raise InputError(f"load: {file} is damaged: its checksum or its form is not that of what it says")
    return manifest


def _check(file: Path, manifest: dict[str, Any]) -> None:
    def require(condition: bool, name: str, expected: str) -> None:
        if not condition:
            raise InputError(f"load: {file} is damaged: {name} must be {expected}, got {brief(manifest.get(name))}")

    def is_count(value: Any) -> bool:
        return type(value) is int and 0 <= value < 1 << 62  # so that what is added has room

    bits, count, next_id = manifest.get("bits"), manifest.get("count"), manifest.get("next_id")
    require(is_count(bits) and bits > 0 and bits % 8 == 0, "bits", "a positive multiple of 8")
    require(bits <= 65536, "bits", "at most 65536")
    require(is_count(count), "count", "a number of codes")
    require(manifest.get("bit_order") == "msb_first", "bit_order", "'msb_first'")
    for name, size in (("codes", count * bits // 8), ("ids", 8 * count), ("live", (count + 7) // 8)):
        entry = manifest.get(name)
        if name != "codes" and entry is None:
            continue
        is_file = (
            isinstance(entry, dict)
            and entry.keys() == {"file", "bytes", "crc32"}
            and isinstance(entry["file"], str)
            and (match := _FILE.fullmatch(entry["file"])) is not None
            and match[1] == name
            and is_count(entry["crc32"])
        )
        require(is_file and is_count(entry["bytes"]) and entry["bytes"] == size, name, f"a file of {size} bytes")
    if manifest.get("ids") is None:
        require(next_id == count and is_count(next_id), "next_id", f"the number of codes, {count}")
    else:
        require(next_id is None or is_count(next_id), "next_id", "a number, or null where codes bring ids")
