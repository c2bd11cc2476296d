"""The latency of small batches on a device: the time from a call to its answer, and the time of the device alone."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Row, WrongAnswer
from benchmarks.search.cases import Case
from benchmarks.search.database import Database
from benchmarks.search.row_names import FAISS, FROM_ACTIVATIONS, HOST_TO_HOST, ON_DEVICE, OURS
from benchmarks.timing import Call, Clock, capture_graph
from hashengine import ops
from tests.helpers.faiss_oracle import TopK

_ROUNDS, _MAX_CALLS_PER_ROUND, _BURST_SECONDS = 12, 50, 0.05


def measure_latency(case: Case, database: Database, clock: Clock) -> Row:
    """Quantiles of the times of single calls: until the answer is ready, and of the device alone, as a CUDA graph.

    The answer is on the device; that of a system named "host to host" is in host memory. A system named "from
    activations" packs the signs of floating-point activations into queries, then searches.
    """
    device, codes = database.device, database.codes
    queries = database.queries[: case.queries].clone()
    activations = ops.unpack_bits(queries).float() - 0.5
    host = queries.cpu().numpy()

    def search() -> TopK:
        return ops.hamming_topk(queries, codes, case.k)

    def pack_and_search() -> TopK:
        return ops.hamming_topk(ops.pack_bits(activations), codes, case.k)

    expected = database.oracle.search(host, case.k)
    for call in (search, pack_and_search, lambda: database.index.search(host, case.k)):
        _verify(case, call(), expected)
    waited: dict[str, Call] = {OURS: search, OURS + FROM_ACTIVATIONS: pack_and_search}
    on_device = {}
    for name, call in list(waited.items()):
        on_device[name + ON_DEVICE] = captured = CapturedSearch(call, device)
        _verify(case, captured.overwritten_answer(), expected)
    waited[OURS + FROM_ACTIVATIONS + " as a graph"] = on_device[OURS + FROM_ACTIVATIONS + ON_DEVICE]
    if database.faiss is not None:
        waited[FAISS] = lambda: database.faiss.search(queries, case.k)
    waited = {name: synchronized(call, device) for name, call in waited.items()}
    waited[OURS + HOST_TO_HOST] = lambda: database.index.search(host, case.k)
    if database.faiss is not None:
        waited[FAISS + HOST_TO_HOST] = lambda: database.faiss.search_from_host(host, case.k)
    bursts = {name: lambda calls, call=call: host_seconds(call, calls) for name, call in waited.items()}
    bursts |= {name: lambda calls, call=call: clock.successive(call, calls) for name, call in on_device.items()}
    return {
        "task": "latency", "codes": case.codes, "queries": case.queries, "bits": case.bits, "k": case.k,
        "data": case.data.value, "verified_by": database.oracle.name, "verified_queries": case.queries,
        "latency": quantiles(bursts),
    }  # fmt: skip


class CapturedSearch:
    """A search as a CUDA graph. Each replay writes the answer to the same memory. On a CPU, a replay is a new call."""

    def __init__(self, call: Callable[[], TopK], device: torch.device):
        self._answers: list[TopK] = []

        def store() -> None:
            self._answers[:] = [call()]

        self._replay = capture_graph(store) if device.type == "cuda" else store

    def __call__(self) -> None:
        """Replay the graph."""
        self._replay()

    def overwritten_answer(self) -> tuple[Tensor, Tensor]:
        """Erase the previous answer, if there is one, then replay. Returns the answer that the replay writes."""
        for part in self._answers[0] if self._answers else ():
            part.fill_(-2)
        self._replay()
        return self._answers[0]


def synchronized(call: Call, device: torch.device) -> Callable[[], None]:
    """The call followed by a synchronization of the device."""

    def call_and_synchronize() -> None:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return call_and_synchronize


def host_seconds(call: Call, calls: int) -> list[float]:
    """Seconds of each call, by the host's clock."""
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds


def _verify(case: Case, answer: tuple[Any, Any], expected: tuple[Any, Any]) -> None:
    for found, right in zip(answer, expected, strict=True):
        if not torch.equal(torch.as_tensor(found).cpu(), torch.from_numpy(right)):
            raise WrongAnswer(f"{case}: the answers must equal the oracle's before their latency is measured")


def quantiles(bursts: dict[str, Callable[[int], list[float]]]) -> dict[str, dict[str, float]]:
    """Quantiles of each system's seconds per call. The systems take turns; slow systems make fewer calls per round."""
    calls, seconds = {}, {name: [] for name in bursts}
    for name, burst in bursts.items():
        burst(3)
        calls[name] = max(1, min(_MAX_CALLS_PER_ROUND, int(_BURST_SECONDS / statistics.median(burst(3)))))
    for _ in range(_ROUNDS):
        for name, burst in bursts.items():
            seconds[name] += burst(calls[name])
    return {
        name: {"p50": statistics.median(taken), "p99": statistics.quantiles(taken, n=100)[98], "calls": len(taken)}
        for name, taken in seconds.items()
    }
