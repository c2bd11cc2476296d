"""A HammingIndex over a mapped file: what is changed and added stays in memory, and the map is not copied for it."""

import gc
import itertools
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest

from hashengine import HammingIndex
from hashengine.index import _mapping
from tests.index.test_index import assert_same_index, codes_of, index_of


def test_changes_of_a_mapped_index_never_reach_the_file(tmp_path):
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


def memory_of_its_own() -> int:
    """Bytes of this process that no file holds."""
    fields = dict(line.split(":") for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    return int(fields["Anonymous"].split()[0]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="codes are added to a map on Linux")
def test_codes_that_are_added_to_a_map_do_not_copy_it(tmp_path):
    codes = codes_of(1 << 22)
    index = HammingIndex(64)
    index.add(codes)
    index.save(tmp_path)
    (file,) = tmp_path.glob("codes-*.bin")
    inode = file.stat().st_ino
    index = HammingIndex.load(tmp_path, mmap=True)
    queries, added = codes[[5, -1]], codes_of(3001, seed=1)
    index.search(queries, 1)  # what the first search allocates
    before = memory_of_its_own()
    index.add(added[:1])
    index.add(added[1:])
    index.update(np.array([7]), codes[:1])
    index.remove(np.array([8]))
    assert index.search(queries, 2)[0][:, 0].tolist() == [0, 0]
    assert memory_of_its_own() - before < codes.nbytes // 4
    assert str(file) in Path("/proc/self/maps").read_text()
    codes[7] = codes[0]
    np.testing.assert_array_equal(index._state.codes[:], np.concatenate([codes, added]))
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


@pytest.mark.parametrize("count", [1, 511, 512, 513, 5000])  # of 8 bytes: around a page, and pages
@pytest.mark.parametrize("room", ["none", "little", "much"])
def test_a_map_grows_as_memory_does(tmp_path, monkeypatch, count, room):
    if room == "none":
        monkeypatch.setattr(_mapping, "_TIMES", 1 << 46)  # of address space that no processor has
    elif room == "little":
        monkeypatch.setattr(_mapping, "_LEAST_ROOM", 64)
        monkeypatch.setattr(_mapping, "_TIMES", 1)
    codes = codes_of(count + 3000)
    index = HammingIndex(64)
    index.add(codes[:count])
    index.save(tmp_path)
    (file,) = tmp_path.glob("codes-*.bin")
    contents = file.read_bytes()
    with open(file, "ab") as tail:
        tail.write(b"what an interrupted save left")
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
