"""The rate at which codes are added to an index on a device."""

import statistics
from typing import Any

import torch

from benchmarks.harness import Row, WrongAnswer
from benchmarks.memory_use import peak_bytes
from benchmarks.search.cases import Case
from benchmarks.search.database import Database
from benchmarks.search.latency import host_seconds, synchronized
from benchmarks.search.row_names import FAISS, FROM_DEVICE, FROM_HOST, OURS
from benchmarks.timing import median_ratio
from hashengine import HammingIndex

_ROUNDS = 5


def measure_build(case: Case, database: Database) -> Row:
    """Measure adding codes to a new index: the rates from host memory and from the device, and the extra memory."""
    device, codes = database.device, database.codes

    def build(source: Any) -> HammingIndex:
        index = HammingIndex(case.bits, device)
        index.add(source)
        return index

    for source in (database.host_codes, codes):
        if not torch.equal(build(source).codes.to(device), codes):
            raise WrongAnswer(f"{case}: the index must hold the added codes before adding is timed")
    extra_bytes = max(0, peak_bytes(lambda: build(codes), device) - codes.nbytes)
    systems = {OURS + FROM_HOST: lambda: build(database.host_codes), OURS + FROM_DEVICE: lambda: build(codes)}
    if database.faiss is not None:
        systems[FAISS + FROM_HOST] = lambda: database.faiss.replace_codes(database.host_codes)
    systems = {name: synchronized(call, device) for name, call in systems.items()}
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for _ in range(_ROUNDS):
        for name, call in systems.items():
            seconds[name] += host_seconds(call, 1)
    return {
        "task": "build", "codes": case.codes, "bits": case.bits, "data": case.data.value, "extra_bytes": extra_bytes,
        "seconds": seconds,
        "codes_per_s": {name: case.codes / statistics.median(taken) for name, taken in seconds.items()},
        "times": {
            name: median_ratio(taken, seconds[OURS + FROM_HOST])
            for name, taken in seconds.items()
            if not name.startswith(OURS)
        },
    }  # fmt: skip
