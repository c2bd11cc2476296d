"""hamming_range: the op is compared with FAISS; the op and its reference with the definition. Errors have one line."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from hashengine import ops
from hashengine.ops.hamming_range import _reference
from tests.helpers.hamming_levels import assert_same, make_codes, make_filter, within

BYTES = torch.zeros(5, 8, dtype=torch.uint8)


@pytest.mark.parametrize("hamming_range", [ops.hamming_range, _reference])
@pytest.mark.parametrize("own_filters", [None, False, True], ids=["no filter", "shared filter", "filter per query"])
def test_filtered_results_equal_the_definition(hamming_range: Callable, own_filters: bool | None) -> None:
    rng = np.random.default_rng(5)
    codes, queries = make_codes("clustered", 900, 40, rng), make_codes("random", 6, 40, rng)
    filter = None if own_filters is None else make_filter(rng, 900, 6, 0.3, own_filters)
    bitmap = None if filter is None else ops.pack_filter(torch.from_numpy(filter))
    for most in (None, 5):
        got = hamming_range(torch.from_numpy(queries), torch.from_numpy(codes), 19, filter=bitmap, max_results=most)
        assert_same(got, within(queries, codes, 19, len(codes) if most is None else most, filter))


def test_results_equal_those_of_faiss() -> None:
    faiss = pytest.importorskip("faiss")
    rng = np.random.default_rng(6)
    codes, queries = make_codes("clustered", 5000, 64, rng), make_codes("clustered", 20, 64, rng)
    oracle = faiss.IndexBinaryFlat(64)
    oracle.add(codes)
    lims, distances, ids = oracle.range_search(queries, 25)  # FAISS finds distances less than its radius
    got = ops.hamming_range(torch.from_numpy(queries), torch.from_numpy(codes), 24)
    np.testing.assert_array_equal(got[0], lims.astype(np.int64))
    for q in range(20):
        part = slice(lims[q], lims[q + 1])
        order = np.lexsort((ids[part], distances[part]))
        np.testing.assert_array_equal(got[1][part], distances[part][order])
        np.testing.assert_array_equal(got[2][part], ids[part][order])


def test_empty_queries_and_empty_codes_give_no_results() -> None:
    codes = torch.zeros(3, 2, dtype=torch.uint8)
    lims, distances, positions = ops.hamming_range(codes[:0], codes, 4)
    assert lims.tolist() == [0] and len(distances) == len(positions) == 0
    assert ops.hamming_range(codes, codes[:0], 4)[0].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("codes", "radius", "max_results", "message"),
    [
        (BYTES, -1, None, r"radius must be 0 to .* bits \(64\), got -1"),
        (BYTES, 65, None, "got 65"),
        (BYTES, 3, 0, "must be at least 1, got 0"),
        (BYTES[:, :4], 3, None, "64 and 32 bits"),
    ],
)
def test_errors_are_one_line(codes: torch.Tensor, radius: int, max_results: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        ops.hamming_range(BYTES, codes, radius, max_results=max_results)
    assert str(caught.value).startswith("hamming_range: ")
    assert "\n" not in str(caught.value)
