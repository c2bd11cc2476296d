"""How long small batches wait, and how fast an index on a device is filled."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_data import Case, Database
from benchmarks.gpu_search import HOST_TO_HOST, OURS, WrongAnswer
from benchmarks.harness import median_ratio
from benchmarks.memory import peak_bytes
from benchmarks.timing import Clock, capture_graph
from hashengine import HammingIndex, ops

ON_DEVICE, FROM_ACTIVATIONS = " on the device", " from activations"
FROM_HOST, FROM_DEVICE = " from the host", " from the device"

_ROUNDS, _CALLS, _BURST_SECONDS = 12, 50, 0.05
_BUILD_ROUNDS = 5

Row = dict[str, Any]


def measure_latency(case: Case, database: Database, clock: Clock) -> Row:
    """Quantiles over single calls: with the wait for the answer, and of the device alone, as a CUDA graph.

    "From activations" is the whole way of a query: packing the signs of floating-point activations, and the search.
    """
    device, codes = database.device, database.codes
    queries = database.queries[: case.queries].clone()
    activations = ops.unpack_bits(queries).float() - 0.5
    host = queries.cpu().numpy()

    def search() -> tuple[Tensor, Tensor]:
        return ops.hamming_topk(queries, codes, case.k)

    def whole_way() -> tuple[Tensor, Tensor]:
        return ops.hamming_topk(ops.pack_bits(activations), codes, case.k)

    want = database.oracle.search(host, case.k)
    for call in (search, whole_way, lambda: database.index.search(host, case.k)):
        _verify(case, call(), want)
    waited = {OURS: search, OURS + FROM_ACTIVATIONS: whole_way}
    on_device = {}
    for name, call in list(waited.items()):
        on_device[name + ON_DEVICE] = captured = _captured(call, device)
        _verify(case, captured.answer(), want)
    waited[OURS + FROM_ACTIVATIONS + " as a graph"] = on_device[OURS + FROM_ACTIVATIONS + ON_DEVICE]
    if database.faiss is not None:
        waited["faiss"] = lambda: database.faiss.search(queries, case.k)
    waited = {name: waiting(call, device) for name, call in waited.items()}
    waited[OURS + HOST_TO_HOST] = lambda: database.index.search(host, case.k)
    if database.faiss is not None:
        waited["faiss" + HOST_TO_HOST] = lambda: database.faiss.search_host(host, case.k)
    bursts = {name: lambda calls, call=call: _host_seconds(call, calls) for name, call in waited.items()}
    bursts |= {name: lambda calls, call=call: clock.successive(call, calls) for name, call in on_device.items()}
    return {
        "task": "latency", "codes": case.codes, "queries": case.queries, "bits": case.bits, "k": case.k,
        "data": case.data.value, "verified_by": database.oracle.name, "verified_queries": case.queries,
        "latency": _quantiles(bursts),
    }  # fmt: skip


class _captured:
    """A call as a CUDA graph, whose answer lies in the same place after each replay; on a CPU the call itself."""

    def __init__(self, call: Callable[[], tuple[Tensor, Tensor]], device: torch.device):
        self._answers: list[tuple[Tensor, Tensor]] = []

        def keep() -> None:
            self._answers[:] = [call()]

        self._replay = capture_graph(keep) if device.type == "cuda" else keep

    def __call__(self) -> None:
        self._replay()

    def answer(self) -> tuple[Tensor, Tensor]:
        for part in self._answers[0] if self._answers else ():
            part.fill_(-2)  # the replay has to write it anew
        self._replay()
        return self._answers[0]


def waiting(call: Callable[[], Any], device: torch.device) -> Callable[[], None]:
    def wait() -> None:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return wait


def _verify(case: Case, answer: tuple[Any, Any], want: tuple[Any, Any]) -> None:
    for mine, right in zip(answer, want, strict=True):
        if not torch.equal(torch.as_tensor(mine).cpu(), torch.from_numpy(right)):
            raise WrongAnswer(f"{case}: the answers must be the oracle's before their latency is measured")


def _host_seconds(call: Callable[[], Any], calls: int) -> list[float]:
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds


def _quantiles(bursts: dict[str, Callable[[int], list[float]]]) -> dict[str, dict[str, float]]:
    """The systems take turns; slow ones get fewer calls."""
    calls, seconds = {}, {name: [] for name in bursts}
    for name, burst in bursts.items():
        burst(3)
        calls[name] = max(1, min(_CALLS, int(_BURST_SECONDS / statistics.median(burst(3)))))
    for _ in range(_ROUNDS):
        for name, burst in bursts.items():
            seconds[name] += burst(calls[name])
    return {
        name: {"p50": statistics.median(taken), "p99": statistics.quantiles(taken, n=100)[98], "calls": len(taken)}
        for name, taken in seconds.items()
    }


def measure_build(case: Case, database: Database) -> Row:
    """Codes a second into a new index, of codes in the host's memory and of codes on the device; the memory on top."""
    device, codes = database.device, database.codes

    def fill(new: Any) -> Any:
        index = HammingIndex(case.bits, device)
        index.add(new)
        return index

    for new in (database.host, codes):
        if not torch.equal(fill(new).codes.to(device), codes):
            raise WrongAnswer(f"{case}: the index must hold what was added before adding is timed")
    extra_bytes = max(0, peak_bytes(lambda: fill(codes), device) - codes.nbytes)
    systems = {OURS + FROM_HOST: lambda: fill(database.host), OURS + FROM_DEVICE: lambda: fill(codes)}
    if database.faiss is not None:
        systems["faiss" + FROM_HOST] = lambda: database.faiss.fill(database.host)
    systems = {name: waiting(call, device) for name, call in systems.items()}
    seconds = {name: [] for name in systems}
    for _ in range(_BUILD_ROUNDS):
        for name, call in systems.items():
            seconds[name] += _host_seconds(call, 1)
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
