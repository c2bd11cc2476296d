"""The measurement of the memory that a call needs."""

import numpy as np
import pytest
import torch

from benchmarks import memory_use

CPU = torch.device("cpu")


def test_the_peak_counts_what_is_allocated_at_the_same_time():
    x = torch.randn(1 << 16)
    scalars = 100  # the most bytes that torch may allocate for the numbers 0, 1 and 2
    assert memory_use.peak_bytes(lambda: (x + 1) * 2, CPU) == pytest.approx(2 * x.nbytes, abs=scalars)
    assert memory_use.peak_bytes(lambda: (x + 1).add_(2), CPU) == pytest.approx(x.nbytes, abs=scalars)
    assert memory_use.peak_bytes(lambda: x.add_(0), CPU) <= scalars


def test_the_extra_memory_of_a_call_excludes_what_it_returns():
    allocated_before = np.ones(8 << 20, np.uint8)

    def call():
        scratch = np.ones(32 << 20, np.uint8)
        return (scratch[: len(allocated_before)] + allocated_before,)

    extra = memory_use.extra_resident_bytes(call)
    assert extra is None or extra == pytest.approx(32 << 20, abs=2 << 20)


def test_memory_that_is_released_during_one_call_hides_nothing():
    """As when the system takes back pages of mapped files."""
    resident = [np.ones(64 << 20, np.uint8)]

    def call():
        resident.clear()
        np.ones(32 << 20, np.uint8)

    extra = memory_use.extra_resident_bytes(call)
    assert extra is None or extra == pytest.approx(32 << 20, abs=2 << 20)
