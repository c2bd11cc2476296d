"""Exact Hamming search on the CPU beside FAISS IndexBinaryFlat, other peers, and what the machine can do at most."""

import os
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks import limits, peers
from benchmarks.codes import Codes, Data, make_codes
from benchmarks.harness import append_results, describe_machine, median_ratio, time_in_rounds
from benchmarks.memory import extra_resident_bytes
from benchmarks.systems import Task, check_sizes, make_systems
from benchmarks.timing import last_level_cache

OURS, BARE_LOOP, READ, READ_BEYOND = "hashengine", "bare loop", "read", "read beyond the cache"
_CACHES = 4  # as many times the last cache, and a read is one of memory

Row = dict[str, Any]


def measure(task: Task, codes: Codes, k: int, share: float, threads: int, rounds: int) -> Row:
    """Seconds of each system in each round, and what follows from them; raises where an answer is wrong.

    ``pairs`` are those of a query and a code that a system's call gets through, ``bytes`` those that a read's does; the
    shares are medians of the rounds.
    """
    calls = make_systems(task, codes, k, share)
    extra_bytes = extra_resident_bytes(calls[OURS])
    asked = len(codes.database) * len(codes.queries)
    pairs, read = dict.fromkeys(calls, asked), {}
    if task is Task.search:
        for name, peer in peers.make_peers(codes.database, codes.queries, k, threads).items():
            calls[name], pairs[name] = peer
    if bare_loop := limits.bare_loop(8 * codes.database.shape[1], threads):
        calls[BARE_LOOP], pairs[BARE_LOOP] = bare_loop
    if len(codes.queries) == 1:  # then memory is the limit
        for name, buffer in _buffers(codes.database).items():
            if limit := limits.read_memory(buffer, threads):
                calls[name], read[name] = limit
    seconds = time_in_rounds(calls, rounds)
    row = {"seconds": seconds, "pairs": pairs, "bytes": read, "extra_bytes": extra_bytes}
    theirs = [name for name in seconds if name.startswith("faiss")]
    if theirs:
        best = min(theirs, key=lambda name: statistics.median(seconds[name]))
        row |= {"faiss_best": best, "times_faiss": median_ratio(seconds[best], seconds[OURS])}
    if BARE_LOOP in seconds:
        row["of_bare_loop"] = median_ratio(seconds[BARE_LOOP], seconds[OURS]) * asked / pairs[BARE_LOOP]
    row["of_read"] = {
        name: median_ratio(seconds[name], seconds[OURS]) * codes.database.nbytes / read[name] for name in read
    }
    return row


def _buffers(codes: np.ndarray) -> dict[str, np.ndarray]:
    """What a single query's search is compared with a read of: the codes, and more than the last cache keeps."""
    beyond = _CACHES * last_level_cache()
    return {READ: codes} | ({READ_BEYOND: np.ones(beyond, np.uint8)} if codes.nbytes < beyond else {})


def make_table(rows: list[Row]) -> Table:
    peer_names = [name for name in peers.MAKERS if any(name in row["seconds"] for row in rows)]
    headers = ["task", "bits", "k", OURS, "faiss's best", *peer_names, BARE_LOOP, "queries/s", "times faiss's best"]
    headers += ["of the bare loop", "extra MB"]
    reads = any(row["of_read"] for row in rows)
    if reads:
        headers.append("of a read (beyond the cache)")
    table = Table(*headers)
    table.caption = (
        "G distances/s (10^9 pairs of a query and a code); times and shares are medians of the rounds; extra: memory "
        "above codes, ids and answers"
    )
    if "usearch" in peer_names:
        table.caption += "; usearch: fewer queries"
    if "numkong" in peer_names:
        table.caption += "; numkong: fewer queries, distances only"
    for row in rows:
        medians = {name: statistics.median(times) for name, times in row["seconds"].items()}
        rates = {name: f"{count / medians[name] / 1e9:.2f}" for name, count in row["pairs"].items()}
        shares = " / ".join(f"{share:.0%}" for share in row["of_read"].values())
        table.add_row(
            row["task"], str(row["bits"]), str(row["k"] or "all"), rates[OURS], rates.get(row.get("faiss_best"), ""),
            *(rates.get(name, "") for name in peer_names), rates.get(BARE_LOOP, ""),
            f"{row['queries'] / medians[OURS]:,.0f}", f"{row['times_faiss']:.1f}" if "times_faiss" in row else "",
            f"{row['of_bare_loop']:.0%}" if "of_bare_loop" in row else "",
            "" if row["extra_bytes"] is None else f"{row['extra_bytes'] / 2**20:.0f}", *([shares] if reads else []),
        )  # fmt: skip
    return table


def run(
    *, tasks: list[Task], codes: int, queries: int, bits: list[int], ks: list[int], share: float, data: Data,
    images: Path, threads: int | None, rounds: int, output: Path | None,
) -> list[Row]:  # fmt: skip
    """Measure, print the table, append to ``output``; returns the rows."""
    try:
        import faiss
    except ImportError:
        raise SystemExit("hamming: needs faiss to compare with: pip install 'hashengine[bench]'") from None
    check_sizes(codes, bits, ks)
    threads = threads or os.cpu_count() or 1
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    versions = {"faiss": faiss.__version__} | peers.installed()
    machine = describe_machine() | versions | {"threads": threads, "bare_loop_simd": limits.simd()}
    console = Console(width=None if sys.stdout.isatty() else 140)  # a file has no width, and tables need some
    console.print(
        f"{codes:,} codes, {queries:,} queries, {data.value} data, {threads} threads, "
        f"SIMD {machine['simd_level']}, {machine['cpu']}; caches warm; median of {rounds} rounds"
    )
    for name in peers.MAKERS.keys() - versions.keys():
        console.print(f"without {name}, which is not installed: pip install 'hashengine[bench]'")
    if machine["bare_loop_simd"] == "none":
        console.print("without the bare loop and reads, which need a C++ compiler")
    rows = []
    # The full ranking has no k.
    cases = [(task, k) for task in tasks for k in ((None,) if task is Task.map else ks)]
    progress = tqdm(total=len(cases) * len(bits), unit="row", disable=None, leave=False)
    for code_bits in bits:
        drawn = make_codes(data, codes, queries, code_bits, images)
        for task, k in cases:
            rows.append(
                machine
                | {"benchmark": "hamming", "task": task.value, "codes": codes, "queries": queries, "bits": code_bits}
                | {"k": k, "data": data.value}
                | ({"share": share} if task is Task.filter else {})
                | measure(task, drawn, k, share, threads, rounds)
            )
            progress.update()
    progress.close()
    console.print(make_table(rows))
    if output is not None:
        append_results(output, rows)
    return rows
