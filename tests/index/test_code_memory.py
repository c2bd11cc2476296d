"""The memory of the codes: shards on several devices, memory that grows, and mapped files."""

import copy
import gc
import itertools
import os
import pickle
import sys
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hashengine import HammingIndex, InputError
from hashengine.index import code_memory
from hashengine.index.code_memory import BlockCyclicShard, allocate_rows
from tests.helpers.index_operations import BITS, UNCHECKED, few_codes, use_small_blocks
from tests.helpers.indexes import assert_same_index, codes_of, index_of


@UNCHECKED
@given(rows=st.integers(0, 300), count=st.integers(1, 5), block=st.sampled_from([8, 16, 64]))
def test_shards_divide_the_rows(rows, count, block):
    bitmap = torch.from_numpy(np.packbits(np.arange(rows) % 3 == 0, bitorder="little")).expand(2, -1)
    numbers, seen = torch.arange(rows), []
    for index in range(count):
        shard = BlockCyclicShard(index, count, block)
        own = shard.slice_of(numbers)
        assert len(own) == shard.size(rows) and bool((own.diff() > 0).all())
        assert torch.equal(shard.global_rows(torch.arange(len(own))), own)
        assert shard.global_rows(torch.tensor([-1])).tolist() == [-1]
        bits = np.unpackbits(shard.slice_of(bitmap, -1, 8).numpy(), axis=1, count=len(own), bitorder="little")
        assert (bits == (own % 3 == 0).numpy()).all()
        seen.append(own)
    assert torch.equal(torch.cat(seen).sort().values, numbers)


def test_the_sizes_of_shards_differ_by_at_most_one_block(monkeypatch):
    use_small_blocks(monkeypatch)
    index = HammingIndex(BITS, ["cpu"] * 3)
    for seed in range(100):
        index.add(few_codes(5, seed))
    assert sorted(map(len, index._snapshot.codes.parts)) == [164, 168, 168]


@pytest.mark.parametrize(("shape", "dtype"), [((0, 8), torch.uint8), ((3, 5), torch.uint8), ((70_001,), torch.int64)])
def test_rows_start_at_a_cache_line(shape, dtype):
    rows = allocate_rows(shape, dtype)
    assert rows.shape == shape and rows.dtype == dtype and rows.data_ptr() % 64 == 0
    rows.fill_(7)
    assert (rows == 7).all()


def test_changes_of_a_mapped_index_do_not_change_its_file_before_a_save(tmp_path):
    index_of().save(tmp_path)
    (file,) = tmp_path.glob("codes-*.bin")
    before = file.read_bytes()
    index = HammingIndex.load(tmp_path, mmap=True)
    index.update(np.arange(50), ~codes_of(50))
    index.remove(np.array([1]))
    index.add(codes_of(5))
    index.update(np.arange(2, 55), codes_of(53, seed=4))
    assert file.read_bytes() == before
    assert_same_index(HammingIndex.load(tmp_path), index_of())
    index.save(tmp_path)
    assert_same_index(HammingIndex.load(tmp_path, mmap=True), index)


def anonymous_memory() -> int:
    """The resident memory of this process that is not backed by a file, in bytes."""
    fields = dict(line.split(":") for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    return int(fields["Anonymous"].split()[0]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="a map has address space for more codes on Linux only")
def test_adding_codes_to_a_map_does_not_copy_it(tmp_path):
    codes = codes_of(1 << 22)
    index = HammingIndex(64)
    index.add(codes)
    index.save(tmp_path)
    (file,) = tmp_path.glob("codes-*.bin")
    inode = file.stat().st_ino
    index = HammingIndex.load(tmp_path, mmap=True)
    queries, added = codes[[5, -1]], codes_of(3001, seed=1)
    index.search(queries, 1)  # the first search allocates more memory than later ones
    before = anonymous_memory()
    index.add(added[:1])
    index.add(added[1:])
    index.update(np.array([7]), codes[:1])
    index.remove(np.array([8]))
    assert index.search(queries, 2)[0][:, 0].tolist() == [0, 0]
    assert anonymous_memory() - before < codes.nbytes // 4
    assert str(file) in Path("/proc/self/maps").read_text()
    codes[7] = codes[0]
    np.testing.assert_array_equal(index._snapshot.codes[:], np.concatenate([codes, added]))
    del index
    gc.collect()
    assert str(file) not in Path("/proc/self/maps").read_text()

    index = HammingIndex.load(tmp_path, mmap=True)
    index.add(added)
    index.save(tmp_path)
    index.add(added)
    index.save(tmp_path)
    assert [path.stat().st_ino for path in tmp_path.glob("codes-*.bin")] == [inode]
    assert len(pickle.dumps(index)) < 1.1 * index.codes.nbytes
    np.testing.assert_array_equal(HammingIndex.load(tmp_path).codes[1 << 22 :], np.concatenate([added, added]))


@pytest.mark.parametrize("count", [1, 511, 512, 513, 5000])  # a page of 4 KB has 512 codes of 8 bytes
@pytest.mark.parametrize("room", ["none", "little", "much"])  # the address space behind the mapped codes
def test_codes_can_be_added_to_a_mapped_index(tmp_path, monkeypatch, count, room):
    if room == "none":
        monkeypatch.setattr(code_memory, "MAP_GROWTH_FACTOR", 1 << 46)  # the reservation fails: no process gets so much
    elif room == "little":
        monkeypatch.setattr(code_memory, "MAP_GROWTH_BYTES", 64)
        monkeypatch.setattr(code_memory, "MAP_GROWTH_FACTOR", 1)
    codes = codes_of(count + 3000)
    index = HammingIndex(64)
    index.add(codes[:count])
    index.save(tmp_path)
    (file,) = tmp_path.glob("codes-*.bin")
    contents = file.read_bytes()
    with open(file, "ab") as tail:
        tail.write(b"left by an interrupted save")
    index = HammingIndex.load(tmp_path, mmap=True)
    index.update(np.array([count - 1]), ~codes[count - 1 : count])
    codes[count - 1] ^= 255
    kept = []
    for start, end in itertools.pairwise([count, count + 3, count + 600, count + 601, count + 3000]):
        kept.append(index.codes)
        index.add(codes[start:end])
    np.testing.assert_array_equal(index.codes, codes)
    for seen in kept:
        np.testing.assert_array_equal(seen, codes[: len(seen)])
    assert file.read_bytes()[: len(contents)] == contents
    index.save(tmp_path)
    assert_same_index(HammingIndex.load(tmp_path, mmap=True), index)


SENT = [copy.copy, copy.deepcopy, lambda index: pickle.loads(ForkingPickler.dumps(index))]


def mapped_files() -> int:
    """The number of maps of files of codes in this process."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return len({line.split()[0] for line in lines if "/codes-" in line})


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("make", SENT, ids=["copy", "deepcopy", "process"])
@pytest.mark.parametrize("ids", [False, True])
def test_a_copy_of_a_mapped_index_maps_the_same_file(tmp_path, make, ids):
    index_of(5000, ids=ids).save(tmp_path)
    index = HammingIndex.load(tmp_path, mmap=True)
    index.add(codes_of(3, seed=1), np.arange(3) + 100_000 if ids else None)
    index.remove(np.array([10]))
    assert len(ForkingPickler.dumps(index)) < 5000
    before = mapped_files()
    other = make(index)
    assert_same_index(other, index)
    assert mapped_files() == before + 1 and not index.codes.is_shared()
    other.update(np.array([20]), codes_of(1, seed=2))
    assert index.search(codes_of(1, seed=2), 1)[0] > 0
    copied = make(other)  # an updated code is not in the file
    assert_same_index(copied, other)
    other.save(tmp_path)  # removes the file that `index` maps
    assert_same_index(make(other), other)
    assert_same_index(make(index), index)
    index.save(tmp_path / "other")
    assert_same_index(HammingIndex.load(tmp_path / "other"), index)


@pytest.mark.parametrize("change", ["save", "move"])
def test_a_mapped_index_whose_folder_has_changed_since_it_was_pickled_is_refused(tmp_path, change):
    folder = tmp_path / "index"
    index_of().save(folder)
    pickled = pickle.dumps(HammingIndex.load(folder, mmap=True))
    if change == "save":
        index_of(60).save(folder)
    else:
        folder.rename(tmp_path / "moved")
    with pytest.raises(
        InputError, match="^HammingIndex: the files must be those that the pickled index maps, in"
    ) as error:
        pickle.loads(pickled)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    if change == "move":
        (tmp_path / "moved").rename(folder)
        assert_same_index(pickle.loads(pickled), index_of())


def test_a_pickle_of_a_mapped_index_loads_after_codes_were_appended_to_its_folder(tmp_path):
    index_of().save(tmp_path)
    index = HammingIndex.load(tmp_path, mmap=True)
    pickled = pickle.dumps(index)
    index.add(codes_of(5, seed=1))
    index.save(tmp_path)
    assert_same_index(pickle.loads(pickled), index_of())


READS = {
    "search": lambda index: index.search(codes_of(1), 1),
    "range_search": lambda index: index.range_search(codes_of(1), 3),
    "count": lambda index: index.count(codes_of(1)),
    "rerank": lambda index: index.rerank(np.ones((1, 64), np.float32), np.zeros((1, 1), np.int64)),
    "reconstruct": lambda index: index.reconstruct(np.zeros(1, np.int64)),
    "update": lambda index: index.update(np.zeros(1, np.int64), codes_of(1)),
    "codes": lambda index: index.codes,
    "copy": copy.copy,
    "pickle": pickle.dumps,
    "to": lambda index: index.to(streamed=True),
}


@pytest.mark.parametrize("where", READS)
def test_a_mapped_file_that_another_program_has_shortened_is_refused(tmp_path, where):
    """Reading a page that the file has lost would end this process with SIGBUS."""
    index_of(20_000).save(tmp_path)
    index = HammingIndex.load(tmp_path, mmap=True)
    READS[where](index)
    (file,) = tmp_path.glob("codes-*.bin")
    os.truncate(file, 100)
    with pytest.raises(
        InputError, match=f"^{where}: the file .*bin must be as long as when it was mapped, .*, got 100"
    ):
        READS[where](index)


def test_a_mapped_file_that_is_removed_or_has_grown_is_still_searched(tmp_path):
    index_of(20_000).save(tmp_path)
    index = HammingIndex.load(tmp_path, mmap=True)
    before, _ = index.search(codes_of(3), 1)
    index.add(codes_of(10))
    index.save(tmp_path)  # appends to the file
    (file,) = tmp_path.glob("codes-*.bin")
    file.unlink()
    assert np.array_equal(index.search(codes_of(3), 1)[0], before)


def test_the_descriptor_of_a_mapped_file_is_closed_with_the_index(tmp_path):
    index_of(100).save(tmp_path)
    gc.collect()
    descriptors = len(os.listdir("/proc/self/fd"))
    index = HammingIndex.load(tmp_path, mmap=True)
    assert len(os.listdir("/proc/self/fd")) == descriptors + 1
    del index
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == descriptors
