"""What the fuzzer's bytes mean, as files for the readers, and what it starts from.

The first byte chooses a reader, the second holds flags. Then comes a file for `read_codes`, or the files of an index;
or, since checksums would refuse nearly all that is made by chance, the number of an index that the library wrote and
edits of it, after which its checksums are made right again.
"""

from __future__ import annotations

import functools
import json
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from hashengine import HammingIndex
from hashengine.index import _manifest, write_codes

READERS = ("edited index", "index", "npy", "u8bin")
MMAP, LSB_FIRST = 1, 2
KEEP_FILES, KEEP_MANIFEST = 4, 8  # of an edited index: leave its sizes and checksums as they were
_KINDS = ("codes", "ids", "live")
_CODES = np.random.default_rng(0).integers(0, 256, (20, 8), dtype=np.uint8)
_SEPARATOR = b"\n====\n"
_DEPTHS = (300, 900, 3000)
_VALUES = (
    None, True, -1, 0, 1, 2, 8, 20.0, 160.0, 1e400, 1 << 32, 1 << 60, (1 << 63) - 1, 1 << 64, 65536, 65544,
    "", "codes-0.bin", "ids-0.bin", "live-0.bin", "codes-/x", "codes-\n", "codes-\0", "codes-\ud800",
    "codes-" + "x" * 300, "x" * 3000, [], {}, *(f"nested {depth}" for depth in _DEPTHS),
)  # fmt: skip

Files = dict[str, bytes]


def files_of(data: bytes) -> tuple[str, int, Files]:
    """The reader, the flags and the files that `data` means."""
    reader, flags, body = READERS[data[0] % len(READERS)] if data else "index", (data[1:2] or b"\0")[0], data[2:]
    if reader == "edited index":
        return "index", flags, _edited(body, flags)
    if reader == "index":
        parts = (body.split(_SEPARATOR, len(_KINDS)) + [b""] * len(_KINDS))[: 1 + len(_KINDS)]
        return reader, flags, dict(zip(_names(), parts, strict=True))
    return reader, flags, {f"codes.{reader}": body}


def seeds() -> dict[str, bytes]:
    """Each kind of file as the library writes it."""
    found = {f"edited_{name}": bytes([0, 0, number]) for number, name in enumerate(_indexes())}
    for name, files in _indexes().items():
        found[name] = bytes([1, 0]) + _SEPARATOR.join(files.values())
    with tempfile.TemporaryDirectory() as name:
        for suffix in READERS[2:]:
            file = Path(name, f"a.{suffix}")
            write_codes(file, _CODES[:3], bit_order="msb_first")
            found[suffix] = bytes([READERS.index(suffix), 0]) + file.read_bytes()
    return found


def _names() -> list[str]:
    return [_manifest.MANIFEST, *(f"{kind}-0.bin" for kind in _KINDS)]


@functools.cache
def _indexes() -> dict[str, Files]:
    found = {}
    for name in ("positions", "own_ids", "removed", "compacted", "empty"):
        index = HammingIndex(64)
        if name != "empty":
            index.add(_CODES, np.arange(20)[::-1] * 3 if name == "own_ids" else None)
        if name in ("removed", "compacted"):
            index.remove(np.array([3, 17]))
        if name == "compacted":
            index.compact()
        with tempfile.TemporaryDirectory() as folder:
            index.save(folder)
            manifest = json.loads(Path(folder, _manifest.MANIFEST).read_text())
            found[name] = files = dict.fromkeys(_names(), b"")
            for kind in filter(manifest.get, _KINDS):
                files[f"{kind}-0.bin"] = Path(folder, manifest[kind]["file"]).read_bytes()
                manifest[kind]["file"] = f"{kind}-0.bin"
        files[_manifest.MANIFEST] = _manifest.text(_manifest.checksummed(manifest)).encode()
        if name == "own_ids":
            old = {field: manifest[field] for field in manifest if field not in ("next_id", "live", "crc32")}
            found["version_1"] = files | {_manifest.MANIFEST: _manifest.text(old | {"version": 1}).encode()}
    return found


def _edited(body: bytes, flags: int) -> Files:
    """The number of an index, then edits of three bytes: of what, where, and to what."""
    files = list(_indexes().values())[(body[:1] or b"\0")[0] % len(_indexes())]
    manifest = json.loads(files[_manifest.MANIFEST])
    contents = {kind: bytearray(files[f"{kind}-0.bin"]) for kind in _KINDS}
    edits = list(zip(body[1::3], body[2::3], body[3::3], strict=False))
    for target, place, change in edits:
        if target % 4:
            _edit_file(contents[_KINDS[target % 4 - 1]], place, change)
    for kind in filter(manifest.get, _KINDS):
        if not flags & KEEP_FILES:
            manifest[kind] |= {"bytes": len(contents[kind]), "crc32": zlib.crc32(contents[kind])}
    for target, place, change in edits:
        if not target % 4:
            _edit_field(manifest, place, change)
    if not flags & KEEP_MANIFEST and "crc32" in manifest:
        manifest = _manifest.checksummed(manifest)
    text = _manifest.text(manifest)
    for depth in _DEPTHS:
        text = text.replace(f'"nested {depth}"', "[" * depth + "]" * depth)
    return dict(zip(_names(), [text.encode(), *map(bytes, contents.values())], strict=True))


def _edit_file(contents: bytearray, place: int, change: int) -> None:
    if place < len(contents):
        contents[place] = change
    elif place % 2:
        contents += bytes([change]) * 8
    else:
        del contents[change:]


def _edit_field(manifest: dict[str, Any], place: int, change: int) -> None:
    entries = [entry for entry in map(manifest.get, _KINDS) if isinstance(entry, dict)]
    places = [(fields, name) for fields in (manifest, *entries) for name in (*fields, "more")]
    fields, name = places[place % len(places)]
    value = fields.get(name)
    if change < len(_VALUES):
        fields[name] = _VALUES[change]
    elif change == 255:
        fields.pop(name, None)
    elif type(value) is int:
        fields[name] = value + change - 128
    elif isinstance(value, str):
        fields[name] = value + chr(change)
