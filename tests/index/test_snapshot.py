"""A snapshot: ids and rows, live rows, filters, and its immutability."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hashengine import InputError
from hashengine.index import snapshot
from hashengine.index.code_memory import ShardedCodes
from hashengine.index.snapshot import IdLookup, Snapshot, combine_filter, combine_filter_on_gpu
from tests.helpers.index_operations import UNCHECKED
from tests.helpers.indexes import codes_of


def snapshot_of(count: int, ids: np.ndarray | None = None) -> Snapshot:
    codes = ShardedCodes((torch.from_numpy(codes_of(count)),))
    if ids is None:
        return Snapshot.from_rows(codes, None, None, next_id=count)
    return Snapshot.from_rows(codes, torch.from_numpy(ids), None, next_id=None)


@given(st.lists(st.integers(1, 9), max_size=12), st.integers(0, 99))
@UNCHECKED
def test_a_lookup_finds_ids_of_all_batches(batches, seed):
    ids = np.random.default_rng(seed).permutation(200)[: sum(batches)]
    lookup, count = IdLookup(), 0
    for batch in batches:
        count += batch
        before, lookup = lookup, lookup.append_ids(ids[:count])
        assert (before.rows_or_missing(ids[count - batch : count]) == -1).all()
    expected = np.full(200, -1)
    expected[ids] = np.arange(len(ids))
    np.testing.assert_array_equal(lookup.rows_or_missing(np.arange(200)), expected)


def test_a_lookup_finds_the_last_row_of_an_id():
    assert IdLookup().append_ids(np.array([5, 7, 5])).rows_or_missing(np.array([5, 7, 6])).tolist() == [2, 1, -1]


@pytest.mark.parametrize("ids", [None, np.array([30, 10, 20, 0])])
def test_rows_and_ids_of_live_rows(ids):
    full = snapshot_of(4, ids)
    less = full.without(np.array([1]))
    known = torch.arange(4) if ids is None else torch.from_numpy(ids)
    assert (full.count, less.count) == (4, 3) and full.live is None  # the first snapshot is unchanged
    assert less.rows_or_missing(known).tolist() == [0, -1, 2, 3]
    assert less.live_rows().tolist() == [0, 2, 3] and torch.equal(less.live_ids(), known[[0, 2, 3]])
    assert torch.equal(less.ids_of(torch.tensor([3, -1, 0])), torch.stack([known[3], torch.tensor(-1), known[0]]))
    assert torch.equal(less.live_codes(), full.codes.all_rows()[[0, 2, 3]])
    assert less.expand_to_rows(torch.tensor([7, 8, 9])).tolist() == [7, 0, 8, 9]
    with pytest.raises(InputError, match="^remove: ids must be ids in the index, got 999"):
        less.rows_of(torch.tensor([999]), "remove")


def test_new_ids_are_allocated_or_checked():
    assert snapshot_of(3).allocate_ids(2, None) == (None, 5)
    with pytest.raises(InputError, match="add: ids must be omitted"):
        snapshot_of(3).allocate_ids(1, torch.tensor([9]))
    own = snapshot_of(2, np.array([4, 6]))
    ids, next_id = own.allocate_ids(1, torch.tensor([5]))
    assert (ids.tolist(), next_id) == ([5], None)
    with pytest.raises(InputError, match="add: ids must be unique, got 6, which is in the index already"):
        own.allocate_ids(2, torch.tensor([5, 6]))


@UNCHECKED
@given(count=st.integers(0, 40), seed=st.integers(0, 99), is_mask=st.booleans(), queries=st.integers(0, 3))
def test_combine_filter_on_gpu_equals_combine_filter(count, seed, is_mask, queries):
    """Both functions run on the CPU here."""
    rng = np.random.default_rng(seed)
    live_mask = rng.random(count) < 0.7
    live = np.packbits(live_mask, bitorder="little") if seed % 3 else None
    left = count if live is None else int(live_mask.sum())
    shape = (queries, left) if queries else (left,)
    filter = rng.random(shape) < 0.5 if is_mask else rng.integers(0, 256, (*shape[:-1], (left + 7) // 8), np.uint8)
    expected = combine_filter(filter, live, count, left)
    live = None if live is None else torch.from_numpy(live)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(snapshot, "GPU_MASK_ENTRIES", 2 * max(count, 1))
        np.testing.assert_array_equal(combine_filter_on_gpu(torch.from_numpy(filter), live, count, left), expected)
