"""HammingIndex: search, ids, and what is refused."""

import numpy as np
import pytest
import torch

from hashengine import HammingIndex, InputError
from hashengine.index import rerank_vectors
from hashengine.index._rows import empty_rows


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


@pytest.mark.parametrize("bits", [8, 64, 128])
def test_filtered_results_equal_those_of_faiss_over_what_is_left(bits):
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
    lims, distances, positions = oracle.range_search(queries, radius + 1)  # exclusive there
    found = index.range_search(queries, radius, filter=mask)
    np.testing.assert_array_equal(found[0], lims)
    for first, last in zip(lims[:-1].astype(int), lims[1:].astype(int), strict=True):
        order = np.lexsort((positions[first:last], distances[first:last]))
        np.testing.assert_array_equal(found[1][first:last], distances[first:last][order])
        np.testing.assert_array_equal(found[2][first:last], left[positions[first:last][order]])


@pytest.mark.parametrize("bits", [8, 65536])
def test_the_shortest_and_the_longest_code(bits):
    index, codes = index_of(20, bits), codes_of(20, bits)
    assert (index.search(codes, 1)[0] == 0).all()
    assert index.search(~codes[:1], 20)[0].max() == bits


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


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda i: i.search(codes_of(2), 1, filter=[True]), TypeError, "filter must be a torch tensor or a numpy"),
        (lambda i: i.search(codes_of(2), 1, filter=np.zeros(50)), TypeError, "mask of bool or a bitmap of uint8, got"),
        (lambda i: i.search(codes_of(2), 1, filter=np.ones(49, bool)), InputError, r"\[50\], or \[2, 50\] with a row"),
        (
            lambda i: i.search(codes_of(2), 1, filter=np.ones(50, np.uint8)),
            InputError,
            r"\[7\], or \[2, 7\] with a row",
        ),
        (lambda i: i.search(codes_of(2), 1, filter=np.ones((3, 50), bool)), InputError, r"got \[3, 50\]"),
        (
            lambda i: i.range_search(codes_of(2), 65),
            InputError,
            r"radius must be 0 to the number of bits \(64\), got 65",
        ),
        (lambda i: i.range_search(codes_of(2), 1, max_results=0), InputError, "max_results must be at least 1, got 0"),
        (lambda i: i.count(codes_of(2), labels=np.ones(2)), TypeError, r"must be \(query_labels, code_labels\), got"),
        (lambda i: i.count(codes_of(2), labels=(np.ones(2), np.ones(50))), TypeError, "query_labels must be integers"),
        (
            lambda i: i.count(codes_of(2), labels=(np.ones(2, int), np.ones(49, int))),
            InputError,
            r"code_labels must be \[50\]",
        ),
        (
            lambda i: i.count(codes_of(2), labels=(np.ones((2, 3)), np.full((50, 3), 2))),
            InputError,
            "code_labels must be zeros and ones",
        ),
        (
            lambda i: i.count(codes_of(2), labels=(np.ones((2, 3)), np.ones((50, 4)))),
            InputError,
            "of one kind and width",
        ),
        (lambda i: i.remove(np.array([10, 10])), InputError, "ids must be unique, got 10 more than once"),
        (lambda i: i.remove(np.array([[10]])), InputError, r"ids must be \[rows\], one a code, got \[1, 1\]"),
        (lambda i: i.update(np.array([10]), codes_of(2)), InputError, r"ids must be \[2\]"),
        (lambda i: i.update(np.array([10, 10]), codes_of(2)), InputError, "ids must be unique"),
        (lambda i: HammingIndex(65544), InputError, "bits must be at most 65536, got 65544"),
        (lambda i: i.rerank(np.zeros((1, 64)), np.array([[11]])), InputError, "rerank: ids must be those of codes"),
        (
            lambda i: i.rerank(np.full((1, 64), np.nan), np.array([[10]])),
            InputError,
            "query_activations must be finite",
        ),
        (lambda i: i.rerank(np.zeros((1, 63)), np.array([[10]])), InputError, r"must be \[rows, 64\], got \[1, 63\]"),
        (lambda i: i.rerank(codes_of(1, 512), np.array([[10]])), TypeError, "must be floating point, got uint8"),
        (lambda i: rerank_vectors(np.zeros((1, 3)), np.zeros((4, 3)), np.array([[4]])), InputError, "must be below 4"),
    ],
)
def test_wrong_filters_labels_and_candidates_are_refused_in_one_line(call, error, message):
    index = index_of(ids=True)
    with pytest.raises(error, match=message) as caught:
        call(index)
    assert "\n" not in str(caught.value)
    assert_same_index(index, index_of(ids=True))


@pytest.mark.parametrize(("shape", "dtype"), [((0, 8), torch.uint8), ((3, 5), torch.uint8), ((70_001,), torch.int64)])
def test_rows_begin_with_a_cache_line(shape, dtype):
    rows = empty_rows(shape, dtype)
    assert rows.shape == shape and rows.dtype == dtype and rows.data_ptr() % 64 == 0
    rows.fill_(7)
    assert (rows == 7).all()
