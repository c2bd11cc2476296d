"""How an index lies in a folder.

``manifest.json`` names the files, their sizes and their checksums. ``codes-*.bin`` holds the codes, removed ones among
them, row after row, uint8, bits / 8 bytes each; ``ids-*.bin``, where ids are not positions, int64, little-endian;
``live-*.bin``, where codes were removed, a bitmap of those that were not, the first in the least significant bit. Files
are only ever appended to, so the bytes that a manifest names stay as they are until another manifest has taken its
place; a tail beyond them is what an interrupted save left, and is not read. ``lock`` is held while one saves.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import sys
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hashengine.errors import InputError
from hashengine.index import _manifest
from hashengine.index._codes import Codes, GrowingCodes, block_rows
from hashengine.index._devices import CPU, memory_for
from hashengine.index._manifest import MANIFEST
from hashengine.index._mapping import map_rows
from hashengine.index._rows import GrowingRows, empty_rows
from hashengine.index._state import State

_KINDS = ("codes", "ids", "live")
_CHUNK_BYTES = 1 << 24


@dataclass(frozen=True)
class Saved:
    """The manifest with which a folder and an index in memory were last the same."""

    path: Path
    manifest: dict[str, Any]


def save(path: Path, bits: int, state: State, saved: Saved | None) -> Saved:
    """Write an index; codes and ids that, as ``saved`` tells, are in the folder already are kept there."""
    if path.exists() and not path.is_dir():
        raise InputError(f"save: path must be a folder or not exist yet, got the file {path}")
    live = None if state.live is None else torch.from_numpy(state.live)
    with _writable(path), _locked(path):
        old = _manifest.read(path) if (path / MANIFEST).exists() else None
        base = old if saved is not None and saved.path == path.resolve() and saved.manifest == old else None
        try:
            manifest = _manifest.checksummed(
                {
                    "format": _manifest.FORMAT,
                    "version": _manifest.VERSION,
                    "bits": bits,
                    "bit_order": "msb_first",
                    "count": len(state.codes),
                    "next_id": state.next_id,
                    "codes": _append(path, "codes", state.codes, base and base["codes"]),
                    "ids": _append(path, "ids", state.ids, base and base["ids"]),
                    "live": _append(path, "live", live, None),
                }
            )
            _replace_manifest(path, manifest)
        except BaseException:
            _remove_unnamed(path)
            raise
        _sync_folder(path)
        _remove_unnamed(path)
    return Saved(path.resolve(), manifest)


def load(path: Path, mmap: bool, devices: tuple[torch.device, ...]) -> tuple[int, State, GrowingCodes, Saved]:
    """The length of a code, the state, the memory in which its codes stand, and what they were loaded from.

    Args:
        devices: where the codes shall lie; the CPU where they are mapped.
    """
    while True:
        manifest = _manifest.read(path)
        try:
            needed = manifest["count"] * manifest["bits"] // 8 // len(devices)
            with memory_for("load", devices, needed):
                state, codes = _load(path, manifest, mmap, devices)
            return manifest["bits"], state, codes, Saved(path.resolve(), manifest)
        except (InputError, FileNotFoundError):
            if _manifest.read(path) == manifest:  # else another process has saved, and removed what was being read
                raise


def _load(
    path: Path, manifest: dict[str, Any], mmap: bool, devices: tuple[torch.device, ...]
) -> tuple[State, GrowingCodes]:
    count, width = manifest["count"], manifest["bits"] // 8
    if mmap and count:
        file = _checked_file(path, manifest["codes"])
        codes = GrowingCodes([GrowingRows(torch.from_numpy(map_rows(file, count, width)))])
    elif devices == (CPU,):
        codes = GrowingCodes([GrowingRows(_read(path, manifest["codes"], torch.uint8, (count, width)))])
    else:
        codes = GrowingCodes.of(_blocks(path, manifest["codes"], count, width), count, width, devices)
    ids = _read(path, manifest["ids"], torch.int64, (count,))
    live = _read(path, manifest["live"], torch.uint8, ((count + 7) // 8,))
    state = State.of(codes.first(count), ids, None if live is None else live.numpy(), manifest["next_id"])
    _check_rows(path, manifest, state)
    return state, codes


def _check_rows(path: Path, manifest: dict[str, Any], state: State) -> None:
    """What holds of ids and removals beyond their sizes; the checksums are right, so this is another's mistake."""
    rows = len(state.codes)
    if state.live is not None and (rows == 0 or np.unpackbits(state.live, bitorder="little")[rows:].any()):
        file = path / manifest["live"]["file"]
        raise InputError(f"load: {file} is damaged: it must hold a bit for each of {rows} codes and zeros behind them")
    if state.ids is not None:
        ids = np.sort((state.ids if state.live is None else state.live_ids()).numpy())
        end = np.inf if state.next_id is None else state.next_id
        if len(ids) and (ids[0] < 0 or ids[-1] >= end or (ids[1:] == ids[:-1]).any()):
            file = path / manifest["ids"]["file"]
            raise InputError(f"load: {file} is damaged: it must hold ids that are unique, 0 or more and below {end}")


@contextmanager
def _writable(path: Path) -> Iterator[None]:
    """Tells what may not be written to as a mistake in ``path``: the folder, its lock, or a file in it."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise InputError(f"save: path must be a folder that can be written to, got {path} ({error.strerror})") from None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """The folder, made where it does not exist, for one save at a time; the system unlocks it when a process dies."""
    path.mkdir(parents=True, exist_ok=True)
    lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"save: {path} must not be in use, got a save that is running; save again later") from None
        yield
    finally:
        fcntl.flock(lock, fcntl.LOCK_UN)  # a child that another thread forked meanwhile would keep it
        os.close(lock)


def _bytes(rows: Tensor) -> memoryview:
    if sys.byteorder != "little" and rows.dtype != torch.uint8:
        raise InputError("index files are little-endian, and this machine is not; ids cannot be kept here")
    return memoryview(rows.contiguous().numpy()).cast("B") if rows.numel() else memoryview(b"")


def _append(path: Path, kind: str, rows: Codes | Tensor | None, base: dict[str, Any] | None) -> dict[str, Any] | None:
    """Bring a file to hold ``rows``: append to the file that ``base`` names, or write a new one."""
    if rows is None:
        return None
    entry = base or {"file": f"{kind}-{secrets.token_hex(4)}.bin", "bytes": 0, "crc32": 0}
    size, checksum = entry["bytes"], entry["crc32"]
    row = len(_bytes(rows[:1]))
    with open(path / entry["file"], "r+b" if base else "xb") as file:
        file.truncate(size)
        file.seek(size)
        step = max(_CHUNK_BYTES // max(row, 1), 1)
        for start in range(size // max(row, 1), len(rows), step):
            chunk = _bytes(rows[start : start + step])
            file.write(chunk)
            checksum = zlib.crc32(chunk, checksum)
            size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return {"file": entry["file"], "bytes": size, "crc32": checksum}


def _replace_manifest(path: Path, manifest: dict[str, Any]) -> None:
    temporary = path / f"{MANIFEST}.{secrets.token_hex(4)}.tmp"
    with open(temporary, "x", encoding="utf-8") as file:
        file.write(_manifest.text(manifest))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path / MANIFEST)


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _remove_unnamed(path: Path) -> None:
    """Remove what the manifest in the folder does not name: what it replaced, and what interrupted saves left."""
    manifest = _manifest.read(path) if (path / MANIFEST).exists() else {}
    named = {entry["file"] for entry in map(manifest.get, _KINDS) if entry}
    token = "[0-9a-f]" * 8
    for pattern in (*(f"{kind}-{token}.bin" for kind in _KINDS), f"{MANIFEST}.{token}.tmp"):
        for file in path.glob(pattern):
            if file.name not in named:
                file.unlink()


def _checked_file(path: Path, entry: dict[str, Any]) -> Path:
    file = path / entry["file"]
    size = file.stat().st_size if file.is_file() else 0
    if size < entry["bytes"] or not file.is_file():
        raise InputError(f"load: {file} is damaged: it must hold {entry['bytes']} bytes, got {size}")
    return file


def _read(path: Path, entry: dict[str, Any] | None, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor | None:
    if entry is None:
        return None
    rows = empty_rows(shape, dtype)
    target = _bytes(rows)
    chunks = (target[start : start + _CHUNK_BYTES] for start in range(0, len(target), _CHUNK_BYTES))
    for _ in _filled(path, entry, chunks):
        pass
    return rows


def _blocks(path: Path, entry: dict[str, Any], count: int, width: int) -> Iterator[Tensor]:
    """The codes in a file, uint8 [count, width], a part at a time."""
    step = block_rows(width)
    buffers = (memoryview(bytearray(min(step, count - first) * width)) for first in range(0, count, step))
    for buffer in _filled(path, entry, buffers):
        yield torch.frombuffer(buffer, dtype=torch.uint8).view(-1, width)


def _filled(path: Path, entry: dict[str, Any], buffers: Iterable[memoryview]) -> Iterator[memoryview]:
    """Each buffer with the next bytes of a file; behind the last one, the checksum of all is looked at."""
    file = _checked_file(path, entry)
    checksum = 0
    with open(file, "rb") as source:
        for buffer in buffers:
            if source.readinto(buffer) != len(buffer):
                raise InputError(f"load: {file} ended early; it was changed while it was read")
            checksum = zlib.crc32(buffer, checksum)
            yield buffer
    if checksum != entry["crc32"]:
        raise InputError(f"load: {file} is damaged: its checksum must be {entry['crc32']}, got {checksum}")
