"""How an index lies in a folder.

``manifest.json`` names the files, their sizes and their checksums; ``codes-*.bin`` holds the codes row after row,
uint8, bits / 8 bytes each; ``ids-*.bin``, where the user brought ids, int64, little-endian. Files are only ever
appended to, so the bytes that a manifest names stay as they are until another manifest has taken its place; a tail
beyond them is what an interrupted save left, and is not read.
"""

import json
import os
import secrets
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hashengine.errors import InputError

FORMAT = "hashengine-index"
VERSION = 1
MANIFEST = "manifest.json"
_CHUNK_BYTES = 1 << 24


@dataclass(frozen=True)
class Saved:
    """The manifest with which a folder and an index in memory were last the same."""

    path: Path
    manifest: dict[str, Any]


@dataclass(frozen=True)
class Contents:
    bits: int
    codes: Tensor
    ids: Tensor | None
    saved: Saved


def save(path: Path, bits: int, codes: Tensor, ids: Tensor | None, saved: Saved | None) -> Saved:
    """Write codes uint8 [N, bits / 8] and ids int64 [N]; what ``saved`` tells is in the folder already is kept."""
    if path.exists() and not path.is_dir():
        raise InputError(f"save: path must be a folder or not exist yet, got the file {path}")
    path.mkdir(parents=True, exist_ok=True)
    old = _read_manifest(path) if (path / MANIFEST).exists() else None
    base = old if saved is not None and saved.path == path.resolve() and saved.manifest == old else None
    try:
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "bits": bits,
            "bit_order": "msb_first",
            "count": len(codes),
            "codes": _append(path, "codes", codes, base and base["codes"]),
            "ids": None if ids is None else _append(path, "ids", ids, base and base["ids"]),
        }
        _replace_manifest(path, manifest)
    except BaseException:
        for file in path.glob("*.bin"):
            if file.name.startswith(("codes-", "ids-")) and file.name not in _file_names(old):
                file.unlink()
        raise
    _sync_folder(path)
    for name in _file_names(old) - _file_names(manifest):
        (path / name).unlink(missing_ok=True)
    return Saved(path.resolve(), manifest)


def load(path: Path) -> Contents:
    manifest = _read_manifest(path)
    count, bits = manifest["count"], manifest["bits"]
    codes = _read(path, manifest["codes"], torch.uint8, (count, bits // 8))
    ids = None if manifest["ids"] is None else _read(path, manifest["ids"], torch.int64, (count,))
    return Contents(bits, codes, ids, Saved(path.resolve(), manifest))


def _bytes(rows: Tensor) -> memoryview:
    if sys.byteorder != "little" and rows.dtype != torch.uint8:
        raise InputError("index files are little-endian, and this machine is not; ids cannot be kept here")
    return memoryview(rows.contiguous().numpy()).cast("B") if rows.numel() else memoryview(b"")


def _append(path: Path, kind: str, rows: Tensor, base: dict[str, Any] | None) -> dict[str, Any]:
    """Bring a file to hold ``rows``: append to the file that ``base`` names, or write a new one."""
    entry = base or {"file": f"{kind}-{secrets.token_hex(4)}.bin", "bytes": 0, "crc32": 0}
    tail = _bytes(rows)[entry["bytes"] :]
    checksum = entry["crc32"]
    with open(path / entry["file"], "r+b" if base else "xb") as file:
        file.truncate(entry["bytes"])
        file.seek(entry["bytes"])
        for start in range(0, len(tail), _CHUNK_BYTES):
            chunk = tail[start : start + _CHUNK_BYTES]
            file.write(chunk)
            checksum = zlib.crc32(chunk, checksum)
        file.flush()
        os.fsync(file.fileno())
    return {"file": entry["file"], "bytes": entry["bytes"] + len(tail), "crc32": checksum}


def _replace_manifest(path: Path, manifest: dict[str, Any]) -> None:
    temporary = path / f"{MANIFEST}.{secrets.token_hex(4)}.tmp"
    try:
        with open(temporary, "x", encoding="utf-8") as file:
            json.dump(manifest, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path / MANIFEST)
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _file_names(manifest: dict[str, Any] | None) -> set[str]:
    entries = [] if manifest is None else [manifest["codes"], manifest["ids"]]
    return {entry["file"] for entry in entries if entry}


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"load: expected the folder of an index, got {path}, which has no {MANIFEST}") from None
    except ValueError as error:  # not JSON, or not UTF-8
        raise InputError(f"load: {file} is damaged: it must be JSON ({error})") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(f"load: {file} must be the manifest of a {FORMAT}, got another file")
    if manifest.get("version") != VERSION:
        raise InputError(
            f"load: {file} has version {manifest.get('version')!r}, this release reads {VERSION}; update hashengine"
        )
    _check_manifest(file, manifest)
    return manifest


def _check_manifest(file: Path, manifest: dict[str, Any]) -> None:
    """Every value is what it must be before a byte of another file is trusted."""

    def require(condition: bool, name: str, expected: str) -> None:
        if not condition:
            raise InputError(f"load: {file} is damaged: {name} must be {expected}, got {manifest.get(name)!r}")

    def is_count(value: Any) -> bool:
        return type(value) is int and 0 <= value < 1 << 63

    bits, count = manifest.get("bits"), manifest.get("count")
    require(is_count(bits) and bits > 0 and bits % 8 == 0, "bits", "a positive multiple of 8")
    require(is_count(count), "count", "a number of codes")
    require(manifest.get("bit_order") == "msb_first", "bit_order", "'msb_first'")
    for name, row_bytes in (("codes", bits // 8), ("ids", 8)):
        entry = manifest.get(name)
        if name == "ids" and entry is None:
            continue
        is_file = (
            isinstance(entry, dict)
            and isinstance(entry.get("file"), str)
            and Path(entry["file"]).name == entry["file"]  # never a way out of the folder
            and entry["file"].startswith(f"{name}-")
            and is_count(entry.get("crc32"))
        )
        require(is_file and entry.get("bytes") == count * row_bytes, name, f"a file of {count * row_bytes} bytes")


def _read(path: Path, entry: dict[str, Any], dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    file = path / entry["file"]
    size = file.stat().st_size if file.is_file() else 0
    if size < entry["bytes"]:
        raise InputError(f"load: {file} is damaged: it must hold {entry['bytes']} bytes, got {size}")
    rows = torch.empty(shape, dtype=dtype)
    target = _bytes(rows)
    checksum = 0
    with open(file, "rb") as source:
        for start in range(0, len(target), _CHUNK_BYTES):
            chunk = target[start : start + _CHUNK_BYTES]
            if source.readinto(chunk) != len(chunk):
                raise InputError(f"load: {file} ended early; it was changed while it was read")
            checksum = zlib.crc32(chunk, checksum)
    if checksum != entry["crc32"]:
        raise InputError(f"load: {file} is damaged: its checksum must be {entry['crc32']}, got {checksum}")
    return rows
