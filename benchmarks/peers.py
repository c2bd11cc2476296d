"""Systems that do another job than the search: they answer fewer queries, and only their rates are compared."""

import importlib.metadata
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np

VERIFIED_QUERIES = 4
_PAIRS = 1 << 25  # of a call; USearch takes 16 bytes for each
_BLOCK = 4096  # codes whose distances NumKong writes at once, so that they stay in the cache


class Peer(NamedTuple):
    """A call to time, and how many pairs of a query and a code it gets through."""

    call: Callable[[], object]
    pairs: int


def installed() -> dict[str, str]:
    """The versions of those that are here."""
    versions = {}
    for name in MAKERS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    return versions


def make_peers(codes: np.ndarray, queries: np.ndarray, k: int, threads: int) -> dict[str, Peer]:
    """Those that are installed, by name; raises where one's distances are wrong."""
    queries = queries[: max(1, _PAIRS // len(codes))]
    return {name: MAKERS[name](codes, queries, k, threads) for name in installed()}


def _usearch(codes: np.ndarray, queries: np.ndarray, k: int, threads: int) -> Peer:
    """Its exact search, which orders ties in another way: the distances are verified, not the ids."""
    from usearch.index import MetricKind, search

    def call(batch: np.ndarray):
        return search(codes, batch, k, MetricKind.Hamming, exact=True, threads=threads)

    for query in queries[:VERIFIED_QUERIES]:
        found = np.asarray(call(query[None]).distances).ravel()
        _verify("usearch", found, np.sort(_distances(codes, query))[:k])
    return Peer(partial(call, queries), len(queries) * len(codes))


def _numkong(codes: np.ndarray, queries: np.ndarray, k: int, threads: int) -> Peer:
    """All distances, block by block, of which it keeps none: it has no search. The codes are packed beforehand."""
    import numkong

    blocks = [numkong.hammings_pack(codes[start : start + _BLOCK]) for start in range(0, len(codes), _BLOCK)]
    found = np.asarray(numkong.hammings_packed(queries[:VERIFIED_QUERIES], blocks[0]))
    for row, query in zip(found, queries, strict=False):
        _verify("numkong", row, _distances(codes[:_BLOCK], query))

    def work(blocks: list) -> None:  # without the interpreter's lock, mostly: it has no threads of its own
        out = numkong.zeros((len(queries), _BLOCK), dtype="uint32")
        for block in blocks:
            if block.width == _BLOCK:
                numkong.hammings_packed(queries, block, out=out)
            else:  # the last one
                numkong.hammings_packed(queries, block)

    def call() -> None:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, [blocks[thread::threads] for thread in range(threads)]))

    return Peer(call, len(queries) * len(codes))


def _distances(codes: np.ndarray, query: np.ndarray) -> np.ndarray:
    return np.bitwise_count(codes ^ query).sum(1, dtype=np.int32)


def _verify(name: str, found: np.ndarray, expected: np.ndarray) -> None:
    if not np.array_equal(found, expected):
        raise SystemExit(f"hamming: the distances of {name} must be right before it is timed")


MAKERS = {"usearch": _usearch, "numkong": _numkong}
