"""Exact Hamming search on a GPU beside FAISS's binary index there, torch, and the device's bounds: one suite.

It needs torch, numpy and hashengine, nothing else: where the command line of `python -m benchmarks` cannot be imported,
`python -m benchmarks.hamming_gpu --output rows.jsonl --minutes 6` runs it.
"""

import argparse
import gc
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_bounds, gpu_peers
from benchmarks.codes import Data
from benchmarks.gpu_bounds import Gpu
from benchmarks.gpu_data import Case, Database
from benchmarks.gpu_latency import measure_build, measure_latency
from benchmarks.gpu_search import OURS, WrongAnswer, measure
from benchmarks.gpu_stream import measure_stream
from benchmarks.harness import append_results, begun_within, describe_machine, find_device
from benchmarks.systems import Task
from benchmarks.timing import Clock, make_clock
from hashengine import InputError

NAME = "hamming-gpu"
SEARCH, LATENCY, BUILD, STREAM = "search", "latency", "build", "stream"  # what is measured of a case
SECONDS = 1.0  # about what the rounds of a row take

_M = 1_000_000

Row = dict[str, Any]
Step = tuple[str, Case]


def suite() -> list[Step]:
    """Everything, in the order of importance, searches of the same codes together."""
    large = [Case(_M, bits, 10_000, k) for bits in (64, 128) for k in (10, 100, 1000)]
    large += [Case(10 * _M, bits, 10_000, k) for bits in (64, 128) for k in (10, 100, 1000)]
    large += [Case(_M, bits, 10_000, k) for bits in (256, 512, 1024) for k in (10, 100, 1000)]
    few = [Case(100 * _M, 64, queries, 10) for queries in (1, 2, 8, 32)] + [Case(_M, 64, 1, 10)]
    waits = [Case(_M, 64, queries, 10) for queries in (1, 2, 8, 32)]
    many = [Case(_M, 64, 100, _M), Case(10 * _M, 64, 100, 100_000)]
    filtered = [Case(_M, 64, 10_000, 100, Task.filter, share=share) for share in (0.01, 0.5)]
    others = [Case(_M, 64, 10_000, 100, Task.range), Case(_M, 64, 10_000, None, Task.map)]
    hard = [Case(_M, 64, 10_000, 100, data=data) for data in (Data.equal, Data.best_last, Data.best_first)]
    hard += [Case(1000, 64, 10_000, 10)]
    return [
        *((SEARCH, case) for case in (*large, *few)),
        *((LATENCY, case) for case in waits),
        *((SEARCH, case) for case in (*many, Case(1000 * _M, 64, 1, 10), *filtered, *others, *hard)),
        (BUILD, Case(10 * _M, 64, 1, 10)),
        (STREAM, Case(100 * _M, 64, 100, 10)),
    ]


def planned(shrink: int) -> list[Step]:
    """The suite with fewer codes and queries, to try it where it would take too long."""
    return [(what, _shrunk(case, shrink)) for what, case in suite()]


def _shrunk(case: Case, by: int) -> Case:
    codes = max(1000, case.codes // by) if by > 1 else case.codes
    k = None if case.k is None else min(case.k, int(case.share * codes) // 2 if case.share < 1 else codes)
    return case._replace(codes=codes, queries=max(1, case.queries // by), k=k)


def run(
    steps: list[Step], *, device: str, minutes: float, output: Path | None, seconds: float = SECONDS,
    images: Path | None = None,
) -> list[Row]:  # fmt: skip
    """Verify and measure step by step; print each row and append it to ``output`` as soon as it is there.

    After ``minutes`` no step is begun. A step that fails is told, and ends the run with an error when all is done.
    """
    on = find_device(device)
    clock = make_clock(on)
    gpu = gpu_bounds.describe(on, clock)
    machine = describe_machine(on) | {"benchmark": NAME, "faiss": gpu_peers.faiss_version()}
    print(_heading(machine, gpu))
    rows, failed, database = [], [], None
    for what, case in begun_within(minutes, steps):
        try:
            if database is None or not database.serves(case):
                database = None
                gc.collect()
                if on.type == "cuda":
                    torch.cuda.empty_cache()
                database = Database(case, on, images)
            measured = _measure(what, case, database, clock, gpu, seconds)
        except (WrongAnswer, RuntimeError, ValueError, MemoryError) as error:
            failed.append(f"{what}, {case}: {error}".splitlines()[0])
            print(failed[-1])
            continue
        measured = [machine | row for row in measured]
        for row in measured:
            print(describe(row), flush=True)
        if output is not None:
            append_results(output, measured)
        rows += measured
    if failed:
        raise SystemExit(f"{len(failed)} of {len(steps)} measurements failed:\n" + "\n".join(failed))
    return rows


def _measure(what: str, case: Case, database: Database, clock: Clock, gpu: Gpu | None, seconds: float) -> list[Row]:
    measures: dict[str, Callable[[], list[Row]]] = {
        SEARCH: lambda: measure(case, database, clock, gpu, seconds),
        LATENCY: lambda: [measure_latency(case, database, clock)],
        BUILD: lambda: [measure_build(case, database)],
        STREAM: lambda: [measure_stream(case, database)],
    }
    return measures[what]()


def _heading(machine: Row, gpu: Gpu | None) -> str:
    text = f"{machine.get('gpu') or machine['cpu']}, torch {machine['torch']}, FAISS {machine['faiss'] or 'missing'}"
    if gpu is not None:
        text += f", {gpu.multiprocessors} multiprocessors, at most {gpu.clock / 1e9:.3f} GHz"
        text += f", a copy moves {gpu.memory / 1e12:.2f} TB/s"
    return text + f", commit {machine['commit']}; answers are verified before they are timed"


def describe(row: Row) -> str:
    """A row in a line."""
    what = f"{row['task']}: {row['codes']:,} x {row['bits']} bits"
    if row["task"] == "latency":
        waits = [f"{name} {1e6 * at['p50']:,.1f} / {1e6 * at['p99']:,.1f}" for name, at in row["latency"].items()]
        return f"{what}, {row['queries']} queries, k = {row['k']}, p50 / p99 in µs: {'; '.join(waits)}"
    if row["task"] == "build":
        rates = [f"{name} {rate / 1e6:,.0f} M codes/s" for name, rate in row["codes_per_s"].items()]
        return f"{what}: {', '.join(rates)}, {row['extra_bytes'] / 1e6:,.0f} MB extra"
    if row["task"] == "stream":
        rates = f"{row['distances_per_s'] / 1e9:,.1f} G distances/s, {row['of_copy']:.0%} of the copy's rate"
        copy = f"{row['host_bytes_per_s'] / 1e9:.0f} GB/s"
        return f"{what} in the host's memory, {row['queries']} queries, k = {row['k']}: {rates}, {copy}"
    what += f", {row['queries']:,} queries, k = {'all' if row['k'] is None else format(row['k'], ',')}"
    what += f", {row['data']}" + (f", filter {row['share']:.0%}" if row["share"] < 1 else "") + f", {row['cache']}"
    parts = [f"{row['distances_per_s'] / 1e9:,.1f} G distances/s", f"{row['queries_per_s']:,.0f} queries/s"]
    for name, seconds in row["seconds"].items():
        if name.startswith(OURS):
            parts.append(f"{name.removeprefix(OURS)} {1e3 * statistics.median(seconds):,.3f} ms".strip())
    if "limit" in row:
        parts.append(f"{row['of_bounds'][row['limit']]:.0%} of {row['limit']} at {row['clock_hz'] / 1e9:.2f} GHz")
    parts += [f"{times:,.1f} x {name}" for name, times in row["times"].items()]
    parts += [f"{name} called once, {seconds:.1f} s" for name, seconds in row["called_once"].items()]
    parts += [f"without {name}: {reason}" for name, reason in row["left_out"].items()]
    if "times_one_query" in row:
        parts.append(f"{row['times_one_query']:.2f} x one query's time")
    return f"{what}: {', '.join(parts)}, {row['extra_bytes'] / 1e6:,.0f} MB extra"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hamming_gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--shrink", type=int, default=1, help="divides the numbers of codes and queries")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    try:
        run(planned(given.shrink), device=given.device, minutes=given.minutes, output=given.output)
    except InputError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
