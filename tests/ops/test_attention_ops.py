"""simam, simam_energy, triplet_pool, triplet_gate and triplet_attention against the formulas, by every guard."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import opcheck

from hashengine import ops
from tests.helpers.layouts import LAYOUTS, assert_gradients, feature_map
from tests.helpers.numerics import assert_as_accurate_as_eager

OPS = torch.ops.hashengine
HALVES = (torch.float16, torch.bfloat16)


def eager_energy(x: Tensor, lam: float) -> Tensor:
    """As the paper's authors state it: everything in x's own type."""
    n = max(x.shape[2] * x.shape[3] - 1, 1)
    d = (x - x.mean((2, 3), keepdim=True)).pow(2)
    return d / (4 * (d.sum((2, 3), keepdim=True) / n + lam)) + 0.5


def eager_simam(x: Tensor, lam: float) -> Tensor:
    return x * torch.sigmoid(eager_energy(x, lam))


def eager_pool(x: Tensor, axis: int) -> Tensor:
    """Z-pool of an axis brought to the front, as the official module permutes."""
    x = x.transpose(1, axis)
    return torch.cat((x.max(1, keepdim=True).values, x.mean(1, keepdim=True)), 1)


def eager_triplet(x: Tensor, parameters: list[list[Tensor]], training: bool, eps: float = 1e-5) -> Tensor:
    """The official module's forward, branch by branch."""
    branches = []
    for axis, weight, gamma, beta, mean, var in zip((2, 3, 1), *parameters, strict=False):
        response = F.conv2d(eager_pool(x, axis), weight.to(x.dtype), padding=weight.shape[-1] // 2)
        gate = torch.sigmoid(F.batch_norm(response, mean.clone(), var.clone(), gamma, beta, training, eps=eps))
        branches.append((x.transpose(1, axis) * gate).transpose(1, axis))
    return sum(branches) / len(branches)


def triplet_parameters(branches: int, dtype: torch.dtype = torch.float64, kernel_size: int = 7) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(1)

    def tensors(*shape: int, low: float) -> list[Tensor]:
        return [(torch.rand(*shape, generator=generator, dtype=torch.float64) + low).to(dtype) for _ in range(branches)]

    weight = tensors(1, 2, kernel_size, kernel_size, low=-0.5)
    return [weight, tensors(1, low=0.5), tensors(1, low=-0.5), tensors(1, low=-0.5), tensors(1, low=0.5)]


def gate_maps(x: Tensor, branches: int = 3) -> list[Tensor | None]:
    n, c, h, w = x.shape
    generator = torch.Generator().manual_seed(2)
    shapes = [(n, 1, c, w), (n, 1, h, c), (n, 1, h, w)]
    maps = [torch.randn(shape, generator=generator, dtype=torch.float64).to(x.dtype) for shape in shapes]
    return [*maps[:branches], *[None] * (3 - branches)]


@pytest.mark.parametrize("layout", LAYOUTS)
class TestEveryLayout:
    """Schema, fake (shape, dtype and strides) and autograd registration, and gradients against finite differences."""

    def test_simam(self, layout):
        x = feature_map(layout, torch.float64).requires_grad_()
        for op, function in ((OPS.simam, ops.simam), (OPS.simam_energy, ops.simam_energy)):
            opcheck(op.default, (x, 0.01))
            assert_gradients(lambda x, function=function: function(x, 0.01), x)

    def test_triplet_pool(self, layout):
        x = feature_map(layout, torch.float64)
        opcheck(OPS.triplet_pool.default, (x.clone().requires_grad_(),))
        opcheck(OPS.triplet_pool.default, (x,))
        assert_gradients(ops.triplet_pool, x)

    @pytest.mark.parametrize("branches", [2, 3])
    def test_triplet_gate(self, layout, branches):
        x = feature_map(layout, torch.float64)
        inputs = (x.requires_grad_(), *(m if m is None else m.requires_grad_() for m in gate_maps(x, branches)))
        opcheck(OPS.triplet_gate.default, inputs)
        maps = [m for m in inputs[1:] if m is not None]
        assert_gradients(ops.triplet_gate, x, *maps)

    @pytest.mark.parametrize("branches", [2, 3])
    @pytest.mark.parametrize("training", [False, True])
    def test_triplet_attention(self, layout, branches, training):
        if layout == "empty" and training:
            pytest.skip("a batch without samples has no statistics")
        x = feature_map(layout, torch.float64, (2, 3, 4, 2))
        weight, gamma, beta, mean, var = triplet_parameters(branches, kernel_size=3)
        learned = [t.requires_grad_() for t in (*weight, *gamma, *beta)]
        inputs = (x.clone().requires_grad_(), weight, gamma, beta, mean, var, training, 1e-5)
        opcheck(OPS.triplet_attention.default, inputs)

        def function(x: Tensor, *tensors: Tensor) -> Tensor:
            parts = [list(tensors[i * branches : (i + 1) * branches]) for i in range(3)]
            return ops.triplet_attention(x, *parts, mean, var, training)[0]

        assert_gradients(function, x, *learned)

    def test_results_keep_the_layout(self, layout):
        x = feature_map(layout)
        for y in (ops.simam(x), ops.simam_energy(x), ops.triplet_gate(x, *gate_maps(x))):
            assert y.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("scale", [1e-2, 1.0, 30.0])
def test_simam_is_as_accurate_as_eager(dtype, scale):
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


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("training", [False, True])
def test_triplet_attention_is_as_accurate_as_eager(dtype, training):
    x = feature_map("contiguous", dtype, (4, 6, 9, 8))
    results, grads = [], []
    for kind in ("fused", "eager", "exact"):
        parameters = triplet_parameters(3, torch.float64 if kind == "exact" else torch.float32, kernel_size=3)
        inputs = (x.double() if kind == "exact" else x.clone()).requires_grad_()
        if kind == "fused":
            y, _, _ = ops.triplet_attention(inputs, *parameters, training)
        else:
            y = eager_triplet(inputs, parameters, training)
        y.backward(feature_map("contiguous", dtype, (4, 6, 9, 8), seed=5).to(y.dtype))
        results.append(y.detach())
        grads.append(inputs.grad)
    assert results[0].dtype == grads[0].dtype == dtype
    assert_as_accurate_as_eager(*results)
    assert_as_accurate_as_eager(*grads)


@pytest.mark.parametrize("branches", [2, 3])
@pytest.mark.parametrize("training", [False, True])
def test_triplet_attention_equals_the_official_forward(branches, training):
    x = feature_map("contiguous", torch.float64)
    parameters = triplet_parameters(branches)
    y, mean, var = ops.triplet_attention(x, *parameters, training)
    torch.testing.assert_close(y, eager_triplet(x, parameters, training))
    response = F.conv2d(eager_pool(x, 2), parameters[0][0], padding=3)
    want = (response.mean(), response.var(correction=0)) if training else (parameters[3][0][0], parameters[4][0][0])
    torch.testing.assert_close((mean[0], var[0]), want)


def test_pool_and_gate_make_triplet_attention():
    x = feature_map("contiguous", torch.float64)
    weight, gamma, beta, mean, var = triplet_parameters(3)
    maps = [
        F.batch_norm(F.conv2d(pool, weight[i], padding=3), mean[i], var[i], gamma[i], beta[i])
        for i, pool in enumerate(ops.triplet_pool(x))
    ]
    want, _, _ = ops.triplet_attention(x, weight, gamma, beta, mean, var, False)
    torch.testing.assert_close(ops.triplet_gate(x, *maps), want)


def test_tied_maxima_send_their_gradient_to_the_lowest_index():
    x = torch.zeros(1, 3, 2, 2, requires_grad=True)
    for pool, lowest in zip(ops.triplet_pool(x), ((..., 0, slice(None)), (..., 0), (0, 0)), strict=True):
        (grad,) = torch.autograd.grad(pool[:, 0].sum(), x, retain_graph=True)
        want = torch.zeros_like(x)
        want[lowest] = 1
        torch.testing.assert_close(grad, want)


def test_simam_on_planes_without_variance():
    gate = torch.sigmoid(torch.tensor(0.5))
    for x in (torch.full((1, 2, 1, 1), 3.0), torch.full((1, 2, 4, 4), -2.0)):
        torch.testing.assert_close(ops.simam(x), x * gate)
        torch.testing.assert_close(ops.simam_energy(x), torch.full_like(x, 0.5))


def test_nan_goes_through_as_in_any_layer():
    x = feature_map("contiguous")
    x[0, 0, 0, 0] = torch.nan
    y = ops.simam(x)
    assert y[0, 0].isnan().all() and y[0, 1:].isfinite().all() and y[1:].isfinite().all()


def test_compiles_without_a_graph_break():
    x = feature_map("channels_last").requires_grad_()
    maps = gate_maps(x)

    def function(x: Tensor) -> Tensor:
        return sum(pool.sum() for pool in ops.triplet_pool(ops.simam(x))) + ops.triplet_gate(x, *maps).square().sum()

    want = torch.autograd.grad(function(x), x)[0]
    got = torch.autograd.grad(torch.compile(function, fullgraph=True, backend="aot_eager")(x), x)[0]
    torch.testing.assert_close(got, want)


def test_double_backward_is_refused_in_one_line():
    x = feature_map("contiguous").requires_grad_()
    (grad,) = torch.autograd.grad(ops.simam(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="simam_backward: .*double backward is not supported"):
        grad.sum().backward()


def test_errors_name_op_and_argument():
    x, integers = feature_map("contiguous"), torch.zeros(1, 1, 2, 2, dtype=torch.int64)
    maps = gate_maps(x)
    parameters = triplet_parameters(3, torch.float32)
    one_value = torch.zeros(1, 1, 1, 1)
    cases = [
        (lambda: ops.simam(integers), TypeError, "simam: x must be float64"),
        (lambda: ops.simam(x[0]), ValueError, r"simam: x must be \[N, C, H, W\], got \[4, 5, 6\]"),
        (lambda: ops.simam(x, 0.0), ValueError, "simam: lam must be above 0"),
        (lambda: ops.simam_energy(x[0]), ValueError, "simam_energy: x must be"),
        (lambda: ops.triplet_pool(x[:, :0]), ValueError, "triplet_pool: x must have at least one channel"),
        (lambda: ops.triplet_gate(x, maps[1], maps[0]), ValueError, r"triplet_gate: map_cw must be \[3, 1, 4, 6\]"),
        (lambda: ops.triplet_gate(x, maps[0].to("meta"), maps[1]), ValueError, "map_cw must be on x's device, cpu"),
        (
            lambda: ops.triplet_attention(x, *parameters[:4], [t.to("meta") for t in parameters[4]], True),
            ValueError,
            r"running_var\[0\] must be on x's device, cpu, got meta",
        ),
        (lambda: ops.triplet_attention(x, parameters[0][:1], *parameters[1:], True), ValueError, "2 or 3 tensors"),
        (lambda: ops.triplet_attention(x, parameters[1], *parameters[1:], True), ValueError, r"\[1, 2, K, K\]"),
        (lambda: ops.triplet_attention(one_value, *parameters, True), ValueError, "more than one value a branch"),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
