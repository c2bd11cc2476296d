"""simam and simam_energy against the formula in torch, in several layouts and dtypes; simam also at each SIMD level."""

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from hashengine import ops
from hashengine.ops.simam import _backward_reference, _reference
from tests.helpers.eager import eager_energy, eager_simam
from tests.helpers.layouts import DTYPES, LAYOUTS, MEMORY_FORMATS, assert_gradients, feature_map
from tests.helpers.numerics import assert_as_accurate_as_eager
from tests.helpers.threads import with_threads

OPS = torch.ops.hashengine
# [N, C, H, W]. The CPU kernels (csrc/cpu/simam) read rows: a row has the positions of a plane or, in channels_last, the
# channels of a position. There are
# - rows that are shorter than a vector, that are whole vectors, and that end in a part of a vector;
# - planes that have several chunks of 2,048 positions and end in a part of a vector;
# - more small planes than the 64 that are packed together;
# - more channels than the 512 that are processed together at most.
SHAPES = [
    (2, 3, 1, 1),
    (3, 9, 1, 1),
    (2, 70, 1, 5),
    (2, 5, 2, 2),
    (3, 20, 7, 7),
    (2, 17, 13, 11),
    (1, 3, 4, 2),
    (2, 8, 8, 8),
    (1, 9, 67, 125),
    (1, 1100, 3, 3),
]


def planes(shape, dtype=torch.float32, layout: str = "contiguous", seed: int = 0, offset: float = 0.5) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + offset
    return values.to(dtype).contiguous(memory_format=MEMORY_FORMATS[layout])


def run(x: Tensor, grad_y: Tensor, lam: float = 1e-4) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, the statistics and grad_x, computed by the ops."""
    y, stats = OPS.simam(x, lam)
    return y, stats, OPS.simam_backward(grad_y, x, stats, lam)


def eager(x: Tensor, grad_y: Tensor, lam: float = 1e-4) -> tuple[Tensor, Tensor]:
    inputs = x.detach().requires_grad_()
    y = eager_simam(inputs, lam)
    return y.detach(), torch.autograd.grad(y, inputs, grad_y)[0]


def eager_statistics(x: Tensor) -> Tensor:
    mean = x.mean((2, 3), keepdim=True)
    variance = (x - mean).square().sum((2, 3), keepdim=True) / max(x.shape[2] * x.shape[3] - 1, 1)
    return torch.cat((mean, variance), -1)[:, :, 0]


def assert_accurate_statistics(stats: Tensor, x: Tensor) -> None:
    eager_stats, exact_stats = eager_statistics(x.to(stats.dtype)), eager_statistics(x.double())
    for i in range(2):
        assert_as_accurate_as_eager(stats[..., i], eager_stats[..., i], exact_stats[..., i])


def assert_accurate(x: Tensor, grad_y: Tensor, lam: float = 1e-4) -> Tensor:
    """Compare y and grad_x with eager torch. Return the statistics."""
    y, stats, grad_x = run(x, grad_y, lam)
    assert y.dtype == grad_x.dtype == x.dtype and y.stride() == grad_x.stride() == x.stride()
    eager_y, eager_grad = eager(x, grad_y, lam)
    exact_y, exact_grad = eager(x.double(), grad_y.double(), lam)
    assert_as_accurate_as_eager(y, eager_y, exact_y)
    assert_as_accurate_as_eager(grad_x, eager_grad, exact_grad)
    return stats


@pytest.mark.parametrize("layout", LAYOUTS)
def test_schema_fake_autograd_and_gradients_are_consistent(layout):
    x = feature_map(layout, torch.float64).requires_grad_()
    for op, function in ((OPS.simam, ops.simam), (OPS.simam_energy, ops.simam_energy)):
        opcheck(op.default, (x, 0.01))
        assert_gradients(lambda x, function=function: function(x, 0.01), x)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_keep_the_layout(layout):
    x = feature_map(layout)
    for y in (ops.simam(x), ops.simam_energy(x)):
        assert y.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("scale", [1e-2, 1.0, 30.0])
def test_values_and_gradients_are_as_accurate_as_eager(dtype, scale):
    x = feature_map("contiguous", dtype, (2, 3, 14, 15)) * scale + scale
    for function, eager in ((ops.simam, eager_simam), (ops.simam_energy, eager_energy)):
        results, grads = [], []
        for run, inputs in ((function, x), (eager, x), (eager, x.double())):
            inputs = inputs.clone().requires_grad_()
            y = run(inputs, 1e-4)
            y.backward(feature_map("contiguous", dtype, (2, 3, 14, 15), seed=3).to(y.dtype))
            results.append(y.detach())
            grads.append(inputs.grad)
        assert results[0].dtype == grads[0].dtype == dtype
        assert_as_accurate_as_eager(*results)
        assert_as_accurate_as_eager(*grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [2e9, 1e12, 1e15, 1e17])
def test_gradients_of_huge_values_are_as_accurate_as_eager(dtype, scale):
    x, grad = (feature_map("contiguous", dtype, (2, 3, 8, 9), seed=seed) for seed in (0, 1))
    for memory_format in MEMORY_FORMATS.values():
        assert_accurate((x * scale).contiguous(memory_format=memory_format), grad)
    for function, eager_function in ((ops.simam, eager_simam), (ops.simam_energy, eager_energy)):
        grads = []
        for op, inputs in ((function, x), (eager_function, x), (eager_function, x.double())):
            inputs = (inputs * scale).requires_grad_()
            op(inputs, 1e-4).backward(grad.to(inputs.dtype))
            grads.append(inputs.grad)
        assert_as_accurate_as_eager(*grads)


def test_the_gate_of_a_plane_without_variance_is_sigmoid_of_one_half():
    gate = torch.sigmoid(torch.tensor(0.5))
    for x in (torch.full((1, 2, 1, 1), 3.0), torch.full((1, 2, 4, 4), -2.0)):
        torch.testing.assert_close(ops.simam(x), x * gate)
        torch.testing.assert_close(ops.simam_energy(x), torch.full_like(x, 0.5))


def test_a_nan_fills_its_plane_and_no_other():
    x = feature_map("contiguous")
    x[0, 0, 0, 0] = torch.nan
    y = ops.simam(x)
    assert y[0, 0].isnan().all() and y[0, 1:].isfinite().all() and y[1:].isfinite().all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", MEMORY_FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_simd_level_is_as_accurate_as_eager(simd_level, shape, layout, dtype):
    if dtype == torch.float64:  # eager and exact would be the same computation
        x, grad_y = planes(shape, dtype, layout), planes(shape, dtype, layout, seed=1)
        y, stats, grad_x = run(x, grad_y)
        want, want_stats = _reference(x, 1e-4)
        torch.testing.assert_close((y, stats), (want, want_stats))
        torch.testing.assert_close(grad_x, _backward_reference(grad_y, x, want_stats, 1e-4))
    else:
        x = planes(shape, dtype, layout)
        assert_accurate_statistics(assert_accurate(x, planes(shape, dtype, layout, seed=1)), x)


@pytest.mark.parametrize("layout", MEMORY_FORMATS)
@pytest.mark.parametrize("offset", [100.0, -3000.0])
def test_planes_with_a_mean_far_from_zero_are_as_accurate_as_eager(simd_level, layout, offset):
    for shape in ((2, 16, 7, 7), (1, 16, 70, 70)):
        x = planes(shape, layout=layout, offset=offset)
        assert_accurate_statistics(assert_accurate(x, planes(shape, layout=layout, seed=1)), x)


@pytest.mark.parametrize("layout", MEMORY_FORMATS)
def test_a_plane_with_one_outlier_is_as_accurate_as_eager(simd_level, layout):
    """The outlier is the first value of each plane. The exponential of its inverse energy overflows in float32."""
    x = torch.full((1, 8, 40, 41), 0.25).contiguous(memory_format=MEMORY_FORMATS[layout])
    x[:, :, 0, 0] = 1e4
    assert_accurate(x, planes(x.shape, layout=layout, seed=1))


@pytest.mark.parametrize("layout", MEMORY_FORMATS)
@pytest.mark.parametrize("shape", [(2, 9, 5, 5), (2, 9, 2, 3), (2, 3, 5, 5), (1, 16, 70, 70)], ids=str)
def test_nan_and_infinity_fill_their_own_plane_only(simd_level, layout, shape):
    for value in (torch.nan, torch.inf):
        x = planes(shape, layout=layout)
        x[0, 1, -1, -1] = value
        y, _, grad_x = run(x, torch.ones_like(x))
        for result in (y, grad_x):
            assert result[0, 1].isnan().all()
            assert result[0, 0].isfinite().all() and result[0, 2:].isfinite().all() and result[1:].isfinite().all()
    x = planes(shape, layout=layout)
    y, stats, _ = run(x, x)
    grad_y = torch.ones_like(x)
    grad_y[0, 1, -1, -1] = torch.nan
    grad_x = OPS.simam_backward(grad_y, x, stats, 1e-4)
    assert grad_x[0, 1].isnan().all()
    assert int(grad_x.isnan().sum()) == shape[2] * shape[3]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", MEMORY_FORMATS)
def test_number_of_threads_does_not_change_the_bits(dtype, layout):
    for shape in ((5, 96, 14, 14), (1, 130, 20, 20), (3, 700, 2, 3)):
        x, grad_y = planes(shape, dtype, layout), planes(shape, dtype, layout, seed=1)
        results = with_threads(lambda x=x, grad_y=grad_y: run(x, grad_y))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_layouts_agree():
    for shape in ((2, 24, 9, 10), (2, 9, 2, 2), (2, 5, 9, 9)):
        x, grad_y = planes(shape), planes(shape, seed=1)
        want = run(x, grad_y)
        others = [
            (x.contiguous(memory_format=torch.channels_last), grad_y),  # x and grad_y differ in layout
            (x, grad_y.contiguous(memory_format=torch.channels_last)),
            (x.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2), grad_y),  # neither NCHW nor channels_last
            (torch.cat((x, x), 1)[:, : shape[1]], torch.cat((grad_y, x), 3)[..., : shape[3]]),  # slices
        ]
        for inputs in others:
            got = run(*inputs)
            assert got[0].stride() == got[2].stride() == torch.empty_like(inputs[0]).stride()
            torch.testing.assert_close(got, want)
        expanded = grad_y[:1, :1].expand(shape)
        torch.testing.assert_close(run(x, expanded), run(x, expanded.contiguous()))


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_inputs_give_empty_results(shape, dtype):
    x = torch.empty(shape, dtype=dtype)
    y, stats, grad_x = run(x, x)
    assert y.shape == grad_x.shape == x.shape and stats.shape == (*shape[:2], 2)
    assert y.dtype == grad_x.dtype == dtype
