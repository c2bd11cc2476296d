"""What is asked of the codes, of whom, and what shows that all answer the same."""

import enum
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.codes import Codes
from hashengine import HammingIndex
from hashengine.metrics import mean_average_precision

VERIFIED_QUERIES = 50
_VERIFIED_RANKINGS = 3  # whole ones, place by place


class Task(str, enum.Enum):
    search = "search"  # the k nearest
    filter = "filter"  # the k nearest of a random half of the codes
    range = "range"  # all within the radius that holds about k
    map = "map"  # mean average precision over the full ranking; no k


Answer = tuple[np.ndarray, ...]
Systems = dict[str, Callable[[], Any]]  # ours first


def make_systems(task: Task, codes: Codes, k: int) -> Systems:
    """Each system's answer to all queries; raises where the first ones' are not the same, bit for bit."""
    if task is Task.map:
        _verify_map(codes)
        return {"hashengine": lambda: mean_average_precision(*_arguments(codes))}
    searches = _make_searches(task, codes.database, codes.queries, k)
    mine, *theirs = (in_order(search(codes.queries[:VERIFIED_QUERIES])) for search in searches.values())
    if not all(np.array_equal(a, b) for other in theirs for a, b in zip(mine, other, strict=True)):
        bits = 8 * codes.database.shape[1]
        raise SystemExit(
            f"hamming: the answers must equal FAISS's before they are timed ({task.value}, {bits} bits, k = {k})"
        )
    return {name: lambda search=search: search(codes.queries) for name, search in searches.items()}


def _make_searches(
    task: Task, codes: np.ndarray, queries: np.ndarray, k: int
) -> dict[str, Callable[[np.ndarray], Answer]]:
    """Each system's search, of a batch of queries; range searches all give (lims, distances, ids)."""
    import faiss

    count, bits = len(codes), 8 * codes.shape[1]
    index = HammingIndex(bits)
    index.add(codes)
    oracle = faiss.IndexBinaryFlat(bits)
    oracle.add(codes)
    if task is Task.range:
        radius = radius_of(index, queries[:VERIFIED_QUERIES], k)
        return {
            "hashengine": lambda batch: index.range_search(batch, radius),
            "faiss": lambda batch: oracle.range_search(batch, radius + 1),  # exclusive
        }
    mask = np.random.default_rng(2).random(count) < 0.5 if task is Task.filter else None
    parameters = None
    if mask is not None:
        bitmap = np.packbits(mask, bitorder="little")
        parameters = faiss.SearchParameters(sel=faiss.IDSelectorBitmap(count, faiss.swig_ptr(bitmap)))
        parameters.bitmap = bitmap  # which FAISS only points to

    def search_faiss(batch: np.ndarray, use_heap: bool) -> Answer:
        oracle.use_heap = use_heap
        return oracle.search(batch, k, params=parameters)

    return {
        "hashengine": lambda batch: index.search(batch, k, filter=mask),
        "faiss heap": lambda batch: search_faiss(batch, True),
        "faiss counting": lambda batch: search_faiss(batch, False),
    }


def radius_of(index: HammingIndex, queries: np.ndarray, k: int) -> int:
    """The smallest radius that holds k codes of a query, on the average."""
    within = index.count(queries).cumsum(1).mean(0)
    return int(np.flatnonzero(within >= k)[0])


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
