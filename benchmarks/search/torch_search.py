"""Exact Hamming search in plain torch, on any device, as users write it without a library.

Searches return (distances int32 [Q, k], positions int64 [Q, k]). `topk_by_xor` orders ties by position, as hashengine
does. It can therefore verify searches that are too large for the CPU. `ProductSearch` leaves the order of ties open.
"""

import torch
from torch import Tensor

from tests.helpers.faiss_oracle import TopK

_MAX_DISTANCES = 1 << 27  # the most int64 distances in memory at the same time
_MAX_SCORES = 1 << 30  # the most float16 scores in memory at the same time
_MAX_EXACT_BITS = 2048  # float16 represents all integers up to this one exactly
_CODES_PER_UNPACKING = 1 << 24


def distances(queries: Tensor, codes: Tensor) -> Tensor:
    """The distances, int64 [Q, N], by XOR and a parallel bit count."""
    rows, columns = _as_words(queries), _as_words(codes)
    return sum(_bit_count(rows[:, None, word] ^ columns[None, :, word]) for word in range(rows.shape[1]))


def topk_by_xor(queries: Tensor, codes: Tensor, k: int) -> TopK:
    """The codes with the k smallest keys, distance * N + position, for N codes. Searches the database in chunks."""
    count, step = len(codes), max(1, _MAX_DISTANCES // len(queries))
    best = torch.empty((len(queries), 0), dtype=torch.int64, device=codes.device)
    for first in range(0, count, step):
        chunk = codes[first : first + step]
        keys = distances(queries, chunk) * count + torch.arange(first, first + len(chunk), device=codes.device)
        best = _smallest(torch.cat([best, _smallest(keys, k)], 1), k)
    return (best // count).int(), best % count


def _smallest(keys: Tensor, k: int) -> Tensor:
    return keys.topk(min(k, keys.shape[1]), largest=False, sorted=True).values


def _as_words(codes: Tensor) -> Tensor:
    """The codes as 64-bit words, padded with zeros."""
    padding = -codes.shape[1] % 8
    return (torch.nn.functional.pad(codes, (0, padding)) if padding else codes.contiguous()).view(torch.int64)


def _bit_count(x: Tensor) -> Tensor:
    """The set bits of each int64, by adding neighbouring fields of 1, 2, 4 and then 8 bits."""
    x = x - ((x >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    return (x * 0x0101010101010101) >> 56


class ProductSearch:
    """A half-precision matrix product of codes with bits of +-1, and `torch.topk`. Searches the database in chunks.

    The database is unpacked beforehand. It then takes 16 times the memory of its codes.
    """

    def __init__(self, codes: Tensor):
        self._bits = 8 * codes.shape[1]
        if self._bits > _MAX_EXACT_BITS:
            raise ValueError(f"ProductSearch: codes must be of at most {_MAX_EXACT_BITS} bits, got {self._bits}")
        self._signs = torch.empty((len(codes), self._bits), dtype=torch.float16, device=codes.device)
        for first in range(0, len(codes), _CODES_PER_UNPACKING):
            rows = slice(first, first + _CODES_PER_UNPACKING)
            self._signs[rows] = _unpack_signs(codes[rows])

    @staticmethod
    def unpacked_bytes(codes: int, bits: int) -> int:
        """The memory that the unpacked database takes."""
        return 2 * codes * bits

    def search(self, queries: Tensor, k: int) -> TopK:
        """The k nearest codes of each query."""
        signs, step = _unpack_signs(queries), max(k, _MAX_SCORES // len(queries))
        scores, positions = None, None
        for first in range(0, len(self._signs), step):
            chunk = self._signs[first : first + step]
            chunk_scores, chunk_positions = (signs @ chunk.T).topk(min(k, len(chunk)))
            chunk_positions += first
            if scores is None:
                scores, positions = chunk_scores, chunk_positions
            else:
                scores, order = torch.cat([scores, chunk_scores], 1).topk(k)
                positions = torch.cat([positions, chunk_positions], 1).gather(1, order)
        return ((self._bits - scores.float()) / 2).int(), positions


def _unpack_signs(codes: Tensor) -> Tensor:
    """The bits as +-1 in float16, [N, bits]. Their order within a byte does not matter to a product."""
    shifts = torch.arange(8, dtype=torch.uint8, device=codes.device)
    return ((codes.unsqueeze(-1) >> shifts) & 1).flatten(-2).half() * 2 - 1
