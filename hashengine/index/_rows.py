"""Rows that grow at the end while readers hold the rows before it."""

import math

import numpy as np
import torch
from torch import Tensor

_LINE_BYTES = 64  # of a cache


def empty_rows(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory that begins with a cache line. NumPy asks the system for huge pages where it is much; torch does not."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _LINE_BYTES, np.uint8)
    start = -memory.ctypes.data % _LINE_BYTES
    return torch.from_numpy(memory[start : start + size]).view(dtype).view(shape)


class GrowingRows:
    """Memory for rows; capacity doubles, so that adding N rows one by one copies O(N).

    How many rows count is the caller's to know: what lies behind them is free.
    """

    def __init__(self, rows: Tensor):
        self._memory = rows

    def first(self, count: int) -> Tensor:
        """The first ``count`` rows; to torch a tensor of its own, so that a copy or a pickle leaves the rest out."""
        return torch.from_numpy(self._memory[:count].numpy())

    def extended(self, count: int, rows: Tensor) -> Tensor:
        """The first ``count`` rows with ``rows`` behind them; views of the first ``count`` stay as they are."""
        needed = count + len(rows)
        if needed > len(self._memory):
            grown = empty_rows((max(needed, 2 * count), *self._memory.shape[1:]), self._memory.dtype)
            grown[:count] = self._memory[:count]
            self._memory = grown
        self._memory[count:needed] = rows
        return self.first(needed)
