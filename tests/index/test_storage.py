"""The folder of a HammingIndex, and what happens when things go wrong."""

import fcntl
import json
import os
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest

import hashengine.index.storage as storage
from hashengine import HammingIndex, InputError
from tests.index.test_index import assert_same_index, codes_of, index_of


@pytest.mark.parametrize("ids", [False, True])
def test_save_and_load(tmp_path, ids):
    index = index_of(ids=ids)
    index.save(tmp_path / "a" / "index")
    assert_same_index(HammingIndex.load(tmp_path / "a" / "index"), index)


def test_an_empty_index_can_be_saved(tmp_path):
    HammingIndex(64).save(tmp_path)
    assert len(HammingIndex.load(tmp_path)) == 0


@pytest.mark.parametrize("reload", [False, True])
def test_saving_again_appends_only_what_is_new(tmp_path, reload):
    index = index_of(ids=True)
    index.save(tmp_path)
    before = {file.name: (file.stat().st_ino, file.read_bytes()) for file in tmp_path.glob("*.bin")}
    if reload:
        index = HammingIndex.load(tmp_path)
    index.add(codes_of(30, seed=5), np.arange(30) + 1000)
    index.save(tmp_path)
    for name, (inode, contents) in before.items():
        assert (tmp_path / name).stat().st_ino == inode
        assert (tmp_path / name).read_bytes()[: len(contents)] == contents
    assert len(list(tmp_path.iterdir())) == 4  # manifest, lock, codes, ids
    assert_same_index(HammingIndex.load(tmp_path), index)


def test_codes_lie_in_the_file_as_they_lie_in_memory(tmp_path):
    index_of().save(tmp_path)
    (file,) = tmp_path.glob("codes-*.bin")
    np.testing.assert_array_equal(np.fromfile(file, np.uint8).reshape(50, 8), codes_of(50))


def test_another_index_replaces_the_old_one(tmp_path):
    index_of().save(tmp_path)
    stale = HammingIndex.load(tmp_path)
    other = index_of(20, bits=128)
    other.save(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    stale.add(codes_of(1))
    stale.save(tmp_path)  # the folder is no longer what it was loaded from: nothing may be appended to its file
    assert_same_index(HammingIndex.load(tmp_path), stale)


def failing(function, after: int):
    calls = 0

    def wrapper(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls > after:
            raise OSError(28, "No space left on device")
        return function(*args, **kwargs)

    return wrapper


@pytest.mark.parametrize(("step", "after"), [("fsync", 0), ("fsync", 1), ("fsync", 2), ("replace", 0)])
@pytest.mark.parametrize("append", [False, True])
def test_a_failed_save_leaves_the_old_index_whole(tmp_path, monkeypatch, step, after, append):
    old = index_of(ids=True)
    old.save(tmp_path)
    grown = HammingIndex.load(tmp_path) if append else index_of(20, ids=True)
    grown.add(codes_of(5, seed=3), np.arange(5) + 5000)
    with monkeypatch.context() as patch:
        patch.setattr(storage.os, step, failing(getattr(os, step), after))
        with pytest.raises(OSError, match="No space left"):
            grown.save(tmp_path)
        assert_same_index(HammingIndex.load(tmp_path), old)
        assert len(list(tmp_path.iterdir())) == 4  # manifest, lock, codes, ids: nothing half written stays
    grown.save(tmp_path)  # and the next save succeeds
    assert_same_index(HammingIndex.load(tmp_path), grown)


def test_a_failure_after_the_commit_keeps_the_new_index(tmp_path, monkeypatch):
    index_of().save(tmp_path)
    new = index_of(20)
    with monkeypatch.context() as patch:
        patch.setattr(storage.os, "fsync", failing(os.fsync, 2))  # codes, manifest; then the folder
        with pytest.raises(OSError, match="No space left"):
            new.save(tmp_path)
    assert_same_index(HammingIndex.load(tmp_path), new)


def damage(path: Path, name: str) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    codes = path / manifest["codes"]["file"]
    edits = {
        "bits": lambda: manifest.update(bits=12),
        "count": lambda: manifest.update(count=1 << 60),
        "version": lambda: manifest.update(version=99),
        "foreign": lambda: manifest.update(format="something else"),
        "bit_order": lambda: manifest.update(bit_order="lsb_first"),
        "escape": lambda: manifest["codes"].update(file="../codes-1.bin"),
        "no codes": lambda: manifest.pop("codes"),
        "ids": lambda: manifest["ids"].update(bytes=3),
    }
    if name in edits:
        edits[name]()
        (path / "manifest.json").write_text(json.dumps(manifest))
    elif name == "truncated":
        os.truncate(codes, codes.stat().st_size - 1)
    elif name == "flipped bit":
        contents = bytearray(codes.read_bytes())
        contents[17] ^= 4
        codes.write_bytes(contents)
    elif name == "file missing":
        codes.unlink()
    elif name == "not JSON":
        (path / "manifest.json").write_bytes(b"\xff{")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bits", "bits must be a positive multiple of 8, got 12"),
        ("count", "codes must be a file of"),
        ("version", "has version 99, this release reads 1 to 2"),
        ("foreign", "must be the manifest of a hashengine-index"),
        ("bit_order", "bit_order must be 'msb_first', got 'lsb_first'"),
        ("escape", "codes must be a file"),
        ("no codes", "codes must be a file"),
        ("ids", "ids must be a file of 400 bytes"),
        ("truncated", "must hold 400 bytes, got 399"),
        ("flipped bit", "its checksum must be"),
        ("file missing", "must hold 400 bytes, got 0"),
        ("not JSON", "must be JSON"),
    ],
)
def test_a_damaged_index_is_refused_in_one_line(tmp_path, name, message):
    index_of(ids=True).save(tmp_path)
    damage(tmp_path, name)
    with pytest.raises(InputError, match=message) as caught:
        HammingIndex.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_tail_that_no_manifest_names_is_not_read(tmp_path):
    index = index_of()
    index.save(tmp_path)
    (file,) = tmp_path.glob("codes-*.bin")
    with open(file, "ab") as tail:
        tail.write(b"interrupted")
    loaded = HammingIndex.load(tmp_path)
    assert_same_index(loaded, index)
    loaded.add(codes_of(3))
    loaded.save(tmp_path)
    assert_same_index(HammingIndex.load(tmp_path), loaded)


def test_no_index_there(tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    for path in (tmp_path, tmp_path / "nothing", file):
        with pytest.raises(InputError, match="load: expected the folder of an index, got"):
            HammingIndex.load(path)
    with pytest.raises(InputError, match="save: path must be a folder or not exist yet"):
        index_of().save(file)
    shutil.rmtree(tmp_path)


def test_version_1_still_loads(tmp_path):
    """A folder as release 0.1 wrote it."""
    codes, ids = codes_of(50), np.arange(50)[::-1] * 10
    entries = {}
    for name, rows in (("codes", codes), ("ids", ids)):
        (tmp_path / f"{name}-0.bin").write_bytes(rows.tobytes())
        entries[name] = {"file": f"{name}-0.bin", "bytes": rows.nbytes, "crc32": zlib.crc32(rows.tobytes())}
    manifest = {"format": "hashengine-index", "version": 1, "bits": 64, "bit_order": "msb_first", "count": 50}
    for own_ids in (False, True):
        (tmp_path / "manifest.json").write_text(
            json.dumps(manifest | entries | ({} if own_ids else {"ids": None}), indent=2)
        )
        assert_same_index(HammingIndex.load(tmp_path), index_of(ids=own_ids))
    index = HammingIndex.load(tmp_path, mmap=True)
    index.add(codes_of(1), np.array([7]))
    index.save(tmp_path)
    assert (tmp_path / "codes-0.bin").stat().st_size == 51 * 8  # appended to
    assert json.loads((tmp_path / "manifest.json").read_text())["version"] == 2
    assert_same_index(HammingIndex.load(tmp_path), index)


def test_a_map_does_not_read_the_codes(tmp_path):
    index_of(ids=True).save(tmp_path)
    damage(tmp_path, "flipped bit")
    assert len(HammingIndex.load(tmp_path, mmap=True)) == 50
    damage(tmp_path, "truncated")
    with pytest.raises(InputError, match="must hold 400 bytes, got 399"):
        HammingIndex.load(tmp_path, mmap=True)


def test_every_byte_of_the_manifest_is_checked(tmp_path):
    index = index_of(ids=True)
    index.remove(np.array([10]))
    index.save(tmp_path)
    file = tmp_path / "manifest.json"
    contents = file.read_bytes()
    rng = np.random.default_rng(0)
    for place, byte in enumerate(contents):
        for value in {int(rng.integers(256)), byte ^ 1, byte ^ 32, *b" 1\n"} - {byte}:
            file.write_bytes(contents[:place] + bytes([value]) + contents[place + 1 :])
            with pytest.raises(InputError):
                HammingIndex.load(tmp_path)
    for length in range(len(contents)):
        file.write_bytes(contents[:length])
        with pytest.raises(InputError):
            HammingIndex.load(tmp_path)


@pytest.mark.parametrize("name", ["ids", "live"])
def test_a_flipped_bit_of_ids_or_removals_is_refused(tmp_path, name):
    index = index_of(ids=True)
    index.remove(np.array([10]))
    index.save(tmp_path)
    (file,) = tmp_path.glob(f"{name}-*.bin")
    contents = bytearray(file.read_bytes())
    contents[3] ^= 16
    file.write_bytes(contents)
    with pytest.raises(InputError, match=f"{name}-.* is damaged: its checksum must be"):
        HammingIndex.load(tmp_path, mmap=True)


def test_one_save_at_a_time(tmp_path):
    index = index_of()
    index.save(tmp_path)
    with open(tmp_path / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="must not be in use, got a save that is running; save again later"):
            index_of(20).save(tmp_path)
    assert_same_index(HammingIndex.load(tmp_path), index)
    index_of(20).save(tmp_path)
    assert len(HammingIndex.load(tmp_path)) == 20


def test_two_writers_in_turn_each_leave_a_whole_index(tmp_path):
    index_of().save(tmp_path)
    first, second = HammingIndex.load(tmp_path, mmap=True), HammingIndex.load(tmp_path)
    for step in range(3):
        for writer in (first, second):
            writer.add(codes_of(3 + step, seed=step))
            writer.save(tmp_path)
            assert_same_index(HammingIndex.load(tmp_path), writer)


def test_a_load_starts_again_where_a_save_came_between(tmp_path, monkeypatch):
    index_of().save(tmp_path)
    load, new = storage._load, index_of(20)

    def interrupted(*args):
        monkeypatch.setattr(storage, "_load", load)
        new.save(tmp_path)
        return load(*args)

    monkeypatch.setattr(storage, "_load", interrupted)
    assert_same_index(HammingIndex.load(tmp_path), new)
