"""How the fuzzer's inputs encode files, and the inputs that the fuzzer starts from.

The first byte of an input selects one of `READERS`, the second byte has the flags, and the other bytes are the body:

- "npy" and "u8bin": the contents of a file that `read_codes` reads;
- "index": the contents of all files of an index, with `_SEPARATOR` between them;
- "edited index": the number of an index in `_indexes`, and a list of edits of its files. Unless a flag forbids it, the
  manifest's sizes and checksums of the other files are corrected after the edits of these files, and its own checksum
  after the edits of the manifest. Without these corrections, a load would refuse nearly every edited file because of
  its checksum.
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
from hashengine.index import write_codes
from hashengine.index.folder import KINDS, MANIFEST, manifest_text, with_checksum

READERS = ("edited index", "index", "npy", "u8bin")
# Flags. MMAP: map the codes. LSB_FIRST: the bit order of codes that are not mapped. KEEP_FILES: do not correct the
# sizes and checksums of edited files in the manifest. KEEP_MANIFEST: do not correct the manifest's own checksum.
MMAP, LSB_FIRST, KEEP_FILES, KEEP_MANIFEST = 1, 2, 4, 8
_CODES = np.random.default_rng(0).integers(0, 256, (20, 8), dtype=np.uint8)
_SEPARATOR = b"\n====\n"
_DEPTHS = (300, 900, 3000)  # numbers of lists within each other; "nested 300" stands for 300 of them
# The values that an edit can give to a field of a manifest.
_VALUES = (
    None, True, -1, 0, 1, 2, 8, 20.0, 160.0, 1e400, 1 << 32, 1 << 60, (1 << 63) - 1, 1 << 64, 65536, 65544,
    "", "codes-0.bin", "ids-0.bin", "live-0.bin", "codes-/x", "codes-\n", "codes-\0", "codes-\ud800",
    "codes-" + "x" * 300, "x" * 3000, [], {}, *(f"nested {depth}" for depth in _DEPTHS),
)  # fmt: skip

Files = dict[str, bytes]


def files_of(data: bytes) -> tuple[str, int, Files]:
    """The reader ("index", "npy" or "u8bin"), the flags, and a dictionary of the files that `data` encodes."""
    reader, flags, body = READERS[data[0] % len(READERS)] if data else "index", (data[1:2] or b"\0")[0], data[2:]
    if reader == "edited index":
        return "index", flags, _edited(body, flags)
    if reader == "index":
        parts = (body.split(_SEPARATOR, len(KINDS)) + [b""] * len(KINDS))[: 1 + len(KINDS)]
        return reader, flags, dict(zip(_names(), parts, strict=True))
    return reader, flags, {f"codes.{reader}": body}


def seeds() -> dict[str, bytes]:
    """Valid inputs by name: one for "npy", one for "u8bin", and two for each index in `_indexes`.

    One of these two contains the files of the index. The other has the number of the index and an empty list of edits.
    """
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
    return [MANIFEST, *(f"{kind}-0.bin" for kind in KINDS)]


@functools.cache
def _indexes() -> dict[str, Files]:
    """The files of several small indexes, by the name of the index. A file that an index lacks is empty here."""
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
            manifest = json.loads(Path(folder, MANIFEST).read_text())
            found[name] = files = dict.fromkeys(_names(), b"")
            for kind in filter(manifest.get, KINDS):
                files[f"{kind}-0.bin"] = Path(folder, manifest[kind]["file"]).read_bytes()
                manifest[kind]["file"] = f"{kind}-0.bin"
        files[MANIFEST] = manifest_text(with_checksum(manifest)).encode()
        if name == "own_ids":
            old = {field: manifest[field] for field in manifest if field not in ("next_id", "live", "crc32")}
            found["version_1"] = files | {MANIFEST: manifest_text(old | {"version": 1}).encode()}
    return found


def _edited(body: bytes, flags: int) -> Files:
    """The files of an index after some edits.

    The first byte of `body` is the number of the index in `_indexes`. Each edit takes three more bytes: the target (the
    manifest or one of the other files), the place in it, and the change.
    """
    files = list(_indexes().values())[(body[:1] or b"\0")[0] % len(_indexes())]
    manifest = json.loads(files[MANIFEST])
    contents = {kind: bytearray(files[f"{kind}-0.bin"]) for kind in KINDS}
    edits = list(zip(body[1::3], body[2::3], body[3::3], strict=False))
    for target, place, change in edits:
        if target % 4:
            _edit_file(contents[KINDS[target % 4 - 1]], place, change)
    for kind in filter(manifest.get, KINDS):
        if not flags & KEEP_FILES:
            manifest[kind] |= {"bytes": len(contents[kind]), "crc32": zlib.crc32(contents[kind])}
    for target, place, change in edits:
        if not target % 4:
            _edit_field(manifest, place, change)
    if not flags & KEEP_MANIFEST and "crc32" in manifest:
        manifest = with_checksum(manifest)
    text = manifest_text(manifest)
    for depth in _DEPTHS:
        text = text.replace(f'"nested {depth}"', "[" * depth + "]" * depth)
    return dict(zip(_names(), [text.encode(), *map(bytes, contents.values())], strict=True))


def _edit_file(contents: bytearray, place: int, change: int) -> None:
    """Change the byte at `place`. If the file has no such byte, append eight bytes or truncate the file."""
    if place < len(contents):
        contents[place] = change
    elif place % 2:
        contents += bytes([change]) * 8
    else:
        del contents[change:]


def _edit_field(manifest: dict[str, Any], place: int, change: int) -> None:
    """Add, change or remove a field of the manifest or of one of its file entries."""
    entries = [entry for entry in map(manifest.get, KINDS) if isinstance(entry, dict)]
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
