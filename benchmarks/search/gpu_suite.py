"""`hamming-gpu`: searches, latencies, builds and streamed searches on a GPU, the most important ones first.

It needs only torch, numpy and hashengine. If the packages for the command line are not installed, run
`python -m benchmarks.search.gpu_suite --output rows.jsonl --minutes 6`.
"""

import argparse
import gc
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.harness import Row, WrongAnswer, append_rows, describe_machine, fail_if_any, within_minutes
from benchmarks.search import gpu_limits
from benchmarks.search.building import measure_build
from benchmarks.search.cases import Case, Task
from benchmarks.search.data import Data
from benchmarks.search.database import Database
from benchmarks.search.gpu import measure_search
from benchmarks.search.gpu_limits import Gpu
from benchmarks.search.latency import measure_latency
from benchmarks.search.row_names import OURS
from benchmarks.search.streaming import measure_streaming
from benchmarks.timing import Clock, make_clock
from hashengine import InputError
from hashengine._validation import check_device
from tests.helpers.faiss_oracle import faiss_version

NAME = "hamming-gpu"
SEARCH, LATENCY, BUILD, STREAM = "search", "latency", "build", "stream"  # the kinds of measurement
SECONDS_PER_ROW = 1.0  # about how long the rounds of a search row take

_M = 1_000_000

Step = tuple[str, Case]  # the kind of measurement, and what to measure


def suite() -> list[Step]:
    """All steps, the most important ones first. In each list, steps that search the same codes are adjacent."""
    large = [Case(_M, bits, 10_000, k) for bits in (64, 128) for k in (10, 100, 1000)]
    large += [Case(10 * _M, bits, 10_000, k) for bits in (64, 128) for k in (10, 100, 1000)]
    large += [Case(_M, bits, 10_000, k) for bits in (256, 512, 1024) for k in (10, 100, 1000)]
    few_queries = [Case(100 * _M, 64, queries, 10) for queries in (1, 2, 8, 32)] + [Case(_M, 64, 1, 10)]
    latencies = [Case(_M, 64, queries, 10) for queries in (1, 2, 8, 32)]
    long_rankings = [Case(_M, 64, 100, _M), Case(10 * _M, 64, 100, 100_000)]
    filtered = [Case(_M, 64, 10_000, 100, Task.filter, share=share) for share in (0.01, 0.5)]
    other_tasks = [Case(_M, 64, 10_000, 100, Task.range), Case(_M, 64, 10_000, None, Task.map)]
    hard = [Case(_M, 64, 10_000, 100, data=data) for data in (Data.equal, Data.best_last, Data.best_first)]
    hard += [Case(1000, 64, 10_000, 10)]
    last_searches = (*long_rankings, Case(1000 * _M, 64, 1, 10), *filtered, *other_tasks, *hard)
    return [
        *((SEARCH, case) for case in (*large, *few_queries)),
        *((LATENCY, case) for case in latencies),
        *((SEARCH, case) for case in last_searches),
        (BUILD, Case(10 * _M, 64, 1, 10)),
        (STREAM, Case(100 * _M, 64, 100, 10)),
    ]


def shrunk_suite(divisor: int) -> list[Step]:
    """The suite with the numbers of codes and queries divided by `divisor`, to try it on a slow machine."""
    return [(what, _shrink(case, divisor)) for what, case in suite()]


def _shrink(case: Case, divisor: int) -> Case:
    codes = max(1000, case.codes // divisor) if divisor > 1 else case.codes
    k = None if case.k is None else min(case.k, int(case.share * codes) // 2 if case.share < 1 else codes)
    return case._replace(codes=codes, queries=max(1, case.queries // divisor), k=k)


def run(
    steps: Sequence[Step],
    *,
    where: str = NAME,
    device: str,
    minutes: float,
    output: Path | None,
    seconds: float = SECONDS_PER_ROW,
    rounds: int | None = None,
    images: Path | None = None,
) -> list[Row]:
    """Verify and measure step by step; print each row and append it to `output` as soon as it is measured.

    Args:
        steps: what to measure, in this order.
        where: the command to name in an error.
        device: "cuda", "cuda:1", ..., or "cpu" to try the command.
        minutes: after this time no step is started.
        output: a JSON Lines file.
        seconds: about how long the rounds of a search row take.
        rounds: the number of rounds of a search row, instead of `seconds`.
        images: the folder of the image archives; only learned codes that are not cached need it.

    Raises:
        SystemExit: at the end, if a step failed.
    """
    torch_device = check_device(where, device)
    clock = make_clock(torch_device)
    gpu = gpu_limits.describe(torch_device, clock)
    machine = describe_machine(torch_device) | {"benchmark": NAME, "faiss": faiss_version()}
    print(_heading(machine, gpu))
    rows, failures, database = [], [], None
    for what, case in within_minutes(minutes, steps):
        try:
            if database is None or not database.holds(case):
                database = None  # release the previous codes before the next ones are made
                gc.collect()
                if torch_device.type == "cuda":
                    torch.cuda.empty_cache()
                database = Database(case, torch_device, images)
            measured = _measure(what, case, database, clock, gpu, seconds, rounds)
        except (WrongAnswer, RuntimeError, ValueError, MemoryError) as error:
            failures.append(f"{what}, {case}: {error}".splitlines()[0])
            print(failures[-1])
            continue
        measured = [machine | row for row in measured]
        for row in measured:
            print(describe(row), flush=True)
        if output is not None:
            append_rows(output, measured)
        rows += measured
    fail_if_any(failures, len(steps))
    return rows


def _measure(
    what: str, case: Case, database: Database, clock: Clock, gpu: Gpu | None, seconds: float, rounds: int | None
) -> list[Row]:
    if what == LATENCY:
        return [measure_latency(case, database, clock)]
    if what == BUILD:
        return [measure_build(case, database)]
    if what == STREAM:
        return [measure_streaming(case, database)]
    return measure_search(case, database, clock, gpu, seconds, rounds)


def _heading(machine: Row, gpu: Gpu | None) -> str:
    text = f"{machine.get('gpu') or machine['cpu']}, torch {machine['torch']}, FAISS {machine['faiss'] or 'missing'}"
    if gpu is not None:
        text += f", {gpu.multiprocessors} multiprocessors, at most {gpu.clock / 1e9:.3f} GHz"
        text += f", a copy moves {gpu.memory / 1e12:.2f} TB/s"
    return text + f", commit {machine['commit']}; answers are verified before they are timed"


def describe(row: Row) -> str:
    """A row in one line of text."""
    what = f"{row['task']}: {row['codes']:,} x {row['bits']} bits"
    if row["task"] == "latency":
        quantiles = [f"{name} {1e6 * at['p50']:,.1f} / {1e6 * at['p99']:,.1f}" for name, at in row["latency"].items()]
        return f"{what}, {row['queries']} queries, k = {row['k']}, p50 / p99 in µs: {'; '.join(quantiles)}"
    if row["task"] == "build":
        rates = [f"{name} {rate / 1e6:,.0f} M codes/s" for name, rate in row["codes_per_s"].items()]
        return f"{what}: {', '.join(rates)}, {row['extra_bytes'] / 1e6:,.0f} MB extra"
    if row["task"] == "stream":
        rates = f"{row['distances_per_s'] / 1e9:,.1f} G distances/s, {row['of_copy']:.0%} of the rate of a copy,"
        copy = f"which moves {row['host_bytes_per_s'] / 1e9:.0f} GB/s"
        return f"{what} in host memory, {row['queries']} queries, k = {row['k']}: {rates} {copy}"
    what += f", {row['queries']:,} queries, k = {'all' if row['k'] is None else format(row['k'], ',')}"
    what += f", {row['data']}" + (f", filter {row['share']:.0%}" if row["share"] < 1 else "") + f", {row['cache']}"
    parts = [f"{row['distances_per_s'] / 1e9:,.1f} G distances/s", f"{row['queries_per_s']:,.0f} queries/s"]
    for name, seconds in row["seconds"].items():
        if name.startswith(OURS):
            parts.append(f"{name.removeprefix(OURS)} {1e3 * statistics.median(seconds):,.3f} ms".strip())
    if "lowest_limit" in row:
        share = row["of_limits"][row["lowest_limit"]]
        parts.append(f"{share:.0%} of the limit '{row['lowest_limit']}' at {row['clock_hz'] / 1e9:.2f} GHz")
    parts += [f"{times:,.1f} times as fast as {name}" for name, times in row["times"].items()]
    parts += [f"{name} called once, {seconds:.1f} s" for name, seconds in row["called_once"].items()]
    parts += [f"without {name}: {reason}" for name, reason in row["left_out"].items()]
    if "times_one_query" in row:
        parts.append(f"{row['times_one_query']:.2f} times the time of one query")
    return f"{what}: {', '.join(parts)}, {row['extra_bytes'] / 1e6:,.0f} MB extra"


def main() -> None:
    """The command line without typer."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search.gpu_suite", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=6.0, help="after this many minutes, no measurement is started")
    parser.add_argument("--shrink", type=int, default=1, help="divides the numbers of codes and queries")
    parser.add_argument("--output", type=Path, help="file to append the result rows to, one JSON object per line")
    options = parser.parse_args()
    try:
        run(shrunk_suite(options.shrink), device=options.device, minutes=options.minutes, output=options.output)
    except InputError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
