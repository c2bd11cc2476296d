"""Searching codes that stay in the host's memory, through two buffers on the device: one is filled while the other is
searched. Beside it the copy alone, which is the bound."""

import statistics
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_data import Case, Database
from benchmarks.gpu_search import OURS, WrongAnswer
from benchmarks.harness import median_ratio
from hashengine import ops

COPY = "copy"

_BUFFER_BYTES = 64 << 20
_ROUNDS = 5

Row = dict[str, Any]


class Stream:
    """Codes in pinned memory, and two buffers of so many rows on the device."""

    def __init__(self, codes: Tensor, device: torch.device, rows: int):
        self._codes = codes.pin_memory()
        self._buffers = [torch.empty((rows, codes.shape[1]), dtype=torch.uint8, device=device) for _ in range(2)]
        self._copies = torch.cuda.Stream(device)
        self._free = [torch.cuda.Event() for _ in range(2)]

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """By (distance, position), as of all codes at once."""
        count = len(self._codes)
        best = torch.empty((len(queries), 0), dtype=torch.int64, device=queries.device)
        for first, part in self._parts():
            distances, positions = ops.hamming_topk(queries, part, min(k, len(part)))
            keys = torch.cat([best, distances.long() * count + positions + first], 1)
            best = keys.topk(min(k, keys.shape[1]), largest=False, sorted=True).values
        return (best // count).int(), best % count

    def copy(self) -> None:
        for _ in self._parts():
            pass

    def _parts(self):
        """Each part with the place of its first code; what is done with it is done on the current stream."""
        main, rows = torch.cuda.current_stream(), len(self._buffers[0])
        for event in self._free:
            event.record(main)
        for turn, part in enumerate(self._codes.split(rows)):
            buffer, free = self._buffers[turn % 2][: len(part)], self._free[turn % 2]
            with torch.cuda.stream(self._copies):
                self._copies.wait_event(free)
                buffer.copy_(part, non_blocking=True)
            main.wait_stream(self._copies)
            yield turn * rows, buffer
            free.record(main)


def measure_stream(case: Case, database: Database) -> Row:
    codes, queries = database.codes.cpu(), database.queries[: case.queries]
    stream = Stream(codes, database.device, max(1, _BUFFER_BYTES // codes.shape[1]))
    want = ops.hamming_topk(queries, database.codes, case.k)
    if not all(map(torch.equal, stream.search(queries, case.k), want)):
        raise WrongAnswer(f"{case}: what is streamed must be found as what lies on the device before it is timed")
    calls = {OURS: lambda: stream.search(queries, case.k), COPY: stream.copy}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(_ROUNDS):
        for name, call in calls.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {
        "task": "stream", "codes": case.codes, "queries": case.queries, "bits": case.bits, "k": case.k,
        "data": case.data.value, "seconds": seconds, "of_copy": median_ratio(seconds[COPY], seconds[OURS]),
        "distances_per_s": case.codes * case.queries / statistics.median(seconds[OURS]),
        "host_bytes_per_s": codes.nbytes / statistics.median(seconds[COPY]),
    }  # fmt: skip
