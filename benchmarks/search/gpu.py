"""One search case on a device: hashengine and its peers are timed in the same rounds, after a check of their answers.

A peer that is too slow for the rounds is called only once.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import Row, WrongAnswer
from benchmarks.memory_use import peak_bytes
from benchmarks.search import gpu_limits, torch_search
from benchmarks.search.cases import Case, Task, draw_mask, radius_holding
from benchmarks.search.database import Database
from benchmarks.search.gpu_limits import Gpu, Work
from benchmarks.search.mean_precision import average_precision, mean_average_precision
from benchmarks.search.oracle import make_oracle
from benchmarks.search.row_names import FAISS, GRAPH, HOST_TO_HOST, ONE_QUERY, OURS, PRODUCT, WHOLE_MAP, XOR
from benchmarks.timing import Call, Clock, capture_graph, median_ratio, time_calls
from hashengine import ops
from tests.helpers.faiss_oracle import MAX_GPU_K, TopK, equal_up_to_ties

_MAX_FEW_QUERIES = 32  # up to this number, a CUDA graph, a search of one query and XOR in torch are timed too
_MIN_MANY_QUERIES = 1000  # from this number on, searches from and to host memory are timed too
_MAX_SECONDS_IN_ROUNDS = 2.0  # a slower peer is called once, outside the rounds
_MAX_PRODUCT_BYTES = 32 << 30  # a larger unpacked database is not searched by matrix products
_MAX_VERIFIED_PAIRS, _MAX_VERIFIED_QUERIES = 200_000_000, 50
_MAX_VERIFIED_RANKINGS = 3
_MAX_HOST_CODES, _MAX_HOST_K = 200_000_000, 10_000  # above either, XOR in torch verifies Task.search


@dataclass
class Plan:
    """The calls to time for one case, and how their answers were verified.

    Attributes:
        systems: the calls by name.
        answer_bytes: the size of hashengine's answer.
        verified_by: the name of the system whose answers were compared with hashengine's.
        verified_queries: the number of queries whose answers were compared.
        called_once: for each peer that is too slow for the rounds, the seconds of its only call.
        left_out: for each system that cannot be timed, the reason.
    """

    systems: dict[str, Call]
    answer_bytes: int
    verified_by: str
    verified_queries: int
    called_once: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


class Sample:
    """The queries whose answers are verified. They are spread over the batch, because kernels search it in tiles."""

    def __init__(self, case: Case, database: Database):
        most = _MAX_VERIFIED_RANKINGS if case.task is Task.map else _MAX_VERIFIED_QUERIES
        count = max(1, min(most, _MAX_VERIFIED_PAIRS // case.codes, case.queries))
        self.rows = torch.linspace(0, case.queries - 1, count).long()
        self.on_device = database.queries[self.rows.to(database.device)]
        self.on_host = self.on_device.cpu().numpy()

    def __len__(self) -> int:
        return len(self.rows)

    def of(self, answer: Sequence[Tensor]) -> list[np.ndarray]:
        """The rows of the sample in each tensor of an answer."""
        return [part[self.rows.to(part.device)].cpu().numpy() for part in answer]


def make_plan(case: Case, database: Database) -> Plan:
    """Verify the answers of hashengine and of its peers, and collect the calls to time.

    A peer that fails, or whose answer is wrong, is left out with the reason.

    Raises:
        WrongAnswer: hashengine's own answer is wrong.
    """
    make = {Task.map: _plan_map, Task.range: _plan_range}.get(case.task, _plan_topk)
    return make(case, database, Sample(case, database))


def _plan_topk(case: Case, database: Database, sample: Sample) -> Plan:
    queries = database.queries[: case.queries]
    mask, bitmap = None, None
    if case.task is Task.filter:
        mask = draw_mask(case.codes, case.share)
        bitmap = ops.pack_filter(torch.from_numpy(mask).to(database.device))

    def search() -> TopK:
        return ops.hamming_topk(queries, database.codes, case.k, filter=bitmap)

    answer = search()
    verified_by = _verify_topk(case, database, sample, answer, mask)
    plan = Plan({OURS: search}, _bytes_of(answer), verified_by, len(sample))
    if database.device.type == "cuda" and case.queries <= _MAX_FEW_QUERIES:
        try:
            plan.systems[GRAPH] = capture_graph(search)
        except RuntimeError as error:
            plan.left_out[GRAPH] = _first_line(error)
    if case.task is Task.search:
        _add_peers(plan, case, database, answer)
    return plan


def _verify_topk(case: Case, database: Database, sample: Sample, answer: TopK, mask: np.ndarray | None) -> str:
    """Compare the answer with that of an oracle, and return the oracle's name."""
    if mask is None and (case.codes > _MAX_HOST_CODES or case.k > _MAX_HOST_K):
        verified_by = XOR
        expected = [part.cpu().numpy() for part in torch_search.topk_by_xor(sample.on_device, database.codes, case.k)]
    else:
        oracle = database.oracle if mask is None else make_oracle(database.host_codes, mask)
        verified_by = oracle.name
        expected = oracle.search(sample.on_host, case.k)
    _compare(case, sample.of(answer), expected, verified_by)
    return verified_by


def _add_peers(plan: Plan, case: Case, database: Database, answer: TopK) -> None:
    queries, codes, k = database.queries[: case.queries], database.codes, case.k
    if 1 < case.queries <= _MAX_FEW_QUERIES:
        plan.systems[ONE_QUERY] = lambda: ops.hamming_topk(queries[:1], codes, k)
    if k <= MAX_GPU_K and case.codes <= _MAX_HOST_CODES:
        _add_peer(plan, FAISS, lambda: database.faiss and (lambda: database.faiss.search(queries, k)), answer)
    if torch_search.ProductSearch.unpacked_bytes(case.codes, case.bits) <= _MAX_PRODUCT_BYTES:
        _add_peer(plan, PRODUCT, lambda: database.product and (lambda: database.product.search(queries, k)), answer)
    if case.queries <= _MAX_FEW_QUERIES and case.codes <= _MAX_HOST_CODES:
        _add_peer(plan, XOR, lambda: lambda: torch_search.topk_by_xor(queries, codes, k), answer)
    if case.queries >= _MIN_MANY_QUERIES:
        host = queries.cpu().numpy()
        plan.systems[OURS + HOST_TO_HOST] = lambda: database.index.search(host, k)
        expected = [part.cpu().numpy() for part in answer]
        _compare(case, list(plan.systems[OURS + HOST_TO_HOST]()), expected, OURS)
        if FAISS in plan.systems:
            plan.systems[FAISS + HOST_TO_HOST] = lambda: database.faiss.search_from_host(host, k)


def _add_peer(plan: Plan, name: str, make: Callable[[], Callable[[], TopK] | None], answer: TopK) -> None:
    """Add the peer's call if it works, is right and is fast enough.

    `make` returns the call; it returns None if there is no such peer on this machine.
    """
    try:
        call = make()
        if call is None:
            return
        start = time.perf_counter()
        is_right = equal_up_to_ties(call(), answer)  # this synchronizes the device
        seconds = time.perf_counter() - start
    except (RuntimeError, ValueError) as error:
        plan.left_out[name] = _first_line(error)
        return
    if not is_right:
        plan.left_out[name] = "its answers are wrong"
    elif seconds > _MAX_SECONDS_IN_ROUNDS:
        plan.called_once[name] = seconds
    else:
        plan.systems[name] = call


def _plan_range(case: Case, database: Database, sample: Sample) -> Plan:
    queries = database.queries[: case.queries]
    counts = ops.hamming_count(sample.on_device, database.codes)[0].cpu().numpy()
    radius = radius_holding(counts, case.k)

    def search() -> tuple[Tensor, ...]:
        return ops.hamming_range(queries, database.codes, radius)

    answer = search()
    lims, distances, positions = (part.cpu().numpy() for part in answer)
    rows = [slice(lims[row], lims[row + 1]) for row in sample.rows.tolist()]
    found = [np.concatenate([part[row] for row in rows]) for part in (distances, positions)]
    found_lims = np.cumsum([0, *(row.stop - row.start for row in rows)])
    oracle = database.oracle
    _compare(case, [found_lims, *found], oracle.range_search(sample.on_host, radius), oracle.name)
    return Plan({OURS: search}, _bytes_of(answer), oracle.name, len(sample))


def _plan_map(case: Case, database: Database, sample: Sample) -> Plan:
    """Two systems: one counts codes by distance, the other computes the whole metric from such counts."""
    codes, (query_labels, labels) = database.codes, database.labels
    queries, query_labels = database.queries[: case.queries], query_labels[: case.queries]

    def count() -> tuple[Tensor, ...]:
        return ops.hamming_count(queries, codes, labels=(query_labels, labels))

    def whole_map() -> Any:
        return mean_average_precision(queries, codes, query_labels, labels)

    answer, precisions = count(), whole_map().expected_per_query
    for row in sample.rows.tolist():
        distances = torch_search.distances(queries[row : row + 1], codes)[0]
        relevant = labels == query_labels[row]
        expected = [distances.bincount(minlength=case.bits + 1)]
        expected.append(distances[relevant].bincount(minlength=case.bits + 1))
        _compare(case, [part[row].cpu().numpy() for part in answer], [part.cpu().numpy() for part in expected], XOR)
        precision = average_precision(distances.cpu().numpy(), relevant.cpu().numpy())
        if not np.isclose(precisions[row], precision, rtol=1e-9, atol=0):
            raise WrongAnswer(f"{case}: the mAP must equal numpy's before it is timed")
    return Plan({OURS: count, WHOLE_MAP: whole_map}, _bytes_of(answer), XOR, len(sample))


def _compare(case: Case, found: Sequence[np.ndarray], expected: Sequence[np.ndarray], verified_by: str) -> None:
    if not all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True)):
        raise WrongAnswer(f"{case}: the answers must equal those of {verified_by} before they are timed")


def _bytes_of(answer: Sequence[Tensor]) -> int:
    return sum(part.nbytes for part in answer)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"


def measure_search(
    case: Case, database: Database, clock: Clock, gpu: Gpu | None, seconds: float, rounds: int | None = None
) -> list[Row]:
    """Verify and time one case with a cold cache and, if the cache can hold the codes, also with a warm cache.

    Returns a row per state of the cache.

    Args:
        case: the task, the sizes and the data.
        database: the codes and queries of `case`.
        clock: the device's clock.
        gpu: the properties of the GPU from which the limits follow; None on a CPU.
        seconds: about how long the 3 to 15 rounds of a row take.
        rounds: the number of rounds, instead of `seconds`.
    """
    plan = make_plan(case, database)
    extra_bytes = max(0, peak_bytes(plan.systems[OURS], database.device) - plan.answer_bytes)
    if gpu is not None:
        gpu = gpu_limits.under_load(gpu, database.device, plan.systems[OURS])
    fixed_rounds = {} if rounds is None else {"rounds": (rounds, rounds)}
    rows = []
    for cache in ("warm", "cold") if database.codes.nbytes <= clock.cache_bytes else ("cold",):
        times = time_calls(plan.systems, clock, cold=cache == "cold", seconds=seconds, **fixed_rounds)
        rows.append(
            {"task": case.task.value, "codes": case.codes, "queries": case.queries, "bits": case.bits, "k": case.k}
            | {"data": case.data.value, "share": case.share, "cache": cache}
            | {"verified_by": plan.verified_by, "verified_queries": plan.verified_queries}
            | {"called_once": plan.called_once, "left_out": plan.left_out, "extra_bytes": extra_bytes}
            | summarise(case, plan.answer_bytes, times, gpu)
        )
    return rows


def summarise(case: Case, answer_bytes: int, times: dict[str, list[list[float]]], gpu: Gpu | None) -> Row:
    """The median seconds of each round, the rates, the limits, and ratios, which are medians over the rounds.

    `times` has each peer's time divided by hashengine's. `times_one_query` is the time of the batch divided by the time
    of its first query. `limits` are rates, in distances per second, and `of_limits` is hashengine's rate divided by
    each of them.
    """
    medians = {name: [statistics.median(calls) for calls in rounds] for name, rounds in times.items()}
    taken = statistics.median(medians[OURS])
    row = {
        "seconds": medians,
        "distances_per_s": case.codes * case.queries / taken,
        "queries_per_s": case.queries / taken,
        "times": {
            name: median_ratio(theirs, medians[OURS + HOST_TO_HOST if name.endswith(HOST_TO_HOST) else OURS])
            for name, theirs in medians.items()
            if not name.startswith(OURS)
        },
    }
    if ONE_QUERY in medians:
        row["times_one_query"] = median_ratio(medians[OURS], medians[ONE_QUERY])
    if gpu is not None:
        limits = gpu_limits.rate_limits(gpu, Work(case.queries, case.codes, case.bits, answer_bytes, case.share))
        row |= {"limits": limits, "lowest_limit": gpu_limits.lowest(limits)}
        row["of_limits"] = {name: row["distances_per_s"] / rate for name, rate in limits.items()}
        row |= {"clock_hz": gpu.clock, "clock_is": gpu.clock_is, "memory_bytes_per_s": gpu.memory}
    return row
