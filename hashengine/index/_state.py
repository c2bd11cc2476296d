"""One state of an index, which a search takes and keeps while others add and remove."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from hashengine.errors import InputError
from hashengine.index._codes import Codes
from hashengine.index._devices import moved
from hashengine.index._filters import combined, combined_on_gpu
from hashengine.index._ids import IdLookup


def marked(bitmap: np.ndarray, rows: np.ndarray, value: bool, count: int) -> np.ndarray:
    """A copy of a bitmap, for ``count`` rows, in which the bits of ``rows`` are ``value``."""
    copy = np.zeros((count + 7) // 8, np.uint8)
    copy[: len(bitmap)] = bitmap
    bits = (1 << (rows & 7)).astype(np.uint8)
    if value:
        np.bitwise_or.at(copy, rows >> 3, bits)
    else:
        np.bitwise_and.at(copy, rows >> 3, ~bits)
    return copy


@dataclass(frozen=True)
class State:
    """Rows in insertion order, removed ones among them.

    Nothing that it refers to is written to again, but for the codes that an update overwrites. Writers work on the CPU;
    what a search reads lies on the first device of the codes, their home, too.
    """

    codes: Codes
    ids: Tensor | None = None  # int64 [rows], on the CPU; None: a code's id is its row
    home_ids: Tensor | None = None  # the same on the home device
    lookup: IdLookup = IdLookup()  # of ids
    live: np.ndarray | None = None  # the bitmap of rows that were not removed, uint8 [ceil(rows / 8)]; None: all
    count: int = 0  # of live codes
    next_id: int | None = 0  # of a code that is added without an id; None: codes come with ids

    @classmethod
    def of(cls, codes: Codes, ids: Tensor | None, live: np.ndarray | None, next_id: int | None) -> State:
        lookup = IdLookup() if ids is None else IdLookup().extended(ids.numpy())
        count = len(codes) if live is None else int(np.unpackbits(live, count=len(codes), bitorder="little").sum())
        return cls(codes, ids, None if ids is None else moved(ids, codes.home), lookup, live, count, next_id)

    @cached_property
    def home_live(self) -> Tensor | None:
        """``live`` on the home device; writers see to it that it is there before a search needs it."""
        return None if self.live is None else moved(torch.from_numpy(self.live), self.codes.home)

    def ids_of_new(self, count: int, ids: Tensor | None) -> tuple[Tensor | None, int | None]:
        """The ids of ``count`` codes that come with ``ids``, or without, and ``next_id`` after them."""
        if self.next_id != 0 and (ids is None) != (self.next_id is not None):  # 0: the first codes decide
            has, came = ("ids", "none") if self.next_id is None else ("positions", "ids")
            raise InputError(f"add: ids must come with all codes or with none; this index holds {has}, got {came}")
        if ids is None:
            next_id = self.next_id + count
            return (None if self.ids is None else torch.arange(self.next_id, next_id)), next_id
        taken = ids[self.find(ids) >= 0]
        if len(taken):
            raise InputError(f"add: ids must be unique, got {int(taken[0])}, which the index holds already")
        return ids, None

    def extended(self, codes: Codes, ids: Tensor | None, home_ids: Tensor | None, next_id: int | None) -> State:
        """The state with all of ``codes`` and ``ids``, of which this one has the first."""
        old, new = len(self.codes), len(codes)
        lookup = self.lookup if ids is None else self.lookup.extended(ids.numpy())
        live = None if self.live is None else marked(self.live, np.arange(old, new), True, new)
        return State(codes, ids, home_ids, lookup, live, self.count + new - old, next_id)

    def without(self, rows: np.ndarray) -> State:
        live = np.packbits(self.live_mask(), bitorder="little") if self.live is None else self.live
        return replace(self, live=marked(live, rows, False, len(self.codes)), count=self.count - len(rows))

    def live_mask(self) -> np.ndarray:
        """Bool [rows]."""
        if self.live is None:
            return np.ones(len(self.codes), bool)
        return np.unpackbits(self.live, count=len(self.codes), bitorder="little").view(bool)

    def live_rows(self) -> Tensor:
        return torch.from_numpy(self.live_mask().nonzero()[0])

    def live_codes(self) -> Tensor:
        """On the codes' device; on the CPU where there are several."""
        return self.codes.whole() if self.live is None else self.codes.take(self.live_rows())

    def live_ids(self) -> Tensor:
        rows = self.live_rows()
        return rows if self.ids is None else self.ids[rows]

    def bitmap(self, filter: Tensor | None) -> Tensor | None:
        """Which rows may be found, for the ops: ``filter`` is a mask or a bitmap of the live codes, on any device."""
        if filter is None:
            return self.home_live
        if filter.is_cuda:
            live = None if self.home_live is None else moved(self.home_live, filter.device)
            return combined_on_gpu(filter, live, len(self.codes), self.count)
        return torch.from_numpy(combined(filter.numpy(), self.live, len(self.codes), self.count))

    def scattered(self, live_values: Tensor) -> Tensor:
        """A value for each row of a value for each live code; zero for the others."""
        if self.live is None:
            return live_values
        values = live_values.new_zeros((len(self.codes), *live_values.shape[1:]))
        values[moved(self.live_rows(), values.device)] = live_values
        return values

    def ids_of(self, rows: Tensor) -> Tensor:
        """The ids of rows on any device, on the home device or, where ids are rows, there; -1 of -1."""
        if self.home_ids is None or rows.numel() == 0:
            return rows
        rows = moved(rows, self.home_ids.device)
        return self.home_ids[rows.clamp(min=0)].masked_fill_(rows < 0, -1)

    def find(self, ids: Tensor) -> Tensor:
        """The row of each id, -1 where no live code has it."""
        wanted = ids.numpy()
        if self.ids is None:
            rows = np.where((0 <= wanted) & (wanted < len(self.codes)), wanted, -1)
        else:
            rows = self.lookup.find(wanted)
        if self.live is not None:
            rows[(self.live[rows >> 3] >> (rows & 7) & 1) == 0] = -1  # where the row is -1, either is right
        return torch.from_numpy(rows)

    def rows_of(self, ids: Tensor, op: str) -> Tensor:
        """The row of each id; an InputError where no live code has one."""
        rows = self.find(ids)
        unknown = ids[rows < 0]
        if len(unknown):
            raise InputError(f"{op}: ids must be those of codes in the index, got {int(unknown[0])}, which is not")
        return rows
