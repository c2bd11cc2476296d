"""Exact Hamming top-k on the CPU beside FAISS IndexBinaryFlat."""

import enum
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

from benchmarks.harness import append_results, describe_machine, median_ratio, time_in_rounds
from hashengine import HammingIndex, InputError

FAISS_MODES = {"faiss heap": True, "faiss counting": False}
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


def measure(codes: np.ndarray, queries: np.ndarray, k: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each system in each round; raises where the answers are not the same, bit for bit."""
    import faiss

    bits = 8 * codes.shape[1]
    index = HammingIndex(bits)
    index.add(codes)
    oracle = faiss.IndexBinaryFlat(bits)
    oracle.add(codes)

    def search_faiss(use_heap: bool) -> tuple[np.ndarray, np.ndarray]:
        oracle.use_heap = use_heap
        return oracle.search(queries, k)

    sample = queries[:VERIFIED_QUERIES]
    for mine, theirs in zip(index.search(sample, k), oracle.search(sample, k), strict=True):
        if not np.array_equal(mine, theirs):
            raise SystemExit(f"hamming: the answers must equal FAISS's before they are timed ({bits} bits, k = {k})")
    systems = {"hashengine": lambda: index.search(queries, k)}
    for name, use_heap in FAISS_MODES.items():
        systems[name] = lambda use_heap=use_heap: search_faiss(use_heap)
    return time_in_rounds(systems, rounds)


def run(
    *, codes: int, queries: int, bits: list[int], ks: list[int], data: Data, threads: int | None, rounds: int,
    output: Path | None,
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
    table = Table("bits", "k", "hashengine", "faiss heap", "faiss counting", "queries/s", "times faiss's best")
    table.caption = "G distances/s (10^9 pairs of a query and a code); the last column is the median of the rounds"
    rows = []
    progress = tqdm(total=len(bits) * len(ks), unit="row", disable=None, leave=False)
    for code_bits in bits:
        rng = np.random.default_rng(1)
        database, batch = draw_codes(data, codes, code_bits, rng), draw_codes(data, queries, code_bits, rng)
        for k in ks:
            seconds = measure(database, batch, k, rounds)
            best_mode = min(FAISS_MODES, key=lambda mode: statistics.median(seconds[mode]))
            medians = {name: statistics.median(times) for name, times in seconds.items()}
            ratio = median_ratio(seconds[best_mode], seconds["hashengine"])
            rates = {name: codes * queries / median / 1e9 for name, median in medians.items()}
            table.add_row(
                str(code_bits), str(k), *(f"{rates[name]:.2f}" for name in seconds),
                f"{queries / medians['hashengine']:,.0f}", f"{ratio:.1f}",
            )  # fmt: skip
            rows.append(
                machine
                | {"benchmark": "hamming", "codes": codes, "queries": queries, "bits": code_bits, "k": k}
                | {"data": data.value, "seconds": seconds, "times_faiss": ratio}
            )
            progress.update()
    progress.close()
    console.print(table)
    if output is not None:
        append_results(output, rows)
    return rows
