"""HammingIndex: search, ids, the folder on disk, and what happens when things go wrong."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import hashengine.index.storage as storage
from hashengine import HammingIndex, InputError


def codes_of(count: int, bits: int = 64, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, bits // 8), dtype=np.uint8)


def index_of(count: int = 50, bits: int = 64, ids: bool = False) -> HammingIndex:
    index = HammingIndex(bits)
    index.add(codes_of(count, bits), np.arange(count)[::-1] * 10 if ids else None)
    return index


def assert_same_index(a: HammingIndex, b: HammingIndex) -> None:
    assert (len(a), a.bits) == (len(b), b.bits)
    queries = codes_of(7, a.bits, seed=9)
    for mine, theirs in zip(a.search(queries, len(a)), b.search(queries, len(b)), strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("bits", [8, 64, 72, 1024])
@pytest.mark.parametrize("kind", ["random", "clustered", "duplicate"])
def test_search_equals_faiss(bits, kind):
    faiss = pytest.importorskip("faiss")
    codes, queries = codes_of(3000, bits), codes_of(20, bits, seed=1)
    if kind == "clustered":
        codes = codes[np.random.default_rng(2).integers(0, 40, 3000)]
    if kind == "duplicate":
        codes[:] = codes[0]
    oracle, index = faiss.IndexBinaryFlat(bits), HammingIndex(bits)
    for part in np.array_split(codes, [1, 5, 1000]):
        oracle.add(part)
        index.add(part)
    for k in (1, 100, 3000):
        distances, ids = index.search(queries, k)
        assert distances.dtype == np.int32 and ids.dtype == np.int64
        oracle_distances, oracle_ids = oracle.search(queries, k)
        np.testing.assert_array_equal(distances, oracle_distances)
        np.testing.assert_array_equal(ids, oracle_ids)


def test_own_ids_come_back_and_ties_stand_in_insertion_order():
    index = HammingIndex(8)
    index.add(np.zeros((3, 1), np.uint8), np.array([30, 10, 20]))
    index.add(np.zeros((1, 1), np.uint8), np.array([5]))
    distances, ids = index.search(np.zeros((1, 1), np.uint8), 4)
    assert ids.tolist() == [[30, 10, 20, 5]] and distances.tolist() == [[0, 0, 0, 0]]


def test_results_come_in_the_queries_library():
    index = index_of()
    for queries, kind in ((codes_of(2), np.ndarray), (torch.from_numpy(codes_of(2)), torch.Tensor)):
        assert all(isinstance(result, kind) for result in index.search(queries, 3))
    assert [result.shape for result in index.search(codes_of(0), 3)] == [(0, 3), (0, 3)]


def test_takes_arrays_of_any_strides_and_keeps_no_reference():
    wide = codes_of(20, 128)
    wide.flags.writeable = False
    index = HammingIndex(64)
    index.add(wide[::-2, ::2])
    copy = np.ascontiguousarray(wide[::-2, ::2])
    distances, ids = index.search(copy, 1)
    assert (distances == 0).all() and ids[:, 0].tolist() == list(range(10))
    mine = copy.copy()
    index.add(mine)
    mine[:] = 0
    assert (index.search(copy, 2)[0] == 0).all()


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
    assert len(list(tmp_path.iterdir())) == 3
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
    assert len(list(tmp_path.iterdir())) == 2
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
        assert len(list(tmp_path.iterdir())) == 3  # manifest, codes, ids: nothing half written stays
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
        ("version", "has version 99, this release reads 1"),
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


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda i: HammingIndex(0), InputError, "bits must be a positive multiple of 8, got 0"),
        (lambda i: HammingIndex(63), InputError, "bits must be a positive multiple of 8, got 63"),
        (lambda i: HammingIndex("64"), InputError, "bits must be a positive multiple of 8, got '64'"),
        (lambda i: i.add([[1]]), TypeError, "codes must be a torch tensor or a numpy array of uint8, got list"),
        (
            lambda i: i.add(codes_of(2).astype(np.float32)),
            TypeError,
            "codes must be packed codes of uint8, got float32",
        ),
        (lambda i: i.add(codes_of(2, 72)), InputError, r"codes must be \[rows, 8\] for 64 bits, got \[2, 9\]"),
        (lambda i: i.add(codes_of(2)[0]), InputError, r"got \[8\]"),
        (lambda i: i.add(codes_of(2), np.array([1, 2])), InputError, "this index holds positions, got ids"),
        (lambda i: i.search(codes_of(2), 0), InputError, r"k must be 1 to the number of codes \(50\), got 0"),
        (lambda i: i.search(codes_of(2), 51), InputError, "got 51"),
        (lambda i: i.search(codes_of(2), 2.0), InputError, "got 2.0"),
        (
            lambda i: i.search(torch.zeros(2, 8), 1),
            TypeError,
            "queries must be packed codes of uint8, got torch.float32",
        ),
        (lambda i: HammingIndex(64).search(codes_of(2), 1), InputError, "the index is empty; add codes first"),
    ],
)
def test_wrong_input_is_refused_in_one_line(call, error, message):
    index = index_of()
    with pytest.raises(error, match=message) as caught:
        call(index)
    assert "\n" not in str(caught.value)
    assert_same_index(index, index_of())


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (np.array([1.0, 2.0]), TypeError, "ids must be .* of int64"),
        (np.array([1]), InputError, r"ids must be \[2\]"),
        (np.array([1, -2]), InputError, "ids must not be negative, got -2"),
        (np.array([7, 7]), InputError, "ids must be unique, got 7 more than once"),
        (np.array([7, 490]), InputError, "ids must be unique, got 490, which the index holds already"),
        (None, InputError, "this index holds ids, got none"),
    ],
)
def test_wrong_ids_are_refused_and_change_nothing(ids, error, message):
    index = index_of(ids=True)
    with pytest.raises(error, match=message):
        index.add(codes_of(2), ids)
    assert_same_index(index, index_of(ids=True))
