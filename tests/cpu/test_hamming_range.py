"""The kernels of hamming_range: every SIMD level is compared, bit for bit, with the definition of a search."""

import numpy as np
import pytest

from tests.helpers.hamming_levels import LevelLibrary, assert_same, make_codes, make_filter, within

# (bits, codes, queries). Some code lengths have a partial 64-bit word. One case has a single code; others have more
# codes than a tile or a word of a bitmap holds. The last one compares enough bytes for several threads.
SIZES = [(8, 1, 1), (24, 70, 3), (64, 3000, 5), (256, 700, 33), (1000, 130, 2), (1000, 1300, 30)]


@pytest.mark.parametrize("kind", ["random", "clustered", "duplicate"])
def test_results_within_a_radius_equal_the_definition(level_library: LevelLibrary, level: str, kind: str) -> None:
    rng = np.random.default_rng(2)
    for bits, count, query_count in SIZES:
        codes, queries = make_codes(kind, count, bits, rng), make_codes("random", query_count, bits, rng)
        queries[0] = codes[-1]
        filters = [make_filter(rng, count, query_count, 0.5, own) for own in (False, True)]
        for filter in (None, *filters):
            for radius in (0, bits // 2 - 2, bits):
                for most in (1, 7, count):
                    got = level_library.range(level, 3, queries, codes, radius, most, filter)
                    assert_same(got, within(queries, codes, radius, most, filter))
