"""greedy_sign: every layout and dtype against the formula, special values, gradients, autocast and compile."""

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from hashengine import ops
from hashengine.ops.greedy_sign import _backward_reference, _reference
from tests.helpers.eager import eager_greedy_sign, special_values
from tests.helpers.layouts import DTYPES, LAYOUTS, feature_map
from tests.helpers.numerics import assert_as_accurate_as_eager
from tests.helpers.threads import with_threads

OPS = torch.ops.hashengine


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_schema_fake_and_autograd_are_consistent(layout, dtype):
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if layout != "empty":  # the mean of no values is NaN, which this check counts as a difference
        checks.append("test_aot_dispatch_dynamic")
    opcheck(OPS.greedy_sign.default, (feature_map(layout, dtype).requires_grad_(), 0.1), test_utils=checks)


@pytest.mark.parametrize("layout", LAYOUTS[:-1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_formula(layout, dtype):
    # One value, fewer values than a chunk of the kernel (2,048), and several chunks.
    for shape in ((1, 1, 1, 1), (3, 4, 5, 6), (4, 33, 64, 9)):
        u = feature_map(layout, dtype, shape)
        grad_b = feature_map("channels_last", dtype, shape, seed=1)
        inputs = u.detach().requires_grad_()
        b, penalty = ops.greedy_sign(inputs, 0.3)
        assert b.dtype == dtype and b.stride() == torch.empty_like(u).stride()
        assert penalty.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        (grad,) = torch.autograd.grad((b, penalty), inputs, (grad_b, torch.full_like(penalty, 0.7)))
        eager = eager_greedy_sign(u, 0.3, grad_b, torch.tensor(0.7, dtype=dtype))
        exact = eager_greedy_sign(u.double(), 0.3, grad_b.double(), torch.tensor(0.7, dtype=torch.float64))
        assert torch.equal(b, eager[0])
        if dtype == torch.float64:
            # The op and the formula sum in float64, in chains of up to 300 additions. Each addition errs by eps / 2.
            torch.testing.assert_close(penalty, exact[1], rtol=2 * 300 * torch.finfo(dtype).eps / 2, atol=0)
        else:
            assert_as_accurate_as_eager(penalty, eager[1].to(penalty.dtype), exact[1])
        assert_as_accurate_as_eager(grad, eager[2], exact[2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_is_plus_one_and_an_infinite_value_has_an_infinite_penalty(dtype):
    u = special_values(dtype).requires_grad_()
    b, penalty = ops.greedy_sign(u, 1.0)
    assert b.tolist() == [1, 1, 1, -1, 1, -1, 1, -1, 1, -1]  # +1 for 0.0 and for -0.0
    assert penalty.item() == torch.inf
    u = u.detach()[:8].requires_grad_()
    b, penalty = ops.greedy_sign(u, 1.0)
    (grad,) = torch.autograd.grad(penalty, u)
    assert grad[:4].tolist() == [0, 0, 0, 0]  # for u = 0, sign(u) is 0; for |u| = 1, |u| - 1 is 0


def test_gradients_agree_with_finite_differences():
    """Compare the gradient of the penalty with finite differences; that of the sign is `grad_b` by definition."""
    u = feature_map("contiguous", torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda u: ops.greedy_sign(u, 0.1)[1], u)
    grad_b = torch.randn_like(u)
    assert torch.equal(torch.autograd.grad(ops.greedy_sign(u, 0.1)[0], u, grad_b)[0], grad_b)


def test_gradients_scale_with_the_loss():
    """Scale the loss, as a GradScaler does: the gradient must be scaled exactly."""
    u = feature_map("contiguous", torch.float64).requires_grad_()
    b, penalty = ops.greedy_sign(u, 0.1)
    loss = b.sum() + penalty
    (plain,) = torch.autograd.grad(loss, u, retain_graph=True)
    (scaled,) = torch.autograd.grad(loss * 1024, u)
    torch.testing.assert_close(scaled, plain * 1024, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_native_kernel_equals_the_reference(dtype):
    u = feature_map("sliced", dtype, (3, 5, 40, 41))
    (b, penalty), (b_reference, penalty_reference) = OPS.greedy_sign(u, 0.2), _reference(u, 0.2)
    assert torch.equal(b, b_reference) and b.stride() == b_reference.stride()
    torch.testing.assert_close(penalty, penalty_reference)
    # The backward accepts infinity and NaN. If grad_penalty is None, its result is grad_b or 0, and therefore finite.
    u[0, 0, 0, :3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    for grad_b in (None, torch.randn_like(u)):
        for grad_penalty in (None, torch.full_like(penalty, -2.0)):
            got = OPS.greedy_sign_backward(grad_b, grad_penalty, u, 0.2)
            want = _backward_reference(grad_b, grad_penalty, u, 0.2)
            assert got.stride() == want.stride()
            torch.testing.assert_close(got, want, equal_nan=True)


def test_number_of_threads_does_not_change_the_bits():
    u = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))
    assert len(set(with_threads(lambda: ops.greedy_sign(u, 0.1)[1].item()))) == 1


def test_compile_under_autocast_does_not_change_the_gradient():
    u = feature_map("contiguous").requires_grad_()

    def loss(u: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            b, penalty = ops.greedy_sign(u.flatten(1) @ torch.eye(120), 0.1)
        assert b.dtype == torch.bfloat16 and penalty.dtype == torch.float32
        return b.float().sum() + penalty

    (want,) = torch.autograd.grad(loss(u), u)
    (got,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(u), u)
    torch.testing.assert_close(got, want)


def test_penalty_of_no_values_is_nan_as_in_torch():
    b, penalty = ops.greedy_sign(torch.empty(0, 16), 0.1)
    assert b.shape == (0, 16) and penalty.isnan()
