"""The folder of an index: saving, appending, loading, damaged files, failures, and several writers."""

import copy
import errno
import fcntl
import json
import os
import pickle
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from hashengine import HammingIndex, InputError, _files
from hashengine.index import folder
from tests.helpers.indexes import assert_same_index, codes_of, index_of
from tests.helpers.paths import ROOT


@pytest.mark.parametrize("ids", [False, True])
def test_a_loaded_index_equals_the_saved_one(tmp_path, ids):
    index = index_of(ids=ids)
    index.save(tmp_path / "a" / "index")
    assert_same_index(HammingIndex.load(tmp_path / "a" / "index"), index)


def test_an_empty_index_can_be_saved(tmp_path):
    HammingIndex(64).save(tmp_path)
    assert len(HammingIndex.load(tmp_path)) == 0


@pytest.mark.parametrize("reload", [False, True])
def test_saving_again_appends_to_the_files(tmp_path, reload):
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


@pytest.mark.parametrize("file", ["codes", "ids"])
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_save_rewrites_a_truncated_or_missing_file(tmp_path, file, damage):
    index = index_of(ids=True)
    index.save(tmp_path)
    (damaged,) = tmp_path.glob(f"{file}-*.bin")
    if damage == "missing":
        damaged.unlink()
    else:
        os.truncate(damaged, damaged.stat().st_size - 1)
    index.add(codes_of(30, seed=5), np.arange(30) + 1000)
    index.save(tmp_path)
    assert len(list(tmp_path.iterdir())) == 4  # manifest, lock, codes, ids
    assert_same_index(HammingIndex.load(tmp_path), index)


def test_the_codes_file_equals_the_codes_in_memory(tmp_path):
    index_of().save(tmp_path)
    (file,) = tmp_path.glob("codes-*.bin")
    np.testing.assert_array_equal(np.fromfile(file, np.uint8).reshape(50, 8), codes_of(50))


def test_a_save_replaces_another_index_in_the_folder(tmp_path):
    index_of().save(tmp_path)
    other = index_of(20, bits=128)
    other.save(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    assert_same_index(HammingIndex.load(tmp_path), other)


def failing(function, after: int):
    """A wrapper of `function`. Its first `after` calls succeed, and all later calls fail."""
    calls = 0

    def wrapper(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls > after:
            raise OSError(28, "No space left on device")
        return function(*args, **kwargs)

    return wrapper


# step: the function of `os` that fails. after: the number of its calls that succeed before the failure.
@pytest.mark.parametrize(("step", "after"), [("fsync", 0), ("fsync", 1), ("fsync", 2), ("fsync", 3), ("replace", 0)])
@pytest.mark.parametrize("append", [False, True])
def test_a_failed_save_leaves_the_old_index_complete(tmp_path, monkeypatch, step, after, append):
    old = index_of(ids=True)
    old.save(tmp_path)
    grown = HammingIndex.load(tmp_path) if append else index_of(20, ids=True)
    grown.add(codes_of(5, seed=3), np.arange(5) + 5000)
    with monkeypatch.context() as patch:
        patch.setattr(os, step, failing(getattr(os, step), after))
        with pytest.raises(OSError, match="No space left"):
            grown.save(tmp_path)
        assert_same_index(HammingIndex.load(tmp_path), old)
        assert len(list(tmp_path.iterdir())) == 4  # manifest, lock, codes, ids: no incomplete file stays
    grown.save(tmp_path)
    assert_same_index(HammingIndex.load(tmp_path), grown)


def test_a_failure_after_the_commit_keeps_the_new_index(tmp_path, monkeypatch):
    index_of().save(tmp_path)
    new = index_of(20)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing(os.fsync, 3))  # the fourth fsync comes after the commit
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
        ("bits", "bits in .* must be a positive multiple of 8, got 12"),
        ("count", "codes in .* must be a file of"),
        ("version", "the version of .* must be 1 to 2, got 99; update hashengine"),
        ("foreign", "must be the manifest of a hashengine-index"),
        ("bit_order", "bit_order in .* must be 'msb_first', got 'lsb_first'"),
        ("escape", "codes in .* must be a file"),
        ("no codes", "codes in .* must be a file"),
        ("ids", "ids in .* must be a file of 400 bytes"),
        ("truncated", "must be at least 400 bytes, got 399; the file is damaged"),
        ("flipped bit", "the checksum of .* must be"),
        ("file missing", "must be at least 400 bytes, got no file"),
        ("not JSON", "must be JSON"),
    ],
)
def test_a_damaged_index_raises_an_error_of_one_line(tmp_path, name, message):
    index_of(ids=True).save(tmp_path)
    damage(tmp_path, name)
    with pytest.raises(InputError, match=message) as caught:
        HammingIndex.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_bytes_beyond_the_size_in_the_manifest_are_not_read(tmp_path):
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


def test_a_folder_without_an_index_is_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    for path in (tmp_path, tmp_path / "nothing", file):
        with pytest.raises(InputError, match="load: path must be the folder of an index, with manifest.json, got"):
            HammingIndex.load(path)
    with pytest.raises(InputError, match="save: path must be a folder or not exist yet"):
        index_of().save(file)


def test_a_folder_of_version_1_is_loaded_and_saved_as_version_2(tmp_path):
    """The test itself writes the folder, in the format of release 0.1."""
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
    assert (tmp_path / "codes-0.bin").stat().st_size == 51 * 8  # the save appended one code
    assert json.loads((tmp_path / "manifest.json").read_text())["version"] == 2
    assert_same_index(HammingIndex.load(tmp_path), index)


def test_a_mapped_load_checks_the_size_of_the_codes_but_not_their_checksum(tmp_path):
    index_of(ids=True).save(tmp_path)
    damage(tmp_path, "flipped bit")
    assert len(HammingIndex.load(tmp_path, mmap=True)) == 50
    damage(tmp_path, "truncated")
    with pytest.raises(InputError, match="must be at least 400 bytes, got 399"):
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
    with pytest.raises(InputError, match=f"the checksum of .*{name}-.* must be"):
        HammingIndex.load(tmp_path, mmap=True)


def test_a_save_during_another_save_is_refused(tmp_path):
    index = index_of()
    index.save(tmp_path)
    with open(tmp_path / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="that is not in use, got a save that is running; save again later"):
            index_of(20).save(tmp_path)
    assert_same_index(HammingIndex.load(tmp_path), index)
    index_of(20).save(tmp_path)
    assert len(HammingIndex.load(tmp_path)) == 20


def test_the_error_of_a_file_system_without_locks_names_the_lock(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(_files.fcntl, "flock", refuse)
    with pytest.raises(OSError, match="No locks available .the lock of the folder.: .*/lock"):
        index_of().save(tmp_path)


def test_a_save_that_would_lose_the_codes_of_another_save_is_refused(tmp_path):
    index_of().save(tmp_path)
    first, second = HammingIndex.load(tmp_path, mmap=True), HammingIndex.load(tmp_path)
    for step in range(3):
        first.add(codes_of(3 + step, seed=step))
        first.save(tmp_path)
        second.add(codes_of(2))
        for _ in range(2):
            for writer in (second, copy.copy(second)):
                with pytest.raises(
                    InputError, match="got .*, to which another index was saved since; load it and change"
                ):
                    writer.save(tmp_path)
            second.update(np.array([5]), codes_of(1))
        assert_same_index(HammingIndex.load(tmp_path), first)
        second.save(tmp_path / "other")
        second = HammingIndex.load(tmp_path)
        second.add(codes_of(4, seed=step))
        second.save(tmp_path)
        first = HammingIndex.load(tmp_path, mmap=True)
        assert_same_index(first, second)


def test_an_index_of_another_folder_replaces_the_one_in_a_folder(tmp_path):
    index_of().save(tmp_path / "a")
    index_of(20).save(tmp_path / "b")
    moved, new = HammingIndex.load(tmp_path / "a"), index_of(30)
    moved.save(tmp_path / "b")
    assert len(HammingIndex.load(tmp_path / "b")) == 50
    new.save(tmp_path / "b")
    assert len(HammingIndex.load(tmp_path / "b")) == 30


def test_a_load_starts_again_if_a_save_removes_the_files_to_read(tmp_path, monkeypatch):
    index_of().save(tmp_path)
    open_folder, new = folder.open_folder, index_of(20)

    def interrupted(path):
        stored = open_folder(path)
        monkeypatch.setattr(folder, "open_folder", open_folder)
        new.save(tmp_path)  # removes the files that `stored` names
        return stored

    monkeypatch.setattr(folder, "open_folder", interrupted)
    assert_same_index(HammingIndex.load(tmp_path), new)


# A folder of version 2: five codes of 16 bits with ids that are not positions; one code is removed.
VERSION_2_FOLDER = {
    "codes-960126fb.bin": bytes(range(1, 11)),
    "ids-20246718.bin": np.array([7, 5, 3, 2, 1], "<i8").tobytes(),
    "live-bcf74d13.bin": b"\x17",
    "manifest.json": b"""{
  "format": "hashengine-index",
  "version": 2,
  "bits": 16,
  "bit_order": "msb_first",
  "count": 5,
  "next_id": null,
  "codes": {
    "file": "codes-960126fb.bin",
    "bytes": 10,
    "crc32": 622876539
  },
  "ids": {
    "file": "ids-20246718.bin",
    "bytes": 40,
    "crc32": 2157272499
  },
  "live": {
    "file": "live-bcf74d13.bin",
    "bytes": 1,
    "crc32": 1372678730
  },
  "crc32": 1428629146
}""",
}


def test_a_folder_of_version_2_loads_and_is_saved_with_the_same_bytes(tmp_path):
    for name, contents in VERSION_2_FOLDER.items():
        (tmp_path / name).write_bytes(contents)
    index = HammingIndex.load(tmp_path)
    assert (index.bits, index.ids.tolist()) == (16, [7, 5, 3, 1])
    assert index.codes.tolist() == [[1, 2], [3, 4], [5, 6], [9, 10]]
    index.save(tmp_path)
    # Every save writes the live bitmap to a new file with a random name. Give it the old name before comparing.
    saved = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / saved["live"]["file"]).rename(tmp_path / "live-bcf74d13.bin")
    saved["live"]["file"] = "live-bcf74d13.bin"
    (tmp_path / "manifest.json").write_text(folder.manifest_text(folder.with_checksum(saved)))
    (tmp_path / "lock").unlink()
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == VERSION_2_FOLDER


def test_the_folder_and_the_formats_are_read_and_written_without_torch(tmp_path):
    index = index_of(ids=True)
    index.remove(np.array([10]))
    index.save(tmp_path)
    script = """if True:
        import sys
        from pathlib import Path
        import numpy as np
        from hashengine.index import folder, formats

        path = Path(sys.argv[1])
        stored = folder.open_folder(path)
        codes = np.empty((stored.rows, stored.bits // 8), np.uint8)
        stored.read_codes_into(codes)
        ids, live = stored.read_ids_and_live()
        assert len(codes) == len(ids) == 50 and np.unpackbits(live).sum() == 49
        assert np.array_equal(np.concatenate(list(stored.code_blocks(7))), codes)
        more = np.concatenate([codes, codes[:1]])
        live[6] |= 4  # the bit of row 50
        contents = folder.Contents(stored.bits, stored.next_id, more, np.append(ids, 7), live)
        folder.save(path, contents, stored.save_point)
        formats.write_codes(path / "codes.npy", codes, bit_order="lsb_first")
        assert np.array_equal(formats.read_codes(path / "codes.npy", bit_order="lsb_first"), codes)
        assert "torch" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, cwd=ROOT)
    loaded = HammingIndex.load(tmp_path)
    assert len(loaded) == 50 and loaded.ids[-1] == 7
    np.testing.assert_array_equal(loaded.codes[-1], codes_of(1)[0])


def test_a_save_does_not_append_to_a_file_that_another_program_changed(tmp_path):
    index = index_of(10)
    index.save(tmp_path)
    [file] = tmp_path.glob("codes-*.bin")
    with open(file, "r+b") as opened:
        opened.write(bytes(80))
    index.add(codes_of(1, seed=5))
    index.save(tmp_path)
    assert torch.equal(HammingIndex.load(tmp_path).codes, index.codes)


def test_a_folder_in_place_of_an_old_file_does_not_fail_a_save(tmp_path):
    (tmp_path / "codes-00000000.bin").mkdir()
    index = index_of(10)
    for _ in range(2):
        index.save(tmp_path)
        assert torch.equal(HammingIndex.load(tmp_path).codes, index.codes)


def test_a_copy_of_a_mapped_index_maps_no_other_file(tmp_path):
    index_of(10).save(tmp_path)
    index = HammingIndex.load(tmp_path, mmap=True)
    [file] = tmp_path.glob("codes-*.bin")
    file.unlink()
    file.write_bytes(bytes(80))
    for other in (copy.copy(index), pickle.loads(pickle.dumps(index))):
        assert torch.equal(other.codes, index.codes)


def test_an_interrupted_compaction_does_not_mix_old_and_new_rows(tmp_path, monkeypatch):
    index = index_of(40)
    index.save(tmp_path)
    index.remove(np.arange(5))
    publish = HammingIndex._publish_codes

    def interrupted(self, *arguments):
        publish(self, *arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(HammingIndex, "_publish_codes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        index.compact()
    monkeypatch.undo()
    for added in (0, 10):  # fewer rows than in the folder, then more
        if added:
            index.add(codes_of(added, seed=9))
        index.save(tmp_path)
        loaded = HammingIndex.load(tmp_path)
        assert torch.equal(loaded.codes, index.codes) and torch.equal(loaded.ids, index.ids)


def test_a_file_with_more_rows_than_the_index_is_written_anew(tmp_path):
    index = index_of(40)
    index.save(tmp_path)
    manifest = folder.read_manifest(tmp_path)
    entry = folder._append(tmp_path, "codes", codes_of(3), manifest["codes"], None)
    assert entry["file"] != manifest["codes"]["file"] and entry["bytes"] == codes_of(3).nbytes


@pytest.mark.parametrize("make", [lambda index: index, copy.copy, lambda index: pickle.loads(pickle.dumps(index))])
def test_an_index_that_is_mapped_in_inference_mode_can_grow_afterwards(tmp_path, make, monkeypatch):
    index_of(10).save(tmp_path)
    for reserve in (True, False):
        if not reserve:
            monkeypatch.setattr("hashengine.index.code_memory._reserve_address_space", lambda *arguments: None)
        with torch.inference_mode():
            index = make(HammingIndex.load(tmp_path, mmap=True))
        index.add(codes_of(3))
        index.update(np.array([1]), codes_of(1))
        assert len(index) == 13


def test_a_path_that_cannot_be_a_folder_is_refused_in_one_line(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    (tmp_path / "file").touch()
    (tmp_path / "lock" / "lock").mkdir(parents=True)
    (tmp_path / "manifest" / "manifest.json").mkdir(parents=True)
    for name in ("a", "file/x", "lock", "manifest"):
        with pytest.raises(InputError, match="^save: path must be ") as caught:
            index_of(3).save(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_the_name_of_a_folder_with_a_line_break_is_in_one_line(tmp_path):
    folder_name = tmp_path / "my\nindex"
    index_of(10).save(folder_name)
    [file] = folder_name.glob("codes-*.bin")
    os.truncate(file, 3)
    with pytest.raises(InputError) as caught:
        HammingIndex.load(folder_name)
    assert "\n" not in str(caught.value)
