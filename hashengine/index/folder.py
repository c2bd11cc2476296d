"""The folder of an index. This module works without torch: it reads and writes numpy arrays.

`manifest.json` contains the names, sizes and checksums of these files:

- `codes-*.bin`: all codes, including removed ones, uint8, bits / 8 bytes per row;
- `ids-*.bin`, unless the id of every code is its row: int64, little-endian;
- `live-*.bin`, if codes were removed: a bitmap of the remaining rows, the first row in the least significant bit.

A save locks the file `lock`. It writes new files, or appends to files that the manifest names. It does not change the
bytes up to the sizes in the manifest. Further bytes of a file come from an interrupted save and are not read. A save is
committed when the new manifest replaces the old one. After that, the save removes the files that only the old manifest
names.
"""

from __future__ import annotations

import json
import re
import secrets
import stat
import sys
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from hashengine._files import (
    copy_permissions,
    locked,
    make_folder,
    naming,
    read_file,
    sync_file,
    sync_folder,
    version_of,
    write_file,
)
from hashengine._validation import MAX_BITS
from hashengine.errors import UNUSABLE, InputError, brief, invalid

FORMAT = "hashengine-index"
VERSION = 2
MANIFEST = "manifest.json"
KINDS = ("codes", "ids", "live")  # the fields of a manifest that name a file

Manifest = dict[str, Any]
Version = tuple[int, ...] | None  # as by version_of
FileEntry = dict[str, Any]  # the value of one of KINDS: the fields file, bytes and crc32

_FIELDS = {
    1: {"format", "version", "bits", "bit_order", "count", "codes", "ids"},
    2: {"format", "version", "bits", "bit_order", "count", "next_id", "codes", "ids", "live", "crc32"},
}
_FILE_NAME = re.compile(r"(codes|ids|live)-[0-9A-Za-z]{1,32}\.bin")  # no path that leaves the folder matches
_CHUNK_BYTES = 1 << 24  # bytes read or written at a time


class Rows(Protocol):
    """Rows of equal size whose slices are numpy arrays: a numpy array, or codes on devices."""

    def __len__(self) -> int: ...

    def __getitem__(self, block: slice, /) -> np.ndarray: ...


@dataclass(frozen=True)
class Contents:
    """The state of an index, as it is saved."""

    bits: int
    next_id: int | None  # the id of the next code added without an id; None: codes are added with ids
    codes: Rows
    ids: np.ndarray | None  # int64 [rows]; None: the id of a code is its row
    live: np.ndarray | None  # bitmap uint8 [ceil(rows / 8)]; None: all rows are live


@dataclass(frozen=True)
class SavePoint:
    """The folder of the last save or load of an index, and the manifest that it had then.

    `versions` tells whether another program has changed or replaced the files of the manifest since. `rows_changed`
    tells whether rows of the manifest have changed in memory since.
    """

    path: Path
    manifest: Manifest
    versions: dict[str, Version]
    rows_changed: bool = False


# Saving.


def save(path: Path, contents: Contents, last: SavePoint | None) -> SavePoint:
    """Write an index to a folder. It replaces an index that the folder contains.

    Args:
        path: the folder; created if it does not exist.
        contents: the index.
        last: the last save or load of this index, or None. If the folder, the versions of its files and the rows are
            unchanged, only the new codes and ids, and which rows are live, are written. Otherwise everything is
            written.

    Raises:
        InputError: as `HammingIndex.save`.
    """
    if path.exists() and not path.is_dir():
        raise invalid("save", "path", "a folder or not exist yet", f"the file {path}")
    with naming(path), _explain_read_only(path), _locked(path):
        old = read_manifest(path) if (path / MANIFEST).exists() else None
        base = None
        if last is not None and old is not None and last.path == path.resolve() and last.manifest != old:
            expected = "a folder that still holds the index of the last load or save"
            advice = "load it and change it again, or save to another folder"
            raise invalid("save", "path", expected, f"{path}, to which another index was saved since", advice)
        if last is not None and old is not None and last == SavePoint(path.resolve(), old, _versions(path, old)):
            base = old
        try:
            manifest = with_checksum(
                {
                    "format": FORMAT,
                    "version": VERSION,
                    "bits": contents.bits,
                    "bit_order": "msb_first",
                    "count": len(contents.codes),
                    "next_id": contents.next_id,
                    "codes": _append(path, "codes", contents.codes, base and base["codes"], old),
                    "ids": _append(path, "ids", contents.ids, base and base["ids"], old),
                    "live": _append(path, "live", contents.live, None, old),
                }
            )
            sync_folder(path)  # the names of new files must be durable before the manifest that names them
            write_file(path / MANIFEST, manifest_text(manifest))
        finally:
            _remove_unnamed(path)
    return SavePoint(path.resolve(), manifest, _versions(path, manifest))


def _versions(path: Path, manifest: Manifest) -> dict[str, Version]:
    """The version of each file that the manifest names."""
    names = [entry["file"] for entry in map(manifest.get, KINDS) if entry]
    return {name: version_of(path / name) for name in names}


@contextmanager
def _explain_read_only(path: Path) -> Iterator[None]:
    """Turn a missing permission for the folder, its lock or a file in it into an `InputError` about `path`."""
    try:
        yield
    except OSError as error:
        if error.errno not in UNUSABLE:
            raise
        raise invalid("save", "path", "a folder that can be written to", f"{path} ({error.strerror})") from None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Create the folder if it does not exist, and hold its lock for one save."""

    def refuse() -> None:
        advice = "save again later"
        raise invalid("save", str(path), "a folder that is not in use", "a save that is running", advice) from None

    make_folder(path)
    with locked(path, refuse):
        yield


def _append(path: Path, kind: str, rows: Rows | None, base: FileEntry | None, old: Manifest | None) -> FileEntry | None:
    """Write `rows` to a file: append to the file of `base`, which contains the first rows, or write a new file.

    If the file of `base` is missing, has become shorter than its entry says, or has more rows, a new file replaces it.
    A new file gets the permissions of the file of its kind in the manifest `old`, or else of the codes there.
    """
    if rows is None:
        return None
    row_bytes = max(rows[:1].nbytes, 1)
    if base is not None:
        fits = base["bytes"] <= len(rows) * row_bytes
        base = base if fits and _holds(path / base["file"], base["bytes"]) else None
    entry = base or {"file": f"{kind}-{secrets.token_hex(4)}.bin", "bytes": 0, "crc32": 0}
    size, checksum = entry["bytes"], entry["crc32"]
    with open(path / entry["file"], "r+b" if base else "xb") as file:
        if base is None and old is not None:
            copy_permissions(path / (old[kind] or old["codes"])["file"], path / entry["file"])
        file.truncate(size)
        file.seek(size)
        step = max(_CHUNK_BYTES // row_bytes, 1)
        for start in range(size // row_bytes, len(rows), step):
            chunk = _bytes_of(rows[start : start + step])
            file.write(chunk)
            checksum = zlib.crc32(chunk, checksum)
            size += len(chunk)
        sync_file(file)
    return {"file": entry["file"], "bytes": size, "crc32": checksum}


def _bytes_of(rows: np.ndarray) -> memoryview:
    _check_byte_order(rows.dtype)
    return np.ascontiguousarray(rows).data.cast("B") if rows.size else memoryview(b"")


def _check_byte_order(dtype: np.dtype) -> None:
    if sys.byteorder != "little" and dtype != np.uint8:
        raise invalid("hashengine", "the machine", "little-endian to read or write ids", "a big-endian one")


def _remove_unnamed(path: Path) -> None:
    """Remove files that the manifest does not name: those of the previous manifest and of interrupted saves."""
    manifest = read_manifest(path) if (path / MANIFEST).exists() else {}
    named = {entry["file"] for entry in map(manifest.get, KINDS) if entry}
    token = "[0-9a-f]" * 8
    patterns = [f"{kind}-{token}.bin" for kind in KINDS]
    patterns += [f"{MANIFEST}.{token}.tmp", f".{token * 4}.partial"]  # temporary files of version 0.1 and of _files.py
    for pattern in patterns:
        for file in path.glob(pattern):
            if file.name not in named:
                with suppress(OSError):  # the save is complete; the next one tries again
                    file.unlink()


# Loading.


@dataclass(frozen=True)
class StoredIndex:
    """An index in a folder, whose manifest was read and checked. Reading rows checks their files."""

    path: Path
    manifest: Manifest

    @property
    def bits(self) -> int:
        """The length of a code."""
        return self.manifest["bits"]

    @property
    def rows(self) -> int:
        """The number of rows, live or not."""
        return self.manifest["count"]

    @property
    def next_id(self) -> int | None:
        """The id of the next code added without one; None: codes are added with ids."""
        return self.manifest["next_id"]

    @property
    def save_point(self) -> SavePoint:
        """The `SavePoint` for a later `save` of the index to the same folder."""
        return SavePoint(self.path.resolve(), self.manifest, _versions(self.path, self.manifest))

    def is_current(self) -> bool:
        """Whether the folder still has this manifest. If not, a later save may have removed the manifest's files."""
        return read_manifest(self.path) == self.manifest

    def has_files(self) -> bool:
        """Whether the folder has the manifest's files. Later saves do not change the rows that the manifest counts."""
        entries = filter(None, map(self.manifest.get, KINDS))
        return all(_holds(self.path / entry["file"], entry["bytes"]) for entry in entries)

    def files(self) -> list[Path]:
        """The manifest's files."""
        return [self.path / entry["file"] for entry in filter(None, map(self.manifest.get, KINDS))]

    def codes_file(self) -> Path:
        """The file of the codes, for mapping. Its size is checked; it may be longer than the codes."""
        return _file_of(self.path, self.manifest["codes"])

    def read_codes_into(self, codes: np.ndarray) -> None:
        """Read all codes into an array uint8 [rows, bits / 8]."""
        _read_into(self.path, self.manifest["codes"], codes)

    def code_blocks(self, rows_per_block: int) -> Iterator[np.ndarray]:
        """Yield blocks of codes, uint8 [rows_per_block or fewer, bits / 8]. After the last one, check the checksum."""
        count, width = self.rows, self.bits // 8
        sizes = (min(rows_per_block, count - first) for first in range(0, count, rows_per_block))
        buffers = (memoryview(bytearray(size * width)) for size in sizes)
        for buffer in _fill(self.path, self.manifest["codes"], buffers):
            yield np.frombuffer(buffer, np.uint8).reshape(-1, width)

    def read_ids_and_live(self) -> tuple[np.ndarray | None, np.ndarray | None]:
        """The ids, int64 [rows], and the bitmap of live rows, uint8 [ceil(rows / 8)]; None as in `Contents`."""
        ids = live = None
        if self.manifest["ids"] is not None:
            ids = np.empty(self.rows, np.int64)
            _read_into(self.path, self.manifest["ids"], ids)
        if self.manifest["live"] is not None:
            live = np.empty((self.rows + 7) // 8, np.uint8)
            _read_into(self.path, self.manifest["live"], live)
        _check_rows(self, ids, live)
        return ids, live


def open_folder(path: Path) -> StoredIndex:
    """Read and check the manifest of an index."""
    return StoredIndex(path, read_manifest(path))


def _check_rows(stored: StoredIndex, ids: np.ndarray | None, live: np.ndarray | None) -> None:
    """Check the values of ids and live rows. The checksums do not detect wrong values that another program wrote."""
    rows = stored.rows
    if live is not None and (rows == 0 or np.unpackbits(live, bitorder="little")[rows:].any()):
        file = stored.path / stored.manifest["live"]["file"]
        raise _damaged(f"the contents of {file}", f"one bit for each of {rows} codes, then zeros", "other bits")
    if ids is not None:
        live_ids = ids if live is None else ids[np.unpackbits(live, count=rows, bitorder="little").view(bool)]
        live_ids = np.sort(live_ids)
        end = np.inf if stored.next_id is None else stored.next_id
        if len(live_ids) and (live_ids[0] < 0 or live_ids[-1] >= end or (live_ids[1:] == live_ids[:-1]).any()):
            file = stored.path / stored.manifest["ids"]["file"]
            raise _damaged(f"the ids in {file}", f"unique, 0 or more and below {end}", "other values")


def _file_of(path: Path, entry: FileEntry) -> Path:
    """The file that the manifest names. Raises an `InputError` if it is missing or too short."""
    file = path / entry["file"]
    if not _holds(file, entry["bytes"]):
        actual = file.stat().st_size if file.is_file() else "no file"
        raise _damaged(f"the size of {file}", f"at least {entry['bytes']} bytes", actual)
    return file


def _holds(file: Path, size: int) -> bool:
    """Whether there is a file with at least `size` bytes."""
    try:
        found = file.stat()
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_size >= size


def _damaged(what: str, expected: str, actual: object) -> InputError:
    return invalid("load", what, expected, actual, "the file is damaged")


def _read_into(path: Path, entry: FileEntry, rows: np.ndarray) -> None:
    _check_byte_order(rows.dtype)
    target = rows.reshape(-1).view(np.uint8).data
    chunks = (target[start : start + _CHUNK_BYTES] for start in range(0, len(target), _CHUNK_BYTES))
    for _ in _fill(path, entry, chunks):
        pass


def _fill(path: Path, entry: FileEntry, buffers: Iterable[memoryview]) -> Iterator[memoryview]:
    """Fill each buffer with the next bytes of a file, and yield the buffer. At the end, check the checksum."""
    file = _file_of(path, entry)
    checksum = 0
    with open(file, "rb") as source:
        for buffer in buffers:
            if source.readinto(buffer) != len(buffer):
                raise invalid("load", str(file), "a file that does not change while it is read", "an early end")
            checksum = zlib.crc32(buffer, checksum)
            yield buffer
    if checksum != entry["crc32"]:
        raise _damaged(f"the checksum of {file}", str(entry["crc32"]), checksum)


# The manifest. Every field is checked before a byte of another file is trusted.


def manifest_text(manifest: Manifest) -> str:
    """The text of the manifest in its file."""
    return json.dumps(manifest, indent=2)


def with_checksum(manifest: Manifest) -> Manifest:
    """The manifest with `crc32`, the checksum of the text of its other fields."""
    body = {name: value for name, value in manifest.items() if name != "crc32"}
    return body | {"crc32": zlib.crc32(manifest_text(body).encode())}


def read_manifest(path: Path) -> Manifest:
    """The checked manifest of the folder `path`. A manifest of version 1 gets the fields `next_id` and `live`."""
    file = path / MANIFEST
    try:
        contents = read_file(file)
        manifest = json.loads(contents.decode())
    except (FileNotFoundError, NotADirectoryError):
        raise invalid("load", "path", f"the folder of an index, with {MANIFEST}", path) from None
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested too deeply
        raise _damaged(str(file), "JSON", f"another text ({error})") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise invalid("load", str(file), f"the manifest of a {FORMAT}", "another file")
    version = manifest.get("version")
    if type(version) is not int or version not in _FIELDS:
        raise invalid("load", f"the version of {file}", f"1 to {VERSION}", brief(repr(version)), "update hashengine")
    if version == 1 and manifest.keys() == _FIELDS[1]:
        manifest |= {"next_id": manifest["count"] if manifest["ids"] is None else None, "live": None}
        _check_manifest(file, manifest)
        return manifest
    _check_manifest(file, manifest)
    # The whole text is compared, because a changed byte is damage even if all values stay the same.
    if manifest.keys() != _FIELDS[2] or manifest_text(with_checksum(manifest)).encode() != contents:
        raise _damaged(f"the text of {file}", "exactly the text that a save writes, with its checksum", "another one")
    return manifest


def _check_manifest(file: Path, manifest: Manifest) -> None:
    bits: Any = manifest.get("bits")
    rows: Any = manifest.get("count")
    next_id = manifest.get("next_id")
    _require(_is_count(bits) and bits > 0 and bits % 8 == 0, file, manifest, "bits", "a positive multiple of 8")
    _require(bits <= MAX_BITS, file, manifest, "bits", f"at most {MAX_BITS}")
    _require(_is_count(rows), file, manifest, "count", "a number of codes")
    _require(manifest.get("bit_order") == "msb_first", file, manifest, "bit_order", "'msb_first'")
    for kind, size in (("codes", rows * bits // 8), ("ids", 8 * rows), ("live", (rows + 7) // 8)):
        if kind == "codes" or manifest.get(kind) is not None:
            is_valid = _is_file_entry(manifest.get(kind), kind, size)
            _require(is_valid, file, manifest, kind, f"a file of {size} bytes")
    if manifest.get("ids") is None:
        _require(next_id == rows and _is_count(next_id), file, manifest, "next_id", f"the number of codes, {rows}")
    else:
        is_valid = next_id is None or _is_count(next_id)
        _require(is_valid, file, manifest, "next_id", "a number, or null if codes are added with ids")


def _require(condition: bool, file: Path, manifest: Manifest, name: str, expected: str) -> None:
    if not condition:
        raise _damaged(f"{name} in {file}", expected, brief(repr(manifest.get(name))))


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62  # leaves room for additions in 64 bits


def _is_file_entry(entry: Any, kind: str, size: int) -> bool:
    return (
        isinstance(entry, dict)
        and entry.keys() == {"file", "bytes", "crc32"}
        and isinstance(entry["file"], str)
        and (match := _FILE_NAME.fullmatch(entry["file"])) is not None
        and match[1] == kind
        and _is_count(entry["crc32"])
        and _is_count(entry["bytes"])
        and entry["bytes"] == size
    )
