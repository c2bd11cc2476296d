"""Rows that grow at the end while readers hold the rows before it."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from hashengine.index._devices import CPU, write

_LINE_BYTES = 64  # of a cache


def empty_rows(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device = CPU) -> Tensor:
    """Memory that begins with a cache line. NumPy asks the system for huge pages where it is much; torch does not."""
    with torch.inference_mode(False):  # whoever adds codes in that mode may change them outside of it
        if device.type != "cpu":
            return torch.empty(shape, dtype=dtype, device=device)
        size = math.prod(shape) * dtype.itemsize
        memory = np.empty(size + _LINE_BYTES, np.uint8)
        start = -memory.ctypes.data % _LINE_BYTES
        return torch.from_numpy(memory[start : start + size]).view(dtype).view(shape)


class GrowingRows:
    """Memory for rows; capacity doubles, so that adding N rows one by one copies O(N).

    How many rows count is the caller's to know: what lies behind them is free.
    """

    def __init__(self, memory: Tensor):
        self._memory = memory

    def first(self, count: int) -> Tensor:
        """The first ``count`` rows; to torch a tensor of its own, so that a copy or a pickle leaves the rest out."""
        with torch.inference_mode(False):
            rows = self._memory[:count]
            return rows if rows.is_cuda else torch.from_numpy(rows.numpy())

    def with_room(self, count: int, needed: int) -> GrowingRows:
        """Memory for ``needed`` rows at least, the first ``count`` of them as here; the same where it has the room."""
        if needed <= len(self._memory):
            return self
        memory = self._grown(needed, 2 * count)
        memory[:count] = self._memory[:count]
        return GrowingRows(memory)

    def _grown(self, needed: int, wanted: int) -> Tensor:
        width, dtype, device = self._memory.shape[1:], self._memory.dtype, self._memory.device
        try:
            return empty_rows((max(needed, wanted), *width), dtype, device)
        except torch.cuda.OutOfMemoryError:  # a GPU of which the rows fill more than a third
            if wanted <= needed:
                raise
            return empty_rows((needed, *width), dtype, device)

    def extended(self, count: int, rows: Tensor) -> GrowingRows:
        """Memory of the first ``count`` rows with ``rows`` behind them; views of the first ``count`` stay as they are.

        Until the caller keeps what this returns, and says that there are more rows, nothing has changed.
        """
        grown = self.with_room(count, count + len(rows))
        write(grown._memory[count : count + len(rows)], rows)
        return grown
