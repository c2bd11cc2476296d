"""HammingIndex: search, ids, changes, copies, and invalid arguments."""

import copy
import pickle
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch

from hashengine import HammingIndex, InputError
from hashengine.index import Searcher
from hashengine.index.code_memory import GrowingCodes
from tests.helpers.indexes import assert_same_index, codes_of, index_of


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


@pytest.mark.parametrize("bits", [8, 64, 128])
def test_filtered_results_equal_faiss_over_the_remaining_codes(bits):
    faiss = pytest.importorskip("faiss")
    codes, queries, rng = codes_of(2000, bits), codes_of(20, bits, seed=1), np.random.default_rng(2)
    index = HammingIndex(bits)
    index.add(codes)
    removed = rng.permutation(2000)[:700]
    index.remove(removed)
    live = np.setdiff1d(np.arange(2000), removed)
    mask = rng.random(1300) < 0.5
    left = live[mask]
    oracle = faiss.IndexBinaryFlat(bits)
    oracle.add(codes[left])
    for k in (1, 100, len(left)):
        distances, positions = oracle.search(queries, k)
        found = index.search(queries, k, filter=mask)
        np.testing.assert_array_equal(found[0], distances)
        np.testing.assert_array_equal(found[1], left[positions])
    radius = bits // 3
    lims, distances, positions = oracle.range_search(queries, radius + 1)  # FAISS's radius is exclusive
    found = index.range_search(queries, radius, filter=mask)
    np.testing.assert_array_equal(found[0], lims)
    for first, last in zip(lims[:-1].astype(int), lims[1:].astype(int), strict=True):
        order = np.lexsort((positions[first:last], distances[first:last]))
        np.testing.assert_array_equal(found[1][first:last], distances[first:last][order])
        np.testing.assert_array_equal(found[2][first:last], left[positions[first:last][order]])


@pytest.mark.parametrize("bits", [8, 65536])
def test_codes_of_the_smallest_and_the_largest_length_can_be_searched(bits):
    index, codes = index_of(20, bits), codes_of(20, bits)
    assert (index.search(codes, 1)[0] == 0).all()
    assert index.search(~codes[:1], 20)[0].max() == bits


def test_ties_are_in_insertion_order_for_any_ids():
    index = HammingIndex(8)
    index.add(np.zeros((3, 1), np.uint8), np.array([30, 10, 20]))
    index.add(np.zeros((1, 1), np.uint8), np.array([5]))
    distances, ids = index.search(np.zeros((1, 1), np.uint8), 4)
    assert ids.tolist() == [[30, 10, 20, 5]] and distances.tolist() == [[0, 0, 0, 0]]


def test_results_are_in_the_library_of_the_queries():
    index = index_of()
    for queries, kind in ((codes_of(2), np.ndarray), (torch.from_numpy(codes_of(2)), torch.Tensor)):
        assert all(isinstance(result, kind) for result in index.search(queries, 3))
    assert [result.shape for result in index.search(codes_of(0), 3)] == [(0, 3), (0, 3)]


def test_arrays_of_any_strides_are_copied():
    wide = codes_of(20, 128)
    wide.flags.writeable = False
    index = HammingIndex(64)
    index.add(wide[::-2, ::2])
    narrow = np.ascontiguousarray(wide[::-2, ::2])
    distances, ids = index.search(narrow, 1)
    assert (distances == 0).all() and ids[:, 0].tolist() == list(range(10))
    added = narrow.copy()
    index.add(added)
    added[:] = 0
    assert (index.search(narrow, 2)[0] == 0).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda i: HammingIndex(0), "HammingIndex: bits must be 8 to 65536, got 0"),
        (lambda i: HammingIndex(63), "HammingIndex: bits must be a multiple of 8, got 63"),
        (lambda i: HammingIndex("64"), "HammingIndex: bits must be an integer from 8 to 65536, got '64'"),
        (lambda i: HammingIndex(65544), "HammingIndex: bits must be 8 to 65536, got 65544"),
        (lambda i: HammingIndex.load(5), "load: path must be a path, got int"),
        (lambda i: i.save(None), "save: path must be a path, got NoneType"),
        (lambda i: i.save(""), "save: path must be a path, got an empty string; '.' is the working folder"),
        (lambda i: HammingIndex.load(""), "load: path must be a path, got an empty string"),
        (lambda i: i.add([[1]]), "add: codes must be a torch tensor or a numpy array of uint8, got list"),
        (lambda i: i.add(codes_of(2).astype(np.float32)), "add: codes must be uint8, got float32; pack activations"),
        (lambda i: i.add(codes_of(2, 72)), r"add: codes must be \[rows, 8\], for 64 bits, got \[2, 9\]"),
        (lambda i: i.add(codes_of(2)[0]), r"add: codes must be \[rows, 8\], for 64 bits, got \[8\]"),
        (
            lambda i: i.add(codes_of(2), np.array([1, 2])),
            "add: ids must be omitted, as for the codes in the index, got ids",
        ),
        (lambda i: i.search(codes_of(2), 0), r"search: k must be 1 to 50 \(the number of codes\), got 0"),
        (lambda i: i.search(codes_of(2), 51), "search: k must be .*, got 51"),
        (lambda i: i.search(codes_of(2), 2.0), "search: k must be .*, got 2.0"),
        (lambda i: i.search(torch.zeros(2, 8), 1), "search: queries must be uint8, got float32; pack activations"),
        (lambda i: HammingIndex(64).search(codes_of(2), 1), "search: the index must be one that holds codes, got an"),
    ],
)
def test_wrong_bits_paths_codes_and_k_raise_an_error_of_one_line(call, message):
    index = index_of()
    with pytest.raises(InputError, match=message) as caught:
        call(index)
    assert "\n" not in str(caught.value)
    assert_same_index(index, index_of())


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.array([1.0, 2.0]), "add: ids must be int64, got float64"),
        (np.array([1]), r"add: ids must be \[2\], one per code, got \[1\]"),
        (np.array([1, -2]), "add: ids must be 0 or more, got -2"),
        (np.array([7, 7]), "add: ids must be unique, got 7 more than once"),
        (np.array([7, 490]), "add: ids must be unique, got 490, which is in the index already"),
        (None, "add: ids must be given, as for the codes in the index, got none"),
    ],
)
def test_wrong_ids_are_refused_and_change_nothing(ids, message):
    index = index_of(ids=True)
    with pytest.raises(InputError, match=message):
        index.add(codes_of(2), ids)
    assert_same_index(index, index_of(ids=True))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda i: i.search(codes_of(2), 1, filter=[True]), "search: filter must be a torch tensor or a numpy array"),
        (lambda i: i.search(codes_of(2), 1, filter=np.zeros(50)), "search: filter must be bool or uint8, got float64"),
        (
            lambda i: i.search(codes_of(2), 1, filter=np.ones(49, bool)),
            r"filter must be \[50\], or \[2, 50\] with one row per query, for 50 codes, got \[49\]",
        ),
        (
            lambda i: i.search(codes_of(2), 1, filter=np.ones(50, np.uint8)),
            r"filter must be \[7\], or \[2, 7\] with one row per query, for 50 codes, got \[50\]",
        ),
        (lambda i: i.search(codes_of(2), 1, filter=np.ones((3, 50), bool)), r"got \[3, 50\]"),
        (
            lambda i: i.range_search(codes_of(2), 65),
            r"range_search: radius must be 0 to 64 \(the number of bits\), got 65",
        ),
        (
            lambda i: i.range_search(codes_of(2), 1, max_results=0),
            "range_search: max_results must be at least 1, got 0",
        ),
        (
            lambda i: i.count(codes_of(2), labels=np.ones(2)),
            r"count: labels must be a pair \(query_labels, code_labels\), got ndarray",
        ),
        (lambda i: i.count(codes_of(2), labels=(np.ones(2), np.ones(50))), "count: query_labels must be integers"),
        (
            lambda i: i.count(codes_of(2), labels=(np.ones(2, int), np.ones(49, int))),
            r"count: code_labels must be \[50\]",
        ),
        (
            lambda i: i.count(codes_of(2), labels=(np.ones((2, 3)), np.full((50, 3), 2))),
            "count: code_labels must be zeros and ones",
        ),
        (lambda i: i.count(codes_of(2), labels=(np.ones((2, 3)), np.ones((50, 4)))), "of one kind and width"),
        (
            lambda i: i.count(codes_of(2), labels=(np.ones(2, int), np.ones((50, 1), int))),
            r"count: code_labels must be \[50\], or multi-hot with at least 2 columns, got \[50, 1\]; pass code_labels",
        ),
        (lambda i: i.remove(np.array([10, 10])), "remove: ids must be unique, got 10 more than once"),
        (lambda i: i.remove(np.array([[10]])), r"remove: ids must be \[rows\], one per code, got \[1, 1\]"),
        (lambda i: i.update(np.array([10]), codes_of(2)), r"update: ids must be \[2\]"),
        (lambda i: i.update(np.array([10, 10]), codes_of(2)), "update: ids must be unique"),
        (lambda i: i.rerank(np.zeros((1, 64)), np.array([[11]])), "rerank: ids must be ids in the index, got 11"),
        (lambda i: i.rerank(np.full((1, 64), np.nan), np.array([[10]])), "rerank: query_activations must be finite"),
        (lambda i: i.rerank(np.zeros((1, 63)), np.array([[10]])), r"must be \[rows, 64\], got \[1, 63\]"),
        (
            lambda i: i.rerank(codes_of(1, 512), np.array([[10]])),
            "rerank: query_activations must be float64, float32, float16 or bfloat16, got uint8",
        ),
    ],
)
def test_wrong_filters_labels_ids_and_activations_raise_an_error_of_one_line(call, message):
    index = index_of(ids=True)
    with pytest.raises(InputError, match=message) as caught:
        call(index)
    assert "\n" not in str(caught.value)
    assert_same_index(index, index_of(ids=True))


def test_removal_and_compaction_keep_ids(tmp_path):
    index = index_of(10)
    index.remove(np.array([3, 9]))
    index.compact()
    index.save(tmp_path)
    index = HammingIndex.load(tmp_path)
    index.add(codes_of(2, seed=3))
    assert index.ids.tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 10, 11]
    index.remove(index.ids)
    index.compact()
    assert len(index) == len(index.codes) == 0
    index.add(codes_of(1))
    assert index.ids.tolist() == [12]


def test_an_updated_code_keeps_its_place():
    index = index_of(5)
    index.update(np.array([1]), codes_of(5)[4:])
    assert index.search(codes_of(5)[4:], 2)[1].tolist() == [[1, 4]]


def sent(index):
    """The index as another process receives it: torch replaces tensors by names of shared memory."""
    return pickle.loads(ForkingPickler.dumps(index))


def from_buffers(index):
    """The index after pickling with out-of-band buffers, which are read-only."""
    buffers = []
    data = pickle.dumps(index, protocol=5, buffer_callback=buffers.append)
    return pickle.loads(data, buffers=[bytes(buffer.raw()) for buffer in buffers])


COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda index: pickle.loads(pickle.dumps(index)),
    "buffers": from_buffers,
    "process": sent,
}


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("ids", [False, True])
def test_copies_and_pickles_are_equal_and_independent(make, ids, tmp_path):
    index = index_of(ids=ids)
    index.remove(np.array([20]))
    index.save(tmp_path)
    other = make(index)
    assert_same_index(other, index)
    assert not index.codes.is_shared() and other.codes.data_ptr() != index.codes.data_ptr()
    other.add(codes_of(1), np.array([20]) if ids else None)
    other.update(np.array([10]), codes_of(1, seed=7))
    np.testing.assert_array_equal(other.reconstruct(np.array([10])), codes_of(1, seed=7))
    assert len(index) == 49
    np.testing.assert_array_equal(index.reconstruct(np.array([10])), codes_of(50)[[48 if ids else 10]])
    other.save(tmp_path)
    assert_same_index(HammingIndex.load(tmp_path), other)


class NamedIndex(HammingIndex):
    """A subclass with another constructor, a slot and an attribute that refers to the index."""

    __slots__ = ("slot",)

    def __init__(self, name):
        super().__init__(64)
        self.name, self.slot, self.parts = name, "slot", [self]


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
def test_attributes_survive_copies_and_pickles(make):
    index = NamedIndex("photos")
    index.add(codes_of(3))
    index.tags = {"a": 1}
    other = make(index)
    assert type(other) is NamedIndex and len(other) == 3
    assert (other.name, other.slot, other.tags) == ("photos", "slot", {"a": 1})
    if make is not copy.copy:
        assert other.parts[0] is other and other.tags is not index.tags


def test_attributes_survive_a_move_to_another_device():
    index = NamedIndex("photos")
    index.add(codes_of(3))
    other = index.to(streamed=True)
    assert type(other) is NamedIndex and other.streamed and (other.name, other.slot) == ("photos", "slot")


def test_the_attributes_of_an_index_itself_are_not_copied_as_those_of_a_user():
    assert HammingIndex(64)._attributes() == {}


def test_an_empty_index_has_no_results():
    index, queries = HammingIndex(64), codes_of(2)
    lims, distances, ids = index.range_search(queries, 64)
    assert lims.tolist() == [0, 0, 0] and len(distances) == len(ids) == 0
    assert index.count(queries).sum() == 0
    index.remove(np.zeros(0, np.int64))
    index.compact()
    assert index.ids.tolist() == []


def test_lookup_of_a_million_ids_that_are_added_in_batches():
    """This test is slow if `add` scans all ids for each batch."""
    ids = np.random.default_rng(0).permutation(1 << 20)
    index = HammingIndex(8)
    codes = (ids & 255).astype(np.uint8)[:, None]
    for start in range(0, len(ids), 1 << 10):
        index.add(codes[start : start + (1 << 10)], ids[start : start + (1 << 10)])
    wanted = np.arange(0, 1 << 20, 7)
    np.testing.assert_array_equal(index.reconstruct(wanted)[:, 0], wanted & 255)
    with pytest.raises(InputError, match="add: ids must be unique, got 5, which is in the index already"):
        index.add(codes[:1], np.array([5]))


def test_an_index_is_a_searcher():
    assert isinstance(HammingIndex(64), Searcher)
    assert not isinstance(codes_of(3), Searcher)


def test_devices_ids_and_codes_are_properties():
    index = index_of(3)
    assert index.devices == (torch.device("cpu"),)
    assert index.ids.tolist() == [0, 1, 2] and index.codes.shape == (3, 8)


@pytest.mark.parametrize("error", [FileNotFoundError(2, "gone"), InputError("load: the size of codes.bin ...")])
def test_a_copy_of_a_mapped_index_is_in_memory_if_a_save_removes_the_file(tmp_path, monkeypatch, error):
    index_of(50).save(tmp_path)
    mapped = HammingIndex.load(tmp_path, mmap=True)

    def gone(*args):
        raise error

    monkeypatch.setattr(GrowingCodes, "from_file", gone)
    assert_same_index(copy.copy(mapped), mapped)
