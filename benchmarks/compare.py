"""`python -m benchmarks compare OTHER`: this checkout next to another one, both measured in one run.

A cell is one call with fixed sizes. It is timed in two processes, one per checkout, in alternating order. Each round
gives a ratio: this checkout's time divided by the other's. If the lower 98% confidence limit of the median ratio
exceeds `TOLERANCE`, the cell is measured once more with three times as many rounds. The cell counts as slower if the
limit exceeds the tolerance again. Assume that a cell is equally fast in both checkouts and that rounds are independent.
Then noise makes the limit exceed the tolerance in at most 1 of 50 measurements, and in both measurements of at most 1
of 2,500 cells.
"""

import json
import math
import os
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from tqdm import tqdm

from hashengine.errors import invalid

ROOT = Path(__file__).resolve().parents[1]
WORKER = Path(__file__).with_name("compare_worker.py")
TOLERANCE = 1.02


@dataclass(frozen=True)
class Comparison:
    """The times of one cell.

    Attributes:
        cell: the name of the cell.
        seconds: the median time of a call in this checkout.
        other_seconds: the median time of a call in the other checkout.
        ratios: this checkout's time divided by the other's, one ratio per round, ascending.
    """

    cell: str
    seconds: float
    other_seconds: float
    ratios: list[float]

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def is_slower(self) -> bool:
        """Whether the lower confidence limit of the median ratio exceeds the tolerance."""
        return self.ratios[confidence_rank(len(self.ratios))] > TOLERANCE


def confidence_rank(count: int, risk: float = 0.02) -> int:
    """The index, in `count` sorted samples, of a lower confidence limit of the median.

    The limit exceeds the true median with a probability of at most `risk`. The true median is below sample `i` (counted
    from 0) with the probability that at most `i` of `count` fair coins show heads.
    """
    rank, probability = 0, 1 / 2**count
    while probability + math.comb(count, rank + 1) / 2**count <= risk:
        rank += 1
        probability += math.comb(count, rank) / 2**count
    return rank


class Worker:
    """A process that imports the package of one checkout and times cells."""

    def __init__(self, checkout: Path) -> None:
        environment = os.environ | {"PYTHONPATH": str(checkout)}
        command = [sys.executable, str(WORKER)]
        self._process = subprocess.Popen(
            command, env=environment, cwd=checkout, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> "Worker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.communicate()

    def _ask(self, request: dict[str, object]) -> object:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the worker ended with exit code {self._process.wait()}; its message is above")
        return json.loads(answer)

    def cells(self) -> list[str]:
        """The names of all cells."""
        names = self._ask({"list": True})
        assert isinstance(names, list)
        return names

    def seconds(self, cell: str, seconds: float) -> float:
        """The median time of one call of the cell. The worker repeats the call for about `seconds`."""
        answer = self._ask({"cell": cell, "seconds": seconds})
        assert isinstance(answer, dict)
        return float(answer["seconds"])


def compare(other: Path, *, only: str = "", rounds: int = 9, seconds: float = 0.1) -> list[Comparison]:
    """Time the cells whose name contains `only` in this checkout and in the checkout `other`.

    Args:
        other: a checkout of the project with its native module built in place.
        only: part of the names of the cells to time; empty for all cells.
        rounds: the number of times that each cell is timed in each checkout, at least 6.
        seconds: about how long the call of a cell is repeated per round and checkout.

    Raises:
        InputError: `other` has no native module, `rounds` is below 6, or no cell's name contains `only`.
    """
    if not list(other.glob("hashengine/_C.*so")):
        advice = "run 'python setup.py build_ext --inplace' there"
        raise invalid("compare", "other", "a folder with hashengine's native module built", other, advice)
    if rounds < 6:
        raise invalid("compare", "rounds", "at least 6, for the confidence limit", rounds)
    with Worker(ROOT) as this, Worker(other.resolve()) as that:
        cells = [cell for cell in this.cells() if only in cell]
        if not cells:
            raise invalid("compare", "only", "part of the name of a cell, such as 'search/topk/64 bits'", repr(only))
        comparisons = []
        for cell in tqdm(cells, unit="cell", leave=False, disable=None):
            comparison = _compare_cell(cell, this, that, rounds, seconds)
            if comparison.is_slower:
                comparison = _compare_cell(cell, this, that, 3 * rounds, seconds)
            comparisons.append(comparison)
    return comparisons


def _compare_cell(cell: str, this: Worker, that: Worker, rounds: int, seconds: float) -> Comparison:
    times: dict[Worker, list[float]] = {this: [], that: []}
    for number in range(rounds):
        for worker in (this, that) if number % 2 else (that, this):
            times[worker].append(worker.seconds(cell, seconds))
    ratios = sorted(own / theirs for own, theirs in zip(times[this], times[that], strict=True))
    return Comparison(cell, statistics.median(times[this]), statistics.median(times[that]), ratios)


def rows(comparisons: list[Comparison]) -> list[dict[str, object]]:
    """The result row of each cell."""
    return [asdict(comparison) | {"ratio": comparison.ratio} for comparison in comparisons]


def summary(comparisons: list[Comparison]) -> str:
    """A text with the median ratio, the smallest and the largest ratio, and the name of every slower cell."""
    ratios = sorted(comparison.ratio for comparison in comparisons)
    slower = [comparison for comparison in comparisons if comparison.is_slower]
    lines = [
        f"{len(comparisons)} cells, time of this checkout divided by the other's: "
        f"median {statistics.median(ratios):.3f}, {ratios[0]:.3f} to {ratios[-1]:.3f}",
        f"slower by more than the noise: {len(slower)}",
    ]
    lines += [f"  {comparison.cell}: {comparison.ratio:.3f}" for comparison in slower]
    return "\n".join(lines)
