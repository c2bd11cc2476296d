"""`hamming` on the CPU: search against FAISS `IndexBinaryFlat`, other libraries, a bare loop and a plain read.

The bare loop only computes distances to cached codes; the plain read only reads memory
(benchmarks/search/cpu_rates.py).
"""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from tqdm import tqdm

from benchmarks.harness import (
    Row,
    WrongAnswer,
    append_rows,
    console_width,
    describe_machine,
    fail_if_any,
    set_threads,
)
from benchmarks.memory_use import extra_resident_bytes
from benchmarks.search import cpu_rates, peers
from benchmarks.search.cases import Case, Task, draw_mask, radius_holding
from benchmarks.search.data import make_codes
from benchmarks.search.mean_precision import average_precision, mean_average_precision
from benchmarks.search.oracle import distances_to
from benchmarks.search.report import cpu_caption, cpu_columns
from benchmarks.search.row_names import BARE_LOOP, FAISS, LABELLED, OURS, READ, READ_BEYOND
from benchmarks.search.synthetic_codes import Codes
from benchmarks.tables import rich_table
from benchmarks.timing import last_level_cache, median_ratio, time_in_rounds
from hashengine import HammingIndex
from hashengine.errors import missing_package
from tests.helpers.faiss_oracle import Arrays, FaissOracle, sort_hits

DEFAULT_ROUNDS = 5

_VERIFIED_QUERIES = 50
_VERIFIED_RANKINGS = 3  # the number of queries whose whole ranking is verified, which takes longer
_CACHES_BEYOND = 4  # a buffer of this many times the size of the last-level cache is mostly read from memory


def run(
    cases: Sequence[Case], *, threads: int | None, rounds: int | None, images: Path | None, output: Path | None
) -> list[Row]:
    """Verify and measure the cases, print the table and append the rows to `output`; returns the rows.

    Raises:
        SystemExit: at the end, if an answer was wrong.
    """
    try:
        import faiss
    except ImportError:
        raise missing_package("hamming", "faiss", "bench") from None
    threads, rounds = set_threads(threads), rounds or DEFAULT_ROUNDS
    faiss.omp_set_num_threads(threads)
    versions = {"faiss": faiss.__version__} | peers.installed()
    machine = describe_machine() | versions | {"threads": threads, "bare_loop_simd": cpu_rates.simd_level()}
    console = Console(width=console_width(160))
    first = cases[0]
    console.print(
        f"{first.codes:,} codes, {first.queries:,} queries, {first.data.value} data, {threads} threads, "
        f"SIMD {machine['simd_level']}, {machine['cpu']}; caches are warm; median of {rounds} rounds"
    )
    for name in peers.MAKERS.keys() - versions.keys():
        console.print(f"without {name}, which is not installed: pip install 'hashengine[bench]'")
    if machine["bare_loop_simd"] == "none":
        console.print("without the bare loop and the reads, which need a C++ compiler")
    rows, wrong = [], []
    codes, recipe = None, None
    for case in tqdm(cases, unit="row", disable=None, leave=False):
        if recipe != (case.data, case.codes, case.queries, case.bits):
            codes, recipe = None, (case.data, case.codes, case.queries, case.bits)  # release the previous codes first
            codes = make_codes(*recipe, images)
        try:
            measured = measure(case, codes, threads, rounds)
        except WrongAnswer as error:
            wrong.append(str(error))
            continue
        what = {"benchmark": "hamming", "task": case.task.value, "codes": case.codes, "queries": case.queries}
        what |= {"bits": case.bits, "k": case.k, "data": case.data.value}
        what |= {"share": case.share} if case.task is Task.filter else {}
        rows.append(machine | what | measured)
    if rows:
        console.print(rich_table(cpu_columns(rows), rows, cpu_caption(rows)))
    if output is not None:
        append_rows(output, rows)
    fail_if_any(wrong, len(cases))
    return rows


def measure(case: Case, codes: Codes, threads: int, rounds: int) -> Row:
    """Verify the answers, then time each system in each round.

    Returns:
        A row with these fields, each of the first three by system. Ratios are medians over the rounds.

        - `seconds`: the seconds per call in each round.
        - `pairs`: the number of (query, code) pairs that a call compares.
        - `bytes`: the bytes that a call reads, only for plain reads.
        - `times_faiss`: hashengine's rate divided by that of `faiss_best`, the faster mode of FAISS.
        - `of_bare_loop`: hashengine's rate, in distances per second, divided by that of the bare loop.
        - `of_read`: for each plain read, the rate at which a search of one query reads the codes, in bytes per second,
          divided by the rate of the plain read.
        - `extra_bytes`: the memory that the search needs beyond the codes, ids and answers.

    Raises:
        WrongAnswer: an answer of hashengine or of a peer is wrong.
    """
    calls = verified_calls(case, codes)
    extra_bytes = extra_resident_bytes(calls[OURS])
    our_pairs = len(codes.database) * len(codes.queries)
    pairs, read_bytes = dict.fromkeys(calls, our_pairs), {}
    if case.task is Task.search:
        for name, peer in peers.make_peers(codes.database, codes.queries, case.k, threads).items():
            calls[name], pairs[name] = peer
    if bare_loop := cpu_rates.bare_loop(case.bits, threads):
        calls[BARE_LOOP], pairs[BARE_LOOP] = bare_loop
    if len(codes.queries) == 1:  # reading the codes then limits the search
        for name, buffer in _buffers_to_read(codes.database).items():
            if read := cpu_rates.read_memory(buffer, threads):
                calls[name], read_bytes[name] = read
    seconds = time_in_rounds(calls, rounds)
    row = {"seconds": seconds, "pairs": pairs, "bytes": read_bytes, "extra_bytes": extra_bytes}
    faiss_modes = [name for name in seconds if name.startswith(FAISS)]
    if faiss_modes:
        best = min(faiss_modes, key=lambda name: statistics.median(seconds[name]))
        row |= {"faiss_best": best, "times_faiss": median_ratio(seconds[best], seconds[OURS])}
    if BARE_LOOP in seconds:
        row["of_bare_loop"] = median_ratio(seconds[BARE_LOOP], seconds[OURS]) * our_pairs / pairs[BARE_LOOP]
    row["of_read"] = {
        name: median_ratio(seconds[name], seconds[OURS]) * codes.database.nbytes / read_bytes[name]
        for name in read_bytes
    }
    return row


def _buffers_to_read(codes: np.ndarray) -> dict[str, np.ndarray]:
    """The codes and, unless they are much larger than the last-level cache, also a buffer that is much larger."""
    beyond_bytes = _CACHES_BEYOND * last_level_cache()
    return {READ: codes} | ({READ_BEYOND: np.ones(beyond_bytes, np.uint8)} if codes.nbytes < beyond_bytes else {})


def verified_calls(case: Case, codes: Codes) -> dict[str, Callable[[], Any]]:
    """For hashengine and, if it has the task, for each mode of FAISS: a call that answers all queries.

    Raises:
        WrongAnswer: answers to the first queries differ from FAISS's or, for `map` and `count`, from a computation in
            numpy.
    """
    if case.task is Task.count:
        return _verified_counts(case, codes)
    if case.task is Task.map:
        _verify_map(codes)
        return {OURS: lambda: _mean_average_precision(codes)}
    searches = _make_searches(case, codes)
    ours, *theirs = (search(codes.queries[:_VERIFIED_QUERIES]) for search in searches.values())
    if case.task is Task.range:
        theirs = map(sort_hits, theirs)
    if not all(np.array_equal(a, b) for other in theirs for a, b in zip(ours, other, strict=True)):
        raise WrongAnswer(f"hamming: {case}: the answers must equal FAISS's before they are timed")
    return {name: lambda search=search: search(codes.queries) for name, search in searches.items()}


def _make_searches(case: Case, codes: Codes) -> dict[str, Callable[[np.ndarray], Arrays]]:
    """For hashengine and for each mode of FAISS, a function that searches a batch of queries; hashengine's is first."""
    index = HammingIndex(case.bits)
    index.add(codes.database)
    mask = draw_mask(case.codes, case.share) if case.task is Task.filter else None
    oracle = FaissOracle(codes.database, mask)
    if case.task is Task.range:
        radius = radius_holding(index.count(codes.queries[:_VERIFIED_QUERIES]), case.k)
        return {
            OURS: lambda batch: index.range_search(batch, radius),
            FAISS: lambda batch: oracle.range_search_unordered(batch, radius),
        }
    return {
        OURS: lambda batch: index.search(batch, case.k, filter=mask),
        f"{FAISS} heap": lambda batch: oracle.search(batch, case.k, use_heap=True),
        f"{FAISS} counting": lambda batch: oracle.search(batch, case.k, use_heap=False),
    }


def _verified_counts(case: Case, codes: Codes) -> dict[str, Callable[[], Any]]:
    index = HammingIndex(case.bits)
    index.add(codes.database)
    labels = (codes.query_labels, codes.labels)
    few, few_labels = codes.queries[:_VERIFIED_RANKINGS], codes.query_labels[:_VERIFIED_RANKINGS]
    counts, relevant = index.count(few, labels=(few_labels, codes.labels))
    if not np.array_equal(counts, index.count(few)):
        raise WrongAnswer(f"hamming: {case}: counts with and without labels must be equal before they are timed")
    for row, (query, label) in enumerate(zip(few, few_labels, strict=True)):
        distances = distances_to(codes.database, query)
        for found, counted in ((counts, distances), (relevant, distances[codes.labels == label])):
            if not np.array_equal(found[row], np.bincount(counted, minlength=case.bits + 1)):
                raise WrongAnswer(f"hamming: {case}: the counts must equal numpy's before they are timed")
    return {OURS: lambda: index.count(codes.queries), LABELLED: lambda: index.count(codes.queries, labels=labels)}


def _mean_average_precision(codes: Codes) -> Any:
    return mean_average_precision(codes.queries, codes.database, codes.query_labels, codes.labels)


def _verify_map(codes: Codes) -> None:
    few = codes._replace(
        queries=codes.queries[:_VERIFIED_RANKINGS], query_labels=codes.query_labels[:_VERIFIED_RANKINGS]
    )
    found = _mean_average_precision(few).expected_per_query
    expected = [
        average_precision(distances_to(few.database, query), few.labels == label)
        for query, label in zip(few.queries, few.query_labels, strict=True)
    ]
    if not np.allclose(found, expected, rtol=1e-9, atol=0):
        raise WrongAnswer(f"hamming: the mAP must equal numpy's before it is timed, got {found} instead of {expected}")
