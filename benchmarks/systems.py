"""What is asked of the codes, of whom, and what shows that all answer the same."""

import enum
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.codes import Codes
from hashengine import HammingIndex, InputError
from hashengine.metrics import mean_average_precision

VERIFIED_QUERIES = 50
_VERIFIED_RANKINGS = 3  # whole ones, place by place


class Task(str, enum.Enum):
    search = "search"  # the k nearest
    filter = "filter"  # the k nearest of a random share of the codes
    range = "range"  # all within the radius that holds about k
    map = "map"  # mean average precision over the full ranking; no k


Answer = tuple[np.ndarray, ...]
Systems = dict[str, Callable[[], Any]]  # ours first


def check_sizes(codes: int, bits: list[int], ks: list[int]) -> None:
    for code_bits in bits:
        if code_bits % 8:
            raise InputError(f"bits must be a multiple of 8, got {code_bits}")
    if max(ks) > codes:
        raise InputError(f"k must be at most the number of codes ({codes}), got {max(ks)}")


def draw_mask(count: int, share: float) -> np.ndarray:
    """bool [count]: what a filter lets through."""
    return np.random.default_rng(2).random(count) < share


def make_systems(task: Task, codes: Codes, k: int, share: float) -> Systems:
    """Each system's answer to all queries; raises where the first ones' are not the same, bit for bit."""
    if task is Task.map:
        _verify_map(codes)
        return {"hashengine": lambda: mean_average_precision(*_arguments(codes))}
    searches = _make_searches(task, codes.database, codes.queries, k, share)
    mine, *theirs = (in_order(search(codes.queries[:VERIFIED_QUERIES])) for search in searches.values())
    if not all(np.array_equal(a, b) for other in theirs for a, b in zip(mine, other, strict=True)):
        bits = 8 * codes.database.shape[1]
        raise SystemExit(
            f"hamming: the answers must equal FAISS's before they are timed ({task.value}, {bits} bits, k = {k})"
        )
    return {name: lambda search=search: search(codes.queries) for name, search in searches.items()}


def _make_searches(
    task: Task, codes: np.ndarray, queries: np.ndarray, k: int, share: float
) -> dict[str, Callable[[np.ndarray], Answer]]:
    """Each system's search, of a batch of queries; range searches all give (lims, distances, ids)."""
    index = HammingIndex(8 * codes.shape[1])
    index.add(codes)
    mask = draw_mask(len(codes), share) if task is Task.filter else None
    oracle = Oracle(codes, mask)
    if task is Task.range:
        radius = radius_of(index.count(queries[:VERIFIED_QUERIES]), k)
        return {
            "hashengine": lambda batch: index.range_search(batch, radius),
            "faiss": lambda batch: oracle.range_search(batch, radius),
        }
    return {
        "hashengine": lambda batch: index.search(batch, k, filter=mask),
        "faiss heap": lambda batch: oracle.search(batch, k, use_heap=True),
        "faiss counting": lambda batch: oracle.search(batch, k, use_heap=False),
    }


class Oracle:
    """FAISS IndexBinaryFlat, whose heap mode orders by (distance, position), over the codes that the mask leaves."""

    name = "FAISS IndexBinaryFlat"

    def __init__(self, codes: np.ndarray, mask: np.ndarray | None = None):
        import faiss

        self._index = faiss.IndexBinaryFlat(8 * codes.shape[1])
        self._index.add(codes)
        self._parameters = None
        if mask is not None:
            self._bitmap = np.packbits(mask, bitorder="little")  # which FAISS only points to
            selector = faiss.IDSelectorBitmap(len(mask), faiss.swig_ptr(self._bitmap))
            self._parameters = faiss.SearchParameters(sel=selector)

    def search(self, queries: np.ndarray, k: int, use_heap: bool = True) -> Answer:
        self._index.use_heap = use_heap
        return self._index.search(queries, k, params=self._parameters)

    def range_search(self, queries: np.ndarray, radius: int) -> Answer:
        return self._index.range_search(queries, radius + 1)  # FAISS's is exclusive


def radius_of(counts: np.ndarray, k: int) -> int:
    """The smallest radius that holds k codes of a query, on the average; counts: [Q, bits + 1], at each distance."""
    return int(np.flatnonzero(counts.cumsum(1).mean(0) >= k)[0])


def in_order(answer: Answer) -> Answer:
    """A range search's answer with the hits of a query by (distance, id), which FAISS leaves open."""
    if len(answer) == 2:
        return answer
    lims, distances, ids = answer
    lims = lims.astype(np.int64)  # FAISS's are unsigned
    query = np.repeat(np.arange(len(lims) - 1), np.diff(lims))
    order = np.lexsort((ids, distances, query))
    return lims, distances[order], ids[order]


def average_precision(distances: np.ndarray, relevant: np.ndarray) -> float:
    """Of one ranking, expected over the orders of ties: the mean of the precisions at the relevant items' places.

    In a tie of n items, r of them relevant, each place is relevant with probability r / n, and then each other place of
    the tie with (r - 1) / (n - 1).
    """
    total, before, hits = 0.0, 0, 0
    for distance in np.unique(distances):
        tie = distances == distance
        n, r = int(tie.sum()), int(relevant[tie].sum())
        place = np.arange(n)
        hits_there = hits + 1 + place * ((r - 1) / max(1, n - 1))
        total += (r / n * hits_there / (before + place + 1)).sum()
        before, hits = before + n, hits + r
    return total / max(1, hits)


def _verify_map(codes: Codes) -> None:
    few = codes._replace(
        queries=codes.queries[:_VERIFIED_RANKINGS], query_labels=codes.query_labels[:_VERIFIED_RANKINGS]
    )
    got = mean_average_precision(*_arguments(few)).expected_per_query
    want = [
        average_precision(np.bitwise_count(few.database ^ query).sum(1, dtype=np.int32), few.labels == label)
        for query, label in zip(few.queries, few.query_labels, strict=True)
    ]
    if not np.allclose(got, want, rtol=1e-9, atol=0):
        raise SystemExit(f"hamming: the mAP must equal numpy's before it is timed, got {got}, expected {want}")


def _arguments(codes: Codes) -> Answer:
    return codes.queries, codes.query_labels, codes.database, codes.labels
