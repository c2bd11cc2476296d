"""The kernels of hamming_count: every SIMD level is compared with the definition of the counts."""

import numpy as np
import pytest

from tests.helpers.hamming_levels import LevelLibrary, assert_same, counts_by_distance, make_codes, make_filter

# (bits, codes, queries). Some code lengths have a partial 64-bit word. One size has a single code. Others have more
# codes than a tile or a word of a bitmap holds, or so many that pairs of distances are counted. The last one compares
# enough bytes for several threads.
SIZES = [
    (8, 1, 1), (8, 6001, 5), (16, 20_003, 4), (24, 70, 3), (64, 3000, 5), (256, 700, 33), (1000, 130, 2),
    (1000, 1300, 30),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["random", "clustered", "duplicate"])
def test_counts_with_labels_and_filters_equal_the_definition(
    level_library: LevelLibrary, level: str, kind: str
) -> None:
    rng = np.random.default_rng(3)
    for bits, count, query_count in SIZES:
        codes, queries = make_codes(kind, count, bits, rng), make_codes("random", query_count, bits, rng)
        rows, bit_mask = (query_count, count), np.uint64(0x1001)
        # of 7 classes, a query visits only its own; of 3, the relevance of all codes is computed
        few, more = (tuple(rng.integers(0, n, (row, 1), dtype=np.uint64) for row in rows) for n in (3, 7))
        multi_hot = tuple(rng.integers(0, 2**63, (n, 2), dtype=np.uint64) & bit_mask for n in rows)
        filters = [make_filter(rng, count, query_count, 0.5, own) for own in (False, True)]
        for filter in (None, *filters):
            got = level_library.count(level, 3, queries, codes, filter)
            np.testing.assert_array_equal(got[0], counts_by_distance(queries, codes, filter)[0])
            for classes in (few, more):
                got = level_library.count(level, 2, queries, codes, filter, classes, any_shared=False)
                is_relevant = classes[0] == classes[1].T
                assert_same(got, counts_by_distance(queries, codes, filter, is_relevant))
            got = level_library.count(level, 2, queries, codes, filter, multi_hot, any_shared=True)
            is_relevant = (multi_hot[0][:, None] & multi_hot[1]).any(2)
            assert_same(got, counts_by_distance(queries, codes, filter, is_relevant))
