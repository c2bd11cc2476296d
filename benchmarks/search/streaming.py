"""Searching codes that stay in host memory: an index streams them through the device, chunk by chunk.

A streamed search cannot be faster than a copy of the codes from pinned memory to the device. That copy is timed for
comparison.
"""

import statistics

import torch

from benchmarks.harness import Row, WrongAnswer
from benchmarks.search.cases import Case
from benchmarks.search.database import Database
from benchmarks.search.latency import synchronized
from benchmarks.search.row_names import COPY, OURS
from benchmarks.timing import median_ratio, time_in_rounds
from hashengine import HammingIndex, ops

_ROUNDS = 5


def measure_streaming(case: Case, database: Database) -> Row:
    """Verify a streamed search against a search of codes on the device. Then time it, and the copy of the codes.

    `of_copy` is the rate of the search divided by the rate of the copy, both in codes per second.
    """
    device, queries = database.device, database.queries[: case.queries]
    index = HammingIndex(case.bits, device, streamed=True)
    index.add(database.codes)
    expected = ops.hamming_topk(queries, database.codes, case.k)
    if not all(map(torch.equal, index.search(queries, case.k), expected)):
        raise WrongAnswer(f"{case}: a streamed search must equal one on the device before it is timed")
    source = index.codes.pin_memory() if device.type == "cuda" else index.codes
    target = torch.empty_like(database.codes)
    calls = {
        OURS: synchronized(lambda: index.search(queries, case.k), device),
        COPY: synchronized(lambda: target.copy_(source, non_blocking=True), device),
    }
    seconds = time_in_rounds(calls, _ROUNDS)
    return {
        "task": "stream", "codes": case.codes, "queries": case.queries, "bits": case.bits, "k": case.k,
        "data": case.data.value, "seconds": seconds, "of_copy": median_ratio(seconds[COPY], seconds[OURS]),
        "distances_per_s": case.codes * case.queries / statistics.median(seconds[OURS]),
        "host_bytes_per_s": source.nbytes / statistics.median(seconds[COPY]),
    }  # fmt: skip
