"""The kernels of hamming_topk: every SIMD level is compared, bit for bit, with the definition of a search."""

import numpy as np
import pytest

from tests.helpers.hamming_levels import (
    LevelLibrary,
    all_distances,
    assert_same,
    make_codes,
    make_filter,
    nearest,
)

KINDS = ["random", "clustered", "duplicate"]
# Code lengths in bits: one byte, partial 64-bit words, and lengths near 252. Up to 252 bits (63 nibbles), the AVX2
# kernel sums a distance in one byte.
WIDTHS = [8, 24, 64, 72, 128, 248, 256, 264, 512, 1000, 1024, 4096]
# (bits, codes, queries). Some code lengths have a partial 64-bit word. One case has a single code; others have more
# codes than a tile or than a word of a bitmap holds. The last one compares enough bytes for several threads.
FILTERED_SIZES = [(8, 1, 1), (24, 70, 3), (64, 3000, 5), (256, 700, 33), (1000, 130, 2), (1000, 1300, 30)]


@pytest.mark.parametrize("kind", KINDS)
def test_results_for_many_code_lengths_equal_the_definition(level_library: LevelLibrary, level: str, kind: str) -> None:
    rng = np.random.default_rng(3)
    for bits in WIDTHS:
        for count, query_count in ((1, 1), (31, 3), (33, 9), (700, 41)):
            codes, queries = make_codes(kind, count, bits, rng), make_codes("random", query_count, bits, rng)
            queries[0] = codes[-1]
            for k in {1, min(10, count), count}:
                for threads in (1, 3):
                    got = level_library.topk(level, threads, queries, codes, k)
                    assert_same(got, nearest(queries, codes, k))


def test_distances_from_zero_to_all_bits_are_exact(level_library: LevelLibrary, level: str) -> None:
    """The lengths include the longest for which a kernel's sums fit in 8 or 16 bits, and lengths just beyond."""
    rng = np.random.default_rng(4)
    for bits in [*WIDTHS, 16, 32, 384, 768, 3968, 3976, 7944, 60_000, 65_528, 65_536]:
        share = np.linspace(0, 1, 150)[:, None]
        codes = np.packbits(rng.random((150, bits)) < share, axis=1)
        queries = np.ascontiguousarray(codes[[0, 149, 10, 75, 140, 148]])
        want = all_distances(queries, codes)
        assert want.max() == bits
        for k in (1, 20, 150):
            assert_same(level_library.topk(level, 1, queries, codes, k), nearest(queries, codes, k))
        counts = level_library.count(level, 1, queries, codes)[0]
        np.testing.assert_array_equal(counts, [np.bincount(row, minlength=bits + 1) for row in want])


@pytest.mark.parametrize("order", ["best last", "best first"])
def test_results_for_codes_sorted_by_distance_equal_the_definition(
    level_library: LevelLibrary, level: str, order: str
) -> None:
    """With the nearest codes last, selectors accept codes until the end.

    For k = 7 and 900 they then drop the superseded codes several times (`Selector::compact`).
    """
    bits, count = 256, 5000
    query = np.zeros((1, bits // 8), np.uint8)
    ones = np.linspace(bits, 0, count).astype(int)
    codes = np.packbits(np.arange(bits) < ones[:, None], axis=1)
    codes = np.ascontiguousarray(codes if order == "best last" else codes[::-1])
    for k in (1, 7, 900):
        assert_same(level_library.topk(level, 1, query, codes, k), nearest(query, codes, k))


def test_chunks_of_a_long_database_are_merged_in_order(level_library: LevelLibrary) -> None:
    rng = np.random.default_rng(5)
    codes, queries = make_codes("clustered", 300_001, 16, rng), make_codes("random", 7, 16, rng)
    for k in (1, 100, 20_000):
        for threads in (1, 2, 5):
            assert_same(level_library.topk("scalar", threads, queries, codes, k), nearest(queries, codes, k))


@pytest.mark.parametrize("kind", KINDS)
def test_filtered_results_equal_the_definition(level_library: LevelLibrary, level: str, kind: str) -> None:
    rng = np.random.default_rng(1)
    for bits, count, query_count in FILTERED_SIZES:
        codes, queries = make_codes(kind, count, bits, rng), make_codes("random", query_count, bits, rng)
        for own in (False, True):
            for share in (0, 0.02, 0.5, 0.98, 1):
                filter = make_filter(rng, count, query_count, share, own)
                for k in {1, min(10, count), count}:
                    for threads in (1, 3):
                        got = level_library.topk(level, threads, queries, codes, k, filter)
                        assert_same(got, nearest(queries, codes, k, filter))


@pytest.mark.parametrize("own", [None, False, True], ids=["no filter", "shared filter", "filter per query"])
@pytest.mark.parametrize("order", ["random", "best last", "best first"])
def test_a_misleading_sample_does_not_change_the_answer(
    level_library: LevelLibrary, level: str, order: str, own: bool | None
) -> None:
    """The nearest codes are at random places, at the end (not sampled), or at the start (sampled)."""
    rng = np.random.default_rng(4)
    codes, queries = make_codes("random", 200_000, 64, rng), make_codes("random", 3, 64, rng)
    if order != "random":
        best = slice(-3000, None) if order == "best last" else slice(300)
        codes[best] = queries[0] ^ (rng.random(codes[best].shape) < 0.02).astype(np.uint8)
    filter = None if own is None else make_filter(rng, len(codes), len(queries), 0.5, own)
    for k in (600, 2500, 40_000):  # with a sampled bound, without one, and a ranking of all codes
        for threads in (1, 3):
            got = level_library.topk(level, threads, queries, codes, k, filter)
            assert_same(got, nearest(queries, codes, k, filter))


# (bits, codes, queries, k) of searches that rank all codes. Distances are stored in 8, 16 and 32 bits. In the second
# case they take more memory than a batch of queries may have.
RANKED_SIZES = [
    (24, 20_000, 5, 20_000),
    (64, 70_000, 131, 4500),
    (256, 9000, 4, 9000),
    (1000, 6000, 3, 5000),
    (65_536, 4200, 2, 4150),
]


@pytest.mark.parametrize("own", [None, False, True], ids=["no filter", "shared filter", "filter per query"])
def test_rankings_of_all_codes_equal_the_definition(level_library: LevelLibrary, level: str, own: bool | None) -> None:
    rng = np.random.default_rng(6)
    for bits, count, query_count, k in RANKED_SIZES:
        codes, queries = make_codes("random", count, bits, rng), make_codes("random", query_count, bits, rng)
        filter = None if own is None else make_filter(rng, count, query_count, 0.6, own)
        expected = nearest(queries, codes, k, filter)
        for threads in (1, 3):
            assert_same(level_library.topk(level, threads, queries, codes, k, filter), expected)
