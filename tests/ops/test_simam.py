"""simam's native CPU kernels: every SIMD level, layout, dtype and odd shape against the formula in float64."""

import pytest
import torch
from torch import Tensor

from hashengine import ops
from hashengine.ops.simam import _backward_reference, _reference
from tests.helpers.numerics import assert_as_accurate_as_eager
from tests.ops.test_attention_ops import eager_simam

OPS = torch.ops.hashengine
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# [N, C, H, W]: rows of positions, and of channels, that are below a vector, whole vectors, and a vector and a part;
# planes of more than one chunk (2,048 positions), of which the last has less than a vector; more planes than are packed
# together (64); more channels than a slab has (512).
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


@pytest.fixture(params=["scalar", "avx2"])
def level(request, monkeypatch) -> str:
    monkeypatch.setenv("HASHENGINE_SIMD_LEVEL", request.param)
    try:
        ops.simam(torch.ones(1, 1, 1, 1))
    except ValueError:
        pytest.skip(f"this CPU has no {request.param}")
    return request.param


def feature_map(shape, dtype=torch.float32, layout: str = "contiguous", seed: int = 0, offset: float = 0.5) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + offset
    return values.to(dtype).contiguous(memory_format=FORMATS[layout])


def run(x: Tensor, grad_y: Tensor, lam: float = 1e-4) -> tuple[Tensor, Tensor, Tensor]:
    """y, statistics and grad_x by the ops themselves."""
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
    for of in range(2):
        assert_as_accurate_as_eager(stats[..., of], eager_stats[..., of], exact_stats[..., of])


def assert_accurate(x: Tensor, grad_y: Tensor, lam: float = 1e-4) -> Tensor:
    """y and grad_x against eager; returns the statistics."""
    y, stats, grad_x = run(x, grad_y, lam)
    assert y.dtype == grad_x.dtype == x.dtype and y.stride() == grad_x.stride() == x.stride()
    eager_y, eager_grad = eager(x, grad_y, lam)
    exact_y, exact_grad = eager(x.double(), grad_y.double(), lam)
    assert_as_accurate_as_eager(y, eager_y, exact_y)
    assert_as_accurate_as_eager(grad_x, eager_grad, exact_grad)
    return stats


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_level_is_as_accurate_as_eager(level, shape, layout, dtype):
    if dtype == torch.float64:  # eager's own error would be the truth's: both are float64
        x, grad_y = feature_map(shape, dtype, layout), feature_map(shape, dtype, layout, seed=1)
        y, stats, grad_x = run(x, grad_y)
        want, want_stats = _reference(x, 1e-4)
        torch.testing.assert_close((y, stats), (want, want_stats))
        torch.testing.assert_close(grad_x, _backward_reference(grad_y, x, want_stats, 1e-4))
    else:
        x = feature_map(shape, dtype, layout)
        assert_accurate_statistics(assert_accurate(x, feature_map(shape, dtype, layout, seed=1)), x)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("offset", [100.0, -3000.0])
def test_a_mean_far_from_zero_costs_no_accuracy(level, layout, offset):
    for shape in ((2, 16, 7, 7), (1, 16, 70, 70)):
        x = feature_map(shape, layout=layout, offset=offset)
        assert_accurate_statistics(assert_accurate(x, feature_map(shape, layout=layout, seed=1)), x)


@pytest.mark.parametrize("layout", FORMATS)
def test_planes_of_one_outlier(level, layout):
    """The outlier's energy is past what an exponential takes, and an outlier first is no good guess of the mean."""
    x = torch.full((1, 8, 40, 41), 0.25).contiguous(memory_format=FORMATS[layout])
    x[:, :, 0, 0] = 1e4
    assert_accurate(x, feature_map(x.shape, layout=layout, seed=1))


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("shape", [(2, 9, 5, 5), (2, 9, 2, 3), (2, 3, 5, 5), (1, 16, 70, 70)], ids=str)
def test_nan_fills_its_plane_alone(level, layout, shape):
    for value in (torch.nan, torch.inf):
        x = feature_map(shape, layout=layout)
        x[0, 1, -1, -1] = value
        y, _, grad_x = run(x, torch.ones_like(x))
        for result in (y, grad_x):
            assert result[0, 1].isnan().all()
            assert result[0, 0].isfinite().all() and result[0, 2:].isfinite().all() and result[1:].isfinite().all()
    x = feature_map(shape, layout=layout)
    y, stats, _ = run(x, x)
    grad_y = torch.ones_like(x)
    grad_y[0, 1, -1, -1] = torch.nan
    grad_x = OPS.simam_backward(grad_y, x, stats, 1e-4)
    assert grad_x[0, 1].isnan().all()
    assert int(grad_x.isnan().sum()) == shape[2] * shape[3]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", FORMATS)
def test_threads_change_no_bit(dtype, layout):
    for shape in ((5, 96, 14, 14), (1, 130, 20, 20), (3, 700, 2, 3)):
        x, grad_y = feature_map(shape, dtype, layout), feature_map(shape, dtype, layout, seed=1)
        before = torch.get_num_threads()
        results = []
        try:
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                results.append(run(x, grad_y))
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_layouts_agree():
    for shape in ((2, 24, 9, 10), (2, 9, 2, 2), (2, 5, 9, 9)):
        x, grad_y = feature_map(shape), feature_map(shape, seed=1)
        want = run(x, grad_y)
        others = [
            (x.contiguous(memory_format=torch.channels_last), grad_y),  # the gradient in another layout
            (x, grad_y.contiguous(memory_format=torch.channels_last)),
            (x.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2), grad_y),  # neither NCHW nor channels_last
            (torch.cat((x, x), 1)[:, : shape[1]], torch.cat((grad_y, x), 3)[..., : shape[3]]),
        ]
        for inputs in others:
            got = run(*inputs)
            assert got[0].stride() == got[2].stride() == torch.empty_like(inputs[0]).stride()
            torch.testing.assert_close(got, want)
        expanded = grad_y[:1, :1].expand(shape)
        torch.testing.assert_close(run(x, expanded), run(x, expanded.contiguous()))


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_in_nothing_out(shape, dtype):
    x = torch.empty(shape, dtype=dtype)
    y, stats, grad_x = run(x, x)
    assert y.shape == grad_x.shape == x.shape and stats.shape == (*shape[:2], 2)
    assert y.dtype == grad_x.dtype == dtype


def test_errors_name_op_and_argument():
    x = feature_map((2, 3, 4, 5))
    stats = OPS.simam(x, 0.1)[1]
    cases = [
        (lambda: OPS.simam(x.int(), 0.1), TypeError, "simam: x must be float64, float32, float16 or bfloat16, got Int"),
        (lambda: OPS.simam(x[0], 0.1), ValueError, r"simam: x must be \[N, C, H, W\], got \[3, 4, 5\]"),
        (lambda: OPS.simam(x, -1.0), ValueError, "simam: lam must be above 0 .*, got -1"),
        (lambda: OPS.simam(x, float("nan")), ValueError, "simam: lam must be above 0 .*, got nan"),
        (lambda: OPS.simam_backward(x[:1], x, stats, 0.1), ValueError, "simam_backward: grad_y must be .*2, 3, 4, 5"),
        (lambda: OPS.simam_backward(x.double(), x, stats, 0.1), ValueError, "simam_backward: grad_y must be "),
        (lambda: OPS.simam_backward(x, x, stats[:1], 0.1), ValueError, r"simam_backward: stats must be .*\[2, 3, 2\]"),
        (lambda: OPS.simam_backward(x, x, stats.double(), 0.1), ValueError, "simam_backward: stats must be "),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
