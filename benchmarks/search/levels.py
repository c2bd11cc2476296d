"""`hamming --levels`: the SIMD levels of this CPU against each other.

They search in a grid of numbers of queries, k and code lengths. A higher level must not be slower than a lower one in
any cell of the grid. Two kinds of cells also have a limit against FAISS.
"""

import functools
import itertools
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console

from benchmarks.harness import Row, WrongAnswer, append_rows, console_width, describe_machine, fail_if_any, set_threads
from benchmarks.search.row_names import FAISS
from benchmarks.tables import rich_table
from benchmarks.timing import median_ratio, time_in_rounds
from hashengine import HammingIndex, _native
from hashengine.errors import invalid
from tests.helpers.faiss_oracle import FaissOracle

QUERIES = (1, 2, 8, 32, 64, 128, 300, 1000)
KS = (1, 10, 100, 1000, 10_000, 100_000)
BITS = (32, 64, 128, 256, 512, 1024)
MOST_RESULTS = 10_000_000  # cells with more results are left out
DEFAULT_ROUNDS = 3

SLOWEST = 1.1  # the most time that a higher level may take, divided by the time of a lower level
_CLEARLY_SLOWER = 2.0  # a level that takes so many times as long as the fastest is not timed again
_CONFIRMING = 3  # a cell that seems to fail is timed again, in this many times as many rounds
_VERIFIED_QUERIES = 50


class Failure(NamedTuple):
    """A limit that a cell breaks: what it compares, and a line for a person."""

    searches: tuple[str, str]
    line: str


class Cell(NamedTuple):
    """One search of the grid."""

    bits: int
    queries: int
    k: int

    def __str__(self) -> str:
        return f"{self.bits} bits, {self.queries:,} queries, k = {self.k:,}"

    def times_faiss(self) -> float | None:
        """How many times as fast as FAISS the search must be; None if no number is required."""
        if self.queries == 1 and self.bits == 64:
            return 1.0
        return 8.0 if (self.queries, self.k) == (1000, 10_000) else None


def run(
    *,
    codes: int,
    queries: Sequence[int],
    bits: Sequence[int],
    ks: Sequence[int],
    threads: int | None,
    rounds: int | None,
    output: Path | None,
) -> list[Row]:
    """Measure every cell at every level, print one table for each code length, and name the cells that fail.

    Args:
        codes: the number of codes.
        queries: numbers of queries.
        bits: code lengths.
        ks: numbers of neighbours; those above `codes` are left out.
        threads: torch's number of threads; None for all cores.
        rounds: how many times each level is timed; `DEFAULT_ROUNDS` if None.
        output: a JSON Lines file to append the rows to.

    Returns:
        A row for each cell. Its field `seconds` has the seconds of a call in each round, by level and for FAISS.

    Raises:
        SystemExit: at the end, if a cell failed.
    """
    module = _native.module()
    if module is None:
        raise invalid("hamming", "the native module", "in use", _native.why_not(), _native.rebuild_command())
    machine = describe_machine() | {"benchmark": "hamming-levels", "threads": set_threads(threads), "codes": codes}
    levels, console = module.simd_levels(), Console(width=console_width(160))
    rows, failures = [], []
    for length in bits:
        of_length = []
        for cell, searches in _cells(codes, length, queries, ks, levels):
            seconds, found = measure(cell, searches, rounds or DEFAULT_ROUNDS, levels)
            of_length.append(machine | cell._asdict() | {"seconds": seconds})
            failures += [failure.line for failure in found]
        console.print(rich_table(_columns(of_length), _lines(of_length), _caption(length, codes, levels, machine)))
        rows += of_length
        if output is not None:
            append_rows(output, of_length)
    fail_if_any(failures, len(rows))
    return rows


def _cells(
    codes: int, bits: int, queries: Sequence[int], ks: Sequence[int], levels: Sequence[str]
) -> Iterator[tuple[Cell, Mapping[str, Callable[[], object]]]]:
    """Each cell of a code length, with a function for each level, and for FAISS if the cell has a limit against it.

    Raises:
        WrongAnswer: the answers of a level differ from FAISS's.
    """
    rng = np.random.default_rng(bits)
    database, batch = (rng.integers(0, 256, (rows, bits // 8), dtype=np.uint8) for rows in (codes, max(queries)))
    index, oracle = HammingIndex(bits), FaissOracle(database)
    index.add(database)
    for count, k in itertools.product(queries, ks):
        if k > codes or count * k > MOST_RESULTS:
            continue
        cell = Cell(bits, count, k)
        few = batch[: min(count, _VERIFIED_QUERIES)]
        expected = oracle.search(few, k)
        for level in levels:
            if not all(map(np.array_equal, _search_at(level, index, few, k), expected)):
                raise WrongAnswer(f"hamming --levels: {cell}: the answers of {level} must equal those of {oracle.name}")
        searches = {level: functools.partial(_search_at, level, index, batch[:count], k) for level in levels}
        if cell.times_faiss() is not None:
            searches[FAISS] = functools.partial(oracle.search, batch[:count], k)
        yield cell, searches


def _search_at(level: str, index: HammingIndex, queries: np.ndarray, k: int) -> tuple[np.ndarray, ...]:
    """Search at a SIMD level. The module reads the variable at every call."""
    before = os.environ.get("HASHENGINE_SIMD_LEVEL")
    os.environ["HASHENGINE_SIMD_LEVEL"] = level
    try:
        return index.search(queries, k)
    finally:
        if before is None:
            del os.environ["HASHENGINE_SIMD_LEVEL"]
        else:
            os.environ["HASHENGINE_SIMD_LEVEL"] = before


def measure(
    cell: Cell, searches: Mapping[str, Callable[[], object]], rounds: int, levels: Sequence[str]
) -> tuple[dict[str, list[float]], list[Failure]]:
    """Time the searches in rounds. Those that seem to break a limit are timed again, in more rounds.

    Returns:
        The seconds of each search in each round, and the limits that the cell breaks.
    """
    seconds = time_in_rounds(searches, 1, warm_up=False)  # `_cells` has called each of them
    fastest = min(times[0] for times in seconds.values())
    close = {name: call for name, call in searches.items() if seconds[name][0] <= _CLEARLY_SLOWER * fastest}
    if rounds > 1 and len(close) > 1:
        seconds |= time_in_rounds(close, rounds)
    doubtful = {name for failure in judge(cell, seconds, levels) for name in failure.searches}
    if doubtful:
        again = {name: call for name, call in searches.items() if name in doubtful}
        seconds |= time_in_rounds(again, _CONFIRMING * rounds)
    return seconds, judge(cell, seconds, levels)


def judge(cell: Cell, seconds: Mapping[str, list[float]], levels: Sequence[str]) -> list[Failure]:
    """The limits that the times of a cell break. `levels` is in ascending order."""
    failures = []
    for lower, higher in itertools.combinations(levels, 2):
        ratio = _ratio(seconds[higher], seconds[lower])
        if ratio > SLOWEST:
            line = f"{cell}: {higher} takes {ratio:.2f} times as long as {lower}"
            failures.append(Failure((lower, higher), line))
    least = cell.times_faiss()
    for level in levels if cell.queries == 1 else levels[-1:]:
        if least is not None and FAISS in seconds and _ratio(seconds[FAISS], seconds[level]) < least:
            ratio = _ratio(seconds[FAISS], seconds[level])
            line = f"{cell}: {level} is {ratio:.2f} times as fast as FAISS, less than {least:g} times"
            failures.append(Failure((level, FAISS), line))
    return failures


def _ratio(numerator: list[float], denominator: list[float]) -> float:
    """The median ratio of the rounds; the ratio of the medians if the two were timed in different rounds."""
    if len(numerator) == len(denominator):
        return median_ratio(numerator, denominator)
    return statistics.median(numerator) / statistics.median(denominator)


def _columns(rows: Sequence[Row]) -> dict[str, Callable[[Row], str]]:
    ks = sorted({row["k"] for row in rows})
    columns: dict[str, Callable[[Row], str]] = {"queries": lambda line: f"{line['queries']:,}"}
    for k in ks:
        columns[f"k = {k:,}"] = lambda line, k=k: line["cells"].get(k, "")  # type: ignore[misc]
    return columns


def _lines(rows: Sequence[Row]) -> list[Row]:
    """One line for each number of queries; its cells by k."""
    lines: dict[int, dict[int, str]] = {}
    for row in rows:
        rates = {
            name: row["codes"] * row["queries"] / statistics.median(seconds) / 1e9
            for name, seconds in row["seconds"].items()
        }
        lines.setdefault(row["queries"], {})[row["k"]] = " / ".join(f"{rate:.2g}" for rate in rates.values())
    return [{"queries": queries, "cells": cells} for queries, cells in lines.items()]


def _caption(bits: int, codes: int, levels: Sequence[str], machine: Row) -> str:
    return (
        f"{bits} bits, {codes:,} codes: billions of distances per second of {' / '.join(levels)}, and of FAISS where "
        f"it was measured; {machine['threads']} threads of {machine['cpu']}"
    )
