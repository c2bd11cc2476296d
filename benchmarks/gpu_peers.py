"""What a GPU search is put beside: FAISS's binary index on the GPU, and what is written in torch today.

Each answers (distances int32 [Q, k], positions int64 [Q, k]) on the device. Only ``xor_topk`` has the order of ties;
of the others `agrees` compares what is settled.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

Answer = tuple[Tensor, Tensor]

FAISS_MOST = 2048  # the largest k of FAISS on a GPU
_PAIRS = 1 << 27  # whose distances plain torch holds at once, int64
_SCORES = 1 << 30  # that a product holds at once, float16
_EXACT_BITS = 2048  # float16 counts no further
_UNPACKED = 1 << 24  # codes that are unpacked at once


def distances(queries: Tensor, codes: Tensor) -> Tensor:
    """int64 [Q, N], by XOR and the usual way to add up bits in parallel."""
    rows, columns = _words(queries), _words(codes)
    return sum(_population(rows[:, None, word] ^ columns[None, :, word]) for word in range(rows.shape[1]))


def xor_topk(queries: Tensor, codes: Tensor, k: int) -> Answer:
    """Exact, and ties by position: ranked by distance * N + position, a part of the database at a time."""
    count, step = len(codes), max(1, _PAIRS // len(queries))
    best = torch.empty((len(queries), 0), dtype=torch.int64, device=codes.device)
    for first in range(0, count, step):
        part = codes[first : first + step]
        keys = distances(queries, part) * count + torch.arange(first, first + len(part), device=codes.device)
        best = _smallest(torch.cat([best, _smallest(keys, k)], 1), k)
    return (best // count).int(), best % count


def _smallest(keys: Tensor, k: int) -> Tensor:
    return keys.topk(min(k, keys.shape[1]), largest=False, sorted=True).values


def _words(codes: Tensor) -> Tensor:
    beyond = -codes.shape[1] % 8
    return (torch.nn.functional.pad(codes, (0, beyond)) if beyond else codes.contiguous()).view(torch.int64)


def _population(x: Tensor) -> Tensor:
    x = x - ((x >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    return (x * 0x0101010101010101) >> 56


class Product:
    """A product of +-1 codes in half precision and ``torch.topk``, a part of the database at a time.

    The database is unpacked beforehand, to 16 times its size.
    """

    def __init__(self, codes: Tensor):
        self._bits = 8 * codes.shape[1]
        if self._bits > _EXACT_BITS:
            raise ValueError(f"float16 counts to {_EXACT_BITS}, got {self._bits} bits")
        self._signs = torch.empty((len(codes), self._bits), dtype=torch.float16, device=codes.device)
        for first in range(0, len(codes), _UNPACKED):
            self._signs[first : first + _UNPACKED] = _signs(codes[first : first + _UNPACKED])

    @staticmethod
    def bytes(codes: int, bits: int) -> int:
        return 2 * codes * bits

    def search(self, queries: Tensor, k: int) -> Answer:
        signs, step = _signs(queries), max(k, _SCORES // len(queries))
        scores, positions = None, None
        for first in range(0, len(self._signs), step):
            part = self._signs[first : first + step]
            found, where = (signs @ part.T).topk(min(k, len(part)))
            where += first
            if scores is None:
                scores, positions = found, where
            else:
                scores, order = torch.cat([scores, found], 1).topk(k)
                positions = torch.cat([positions, where], 1).gather(1, order)
        return ((self._bits - scores.float()) / 2).int(), positions


def _signs(codes: Tensor) -> Tensor:
    places = torch.arange(8, dtype=torch.uint8, device=codes.device)
    return ((codes.unsqueeze(-1) >> places) & 1).flatten(-2).half() * 2 - 1


class FaissGpu(NamedTuple):
    """FAISS's index on the GPU, with queries and answers on the device, and with numpy's."""

    search: Callable[[Tensor, int], Answer]
    search_host: Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]
    fill: Callable[[np.ndarray], None]  # with these codes instead of those that it holds


def faiss_version() -> str | None:
    """Of the FAISS that is installed, marked where it knows no GPU; None without one."""
    try:
        import faiss
    except ImportError:
        return None
    return faiss.__version__ + ("" if hasattr(faiss, "GpuIndexBinaryFlat") else " (CPU)")


def add_to_faiss(codes: np.ndarray, device: torch.device) -> FaissGpu | None:
    """An index of the codes on the device; None where FAISS is missing or knows no GPU."""
    version = faiss_version()
    if device.type != "cuda" or version is None or version.endswith("(CPU)"):
        return None
    import faiss

    place, stream = device.index or 0, torch.cuda.current_stream(device).cuda_stream
    resources = faiss.StandardGpuResources()
    resources.setDefaultStream(place, faiss.cast_integer_to_cudastream_t(stream))  # the one that events are on
    config = faiss.GpuIndexBinaryFlatConfig()
    config.device = place
    index = faiss.GpuIndexBinaryFlat(resources, 8 * codes.shape[1], config)
    index.add(codes)

    def search(queries: Tensor, k: int) -> Answer:
        found = torch.empty((len(queries), k), dtype=torch.int32, device=device)
        positions = torch.empty((len(queries), k), dtype=torch.int64, device=device)
        index.search_c(
            len(queries),
            faiss.cast_integer_to_uint8_ptr(queries.data_ptr()),
            k,
            faiss.cast_integer_to_int_ptr(found.data_ptr()),
            faiss.cast_integer_to_idx_t_ptr(positions.data_ptr()),
        )
        return found, positions

    def fill(codes: np.ndarray) -> None:
        index.reset()
        index.add(codes)

    return FaissGpu(search, index.search, fill)


def agrees(answer: Answer, right: Answer) -> bool:
    """Whether the distances are the same, and the positions below the last group of ties, as sets."""
    found, want = answer[0], right[0]
    if not torch.equal(found, want):
        return False
    settled = want < want[:, -1:]
    ids = [positions.masked_fill(~settled, -1).sort(1).values for _, positions in (answer, right)]
    return torch.equal(*ids)
