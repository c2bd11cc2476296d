"""`mapped`: searches of a mapped index that the page cache cannot hold, against a plain read of the same file.

A memory cgroup limits the page cache, if this machine permits one. The pages of the file are evicted before each call
in any case, so that it is read from the disk.
"""

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

from benchmarks.harness import Row, append_rows, console_width, describe_machine, set_threads
from benchmarks.search import cgroup
from benchmarks.timing import median_ratio
from hashengine import HammingIndex
from hashengine._validation import check_bits
from hashengine.errors import invalid

_ROWS_PER_DRAW = 1 << 22
_READ_BUFFER_BYTES = 1 << 22


def run(
    *,
    codes: int,
    queries: int,
    bits: int,
    k: int,
    cache_bytes: int,
    threads: int | None,
    rounds: int,
    folder: Path,
    output: Path | None,
) -> Row:
    """Save an index and its answers; then time searches of the mapped file in a new process.

    The row is printed, appended to `output` and returned. Its field `limit` is "cgroup" if a cgroup limited the page
    cache, "eviction" if pages were only evicted. `of_read` is the search's rate divided by the rate of the plain read.
    """
    check_bits("mapped", bits)
    if k > codes:
        raise invalid("mapped", "k", f"at most the number of codes, {codes}", k)
    threads = set_threads(threads)
    file_bytes = codes * bits // 8
    folder.mkdir(parents=True, exist_ok=True)
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < 2 * file_bytes:
        expected = f"on a disk with {2 * file_bytes / 1e9:.1f} GB free"
        raise invalid("mapped", "folder", expected, f"{str(folder)!r} with {free_bytes / 1e9:.1f} GB")
    path = folder / f"mapped-{os.getpid()}"
    try:
        _save_index_and_answers(path, codes, queries, bits, k)
        limit = cgroup.create(cache_bytes)
        try:
            measured = _measure_in_another_process(path, k, threads, rounds, limit)
        finally:
            if limit is not None:
                limit.rmdir()
    finally:
        shutil.rmtree(path, ignore_errors=True)
    row = describe_machine() | {
        "benchmark": "mapped", "codes": codes, "queries": queries, "bits": bits, "k": k, "threads": threads,
        "limit": "eviction" if limit is None else "cgroup", "cache_bytes": cache_bytes, **measured,
        "of_read": median_ratio(measured["seconds"]["read"], measured["seconds"]["search"]),
    }  # fmt: skip
    _print(row, file_bytes)
    if output is not None:
        append_rows(output, [row])
    return row


def _print(row: Row, file_bytes: int) -> None:
    limited = f"a page cache of {row['cache_bytes'] / 2**20:.0f} MiB (cgroup)"
    how = limited if row["limit"] == "cgroup" else "its pages are evicted before each call"
    console = Console(width=console_width(140))
    console.print(
        f"{row['codes']:,} codes of {row['bits']} bits, a mapped file of {file_bytes / 1e9:.2f} GB; {how}; "
        f"{row['queries']:,} queries, k = {row['k']}, {row['threads']} threads, {row['cpu']}; median of "
        f"{len(row['seconds']['search'])} rounds; answers equal those of a search in memory"
    )
    for name, seconds in row["seconds"].items():
        rate = statistics.median(file_bytes / 1e9 / taken for taken in seconds)
        from_disk = statistics.median(row["disk_bytes"][name])
        console.print(f"{name}: {rate:.2f} GB/s; {from_disk / file_bytes:.0%} of the file read from the disk")
    console.print(f"search: {row['of_read']:.0%} of a plain read's rate")


def _save_index_and_answers(path: Path, codes: int, queries: int, bits: int, k: int) -> None:
    """Save to `path`: an index of random codes, random queries, and the answers of the index while it is in memory."""
    rng = np.random.default_rng(1)
    index = HammingIndex(bits)
    for start in range(0, codes, _ROWS_PER_DRAW):
        index.add(rng.integers(0, 256, (min(_ROWS_PER_DRAW, codes - start), bits // 8), dtype=np.uint8))
    batch = rng.integers(0, 256, (queries, bits // 8), dtype=np.uint8)
    distances, ids = index.search(batch, k)
    index.save(path / "index")
    np.savez(path / "answers.npz", queries=batch, distances=distances, ids=ids)
    os.sync()  # a page can be evicted only after it was written to the disk


def _measure_in_another_process(path: Path, k: int, threads: int, rounds: int, limit: Path | None) -> Row:
    """Run `measure` in a new process, which does not hold the codes in its memory."""
    command = [sys.executable, "-m", "benchmarks.search.mapped", path, k, threads, rounds, limit or ""]
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        raise SystemExit("mapped: the process that searches failed")
    return json.loads(done.stdout)


def measure(path: Path, k: int, threads: int, rounds: int, limit: Path | None) -> Row:
    """Time searches and plain reads in turn. Returns the seconds of each call and the bytes that it read from the disk.

    Args:
        path: the folder that `_save_index_and_answers` wrote.
        k: the number of neighbours.
        threads: torch's number of threads.
        rounds: the number of rounds; a round is one search and one read.
        limit: the folder of the cgroup to enter; None if there is none.
    """
    torch.set_num_threads(threads)
    answers = np.load(path / "answers.npz")
    queries = answers["queries"]
    warm_up = HammingIndex(8 * queries.shape[1])
    warm_up.add(queries)
    warm_up.search(queries, 1)  # loads libraries and starts threads, which must not count towards the cgroup's limit
    (file,) = (path / "index").glob("codes-*.bin")
    if limit is not None:
        cgroup.enter(limit)
    seconds: dict[str, list[float]] = {"search": [], "read": []}
    disk_bytes: dict[str, list[int]] = {"search": [], "read": []}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        with open(file, "rb") as source:
            os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # evicts pages that are not mapped
        before, start = _bytes_read_from_disk(), time.perf_counter()
        result = call()
        seconds[name].append(time.perf_counter() - start)
        disk_bytes[name].append(_bytes_read_from_disk() - before)
        return result

    for _ in range(rounds):
        index = HammingIndex.load(path / "index", mmap=True)
        found = timed("search", partial(index.search, queries, k))
        if not all(map(np.array_equal, found, (answers["distances"], answers["ids"]))):
            raise SystemExit("mapped: the answers must equal those of a search in memory")
        del index  # mapped pages cannot be evicted
        timed("read", partial(_read, file))
    return {"seconds": seconds, "disk_bytes": disk_bytes}


def _read(file: Path) -> None:
    buffer = bytearray(_READ_BUFFER_BYTES)
    with open(file, "rb", buffering=0) as source:
        os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while source.readinto(buffer):
            pass


def _bytes_read_from_disk() -> int:
    """The number of bytes that this process has read from a disk, in read calls and in page faults."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"])


if __name__ == "__main__":
    path, k, threads, rounds, limit = sys.argv[1:]
    print(json.dumps(measure(Path(path), int(k), int(threads), int(rounds), Path(limit) if limit else None)))
