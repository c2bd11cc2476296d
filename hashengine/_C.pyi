"""The functions of the native module itself; its kernels are called as `torch.ops.hashengine.*`."""

from typing import Any

import numpy as np

def build_config() -> dict[str, Any]:
    """How the module was compiled."""

def hamming_topk(
    queries: np.ndarray, codes: np.ndarray, k: int, filter: np.ndarray | None, num_threads: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """`hashengine.ops.hamming_topk` for numpy arrays; None if the op has to be called instead."""

def simd_level() -> str:
    """The instruction set that the CPU kernels use."""

def simd_levels() -> list[str]:
    """The instruction sets that this processor supports. By default, the last one is used."""
