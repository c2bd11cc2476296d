"""`single-query`: the time of a search of few codes for one query, its parts, and the same search with FAISS.

Such a search takes a few microseconds, so the overhead of the call counts. It has three parts: the checks of
`HammingIndex.search` in Python, the call of the native module with the allocation of its results, and the kernel. The
time of the kernel grows with the number of codes; the overhead does not.
"""

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from benchmarks.harness import Row, WrongAnswer, append_rows, console_width, describe_machine, set_threads
from benchmarks.search.latency import host_seconds, quantiles
from benchmarks.search.row_names import FAISS, NATIVE, NATIVE_ONE_CODE, ONE_THREAD, OP, OURS, TENSOR
from hashengine import HammingIndex, _native, ops
from hashengine.errors import invalid
from tests.helpers.faiss_oracle import FaissOracle

CODES = (1_000, 10_000, 20_000, 50_000, 100_000, 200_000, 500_000, 1_000_000)


def run(
    *, codes: Sequence[int], bits: int, k: int, busy: Sequence[int], threads: int | None, output: Path | None
) -> list[Row]:
    """Measure every number of codes with every number of busy processes.

    Args:
        codes: numbers of codes.
        bits: the length of a code.
        k: the number of neighbours.
        busy: numbers of other processes that keep a core busy during a measurement.
        threads: torch's number of threads; None for all cores.
        output: a JSON Lines file to append the rows to.

    Returns:
        One row per measurement. Its field `latency` has quantiles of the seconds of each system's calls.
    """
    if k > min(codes):
        raise invalid("single-query", "k", f"at most the smallest number of codes, {min(codes)}", k)
    if _native.module() is None:
        raise invalid("single-query", "the native module", "in use", _native.why_not(), _native.rebuild_command())
    set_threads(threads)
    console, rows = Console(width=console_width(160)), []
    for processes in busy:
        with busy_processes(processes):
            for count in codes:
                row = describe_machine() | {"benchmark": "single-query", "busy": processes}
                row |= measure(count, bits, k)
                console.print(line(row))
                rows.append(row)
    if output is not None:
        append_rows(output, rows)
    return rows


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Yield `count` processes that compute without end, at the priority of this one; afterwards, end them."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def measure(count: int, bits: int, k: int) -> Row:
    """Verify the answer to one query among `count` random codes; then time the systems, which take turns."""
    rng = np.random.default_rng(count)
    codes, query = (rng.integers(0, 256, (rows, bits // 8), dtype=np.uint8) for rows in (count, 1))
    index, oracle = HammingIndex(bits), FaissOracle(codes)
    index.add(codes)
    stored, tensor, native = index.codes, torch.from_numpy(query), _native.module()
    array = stored.numpy()
    expected = oracle.search(query, k)
    systems = {
        OURS: lambda: index.search(query, k),
        TENSOR: lambda: index.search(tensor, k),
        ONE_THREAD: lambda: index.search(query, k, num_threads=1),
        NATIVE: lambda: native.hamming_topk(query, array, k, None, 0),
        OP: lambda: ops.hamming_topk(tensor, stored, k),
        FAISS: lambda: oracle.search(query, k),
    }
    for name, call in systems.items():
        if not all(map(np.array_equal, map(np.asarray, call()), expected)):
            raise WrongAnswer(f"{name}, {count} codes: the answer must equal that of {oracle.name}")
    systems[NATIVE_ONE_CODE] = lambda: native.hamming_topk(query, array[:1], 1, None, 0)
    bursts = {name: lambda calls, call=call: host_seconds(call, calls) for name, call in systems.items()}
    return {"codes": count, "queries": 1, "bits": bits, "k": k, "latency": quantiles(bursts)}


def line(row: Row) -> str:
    """A row as one line of text."""
    medians = [f"{name} {1e6 * at['p50']:,.1f}" for name, at in row["latency"].items()]
    return f"{row['codes']:,} codes, {row['busy']} busy processes, microseconds: {', '.join(medians)}"
