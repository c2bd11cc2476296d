"""Searches of many queries, whose kernels hold a query in each bit of a vector: every level against the definition."""

import numpy as np
import pytest

from tests.helpers.hamming_levels import all_distances, assert_same, make_codes, make_filter, nearest, within

BLOCKS = {"avx2": 256, "avx512": 512, "neon": 128}  # queries
COUNT = 4500  # codes: at least 4096 pay for slices
# One word and less, each number of words that has a loop of its own and those that share one, and the first too long.
LENGTHS = [8, 24, 32, 40, 64, 72, 128, 136, 192, 256, 320, 384, 512, 576, 768, 960, 1016, 1024, 2048, 2056]
pytestmark = pytest.mark.parametrize("level", list(BLOCKS), indirect=True)


def make_searched(bits: int, query_count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Queries and codes: codes of every kind, and queries that are some of them, their opposites, and others."""
    codes = np.concatenate([make_codes(kind, COUNT // 3, bits, rng) for kind in ("duplicate", "random", "clustered")])
    queries = make_codes("random", query_count, bits, rng)
    queries[::3] = codes[rng.integers(0, COUNT, len(queries[::3]))]
    queries[1::3] = ~codes[rng.integers(0, COUNT, len(queries[1::3]))]
    return queries, codes


@pytest.mark.parametrize("bits", LENGTHS)
def test_every_length(level_library, level, bits):
    queries, codes = make_searched(bits, BLOCKS[level] + 1, np.random.default_rng(bits))
    for k in (20, 3000):
        assert_same(level_library.topk(level, 1, queries, codes, k), nearest(queries, codes, k))
    queries = queries[:-1]
    got = level_library.range(level, 1, queries, codes, bits, COUNT)  # every sum that a counter must hold
    assert_same(got, within(queries, codes, bits, COUNT))


def test_none_is_offered_in_vain(level_library, level):
    """The exact distance of what is offered would hide codes that are counted as too near, but not their time."""
    for bits in LENGTHS[:-1]:
        queries, codes = make_searched(bits, BLOCKS[level] - 1, np.random.default_rng(bits))
        codes[7] = 0  # as the place of the block that no query takes
        got = level_library.offered(level, queries, codes, bits // 2)
        np.testing.assert_array_equal(got, (all_distances(queries, codes) == bits // 2).sum(1))


@pytest.mark.parametrize("kind", ["random", "clustered", "duplicate"])
def test_every_rest_of_a_block(level_library, level, kind):
    """Around the fewest queries that slices pay for, whole blocks, and both."""
    rng, block = np.random.default_rng(2), BLOCKS[level]
    codes, queries = make_codes(kind, COUNT, 64, rng), make_codes("random", 2 * block + 1, 64, rng)
    queries[::7] = codes[0]
    distances, positions = nearest(queries, codes, 10)
    least = block * 9 // 16
    for count in (block // 2, least - 1, least, least + 1, block - 1, block, block + 1, block + least, 2 * block + 1):
        got = level_library.topk(level, 3, queries[:count], codes, 10)
        assert_same(got, (distances[:count], positions[:count]))


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("bits", [40, 256])
def test_filters(level_library, level, bits, own):
    rng = np.random.default_rng(3)
    queries, codes = make_searched(bits, BLOCKS[level] + 3, rng)
    for share in (0.02, 0.5):
        filter = make_filter(rng, COUNT, len(queries), share, own)
        for k in (10, 300):  # more than the least share lets through
            got = level_library.topk(level, 2, queries, codes, k, filter)
            assert_same(got, nearest(queries, codes, k, filter))
        for most in (7, COUNT):
            got = level_library.range(level, 2, queries, codes, bits // 3, most, filter)
            assert_same(got, within(queries, codes, bits // 3, most, filter))


def test_blocks_that_selectors_have_no_room_for(level_library, level):
    rng = np.random.default_rng(4)
    for count, query_count, k in ((6500, BLOCKS[level] * 3 // 2, 4096), (82_000, 256, 10_240)):
        codes, queries = make_codes("random", count, 64, rng), make_codes("random", query_count, 64, rng)
        assert_same(level_library.topk(level, 1, queries, codes, k), nearest(queries, codes, k))


@pytest.mark.parametrize("order", ["random", "best first"])
def test_chunks_tiles_and_samples(level_library, level, order):
    """A chunk begins with the bounds of those before it, and of a sample, which may tell a query too little."""
    rng = np.random.default_rng(5)
    codes, queries = make_codes("random", 200_000, 40, rng), make_codes("random", BLOCKS[level] + 1, 40, rng)
    if order == "best first":
        queries[-1] = queries[40]
        codes[:300] = queries[40] ^ (rng.random((300, 5)) < 0.02).astype(np.uint8)
    for k in (100, 600):  # a sample pays for the last
        assert_same(level_library.topk(level, 2, queries, codes, k), nearest(queries, codes, k))
