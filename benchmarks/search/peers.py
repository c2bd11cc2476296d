"""CPU libraries whose distances per second are compared with those of hashengine's search.

Their times per call are not compared, because a peer may get fewer queries, and NumKong only computes distances.
"""

import importlib.metadata
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from benchmarks.harness import WrongAnswer
from benchmarks.search.oracle import distances_to

_VERIFIED_QUERIES = 4
_MAX_PAIRS = 1 << 25  # (query, code) pairs per call; limits the memory that USearch allocates for them
_NUMKONG_BLOCK_CODES = 4096  # codes per call of NumKong, so that its distances stay in the cache


class Peer(NamedTuple):
    """A call to time, and the number of (query, code) pairs whose distance it computes."""

    call: Callable[[], object]
    pairs: int


def installed() -> dict[str, str]:
    """The installed libraries of `MAKERS` and their versions."""
    versions = {}
    for name in MAKERS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def make_peers(codes: np.ndarray, queries: np.ndarray, k: int, threads: int) -> dict[str, Peer]:
    """The installed peers by name. Raises `WrongAnswer` if the distances of a peer are wrong."""
    queries = queries[: max(1, _MAX_PAIRS // len(codes))]
    return {name: MAKERS[name](codes, queries, k, threads) for name in installed()}


def _usearch(codes: np.ndarray, queries: np.ndarray, k: int, threads: int) -> Peer:
    """USearch's exact search. It orders ties differently, so only the distances are verified."""
    from usearch.index import MetricKind, search

    def call(batch: np.ndarray) -> Any:
        return search(codes, batch, k, MetricKind.Hamming, exact=True, threads=threads)

    for query in queries[:_VERIFIED_QUERIES]:
        found = np.asarray(call(query[None]).distances).ravel()
        _verify("usearch", found, np.sort(distances_to(codes, query))[:k])
    return Peer(partial(call, queries), len(queries) * len(codes))


def _numkong(codes: np.ndarray, queries: np.ndarray, k: int, threads: int) -> Peer:
    """All distances by NumKong, which has no search. Each block of distances overwrites the previous one."""
    import numkong

    starts = range(0, len(codes), _NUMKONG_BLOCK_CODES)
    blocks = [numkong.hammings_pack(codes[start : start + _NUMKONG_BLOCK_CODES]) for start in starts]
    found = np.asarray(numkong.hammings_packed(queries[:_VERIFIED_QUERIES], blocks[0]))
    for row, query in zip(found, queries, strict=False):
        _verify("numkong", row, distances_to(codes[:_NUMKONG_BLOCK_CODES], query))

    # NumKong starts no threads. Python threads run it in parallel, because it releases the interpreter's lock.
    def compute(blocks: list) -> None:
        out = numkong.zeros((len(queries), _NUMKONG_BLOCK_CODES), dtype="uint32")
        for block in blocks:
            if block.width == _NUMKONG_BLOCK_CODES:
                numkong.hammings_packed(queries, block, out=out)
            else:  # the last block of the database
                numkong.hammings_packed(queries, block)

    def call() -> None:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(compute, [blocks[thread::threads] for thread in range(threads)]))

    return Peer(call, len(queries) * len(codes))


def _verify(name: str, found: np.ndarray, expected: np.ndarray) -> None:
    if not np.array_equal(found, expected):
        raise WrongAnswer(f"hamming: the distances of {name} must be right before it is timed")


MAKERS: dict[str, Callable[[np.ndarray, np.ndarray, int, int], Peer]] = {"usearch": _usearch, "numkong": _numkong}
