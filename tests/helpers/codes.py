"""Random bits for tests and benchmarks."""

import numpy as np


def rare_bits(shape: tuple[int, ...], halvings: int, rng: np.random.Generator) -> np.ndarray:
    """Random uint8 in which each bit is set with probability 2**-halvings: the AND of `halvings` random arrays."""
    bits = rng.integers(0, 256, shape, dtype=np.uint8)
    for _ in range(halvings - 1):
        bits &= rng.integers(0, 256, shape, dtype=np.uint8)
    return bits
