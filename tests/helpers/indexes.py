"""Small indexes of random codes, and the comparison of two indexes."""

from __future__ import annotations

import numpy as np
import torch

from hashengine import HammingIndex


def codes_of(count: int, bits: int = 64, seed: int = 0) -> np.ndarray:
    """Random codes, uint8 [count, bits / 8]. A smaller `count` gives the first `count` of the same codes."""
    return np.random.default_rng(seed).integers(0, 256, (count, bits // 8), dtype=np.uint8)


def index_of(count: int = 50, bits: int = 64, ids: bool = False) -> HammingIndex:
    """An index of `codes_of(count, bits)`. If `ids` is true, the ids are 10 * (count - 1), ..., 10, 0."""
    index = HammingIndex(bits)
    index.add(codes_of(count, bits), np.arange(count)[::-1] * 10 if ids else None)
    return index


def assert_same_index(a: HammingIndex, b: HammingIndex) -> None:
    """Check that both indexes rank all of their codes in the same way, with equal distances and ids."""
    assert (len(a), a.bits) == (len(b), b.bits)
    queries = codes_of(7, a.bits, seed=9)
    for result, expected in zip(a.search(queries, len(a)), b.search(queries, len(b)), strict=True):
        np.testing.assert_array_equal(result, expected)


def as_numpy(result: np.ndarray | torch.Tensor) -> np.ndarray:
    """The result as a numpy array; a tensor may be on any device."""
    return result.cpu().numpy() if isinstance(result, torch.Tensor) else result
