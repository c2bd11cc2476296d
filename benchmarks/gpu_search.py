"""One search on a device: who answers it, what shows that the answers are right, and how long it takes."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks import gpu_bounds, gpu_peers
from benchmarks.gpu_bounds import Gpu, Work
from benchmarks.gpu_data import Case, Database, make_oracle
from benchmarks.harness import median_ratio
from benchmarks.memory import peak_bytes
from benchmarks.systems import Task, average_precision, draw_mask, in_order, radius_of
from benchmarks.timing import Clock, capture_graph, time_calls
from hashengine import ops
from hashengine.metrics import mean_average_precision

OURS, GRAPH, ONE_QUERY, WHOLE_MAP = "hashengine", "hashengine graph", "hashengine one query", "hashengine mAP"
FAISS, PRODUCT, XOR = "faiss", "torch product", "torch xor"
HOST_TO_HOST = " host to host"

_FEW = 32  # queries, up to which launches matter, and plain torch has nothing better than XOR
_MANY = 1000  # from which on the way from the host and back is timed, too
_LONGEST = 2.0  # seconds; what takes longer is called once and not in rounds
_PRODUCT_BYTES = 32 << 30  # of an unpacked database
_VERIFIED_PAIRS, _VERIFIED_QUERIES = 200_000_000, 50
_HOST_CODES, _HOST_K = 200_000_000, 10_000  # beyond these the answer is verified on the device, in plain torch
_VERIFIED_RANKINGS = 3

Row = dict[str, Any]
Call = Callable[[], Any]


class WrongAnswer(Exception):
    """An answer that is not the oracle's, and is therefore not timed."""


class Plan:
    """The calls to time of one case, each verified; raises WrongAnswer where this library's is wrong."""

    def __init__(self, case: Case, database: Database):
        self.case, self.database = case, database
        self.queries = database.queries[: case.queries]
        self.systems: dict[str, Call] = {}
        self.called_once: dict[str, float] = {}  # seconds of what takes too long for rounds
        self.left_out: dict[str, str] = {}
        most = _VERIFIED_RANKINGS if case.task is Task.map else _VERIFIED_QUERIES
        rows = max(1, min(most, _VERIFIED_PAIRS // case.codes, case.queries))
        self._sample = torch.linspace(0, case.queries - 1, rows).long()  # over the whole batch, all tiles of it
        self._sampled = self.queries[self._sample.to(database.device)].cpu().numpy()
        {Task.map: self._plan_map, Task.range: self._plan_range}.get(case.task, self._plan_search)()

    def _plan_search(self) -> None:
        case, database, queries = self.case, self.database, self.queries
        mask, bitmap = None, None
        if case.task is Task.filter:
            mask = draw_mask(case.codes, case.share)
            bitmap = ops.pack_filter(torch.from_numpy(mask).to(database.device))
        call = self.systems[OURS] = lambda: ops.hamming_topk(queries, database.codes, case.k, filter=bitmap)
        answer = call()
        self.answer_bytes = sum(part.nbytes for part in answer)
        self._verify_topk(answer, mask)
        if database.device.type == "cuda" and case.queries <= _FEW:
            try:
                self.systems[GRAPH] = capture_graph(call)
            except RuntimeError as error:
                self.left_out[GRAPH] = _first_line(error)
        if case.task is Task.filter:
            return
        if 1 < case.queries <= _FEW:
            self.systems[ONE_QUERY] = lambda: ops.hamming_topk(queries[:1], database.codes, case.k)
        if case.k <= gpu_peers.FAISS_MOST and case.codes <= _HOST_CODES:
            self._add_peer(FAISS, lambda: database.faiss and (lambda: database.faiss.search(queries, case.k)), answer)
        if gpu_peers.Product.bytes(case.codes, case.bits) <= _PRODUCT_BYTES:
            self._add_peer(
                PRODUCT, lambda: database.product and (lambda: database.product.search(queries, case.k)), answer
            )
        if case.queries <= _FEW and case.codes <= _HOST_CODES:
            self._add_peer(XOR, lambda: lambda: gpu_peers.xor_topk(queries, database.codes, case.k), answer)
        if case.queries >= _MANY:
            host = queries.cpu().numpy()
            way = self.systems[OURS + HOST_TO_HOST] = lambda: database.index.search(host, case.k)
            self.verified_by = OURS
            self._compare(list(way()), [part.cpu().numpy() for part in answer])
            if FAISS in self.systems:
                self.systems[FAISS + HOST_TO_HOST] = lambda: database.faiss.search_host(host, case.k)

    def _add_peer(self, name: str, make: Callable[[], Call | None], answer: gpu_peers.Answer) -> None:
        """Whatever goes wrong with a peer leaves it out, and is told."""
        try:
            call = make()
            if call is None:
                return
            start = time.perf_counter()
            right = gpu_peers.agrees(call(), answer)  # which waits for the device
            seconds = time.perf_counter() - start
        except (RuntimeError, ValueError) as error:
            self.left_out[name] = _first_line(error)
            return
        if not right:
            self.left_out[name] = "its answers are wrong"
        elif seconds > _LONGEST:
            self.called_once[name] = seconds
        else:
            self.systems[name] = call

    def _verify_topk(self, answer: gpu_peers.Answer, mask: np.ndarray | None) -> None:
        case, database = self.case, self.database
        mine = [part[self._sample.to(part.device)].cpu().numpy() for part in answer]
        if mask is None and (case.codes > _HOST_CODES or case.k > _HOST_K):
            self.verified_by = XOR
            batch = torch.from_numpy(self._sampled).to(database.device)
            theirs = [part.cpu().numpy() for part in gpu_peers.xor_topk(batch, database.codes, case.k)]
        else:
            oracle = database.oracle if mask is None else make_oracle(database.host, mask)
            self.verified_by = oracle.name
            theirs = oracle.search(self._sampled, case.k)
        self._compare(mine, theirs)

    def _plan_range(self) -> None:
        database, queries = self.database, self.queries
        sample = torch.from_numpy(self._sampled).to(database.device)
        radius = radius_of(ops.hamming_count(sample, database.codes)[0].cpu().numpy(), self.case.k)
        call = self.systems[OURS] = lambda: ops.hamming_range(queries, database.codes, radius)
        answer = call()
        self.answer_bytes = sum(part.nbytes for part in answer)
        self.verified_by = database.oracle.name
        lims, distances, positions = (part.cpu().numpy() for part in answer)
        rows = [slice(lims[row], lims[row + 1]) for row in self._sample.tolist()]
        mine = [np.concatenate([part[row] for row in rows]) for part in (distances, positions)]
        counted = np.cumsum([0, *(row.stop - row.start for row in rows)])
        self._compare([counted, *mine], in_order(database.oracle.range_search(self._sampled, radius)))

    def _plan_map(self) -> None:
        """Counts by distance, which are all that the metric needs of a full ranking, and the metric itself."""
        codes, (query_labels, labels) = self.database.codes, self.database.labels
        queries, query_labels = self.queries, query_labels[: self.case.queries]
        call = self.systems[OURS] = lambda: ops.hamming_count(queries, codes, query_labels=query_labels, labels=labels)
        self.systems[WHOLE_MAP] = lambda: mean_average_precision(queries, query_labels, codes, labels)
        answer = call()
        self.answer_bytes = sum(part.nbytes for part in answer)
        self.verified_by = XOR
        precisions = self.systems[WHOLE_MAP]().expected_per_query
        for row in self._sample.tolist():
            distances = gpu_peers.distances(queries[row : row + 1], codes)[0]
            relevant = labels == query_labels[row]
            counts = [distances.bincount(minlength=self.case.bits + 1)]
            counts.append(distances[relevant].bincount(minlength=self.case.bits + 1))
            self._compare([part[row].cpu().numpy() for part in answer], [part.cpu().numpy() for part in counts])
            want = average_precision(distances.cpu().numpy(), relevant.cpu().numpy())
            if not np.isclose(precisions[row], want, rtol=1e-9, atol=0):
                raise WrongAnswer(f"{self.case}: the mAP must be numpy's before it is timed")

    def _compare(self, mine: list[np.ndarray], theirs: list[np.ndarray]) -> None:
        if not all(np.array_equal(a, b) for a, b in zip(mine, theirs, strict=True)):
            raise WrongAnswer(f"{self.case}: the answers must equal those of {self.verified_by} before they are timed")

    @property
    def verified_queries(self) -> int:
        return len(self._sample)


def measure(case: Case, database: Database, clock: Clock, gpu: Gpu | None, seconds: float) -> list[Row]:
    """A row for each state of the cache: warm where it holds the codes, and cold."""
    plan = Plan(case, database)
    extra_bytes = max(0, peak_bytes(plan.systems[OURS], database.device) - plan.answer_bytes)
    if gpu is not None:
        gpu = gpu_bounds.under_load(gpu, database.device, plan.systems[OURS])
    rows = []
    for cache in ("warm", "cold") if database.codes.nbytes <= clock.cache_bytes else ("cold",):
        times = time_calls(plan.systems, clock, cold=cache == "cold", seconds=seconds)
        rows.append(
            {"task": case.task.value, "codes": case.codes, "queries": case.queries, "bits": case.bits, "k": case.k}
            | {"data": case.data.value, "share": case.share, "cache": cache}
            | {"verified_by": plan.verified_by, "verified_queries": plan.verified_queries}
            | {"called_once": plan.called_once, "left_out": plan.left_out, "extra_bytes": extra_bytes}
            | summarise(case, plan.answer_bytes, times, gpu)
        )
    return rows


def summarise(case: Case, answer_bytes: int, times: dict[str, list[list[float]]], gpu: Gpu | None) -> Row:
    """Seconds in each round, rates, and ratios, which are medians of the rounds'."""
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
        found = gpu_bounds.bounds(gpu, Work(case.queries, case.codes, case.bits, answer_bytes, case.share))
        limit = gpu_bounds.limiting(found)
        of = {name: row["distances_per_s"] / rate for name, rate in found.items()}
        row |= {"bounds": found, "limit": limit, "of_bounds": of, "clock_hz": gpu.clock, "clock_is": gpu.clock_is}
        row["memory_bytes_per_s"] = gpu.memory
    return row


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"
