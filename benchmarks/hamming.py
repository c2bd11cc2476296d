"""Exact Hamming search on the CPU, of all codes, of half of them, within a radius, beside FAISS IndexBinaryFlat."""

import enum
import itertools
import os
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.harness import append_results, describe_machine, median_ratio, time_in_rounds
from hashengine import HammingIndex, InputError

VERIFIED_QUERIES = 50


class Data(str, enum.Enum):
    random = "random"  # independent bits
    clustered = "clustered"  # 1,000 centres with a few bits flipped, as learned codes are: large groups of ties


def draw_codes(data: Data, count: int, bits: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 [count, bits / 8]."""
    codes = rng.integers(0, 256, (count, bits // 8), dtype=np.uint8)
    if data is Data.clustered:
        # The conjunction of four random bytes: a bit flips with probability 1/16.
        flips = codes
        for _ in range(3):
            flips = flips & rng.integers(0, 256, codes.shape, dtype=np.uint8)
        centres = np.random.default_rng(0).integers(0, 256, (1000, bits // 8), dtype=np.uint8)
        codes = centres[rng.integers(0, len(centres), count)] ^ flips
    return codes


class Task(str, enum.Enum):
    search = "search"  # the k nearest
    filter = "filter"  # the k nearest of a random half of the codes
    range = "range"  # all within the radius that holds about k


Answer = tuple[np.ndarray, ...]


def make_systems(
    task: Task, codes: np.ndarray, queries: np.ndarray, k: int
) -> dict[str, Callable[[np.ndarray], Answer]]:
    """Each system's search, of a batch of queries; range searches all give (lims, distances, ids)."""
    import faiss

    count, bits = len(codes), 8 * codes.shape[1]
    index = HammingIndex(bits)
    index.add(codes)
    oracle = faiss.IndexBinaryFlat(bits)
    oracle.add(codes)
    if task is Task.range:
        radius = radius_of(index, queries[:VERIFIED_QUERIES], k)
        return {
            "hashengine": lambda batch: index.range_search(batch, radius),
            "faiss": lambda batch: oracle.range_search(batch, radius + 1),  # exclusive
        }
    mask = np.random.default_rng(2).random(count) < 0.5 if task is Task.filter else None
    parameters = None
    if mask is not None:
        bitmap = np.packbits(mask, bitorder="little")
        parameters = faiss.SearchParameters(sel=faiss.IDSelectorBitmap(count, faiss.swig_ptr(bitmap)))
        parameters.bitmap = bitmap  # which FAISS only points to

    def search_faiss(batch: np.ndarray, use_heap: bool) -> Answer:
        oracle.use_heap = use_heap
        return oracle.search(batch, k, params=parameters)

    return {
        "hashengine": lambda batch: index.search(batch, k, filter=mask),
        "faiss heap": lambda batch: search_faiss(batch, True),
        "faiss counting": lambda batch: search_faiss(batch, False),
    }


def radius_of(index: HammingIndex, queries: np.ndarray, k: int) -> int:
    """The smallest radius that holds k codes of a query, on the average."""
    within = index.count(queries).cumsum(1).mean(0)
    return int(np.flatnonzero(within >= k)[0])


def in_order(answer: Answer) -> Answer:
    """A range search's answer with the hits of a query by (distance, id), which FAISS leaves open."""
    if len(answer) == 2:
        return answer
    lims, distances, ids = answer
    lims = lims.astype(np.int64)  # FAISS's are unsigned
    query = np.repeat(np.arange(len(lims) - 1), np.diff(lims))
    order = np.lexsort((ids, distances, query))
    return lims, distances[order], ids[order]


def measure(task: Task, codes: np.ndarray, queries: np.ndarray, k: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each system in each round; raises where the answers are not the same, bit for bit."""
    systems = make_systems(task, codes, queries, k)
    mine, *theirs = (in_order(system(queries[:VERIFIED_QUERIES])) for system in systems.values())
    if not all(np.array_equal(a, b) for other in theirs for a, b in zip(mine, other, strict=True)):
        raise SystemExit(
            f"hamming: the answers must equal FAISS's before they are timed ({task.value}, {8 * codes.shape[1]} bits, "
            f"k = {k})"
        )
    return time_in_rounds({name: partial(system, queries) for name, system in systems.items()}, rounds)


def run(
    *, tasks: list[Task], codes: int, queries: int, bits: list[int], ks: list[int], data: Data, threads: int | None,
    rounds: int, output: Path | None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Measure, print the table, append to ``output``; returns the rows."""
    try:
        import faiss
    except ImportError:
        raise SystemExit("hamming: needs faiss to compare with: pip install 'hashengine[bench]'") from None
    for code_bits in bits:
        if code_bits % 8:
            raise InputError(f"bits must be a multiple of 8, got {code_bits}")
    if max(ks) > codes:
        raise InputError(f"k must be at most the number of codes ({codes}), got {max(ks)}")
    threads = threads or os.cpu_count() or 1
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    machine = describe_machine() | {"faiss": faiss.__version__, "threads": threads}
    console = Console(width=None if sys.stdout.isatty() else 120)  # a file has no width, and tables need some
    console.print(
        f"{codes:,} codes, {queries:,} queries, {data.value} data, {threads} threads, "
        f"SIMD {machine['simd_level']}, {machine['cpu']}; caches warm; median of {rounds} rounds"
    )
    table = Table("task", "bits", "k", "hashengine", "faiss's best", "queries/s", "times faiss's best")
    table.caption = "G distances/s (10^9 pairs of a query and a code); the last column is the median of the rounds"
    rows = []
    progress = tqdm(total=len(tasks) * len(bits) * len(ks), unit="row", disable=None, leave=False)
    for code_bits in bits:
        rng = np.random.default_rng(1)
        database, batch = draw_codes(data, codes, code_bits, rng), draw_codes(data, queries, code_bits, rng)
        for task, k in itertools.product(tasks, ks):
            seconds = measure(task, database, batch, k, rounds)
            medians = {name: statistics.median(times) for name, times in seconds.items()}
            best = min((name for name in seconds if name != "hashengine"), key=medians.__getitem__)
            ratio = median_ratio(seconds[best], seconds["hashengine"])
            rates = [codes * queries / medians[name] / 1e9 for name in ("hashengine", best)]
            table.add_row(
                task.value, str(code_bits), str(k), *(f"{rate:.2f}" for rate in rates),
                f"{queries / medians['hashengine']:,.0f}", f"{ratio:.1f}",
            )  # fmt: skip
            rows.append(
                machine
                | {"benchmark": "hamming", "task": task.value, "codes": codes, "queries": queries, "bits": code_bits}
                | {"k": k, "data": data.value, "seconds": seconds, "times_faiss": ratio}
            )
            progress.update()
    progress.close()
    console.print(table)
    if output is not None:
        append_results(output, rows)
    return rows
