"""Searches of a mapped index that memory cannot keep, so that each one reads it from the disk, beside a plain read."""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from benchmarks import cgroup
from benchmarks.harness import append_results, describe_machine, median_ratio
from hashengine import HammingIndex, InputError

_DRAWN_ROWS = 1 << 22  # at a time
_READ_BYTES = 1 << 22


def run(
    *, codes: int, queries: int, bits: int, k: int, cache_bytes: int, threads: int | None, rounds: int, folder: Path,
    output: Path | None,
) -> dict[str, Any]:  # fmt: skip
    """Build the index, search it in memory, then mapped in another process; print, append; returns the row."""
    if bits % 8:
        raise InputError(f"bits must be a multiple of 8, got {bits}")
    if k > codes:
        raise InputError(f"k must be at most the number of codes ({codes}), got {k}")
    threads = threads or os.cpu_count() or 1
    torch.set_num_threads(threads)
    size = codes * bits // 8
    folder.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(folder).free < 2 * size:
        raise InputError(f"folder must have {2 * size / 1e9:.1f} GB of free disk, of which {str(folder)!r} has less")
    path = folder / f"mapped-{os.getpid()}"
    try:
        batch = _save_with_answers(path, codes, queries, bits, k)
        limit = cgroup.make(cache_bytes)
        try:
            measured = _in_another_process(path, k, threads, rounds, limit)
        finally:
            if limit is not None:
                limit.rmdir()
    finally:
        shutil.rmtree(path, ignore_errors=True)
    gigabytes = {name: [size / 1e9 / s for s in seconds] for name, seconds in measured["seconds"].items()}
    row = describe_machine() | {
        "benchmark": "mapped", "codes": codes, "queries": len(batch), "bits": bits, "k": k, "threads": threads,
        "limit": "cgroup" if limit is not None else "eviction", "cache_bytes": cache_bytes, **measured,
        "of_read": median_ratio(measured["seconds"]["read"], measured["seconds"]["search"]),
    }  # fmt: skip
    how = f"a page cache of {cache_bytes / 2**20:.0f} MiB (cgroup)" if limit is not None else "its pages evicted before"
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(
        f"{codes:,} codes of {bits} bits, a mapped file of {size / 1e9:.2f} GB; {how}; {queries:,} queries, k = {k}, "
        f"{threads} threads, {row['cpu']}; median of {rounds} rounds; answers equal to a search in memory"
    )
    for name, rates in gigabytes.items():
        read = statistics.median(measured["disk_bytes"][name])
        console.print(f"{name}: {statistics.median(rates):.2f} GB/s; from the disk {read / size:.0%} of the file")
    console.print(f"search: {row['of_read']:.0%} of a plain read's rate")
    if output is not None:
        append_results(output, [row])
    return row


def _save_with_answers(path: Path, codes: int, queries: int, bits: int, k: int) -> np.ndarray:
    """An index at ``path`` of random codes, with the answers that it gives in memory; returns the queries."""
    rng = np.random.default_rng(1)
    index = HammingIndex(bits)
    for start in range(0, codes, _DRAWN_ROWS):
        index.add(rng.integers(0, 256, (min(_DRAWN_ROWS, codes - start), bits // 8), dtype=np.uint8))
    batch = rng.integers(0, 256, (queries, bits // 8), dtype=np.uint8)
    distances, ids = index.search(batch, k)
    index.save(path / "index")
    np.savez(path / "answers.npz", queries=batch, distances=distances, ids=ids)
    os.sync()  # what is not on the disk cannot be evicted
    return batch


def _in_another_process(path: Path, k: int, threads: int, rounds: int, limit: Path | None) -> dict[str, Any]:
    """What `main` measured, in a process in which nothing of the file has been in memory."""
    command = [sys.executable, "-m", "benchmarks.mapped", path, k, threads, rounds, limit or ""]
    root = str(Path(__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        raise SystemExit("mapped: the process that searches failed")
    return json.loads(done.stdout)


def main(path: Path, k: int, threads: int, rounds: int, limit: Path | None) -> dict[str, Any]:
    """Seconds, and bytes that came from the disk, of searches and of plain reads in turns."""
    torch.set_num_threads(threads)
    answers = np.load(path / "answers.npz")
    queries = answers["queries"]
    warm = HammingIndex(8 * queries.shape[1])
    warm.add(queries)
    warm.search(queries, 1)  # libraries and threads come before the limit
    (file,) = (path / "index").glob("codes-*.bin")
    if limit is not None:
        cgroup.enter(limit)
    seconds: dict[str, list[float]] = {"search": [], "read": []}
    disk_bytes: dict[str, list[int]] = {"search": [], "read": []}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        with open(file, "rb") as source:
            os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # evicts what nobody has mapped
        before, start = _disk_bytes(), time.perf_counter()
        result = call()
        seconds[name].append(time.perf_counter() - start)
        disk_bytes[name].append(_disk_bytes() - before)
        return result

    for _ in range(rounds):
        index = HammingIndex.load(path / "index", mmap=True)
        found = timed("search", partial(index.search, queries, k))
        if not all(map(np.array_equal, found, (answers["distances"], answers["ids"]))):
            raise SystemExit("mapped: the answers must equal those of a search in memory")
        del index
        timed("read", partial(_read, file))
    return {"seconds": seconds, "disk_bytes": disk_bytes}


def _read(file: Path) -> None:
    buffer = bytearray(_READ_BYTES)
    with open(file, "rb", buffering=0) as source:
        os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while source.readinto(buffer):
            pass


def _disk_bytes() -> int:
    """What this process has read from a disk so far, whatever way."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"])


if __name__ == "__main__":
    path, k, threads, rounds, limit = sys.argv[1:]
    print(json.dumps(main(Path(path), int(k), int(threads), int(rounds), Path(limit) if limit else None)))
