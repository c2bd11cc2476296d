"""FAISS's binary flat indexes, which give the expected answers of Hamming searches, on the CPU and on a GPU.

`FaissOracle` orders its results by (distance, position), as hashengine does, so positions must be equal too. `FaissGpu`
orders ties in any way, so `equal_up_to_ties` compares distances and sets of positions.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

Arrays = tuple[np.ndarray, ...]
TopK = tuple[Tensor, Tensor]  # distances int32 [Q, k], positions int64 [Q, k]

MAX_GPU_K = 2048  # the largest k of FAISS on a GPU


class FaissOracle:
    """FAISS `IndexBinaryFlat` on the CPU. Its heap mode orders by (distance, position).

    Args:
        codes: uint8 [N, bits / 8].
        mask: bool [N], the codes that `search` may find; None for all. The range searches ignore it.
    """

    name = "FAISS IndexBinaryFlat"

    def __init__(self, codes: np.ndarray, mask: np.ndarray | None = None):
        import faiss

        self._index = faiss.IndexBinaryFlat(8 * codes.shape[1])
        self._index.add(codes)
        self._parameters = None
        if mask is not None:
            self._bitmap = np.packbits(mask, bitorder="little")  # an attribute, because FAISS stores only a pointer
            selector = faiss.IDSelectorBitmap(len(mask), faiss.swig_ptr(self._bitmap))
            self._parameters = faiss.SearchParameters(sel=selector)

    def search(self, queries: np.ndarray, k: int, use_heap: bool = True) -> Arrays:
        """Return (distances int32 [Q, k], positions int64 [Q, k])."""
        self._index.use_heap = use_heap
        return self._index.search(queries, k, params=self._parameters)

    def range_search(self, queries: np.ndarray, radius: int) -> Arrays:
        """Return (lims [Q + 1], distances, positions) within the inclusive radius, the nearest first."""
        return sort_hits(self.range_search_unordered(queries, radius))

    def range_search_unordered(self, queries: np.ndarray, radius: int) -> Arrays:
        """Return the hits of range_search, those of each query in no defined order. Benchmarks time this method."""
        return self._index.range_search(queries, radius + 1)  # FAISS's radius is exclusive


def sort_hits(answer: Arrays) -> Arrays:
    """Order the hits of each query of a range search by (distance, position)."""
    lims, distances, positions = answer
    lims = lims.astype(np.int64)  # FAISS returns unsigned integers
    query = np.repeat(np.arange(len(lims) - 1), np.diff(lims))
    order = np.lexsort((positions, distances, query))
    return lims, distances[order], positions[order]


class FaissGpu:
    """FAISS `GpuIndexBinaryFlat` on a CUDA device. Its kernels run on the current stream."""

    def __init__(self, codes: np.ndarray, device: torch.device):
        import faiss

        self._faiss, self._device = faiss, device
        number, stream = device.index or 0, torch.cuda.current_stream(device).cuda_stream
        self._resources = faiss.StandardGpuResources()
        self._resources.setDefaultStream(number, faiss.cast_integer_to_cudastream_t(stream))
        config = faiss.GpuIndexBinaryFlatConfig()
        config.device = number
        self._index = faiss.GpuIndexBinaryFlat(self._resources, 8 * codes.shape[1], config)
        self._index.add(codes)

    def search(self, queries: Tensor, k: int) -> TopK:
        """Search with queries and results on the device."""
        distances = torch.empty((len(queries), k), dtype=torch.int32, device=self._device)
        positions = torch.empty((len(queries), k), dtype=torch.int64, device=self._device)
        self._index.search_c(
            len(queries),
            self._faiss.cast_integer_to_uint8_ptr(queries.data_ptr()),
            k,
            self._faiss.cast_integer_to_int_ptr(distances.data_ptr()),
            self._faiss.cast_integer_to_idx_t_ptr(positions.data_ptr()),
        )
        return distances, positions

    def search_from_host(self, queries: np.ndarray, k: int) -> Arrays:
        """Search with queries and results in host memory."""
        return self._index.search(queries, k)

    def replace_codes(self, codes: np.ndarray) -> None:
        """Replace all codes of the index by `codes`."""
        self._index.reset()
        self._index.add(codes)


def faiss_version() -> str | None:
    """Return the version of the installed FAISS, with " (CPU)" if it has no GPU support; None without FAISS."""
    try:
        import faiss
    except ImportError:
        return None
    return faiss.__version__ + ("" if hasattr(faiss, "GpuIndexBinaryFlat") else " (CPU)")


def make_faiss_gpu(codes: np.ndarray, device: torch.device) -> FaissGpu | None:
    """Return a `FaissGpu` with the codes; None on the CPU, without FAISS, or if FAISS has no GPU support."""
    version = faiss_version()
    if device.type != "cuda" or version is None or version.endswith("(CPU)"):
        return None
    return FaissGpu(codes, device)


def search_on_gpu(queries: Tensor, codes: Tensor, k: int) -> TopK:
    """Search with FAISS's index on the GPU of `codes`; k is at most `MAX_GPU_K`."""
    return FaissGpu(codes.cpu().numpy(), codes.device).search(queries, k)


def equal_up_to_ties(answer: TopK, expected: TopK) -> bool:
    """Return True if the distances are equal and each query has the same set of positions below its last distance.

    Positions at the last distance are not compared, because k may cut a group of ties anywhere.
    """
    (distances, positions), (expected_distances, expected_positions) = answer, expected
    if not torch.equal(distances, expected_distances):
        return False
    is_last = expected_distances == expected_distances[:, -1:]
    return torch.equal(*(found.masked_fill(is_last, -1).sort(1).values for found in (positions, expected_positions)))
