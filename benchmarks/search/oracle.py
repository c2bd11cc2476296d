"""The answers that a search must give before it is timed: those of FAISS or, without FAISS, of the CPU kernels."""

from typing import Protocol

import numpy as np

from hashengine import HammingIndex
from tests.helpers.faiss_oracle import Arrays, FaissOracle, faiss_version


class Oracle(Protocol):
    """Exact searches on the CPU whose results are ordered by (distance, position)."""

    name: str

    def search(self, queries: np.ndarray, k: int) -> Arrays:
        """The k nearest codes: distances int32 [Q, k], positions int64 [Q, k]."""

    def range_search(self, queries: np.ndarray, radius: int) -> Arrays:
        """The codes within the inclusive radius: lims [Q + 1], distances, positions.

        The results of query i are those from lims[i] up to, but not including, lims[i + 1].
        """


class CpuOracle:
    """hashengine's CPU kernels. They verify the answers of a GPU if FAISS is not installed."""

    name = "hashengine on the CPU"

    def __init__(self, codes: np.ndarray, mask: np.ndarray | None):
        self._index, self._mask = HammingIndex(8 * codes.shape[1]), mask
        self._index.add(codes)

    def search(self, queries: np.ndarray, k: int) -> Arrays:
        """The k nearest codes: distances int32 [Q, k], positions int64 [Q, k]."""
        return self._index.search(queries, k, filter=self._mask)

    def range_search(self, queries: np.ndarray, radius: int) -> Arrays:
        """The codes within the inclusive radius: lims [Q + 1], distances, positions."""
        return self._index.range_search(queries, radius)


def make_oracle(codes: np.ndarray, mask: np.ndarray | None) -> Oracle:
    """The oracle for these codes; `mask`, bool [N], selects the codes that may be found."""
    return (CpuOracle if faiss_version() is None else FaissOracle)(codes, mask)


def distances_to(codes: np.ndarray, query: np.ndarray) -> np.ndarray:
    """The distance of each code from one query, int32 [N], by the definition of the distance."""
    return np.bitwise_count(codes ^ query).sum(1, dtype=np.int32)
