"""Rows that grow at the end while readers hold the rows before it."""

import torch
from torch import Tensor


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
            grown = self._memory.new_empty((max(needed, 2 * count), *self._memory.shape[1:]))
            grown[:count] = self._memory[:count]
            self._memory = grown
        self._memory[count:needed] = rows
        return self.first(needed)
