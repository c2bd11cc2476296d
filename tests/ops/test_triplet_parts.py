"""triplet_pool and triplet_gate, triplet attention in parts: the native CPU kernels against the formulas."""

import pytest
import torch
from torch import Tensor

from hashengine import _native
from hashengine.ops import triplet_gate, triplet_pool
from hashengine.ops.triplet_gate import _backward_reference as gate_backward_reference
from hashengine.ops.triplet_gate import _reference as gate_reference
from hashengine.ops.triplet_pool import _backward_reference as pool_backward_reference
from hashengine.ops.triplet_pool import _reference as pool_reference
from tests.helpers.layouts import feature_map
from tests.helpers.numerics import assert_as_accurate_as_eager

pytestmark = pytest.mark.skipif(not _native.available(), reason="the native module is not built")

OPS = torch.ops.hashengine
FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
SHAPES = [(2, 3, 1, 37), (5, 4, 1, 1), (9, 8, 7, 7), (1, 70, 9, 3), (2, 13, 5, 11)]


def normal(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gate_maps(x: Tensor, branches: int) -> list[Tensor | None]:
    n, c, h, w = x.shape
    shapes = [(n, 1, c, w), (n, 1, h, c), (n, 1, h, w)][:branches]
    return [*(normal(shape, x.dtype, i) for i, shape in enumerate(shapes)), *[None] * (3 - branches)]


def assert_all_accurate(got: tuple, eager: tuple, exact: tuple) -> None:
    for one, reference, truth in zip(got, eager, exact, strict=True):
        if truth.dtype == torch.int32:
            assert torch.equal(one, truth)
        elif one.dtype == torch.float64:
            torch.testing.assert_close(one, truth)
        else:
            assert_as_accurate_as_eager(one, reference, truth.double())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_pool(dtype, memory_format, shape):
    x = feature_map("contiguous", dtype, shape).contiguous(memory_format=FORMATS[memory_format])
    got, exact = OPS.triplet_pool(x), pool_reference(x.double())
    assert_all_accurate(got, pool_reference(x), exact)
    grads = [normal(pool.shape, dtype, i) for i, pool in enumerate(got[:3])]
    indices = list(got[3:])
    grad_x = OPS.triplet_pool_backward(grads, indices, x)
    assert grad_x.dtype == dtype and grad_x.stride() == x.stride()
    want = pool_backward_reference([grad.double() for grad in grads], indices, x.double())
    assert_all_accurate((grad_x,), (pool_backward_reference(grads, indices, x),), (want,))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("branches", [2, 3])
def test_gate(dtype, memory_format, branches):
    for shape in SHAPES:
        x, grad_y = (feature_map("contiguous", dtype, shape, seed) for seed in (2, 3))
        x = x.contiguous(memory_format=FORMATS[memory_format])
        maps = gate_maps(x, branches)
        wide = [None if value is None else value.double() for value in maps]
        got, exact = OPS.triplet_gate(x, *maps), gate_reference(x.double(), *wide)
        assert got.stride() == x.stride()
        assert_all_accurate((got,), (gate_reference(x, *maps),), (exact,))
        grads = OPS.triplet_gate_backward(grad_y, x, *maps)
        eager, exact = (
            gate_backward_reference(grad_y, x, *maps),
            gate_backward_reference(grad_y.double(), x.double(), *wide),
        )
        assert_all_accurate(grads[: branches + 1], eager[: branches + 1], exact[: branches + 1])


def test_other_strides_and_mixed_types():
    x = feature_map("contiguous").permute(0, 2, 1, 3)
    for one, want in zip(triplet_pool(x), triplet_pool(x.contiguous()), strict=True):
        assert torch.equal(one, want)
    maps = gate_maps(x, 3)
    got = triplet_gate(x, *maps)
    assert torch.equal(got, triplet_gate(x.contiguous(), *maps)) and got.stride() == torch.empty_like(x).stride()
    halves = [value.half() for value in maps]
    grads = OPS.triplet_gate_backward(x, x, *halves)
    assert [grad.dtype for grad in grads] == [x.dtype, torch.half, torch.half, torch.half]
    assert torch.equal(triplet_gate(x, *halves), triplet_gate(x, *(value.float() for value in halves)))


def test_the_number_of_threads_changes_no_bit():
    x = feature_map("contiguous", shape=(1, 70, 18, 9))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append([*OPS.triplet_pool(x), *OPS.triplet_gate_backward(x, x, *gate_maps(x, 3))])
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
