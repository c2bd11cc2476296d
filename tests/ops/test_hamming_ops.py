"""Filters, radius and counts: every SIMD level against their definitions, and the ops that call them."""

import numpy as np
import pytest
import torch

from hashengine import ops
from hashengine.ops.hamming_count import _reference as count_reference
from hashengine.ops.hamming_range import _reference as range_reference
from hashengine.ops.hamming_topk import _reference as topk_reference
from tests.helpers.hamming_levels import all_distances, assert_same, make_codes, make_filter, nearest, within

KINDS = ["random", "clustered", "duplicate"]
# (bits, codes, queries): odd lengths, one code, more codes than a tile and than a word of a bitmap
SIZES = [(8, 1, 1), (24, 70, 3), (64, 3000, 5), (256, 700, 33), (1000, 130, 2)]


def counted(queries, codes, filter=None, relevant=None):
    distances, bins = all_distances(queries, codes), 8 * codes.shape[1] + 1
    passing = np.ones_like(distances, bool) if filter is None else np.broadcast_to(filter, distances.shape)
    relevant = np.zeros_like(passing) if relevant is None else relevant
    rows = list(zip(distances, passing, relevant, strict=True))
    counts = np.stack([np.bincount(d[p], minlength=bins) for d, p, _ in rows])
    return counts, np.stack([np.bincount(d[p & r], minlength=bins) for d, p, r in rows])


@pytest.mark.parametrize("kind", KINDS)
def test_filters(level_library, level, kind):
    rng = np.random.default_rng(1)
    for bits, count, query_count in SIZES:
        codes, queries = make_codes(kind, count, bits, rng), make_codes("random", query_count, bits, rng)
        for own in (False, True):
            for share in (0, 0.02, 0.5, 0.98, 1):
                filter = make_filter(rng, count, query_count, share, own)
                for k in {1, min(10, count), count}:
                    for threads in (1, 3):
                        got = level_library.topk(level, threads, queries, codes, k, filter)
                        assert_same(got, nearest(queries, codes, k, filter))


@pytest.mark.parametrize("kind", KINDS)
def test_radius(level_library, level, kind):
    rng = np.random.default_rng(2)
    for bits, count, query_count in SIZES:
        codes, queries = make_codes(kind, count, bits, rng), make_codes("random", query_count, bits, rng)
        queries[0] = codes[-1]
        for filter in (
            None,
            make_filter(rng, count, query_count, 0.5, False),
            make_filter(rng, count, query_count, 0.5, True),
        ):
            for radius in (0, bits // 2 - 2, bits):
                for most in (1, 7, count):
                    got = level_library.range(level, 3, queries, codes, radius, most, filter)
                    assert_same(got, within(queries, codes, radius, most, filter))


@pytest.mark.parametrize("kind", KINDS)
def test_counts(level_library, level, kind):
    rng = np.random.default_rng(3)
    for bits, count, query_count in SIZES:
        codes, queries = make_codes(kind, count, bits, rng), make_codes("random", query_count, bits, rng)
        single = [rng.integers(0, 3, (rows, 1), dtype=np.uint64) for rows in (query_count, count)]
        multi = [
            rng.integers(0, 2**63, (rows, 2), dtype=np.uint64) & np.uint64(0x1001) for rows in (query_count, count)
        ]
        for filter in (
            None,
            make_filter(rng, count, query_count, 0.5, False),
            make_filter(rng, count, query_count, 0.5, True),
        ):
            got = level_library.count(level, 3, queries, codes, filter)
            np.testing.assert_array_equal(got[0], counted(queries, codes, filter)[0])
            for labels, relevant in (
                (single, single[0] == single[1].T),
                (multi, (multi[0][:, None] & multi[1]).any(2)),
            ):
                got = level_library.count(level, 2, queries, codes, filter, labels, labels is multi)
                assert_same(got, counted(queries, codes, filter, relevant))


@pytest.mark.parametrize("own", [None, False, True])
@pytest.mark.parametrize("order", ["random", "best last", "best first"])
def test_a_large_k_with_a_sample_that_leads_astray(level_library, level, order, own):
    """The nearest lie where no sample looks, everywhere, or where one always does: the answer is the same."""
    rng = np.random.default_rng(4)
    codes, queries = make_codes("random", 200_000, 64, rng), make_codes("random", 2, 64, rng)
    if order != "random":
        best = slice(-3000, None) if order == "best last" else slice(300)
        codes[best] = queries[0] ^ (rng.random(codes[best].shape) < 0.02).astype(np.uint8)
    filter = None if own is None else make_filter(rng, len(codes), len(queries), 0.5, own)
    for k in (600, 2500, 40_000):  # from a sample, without one, and a ranking
        assert_same(level_library.topk(level, 1, queries, codes, k, filter), nearest(queries, codes, k, filter))


def tensors(*arrays):
    return [None if array is None else torch.from_numpy(array) for array in arrays]


@pytest.mark.parametrize("own", [None, False, True])
def test_ops_and_references_are_one(own):
    rng = np.random.default_rng(5)
    codes, queries = make_codes("clustered", 900, 40, rng), make_codes("random", 6, 40, rng)
    filter = None if own is None else make_filter(rng, 900, 6, 0.3, own)
    bitmap = None if filter is None else ops.pack_filter(torch.from_numpy(filter))
    q, c = tensors(queries, codes)
    for topk in (ops.hamming_topk, topk_reference):
        assert_same(topk(q, c, 900, filter=bitmap), nearest(queries, codes, 900, filter))
    for hamming_range in (ops.hamming_range, range_reference):
        for most in (None, 5):
            got = hamming_range(q, c, 19, filter=bitmap, max_results=most)
            assert_same(got, within(queries, codes, 19, most, filter))
    labels = [torch.from_numpy(rng.integers(0, 3, rows)) for rows in (6, 900)]
    shared = [torch.from_numpy(rng.random((rows, 70)) < 0.05) for rows in (6, 900)]
    for count in (ops.hamming_count, count_reference):
        got = count(q, c, filter=bitmap)
        assert got[1].shape == (6, 0)
        np.testing.assert_array_equal(got[0], counted(queries, codes, filter)[0])
        relevant = (labels[0][:, None] == labels[1]).numpy()
        got = count(q, c, filter=bitmap, query_labels=labels[0], labels=labels[1])
        assert_same(got, counted(queries, codes, filter, relevant))
        relevant = (shared[0][:, None] & shared[1]).any(2).numpy()
        got = count(q, c, filter=bitmap, query_labels=shared[0], labels=shared[1])
        assert_same(got, counted(queries, codes, filter, relevant))


def test_no_queries_no_codes_no_labels():
    codes = torch.zeros(3, 2, dtype=torch.uint8)
    lims, distances, positions = ops.hamming_range(codes[:0], codes, 4)
    assert lims.tolist() == [0] and len(distances) == len(positions) == 0
    assert ops.hamming_range(codes, codes[:0], 4)[0].tolist() == [0, 0, 0, 0]
    assert ops.hamming_count(codes, codes[:0])[0].sum() == 0
    none = torch.zeros(3, 0, dtype=torch.bool)
    counts, relevant = ops.hamming_count(codes, codes, query_labels=none, labels=none)
    assert counts[:, 0].tolist() == [3, 3, 3] and relevant.sum() == 0


def test_a_filter_is_packed_least_significant_bit_first():
    mask = torch.zeros(2, 11, dtype=torch.bool)
    mask[0, [0, 9]] = True
    assert ops.pack_filter(mask).tolist() == [[1, 2], [0, 0]]
    assert ops.pack_filter(mask[0]).tolist() == [1, 2]


BYTES = torch.zeros(5, 8, dtype=torch.uint8)
MASK = torch.zeros(1, dtype=torch.bool)
NUMBERS = torch.zeros(5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.hamming_topk(BYTES, BYTES, 1, filter=MASK), TypeError, "filter must be a bitmap of uint8"),
        (lambda: ops.hamming_topk(BYTES, BYTES, 1, filter=BYTES[0]), ValueError, r"filter must be \[1\], or \[5, 1\]"),
        (lambda: ops.hamming_topk(BYTES, BYTES, 1, filter=BYTES[:2, :1]), ValueError, r"for 5 codes, got \[2, 1\]"),
        (lambda: ops.hamming_range(BYTES, BYTES, -1), ValueError, r"radius must be 0 to .* bits \(64\), got -1"),
        (lambda: ops.hamming_range(BYTES, BYTES, 65), ValueError, "got 65"),
        (lambda: ops.hamming_range(BYTES, BYTES, 3, max_results=0), ValueError, "must be at least 1, got 0"),
        (lambda: ops.hamming_range(BYTES, BYTES[:, :4], 3), ValueError, "64 and 32 bits"),
        (lambda: ops.hamming_count(BYTES, BYTES, labels=NUMBERS), ValueError, "must come together"),
        (lambda: ops.hamming_count(BYTES, BYTES, query_labels=NUMBERS, labels=NUMBERS.int()), TypeError, "int64"),
        (lambda: ops.hamming_count(BYTES, BYTES, query_labels=NUMBERS, labels=NUMBERS[:4]), ValueError, "of 5 "),
        (lambda: ops.hamming_count(BYTES, BYTES, query_labels=NUMBERS, labels=BYTES.bool()), ValueError, "one kind"),
    ],
)  # fmt: skip
def test_errors_are_one_line(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call()
    assert str(caught.value).startswith("hamming_")
    assert "\n" not in str(caught.value)


def test_faiss_finds_the_same_within_a_radius():
    faiss = pytest.importorskip("faiss")
    rng = np.random.default_rng(6)
    codes, queries = make_codes("clustered", 5000, 64, rng), make_codes("clustered", 20, 64, rng)
    oracle = faiss.IndexBinaryFlat(64)
    oracle.add(codes)
    lims, distances, ids = oracle.range_search(queries, 25)  # exclusive
    got = ops.hamming_range(*tensors(queries, codes), 24)
    np.testing.assert_array_equal(got[0], lims.astype(np.int64))
    for q in range(20):
        part = slice(lims[q], lims[q + 1])
        order = np.lexsort((ids[part], distances[part]))
        np.testing.assert_array_equal(got[1][part], distances[part][order])
        np.testing.assert_array_equal(got[2][part], ids[part][order])


@pytest.mark.parametrize("queries", [1, 5])
def test_more_of_the_longest_codes_than_a_chunk_numbers(queries):
    """Of 65,536 bits a chunk takes 32,768 codes: beside the distance there is no room for more positions."""
    codes = np.zeros((70_000, 8192), np.uint8)  # pages that are never written to
    marked = [3, 32_767, 32_768, 65_535, 65_536, 69_999]
    codes[marked] = 255
    codes[marked[::2], 0] = 127
    asked = torch.full((queries, 8192), 255, dtype=torch.uint8)
    order, distances = marked[1::2] + marked[::2] + [0, 1], [0] * 3 + [1] * 3 + [65_536] * 2
    got = ops.hamming_topk(asked, torch.from_numpy(codes), 8)
    assert got[0].tolist() == [distances] * queries and got[1].tolist() == [order] * queries
    lims, got_distances, positions = ops.hamming_range(asked, torch.from_numpy(codes), 1)
    assert lims.tolist() == [6 * q for q in range(queries + 1)]
    assert got_distances.tolist() == distances[:6] * queries and positions.tolist() == order[:6] * queries
