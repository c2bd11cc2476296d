"""The ops under torch.func, forward-mode differentiation and torch.jit.trace, against the formulas in eager torch."""

import copy

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.fx
from torch import Tensor
from torch.func import functionalize, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

from hashengine import _native, ops
from hashengine.nn import GreedyHash, SimAM, TripletAttention
from tests.helpers.eager import eager_energy, eager_pool, eager_simam, eager_triplet, gate_maps, triplet_parameters

SHAPE = (2, 3, 4, 5)
MAPS = gate_maps(torch.zeros(SHAPE, dtype=torch.float64))
PARAMETERS = triplet_parameters(3, kernel_size=3)


def eager_gate(x: Tensor) -> Tensor:
    maps = zip((2, 3, 1), MAPS, strict=True)
    return sum((x.transpose(1, axis) * torch.sigmoid(map)).transpose(1, axis) for axis, map in maps) / 3


def joined(tensors: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


# The name: the op, and its formula, both as a function of x.
FUNCTIONS = {
    "simam": (lambda x: ops.simam(x, 1e-2), lambda x: eager_simam(x, 1e-2)),
    "simam_energy": (lambda x: ops.simam_energy(x, 1e-2), lambda x: eager_energy(x, 1e-2)),
    "triplet_pool": (
        lambda x: joined(ops.triplet_pool(x)),
        lambda x: joined([eager_pool(x, axis) for axis in (2, 3, 1)]),
    ),
    "triplet_gate": (lambda x: ops.triplet_gate(x, *MAPS), eager_gate),
    "triplet_attention, evaluation": (
        lambda x: ops.triplet_attention(x, *PARAMETERS, False)[0],
        lambda x: eager_triplet(x, PARAMETERS, False),
    ),
    "triplet_attention, training": (
        lambda x: ops.triplet_attention(x, *PARAMETERS, True)[0],
        lambda x: eager_triplet(x, PARAMETERS, True),
    ),
    "penalty of greedy_sign": (
        lambda x: ops.greedy_sign(x, 0.3)[1],
        lambda x: 0.3 * (x.abs() - 1).abs().pow(3).mean(),
    ),
}
every_function = pytest.mark.parametrize(("op", "formula"), FUNCTIONS.values(), ids=FUNCTIONS)


def normal(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@every_function
def test_forward_mode_derivatives_are_those_of_the_formula(op, formula):
    x, v = normal(0), normal(1)
    expected = jvp(formula, (x,), (v,))
    assert expected[1].abs().max() > 0
    torch.testing.assert_close(jvp(op, (x,), (v,)), expected)
    torch.testing.assert_close(linearize(op, x)[1](v), expected[1])
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(op(forward_ad.make_dual(x, v))).tangent
    torch.testing.assert_close(tangent, expected[1])
    forward = torch.autograd.functional.jacobian(op, x, strategy="forward-mode", vectorize=True)
    torch.testing.assert_close(forward, jacfwd(formula)(x))


@pytest.mark.skipif(not _native.available(), reason="the native module is not in use")
@pytest.mark.parametrize(
    "op",
    [
        lambda x: torch.ops.hashengine.simam(x, 1e-2)[0],
        lambda x: torch.ops.hashengine.greedy_sign(x, 0.3)[1],
        lambda x: torch.ops.hashengine.triplet_attention(x, *PARAMETERS, False, 1e-5)[0],
        lambda x: torch.ops.hashengine.triplet_attention_inference(x, *PARAMETERS, 1e-5),
    ],
)
def test_native_ops_refuse_tangents_instead_of_dropping_them(op):
    x = normal(0)
    for call in (lambda: jvp(op, (x,), (x,)), lambda: jacfwd(op)(x)):
        with pytest.raises(ValueError, match="inputs must be without tangents .* call the function in hashengine.ops"):
            call()
    assert op(x).isfinite().all()


@every_function
def test_the_transforms_of_torch_func_are_those_of_the_formula(op, formula):
    x = normal(0)
    expected = jacrev(formula)(x)
    torch.testing.assert_close(jacrev(op)(x), expected)
    torch.testing.assert_close(jacfwd(op)(x), expected)
    y, pullback = vjp(op, x)
    torch.testing.assert_close(pullback(torch.ones_like(y)), vjp(formula, x)[1](torch.ones_like(y)))
    other = normal(5)[1:]  # the constant maps are those of two samples
    second = [hessian(lambda x, f=f: f(torch.cat((x, other))).square().sum())(x[:1]) for f in (op, formula)]
    torch.testing.assert_close(*second)


@every_function
def test_vmap_computes_each_item(op, formula):
    batch = normal(2, (3, *SHAPE))
    torch.testing.assert_close(vmap(op)(batch), torch.stack([formula(x) for x in batch]))
    gradients = vmap(grad(lambda x: op(x).square().sum()))(batch)
    torch.testing.assert_close(gradients, torch.stack([grad(lambda x: formula(x).square().sum())(x) for x in batch]))


def test_the_code_of_greedy_sign_has_the_derivative_of_the_identity():
    u, v = normal(3, (4, 8)), normal(4, (4, 8))
    u[0, 0] = torch.inf
    b, tangent = jvp(lambda u: ops.greedy_sign(u, 0.1)[0], (u,), (v,))
    assert torch.equal(b, ops.greedy_sign(u, 0.1)[0]) and torch.equal(tangent, v)
    assert torch.equal(vmap(lambda u: ops.greedy_sign(u, 0.1)[0])(u), b)
    assert torch.equal(grad(lambda u: (ops.greedy_sign(u, 0.1)[0] * v).sum())(u), v)


@every_function
def test_functionalize_keeps_results_and_gradients(op, formula):
    x = normal(0)
    for function in (op, grad(lambda x: op(x).square().sum())):
        torch.testing.assert_close(functionalize(function)(x), function(x))


@pytest.mark.parametrize("u", [normal(3, (4, 8)), normal(3, (4, 8)).half(), normal(3, (4, 8)).double(), normal(3, ())])
def test_the_tangent_of_the_penalty_has_its_dtype(u):
    penalty, tangent = jvp(lambda u: ops.greedy_sign(u, 0.1)[1], (u,), (torch.ones_like(u),))
    assert penalty.dtype == tangent.dtype == (torch.float64 if u.dtype == torch.float64 else torch.float32)


@every_function
def test_a_trace_contains_no_op_of_hashengine(op, formula):
    x = normal(0)
    traced = torch.jit.trace(op, x)
    assert "hashengine::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(normal(1)), formula(normal(1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_results_keep_their_dtype_under_a_transform(dtype):
    x = normal(0).to(dtype)
    maps, parameters = [m.to(dtype) for m in MAPS], [[t.to(dtype) for t in tensors] for tensors in PARAMETERS]
    for op in (
        ops.simam,
        ops.simam_energy,
        ops.triplet_pool,
        lambda x: ops.triplet_gate(x, *maps),
        lambda x: ops.triplet_attention(x, *parameters, False),
        lambda x: ops.greedy_sign(x, 0.1),
    ):
        plain, native = ([y.dtype for y in ([y] if isinstance(y, Tensor) else y)] for y in (vmap(op)(x[None]), op(x)))
        assert plain == native


@pytest.mark.parametrize("training", [True, False])
def test_autocast_does_not_round_the_convolutions_under_a_transform(training):
    """As outside of a transform, they are computed in float32 for bfloat16."""
    x = normal(0).bfloat16()
    parameters = [[tensor.float() for tensor in tensors] for tensors in PARAMETERS]
    alone = vmap(lambda x: ops.triplet_attention(x, *parameters, training)[0])(x[None])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(vmap(lambda x: ops.triplet_attention(x, *parameters, training)[0])(x[None]), alone)


@pytest.mark.parametrize("layer", [SimAM, TripletAttention, GreedyHash])
def test_a_backward_refuses_the_tangent_of_its_gradient_instead_of_dropping_it(layer):
    x, g = torch.randn(2, 3, 4, 5, requires_grad=True), torch.randn(2, 3, 4, 5)
    y = layer().eval()(x)
    y = y[0] if isinstance(y, tuple) else y

    def pull_back(gradient):
        return torch.autograd.grad(y, x, gradient, retain_graph=True)[0]

    with pytest.raises(ValueError, match="_backward: inputs must be without tangents of forward-mode differentiation"):
        torch.func.jvp(pull_back, (g,), (g,))
    with forward_ad.dual_level(), pytest.raises(ValueError, match="_backward: inputs must be without tangents"):
        pull_back(forward_ad.make_dual(g, g))
    assert torch.equal(torch.vmap(pull_back)(torch.stack([g, -g]))[1], pull_back(-g))


def test_linearize_leaves_the_running_statistics_out_of_the_graph():
    layer, x = TripletAttention(), torch.randn(2, 3, 4, 5)
    _, jvp = torch.func.linearize(layer, x)
    jvp(x)
    assert not any(buffer.requires_grad for buffer in layer.buffers())
    copy.deepcopy(layer)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layer", [SimAM, TripletAttention, lambda: TripletAttention(no_spatial=True)])
def test_a_symbolic_trace_of_torch_fx_equals_eager(layer, training):
    layer, x = layer().train(training), torch.randn(2, 3, 4, 5)
    traced = torch.fx.symbolic_trace(copy.deepcopy(layer))
    torch.testing.assert_close(traced(x), layer(x))


def test_a_saved_trace_of_greedy_hash_has_the_gradient(tmp_path):
    torch.jit.trace(GreedyHash(0.1), torch.randn(4, 16)).save(str(tmp_path / "trace.pt"))
    u = torch.randn(4, 16, requires_grad=True)
    u.data[0, 0] = torch.inf
    b, penalty = torch.jit.load(str(tmp_path / "trace.pt"))(u)
    expected = u.detach().clone().requires_grad_()
    b_expected, penalty_expected = GreedyHash(0.1)(expected)
    assert torch.equal(b, b_expected) and torch.equal(penalty, penalty_expected)
    for got in (b, b_expected):
        (got * torch.arange(16)).sum().backward()
    assert torch.equal(u.grad[1:], expected.grad[1:])
