"""The bit-sliced kernels, which search blocks of many queries: each is compared with the definition of a search."""

import numpy as np
import pytest

from tests.helpers.hamming_levels import (
    LevelLibrary,
    all_distances,
    assert_same,
    make_codes,
    make_filter,
    nearest,
    within,
)

BLOCKS = {"avx2": 256, "avx512": 512, "neon": 128}  # queries per block
COUNT = 4500  # codes; with fewer than 4096 the bit-sliced kernels are not used
# Code lengths in bits: some of at most 64, every length that has a specialised loop, some that have none, and 2056, for
# which the bit-sliced kernels are not used.
LENGTHS = [8, 24, 32, 40, 64, 72, 128, 136, 192, 256, 320, 384, 512, 576, 768, 960, 1016, 1024, 2048, 2056]
pytestmark = pytest.mark.parametrize("level", list(BLOCKS), indirect=True)


def make_searched(bits: int, query_count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Queries, and codes of every kind. A third of the queries equal codes, and a third are complements of codes."""
    codes = np.concatenate([make_codes(kind, COUNT // 3, bits, rng) for kind in ("duplicate", "random", "clustered")])
    queries = make_codes("random", query_count, bits, rng)
    queries[::3] = codes[rng.integers(0, COUNT, len(queries[::3]))]
    queries[1::3] = ~codes[rng.integers(0, COUNT, len(queries[1::3]))]
    return queries, codes


@pytest.mark.parametrize("bits", LENGTHS)
def test_results_for_many_code_lengths_equal_the_definition(level_library: LevelLibrary, level: str, bits: int) -> None:
    queries, codes = make_searched(bits, BLOCKS[level] + 1, np.random.default_rng(bits))
    for k in (20, 3000):
        assert_same(level_library.topk(level, 1, queries, codes, k), nearest(queries, codes, k))
    queries = queries[:-1]
    # A radius of all bits, so that the counters reach every distance.
    got = level_library.range(level, 1, queries, codes, bits, COUNT)
    assert_same(got, within(queries, codes, bits, COUNT))


def test_there_are_no_false_hits(level_library: LevelLibrary, level: str) -> None:
    """A search discards false hits by their exact distance, so only `LevelLibrary.pushed` shows them."""
    for bits in LENGTHS[:-1]:
        queries, codes = make_searched(bits, BLOCKS[level] - 1, np.random.default_rng(bits))
        codes[7] = 0  # the unused places of the block also hold zeros; they must have no hits
        # `pushed` counts every false hit, but counts a true hit only if its distance is exactly the radius.
        got = level_library.pushed(level, queries, codes, bits // 2)
        np.testing.assert_array_equal(got, (all_distances(queries, codes) == bits // 2).sum(1))


@pytest.mark.parametrize("kind", ["random", "clustered", "duplicate"])
def test_results_for_several_numbers_of_queries_equal_the_definition(
    level_library: LevelLibrary, level: str, kind: str
) -> None:
    """The numbers are near the fewest queries for a bit-sliced kernel, near one block and two, and in between.

    The fewest queries are 9/16 of a block with AVX2 and AVX-512, and half a block with NEON.
    """
    rng, block = np.random.default_rng(2), BLOCKS[level]
    codes, queries = make_codes(kind, COUNT, 64, rng), make_codes("random", 2 * block + 1, 64, rng)
    queries[::7] = codes[0]
    distances, positions = nearest(queries, codes, 10)
    fewest = block * 9 // 16
    for count in (
        block // 2,
        fewest - 1,
        fewest,
        fewest + 1,
        block - 1,
        block,
        block + 1,
        block + fewest,
        2 * block + 1,
    ):
        got = level_library.topk(level, 3, queries[:count], codes, 10)
        assert_same(got, (distances[:count], positions[:count]))


@pytest.mark.parametrize("own", [False, True], ids=["shared filter", "filter per query"])
@pytest.mark.parametrize("bits", [40, 256])
def test_filtered_results_equal_the_definition(level_library: LevelLibrary, level: str, bits: int, own: bool) -> None:
    rng = np.random.default_rng(3)
    queries, codes = make_searched(bits, BLOCKS[level] + 3, rng)
    for share in (0.02, 0.5):
        filter = make_filter(rng, COUNT, len(queries), share, own)
        for k in (10, 300):  # fewer than 300 codes pass the filter with the smaller share
            got = level_library.topk(level, 2, queries, codes, k, filter)
            assert_same(got, nearest(queries, codes, k, filter))
        for most in (7, COUNT):
            got = level_library.range(level, 2, queries, codes, bits // 3, most, filter)
            assert_same(got, within(queries, codes, bits // 3, most, filter))


def test_results_for_a_large_k_equal_the_definition(level_library: LevelLibrary, level: str) -> None:
    """A query with a large k takes much memory. With AVX-512 and k = 4096, the search therefore takes two batches."""
    rng = np.random.default_rng(4)
    for count, query_count, k in ((6500, BLOCKS[level] * 3 // 2, 4096), (82_000, 256, 10_240)):
        codes, queries = make_codes("random", count, 64, rng), make_codes("random", query_count, 64, rng)
        assert_same(level_library.topk(level, 1, queries, codes, k), nearest(queries, codes, k))


@pytest.mark.parametrize("order", ["random", "best first"])
def test_bounds_from_a_sample_and_from_other_chunks_keep_results_exact(
    level_library: LevelLibrary, level: str, order: str
) -> None:
    """A chunk starts with bounds from finished chunks and from a sample of the codes.

    With "best first" and k = 600, the sampled bound of two queries is too tight.
    """
    rng = np.random.default_rng(5)
    codes, queries = make_codes("random", 200_000, 40, rng), make_codes("random", BLOCKS[level] + 1, 40, rng)
    if order == "best first":
        queries[-1] = queries[40]
        codes[:300] = queries[40] ^ (rng.random((300, 5)) < 0.02).astype(np.uint8)
    for k in (100, 600):  # a sample is taken only for 600
        assert_same(level_library.topk(level, 2, queries, codes, k), nearest(queries, codes, k))
