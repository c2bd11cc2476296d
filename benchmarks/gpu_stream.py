"""Searching codes that stay in the host's memory, from which an index streams them through the device chunk by chunk.
Beside it the copy alone, of the same bytes from pinned memory, which is the bound."""

import statistics
from typing import Any

import torch

from benchmarks.gpu_data import Case, Database
from benchmarks.gpu_latency import waiting
from benchmarks.gpu_search import OURS, WrongAnswer
from benchmarks.harness import median_ratio, time_in_rounds
from hashengine import HammingIndex, ops

COPY = "copy"

_ROUNDS = 5

Row = dict[str, Any]


def measure_stream(case: Case, database: Database) -> Row:
    device, queries = database.device, database.queries[: case.queries]
    index = HammingIndex(case.bits, device, streamed=True)
    index.add(database.codes)
    want = ops.hamming_topk(queries, database.codes, case.k)
    if not all(map(torch.equal, index.search(queries, case.k), want)):
        raise WrongAnswer(f"{case}: what is streamed must be found as what lies on the device before it is timed")
    source = index.codes.pin_memory() if device.type == "cuda" else index.codes
    target = torch.empty_like(database.codes)
    calls = {
        OURS: waiting(lambda: index.search(queries, case.k), device),
        COPY: waiting(lambda: target.copy_(source, non_blocking=True), device),
    }
    seconds = time_in_rounds(calls, _ROUNDS)
    return {
        "task": "stream", "codes": case.codes, "queries": case.queries, "bits": case.bits, "k": case.k,
        "data": case.data.value, "seconds": seconds, "of_copy": median_ratio(seconds[COPY], seconds[OURS]),
        "distances_per_s": case.codes * case.queries / statistics.median(seconds[OURS]),
        "host_bytes_per_s": source.nbytes / statistics.median(seconds[COPY]),
    }  # fmt: skip
