"""Exact merging: merged answers of the parts of a database, in any order, equal the answer for the whole database."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hashengine.index.merge import merge_counts, merge_range, merge_topk
from hashengine.ops import hamming_count, hamming_range, hamming_topk, pack_filter

BITS = 16
QUERIES = torch.tensor([[0, 0], [255, 1], [3, 128]], dtype=torch.uint8)


@st.composite
def split_databases(draw):
    """Codes of few values, so that most distances are ties; the rows of each part; and a mask of all rows.

    The parts are in random order. A part has ascending rows, which need not be contiguous, or no rows.
    """
    count = draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    codes = torch.from_numpy(rng.choice(np.array([0, 1, 3, 255], np.uint8), (count, BITS // 8)))
    part_of_row = rng.integers(0, draw(st.integers(1, 6)), count)
    parts = [torch.from_numpy(np.flatnonzero(part_of_row == part)) for part in range(6)]
    mask = torch.from_numpy(rng.random(count) < draw(st.sampled_from([0.0, 0.3, 1.0])))
    return codes, [parts[number] for number in rng.permutation(6)], mask


def topk_of(codes: torch.Tensor, rows: torch.Tensor, mask: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The answer of one part, with positions in the whole database."""
    if len(rows) == 0:
        shape = (len(QUERIES), 0)
        return torch.empty(shape, dtype=torch.int32), torch.empty(shape, dtype=torch.int64)
    distances, local = hamming_topk(QUERIES, codes[rows], min(k, len(rows)), filter=pack_filter(mask[rows]))
    return distances, rows[local.clamp(min=0)].where(local >= 0, -1)


def range_of(codes, rows, mask, radius: int, max_results: int | None) -> tuple[torch.Tensor, ...]:
    lims, distances, local = hamming_range(
        QUERIES, codes[rows], radius, filter=pack_filter(mask[rows]), max_results=max_results
    )
    return lims, distances, rows[local]


def assert_equal(answer: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    for tensor, wanted in zip(answer, expected, strict=True):
        assert tensor.dtype == wanted.dtype and torch.equal(tensor, wanted)


@settings(max_examples=200, deadline=None)
@given(split_databases(), st.integers(1, 40))
def test_any_split_gives_the_same_topk(database, k):
    codes, parts, mask = database
    k = min(k, len(codes))
    answers = [topk_of(codes, rows, mask, k) for rows in parts]
    expected = hamming_topk(QUERIES, codes, k, filter=pack_filter(mask))
    assert_equal(merge_topk(answers, k, rows=len(codes), bits=BITS), expected)
    merged = merge_topk([merge_topk(answers[:3], k, rows=len(codes), bits=BITS), *answers[3:]], k, rows=999, bits=BITS)
    assert_equal(merged, expected)  # merges can be nested, and `rows` may exceed the number of rows


@settings(max_examples=200, deadline=None)
@given(split_databases(), st.integers(0, BITS), st.sampled_from([None, 1, 2, 9]))
def test_any_split_gives_the_same_range(database, radius, max_results):
    codes, parts, mask = database
    answers = [range_of(codes, rows, mask, radius, max_results) for rows in parts]
    expected = hamming_range(QUERIES, codes, radius, filter=pack_filter(mask), max_results=max_results)
    assert_equal(merge_range(answers, max_results, rows=len(codes)), expected)
    merged = merge_range([merge_range(answers[:3], max_results, rows=len(codes)), *answers[3:]], max_results, rows=999)
    assert_equal(merged, expected)


@settings(max_examples=100, deadline=None)
@given(split_databases())
def test_any_split_gives_the_same_counts(database):
    codes, parts, mask = database
    answers = [hamming_count(QUERIES, codes[rows], filter=pack_filter(mask[rows])) for rows in parts]
    assert_equal(merge_counts(answers), hamming_count(QUERIES, codes, filter=pack_filter(mask)))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_ties_are_in_the_order_of_positions_in_the_whole_database(order):
    parts = [(torch.tensor([[2, 5]]), torch.tensor([[7, 1]])), (torch.tensor([[2, 5]]), torch.tensor([[3, 0]]))]
    parts = [(distances.int(), positions) for distances, positions in parts]
    distances, positions = merge_topk([parts[number] for number in order], 4, rows=8, bits=8)
    assert (distances.tolist(), positions.tolist()) == ([[2, 2, 5, 5]], [[3, 7, 0, 1]])


def test_missing_results_are_last():
    parts = [
        (torch.tensor([[9, 9]], dtype=torch.int32), torch.tensor([[-1, -1]])),
        (torch.tensor([[8]], dtype=torch.int32), torch.tensor([[4]])),
    ]
    distances, positions = merge_topk(parts, 3, rows=5, bits=8)
    assert (distances.tolist(), positions.tolist()) == ([[8, 9, 9]], [[4, -1, -1]])


def test_parts_without_queries_give_an_empty_answer():
    empty = torch.empty((0, 3), dtype=torch.int32), torch.empty((0, 3), dtype=torch.int64)
    assert_equal(merge_topk([empty], 3, rows=5, bits=8), empty)
    no_results = torch.zeros(1, dtype=torch.int64), torch.empty(0, dtype=torch.int32), torch.empty(0, dtype=torch.int64)
    assert_equal(merge_range([no_results, no_results], None, rows=5), no_results)
