"""A case of the search benchmarks: its task, its sizes and its data. CPU and GPU benchmarks use the same cases."""

import enum
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from benchmarks.search.data import Data
from hashengine._validation import check_bits
from hashengine.errors import invalid


class Task(str, enum.Enum):
    """The kind of search.

    - `search`: the k nearest codes.
    - `filter`: the k nearest of the codes that a random filter selects.
    - `range`: all codes within a radius that holds about k codes per query.
    - `map`: mean average precision over the full ranking, which has no k.
    - `count`: the number of codes at each distance, without and with labels; it has no k either.
    """

    search = "search"
    filter = "filter"
    range = "range"
    map = "map"
    count = "count"

    @property
    def has_k(self) -> bool:
        """Whether the task has a number of neighbours."""
        return self not in (Task.map, Task.count)


class Case(NamedTuple):
    """One measurement of a search.

    Attributes:
        codes: the number of codes in the database.
        bits: the length of a code.
        queries: the number of queries in the batch.
        k: the number of neighbours; for `Task.range`, about that number; None if the task has none.
        task: the kind of search.
        data: how the codes are made.
        share: the share of the codes that the filter selects; 1 without a filter.
    """

    codes: int
    bits: int
    queries: int
    k: int | None
    task: Task = Task.search
    data: Data = Data.random
    share: float = 1.0

    def __str__(self) -> str:
        text = f"{self.task.value} of {self.codes:,} x {self.bits} bits, {self.queries:,} queries"
        text += "" if self.k is None else f", k = {self.k:,}"
        text += "" if self.task is not Task.filter else f", filter {self.share:.0%}"
        return text + ("" if self.data is Data.random else f", {self.data.value} data")


def make_cases(
    where: str,
    *,
    tasks: Sequence[Task],
    codes: int,
    queries: int,
    bits: Sequence[int],
    ks: Sequence[int],
    share: float,
    data: Data,
) -> list[Case]:
    """Every combination of code length, task and k; cases that search the same codes follow each other.

    Raises:
        InputError: a code length is not a multiple of 8, or a k is larger than `codes`; the error names `where`.
    """
    for length in bits:
        check_bits(where, length)
    if max(ks) > codes:
        raise invalid(where, "k", f"at most the number of codes, {codes}", max(ks))
    return [
        Case(codes, length, queries, k, task, data, share if task is Task.filter else 1.0)
        for length in bits
        for task in tasks
        for k in (ks if task.has_k else (None,))
    ]


def draw_mask(count: int, share: float) -> np.ndarray:
    """The filter of a case, bool [count]: a random mask that selects about `share` of the codes."""
    return np.random.default_rng(2).random(count) < share


def radius_holding(counts: np.ndarray, k: int) -> int:
    """The radius of a case: the smallest one that holds at least k codes per query on average.

    Args:
        counts: [Q, bits + 1], the number of codes at each distance.
        k: the number of codes to hold.
    """
    return int(np.flatnonzero(counts.cumsum(1).mean(0) >= k)[0])
