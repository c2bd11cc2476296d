"""One immutable state of an index: its rows, their ids and which of them are live.

A search takes the current snapshot and uses it to the end, while writers publish new ones. Only the contents of codes
can change: an update overwrites them in place, under a lock.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from hashengine._computed_once import computed_once
from hashengine.errors import invalid
from hashengine.index.code_memory import ShardedCodes
from hashengine.index.devices import CPU, to_device
from hashengine.ops._hamming import pack_filter, unpack_filter

GPU_MASK_ENTRIES = 1 << 27  # entries of a mask, 1 byte each, that a GPU unpacks at a time


@dataclass(frozen=True)
class _SortedRun:
    """The ids of consecutive rows. They are sorted at the first lookup."""

    first_row: int
    ids: np.ndarray

    @computed_once
    def order(self) -> np.ndarray:
        return np.argsort(self.ids, kind="stable")

    @computed_once
    def sorted_ids(self) -> np.ndarray:
        return self.ids[self.order]


class IdLookup:
    """The row of each id. Immutable; a sequence of sorted runs, each at least twice as long as the next.

    A lookup is a binary search in each run; N ids have at most about log2(N) runs. If N ids are added one by one, each
    is sorted at most about log2(N) times. The runs take 16 bytes per id after the first lookup, and no memory before
    it. A dictionary of a million ids would take about 100 MB (estimated).
    """

    def __init__(self, runs: tuple[_SortedRun, ...] = ()) -> None:
        self._runs = runs

    def append_ids(self, ids: np.ndarray) -> IdLookup:
        """The lookup for `ids`, those of all rows, int64 [N]. They begin with the ids that this lookup contains."""
        first_row = self._runs[-1].first_row + len(self._runs[-1].ids) if self._runs else 0
        runs = list(self._runs)
        while runs and 2 * (len(ids) - first_row) > len(runs[-1].ids):
            first_row = runs.pop().first_row
        return IdLookup((*runs, _SortedRun(first_row, ids[first_row:])))

    def rows_or_missing(self, ids: np.ndarray) -> np.ndarray:
        """The row of each id, or -1 if there is none. If an id was removed and added again, the last row counts."""
        rows = np.full(len(ids), -1, np.int64)
        for run in self._runs:
            if len(run.ids):
                places = np.maximum(np.searchsorted(run.sorted_ids, ids, side="right") - 1, 0)
                found = run.sorted_ids[places] == ids
                rows[found] = run.first_row + run.order[places[found]]
        return rows


@dataclass(frozen=True)
class Snapshot:
    """Rows in insertion order, including removed ones, which are not live.

    Writers use the fields on the CPU. A search also uses `device_ids` and `device_live`, which are on the first device
    of the codes.
    """

    codes: ShardedCodes
    ids: Tensor | None = None  # int64 [rows] on the CPU; None: the id of a code is its row
    device_ids: Tensor | None = None  # `ids` on the first device of the codes
    lookup: IdLookup = IdLookup()  # from ids to rows; unused if ids is None
    live: np.ndarray | None = None  # bitmap of the live rows, uint8 [ceil(rows / 8)], as by pack_filter; None: all
    count: int = 0  # live rows
    next_id: int | None = 0  # the id of the next code added without one; None: codes are added with ids

    @classmethod
    def from_rows(
        cls, codes: ShardedCodes, ids: Tensor | None, live: np.ndarray | None, next_id: int | None
    ) -> Snapshot:
        """A snapshot of these rows; the other fields are computed."""
        lookup = IdLookup() if ids is None else IdLookup().append_ids(ids.numpy())
        count = len(codes) if live is None else int(np.unpackbits(live, count=len(codes), bitorder="little").sum())
        device_ids = None if ids is None else to_device(ids, codes.first_device)
        return cls(codes, ids, device_ids, lookup, live, count, next_id)

    @computed_once
    def device_live(self) -> Tensor | None:
        """`live` on the first device; `HammingIndex` computes it before it publishes the snapshot."""
        return None if self.live is None else to_device(torch.from_numpy(self.live), self.codes.first_device)

    @computed_once
    def host_codes(self) -> np.ndarray | None:
        """The codes of all rows, uint8 [rows, bits / 8], as a view; None if they are not in one part in host memory."""
        first, *others = self.codes.parts
        return None if others or first.device.type != "cpu" else first.numpy()

    # Changes: each method returns a new snapshot or values for one.

    def allocate_ids(self, count: int, ids: Tensor | None) -> tuple[Tensor | None, int | None]:
        """The ids of `count` new codes, and `next_id` after them.

        Args:
            count: the number of new codes.
            ids: the ids that the caller gave, or None to number the codes.

        Returns:
            The ids, int64 [count], or None if the id of every code is still its row; and the new `next_id`.
        """
        has_ids = self.next_id is None
        if self.next_id != 0 and (ids is not None) != has_ids:  # next_id 0: nothing was added, so both are allowed
            expected = "given, as for the codes in the index" if has_ids else "omitted, as for the codes in the index"
            raise invalid("add", "ids", expected, "none" if ids is None else "ids")
        if ids is None:
            first, next_id = self.next_id or 0, (self.next_id or 0) + count
            return (None if self.ids is None else torch.arange(first, next_id, device=CPU)), next_id
        taken = ids[self.rows_or_missing(ids) >= 0]
        if len(taken):
            raise invalid("add", "ids", "unique", f"{int(taken[0])}, which is in the index already")
        return ids, None

    def appended(
        self, codes: ShardedCodes, ids: Tensor | None, device_ids: Tensor | None, next_id: int | None
    ) -> Snapshot:
        """The snapshot after rows were added; `codes` and `ids` begin with those of this snapshot."""
        old, new = len(self.codes), len(codes)
        lookup = self.lookup if ids is None else self.lookup.append_ids(ids.numpy())
        live = None if self.live is None else _with_bits(self.live, np.arange(old, new), True, new)
        return Snapshot(codes, ids, device_ids, lookup, live, self.count + new - old, next_id)

    def without(self, rows: np.ndarray) -> Snapshot:
        """The snapshot after the removal of `rows`, int64 [M], which must be live."""
        live = np.packbits(self.live_mask(), bitorder="little") if self.live is None else self.live
        return replace(self, live=_with_bits(live, rows, False, len(self.codes)), count=self.count - len(rows))

    # Live rows.

    def live_mask(self) -> np.ndarray:
        """Whether each row is live, bool [rows]."""
        if self.live is None:
            return np.ones(len(self.codes), bool)
        return np.unpackbits(self.live, count=len(self.codes), bitorder="little").view(bool)

    def live_rows(self) -> Tensor:
        """The live rows, int64 [count], ascending."""
        return torch.from_numpy(self.live_mask().nonzero()[0])

    def live_codes(self) -> Tensor:
        """The codes of the live rows, uint8 [count, bits / 8]: on their device, or on the CPU if there are several."""
        return self.codes.all_rows() if self.live is None else self.codes.gather(self.live_rows())

    def live_ids(self) -> Tensor:
        """The ids of the live rows, int64 [count], on the CPU."""
        rows = self.live_rows()
        return rows if self.ids is None else self.ids[rows]

    # From ids to rows and back.

    def rows_or_missing(self, ids: Tensor) -> Tensor:
        """The row of each id, or -1 if no live code has this id."""
        wanted = ids.numpy()
        if self.ids is None:
            rows = np.where((0 <= wanted) & (wanted < len(self.codes)), wanted, -1)
        else:
            rows = self.lookup.rows_or_missing(wanted)
        if self.live is not None:
            rows[(self.live[rows >> 3] >> (rows & 7) & 1) == 0] = -1  # row -1 reads the last byte, and stays -1
        return torch.from_numpy(rows)

    def rows_of(self, ids: Tensor, where: str) -> Tensor:
        """The row of each id. Raises an `InputError` that names `where` if no live code has one of the ids."""
        rows = self.rows_or_missing(ids)
        unknown = ids[rows < 0]
        if len(unknown):
            raise invalid(where, "ids", "ids in the index", int(unknown[0]))
        return rows

    def ids_of(self, rows: Tensor) -> Tensor:
        """The ids of `rows`; -1 for row -1. They are on the first device of the codes.

        If the id of a code is its row, or if `rows` is empty, `rows` itself is returned.
        """
        if self.device_ids is None or rows.numel() == 0:
            return rows
        rows = to_device(rows, self.device_ids.device)
        return self.device_ids[rows.clamp(min=0)].masked_fill_(rows < 0, -1)

    # From values per live code to values per row.

    def row_filter(self, filter: Tensor | None) -> Tensor | None:
        """The bitmap of rows that a search may return: uint8 [ceil(rows / 8)], or one per query; None for all rows.

        Args:
            filter: a mask (bool) or bitmap (uint8) of the live codes, on any device; None for all of them.
        """
        if filter is None:
            return self.device_live
        if filter.is_cuda:
            live = None if self.device_live is None else to_device(self.device_live, filter.device)
            return combine_filter_on_gpu(filter, live, len(self.codes), self.count)
        return torch.from_numpy(combine_filter(filter.numpy(), self.live, len(self.codes), self.count))

    def expand_to_rows(self, values: Tensor) -> Tensor:
        """Values of the live codes as values of all rows; zero for removed rows."""
        if self.live is None:
            return values
        expanded = values.new_zeros((len(self.codes), *values.shape[1:]))
        expanded[to_device(self.live_rows(), expanded.device)] = values
        return expanded


def _with_bits(bitmap: np.ndarray, rows: np.ndarray, value: bool, count: int) -> np.ndarray:
    """A copy of a bitmap, for `count` rows, in which the bits of `rows` are `value`."""
    copy = np.zeros((count + 7) // 8, np.uint8)
    copy[: len(bitmap)] = bitmap
    bits = (1 << (rows & 7)).astype(np.uint8)
    if value:
        np.bitwise_or.at(copy, rows >> 3, bits)
    else:
        np.bitwise_and.at(copy, rows >> 3, ~bits)
    return copy


def combine_filter(filter: np.ndarray, live: np.ndarray | None, rows: int, count: int) -> np.ndarray:
    """The bitmap of the live rows that a filter selects, uint8 [..., ceil(rows / 8)].

    Args:
        filter: one value per live row, in order: a mask, bool [..., count], or its bitmap, uint8.
        live: the bitmap of the live rows; None if all rows are live.
        rows: the number of rows.
        count: the number of live rows.
    """
    is_mask = filter.dtype == bool
    if live is not None:
        bitmap = np.empty((*filter.shape[:-1], len(live)), np.uint8)
        live_mask, selected = np.unpackbits(live, count=rows, bitorder="little").view(bool), np.zeros(rows, bool)
        for query in np.ndindex(filter.shape[:-1]):  # one at a time, because a mask takes 8 times the memory
            mask = filter[query]
            selected[live_mask] = mask if is_mask else np.unpackbits(mask, count=count, bitorder="little")
            bitmap[query] = np.packbits(selected, bitorder="little")
        return bitmap
    if is_mask:
        return np.packbits(filter, axis=-1, bitorder="little")
    bitmap = filter.copy()
    if count % 8:  # the ops require zero bits after the last row
        bitmap[..., -1] &= (1 << count % 8) - 1
    return bitmap


def combine_filter_on_gpu(filter: Tensor, live: Tensor | None, rows: int, count: int) -> Tensor:
    """`combine_filter` for tensors on one GPU. It does not synchronize: no shape depends on a tensor's values."""
    if live is not None:
        live_mask = unpack_filter(live, rows)
        live_position = (live_mask.cumsum(0) - 1).clamp_(min=0)  # the position of each row among the live rows
    is_mask = filter.dtype == torch.bool
    bitmap = filter.new_empty((*filter.shape[:-1], (rows + 7) // 8), dtype=torch.uint8)
    step = max(GPU_MASK_ENTRIES // max(rows, 1), 1)
    for part, target in zip(_as_rows(filter).split(step), _as_rows(bitmap).split(step), strict=True):
        if count == 0:
            target.zero_()
            continue
        mask = part if is_mask else unpack_filter(part, count)
        if live is not None:
            mask = mask.index_select(1, live_position).logical_and_(live_mask)
        target.copy_(pack_filter(mask))
    return bitmap


def _as_rows(values: Tensor) -> Tensor:
    return values.unsqueeze(0) if values.dim() == 1 else values
