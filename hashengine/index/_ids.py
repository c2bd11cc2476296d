"""From ids to rows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class _Run:
    """Ids of consecutive rows, sorted when they are first asked for."""

    first: int
    ids: np.ndarray

    @cached_property
    def order(self) -> np.ndarray:
        return np.argsort(self.ids, kind="stable")

    @cached_property
    def sorted_ids(self) -> np.ndarray:
        return self.ids[self.order]


class IdLookup:
    """The row of each id, immutable: sorted runs, each at least twice as long as the next.

    A lookup is a binary search in each of at most log2(N) runs, and N ids that come one by one are sorted log2(N) times
    each. A dictionary of a million ids would take 100 MB and a second; this takes 16 bytes an id, and nothing at all
    before the first lookup.
    """

    def __init__(self, runs: tuple[_Run, ...] = ()):
        self._runs = runs

    def extended(self, ids: np.ndarray) -> IdLookup:
        """The lookup of all rows' ``ids``, int64 [N], of which this one knows the first."""
        first = self._runs[-1].first + len(self._runs[-1].ids) if self._runs else 0
        runs = list(self._runs)
        while runs and 2 * (len(ids) - first) > len(runs[-1].ids):
            first = runs.pop().first
        return IdLookup((*runs, _Run(first, ids[first:])))

    def find(self, ids: np.ndarray) -> np.ndarray:
        """The row of each id, the last where an id was removed and came again; -1 where there is none."""
        rows = np.full(len(ids), -1, np.int64)
        for run in self._runs:
            if len(run.ids):
                places = np.maximum(np.searchsorted(run.sorted_ids, ids, side="right") - 1, 0)
                found = run.sorted_ids[places] == ids
                rows[found] = run.first + run.order[places[found]]
        return rows
