"""greedy_sign, pack_bits and unpack_bits: the native kernels and the references, by every guard."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from hashengine import ops
from hashengine.ops.greedy_sign import _backward_reference, _reference
from hashengine.ops.pack_bits import _pack_reference, _unpack_reference
from tests.helpers.layouts import LAYOUTS, feature_map
from tests.helpers.numerics import assert_as_accurate_as_eager

OPS = torch.ops.hashengine
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def formula(u: Tensor, alpha: float, grad_b: Tensor, grad_penalty: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """b, penalty and grad_u as the issue's formula has them, in u's own type."""
    b = torch.where(u >= 0, 1.0, -1.0).to(u.dtype)
    excess = u.abs() - 1
    penalty = alpha * excess.abs().pow(3).mean()
    slope = excess.square() * excess.sign() * u.sign()
    return b, penalty, grad_b + grad_penalty * alpha * 3 / u.numel() * slope


def special_values(dtype: torch.dtype) -> Tensor:
    return torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-7, -1e-7, 200.0, -200.0, torch.inf, -torch.inf]).to(dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_greedy_sign_opcheck(layout, dtype):
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if layout != "empty":  # the mean of nothing is NaN, which this check would take for a difference
        checks.append("test_aot_dispatch_dynamic")
    opcheck(OPS.greedy_sign.default, (feature_map(layout, dtype).requires_grad_(), 0.1), test_utils=checks)


@pytest.mark.parametrize("layout", LAYOUTS[:-1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_greedy_sign_equals_the_formula(layout, dtype):
    # Sizes that fill no chunk, one chunk, and several.
    for shape in ((1, 1, 1, 1), (3, 4, 5, 6), (4, 33, 64, 9)):
        u = feature_map(layout, dtype, shape)
        grad_b = feature_map("channels_last", dtype, shape, seed=1)
        inputs = u.detach().requires_grad_()
        b, penalty = ops.greedy_sign(inputs, 0.3)
        assert b.dtype == dtype and b.stride() == torch.empty_like(u).stride()
        assert penalty.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        (grad,) = torch.autograd.grad((b, penalty), inputs, (grad_b, torch.full_like(penalty, 0.7)))
        eager = formula(u, 0.3, grad_b, torch.tensor(0.7, dtype=dtype))
        exact = formula(u.double(), 0.3, grad_b.double(), torch.tensor(0.7, dtype=torch.float64))
        assert torch.equal(b, eager[0])
        if dtype == torch.float64:
            # Both sides add up in float64: up to 300 additions in a chain each, half a last place an addition.
            torch.testing.assert_close(penalty, exact[1], rtol=2 * 300 * torch.finfo(dtype).eps / 2, atol=0)
        else:
            assert_as_accurate_as_eager(penalty, eager[1].to(penalty.dtype), exact[1])
        assert_as_accurate_as_eager(grad, eager[2], exact[2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_greedy_sign_of_special_values(dtype):
    u = special_values(dtype).requires_grad_()
    b, penalty = ops.greedy_sign(u, 1.0)
    assert b.tolist() == [1, 1, 1, -1, 1, -1, 1, -1, 1, -1]  # zero, of either sign, is +1
    assert penalty.item() == torch.inf
    u = u.detach()[:8].requires_grad_()
    b, penalty = ops.greedy_sign(u, 1.0)
    (grad,) = torch.autograd.grad(penalty, u)
    assert grad[:4].tolist() == [0, 0, 0, 0]  # sign(0) = 0, and no slope at |u| = 1


def test_greedy_sign_gradients_by_finite_differences():
    """The penalty's gradient is a true derivative; the sign's is straight-through by definition."""
    u = feature_map("contiguous", torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda u: ops.greedy_sign(u, 0.1)[1], u)
    grad_b = torch.randn_like(u)
    assert torch.equal(torch.autograd.grad(ops.greedy_sign(u, 0.1)[0], u, grad_b)[0], grad_b)


def test_greedy_sign_penalty_scales_with_the_loss():
    """Under a GradScaler, both gradients grow by the same factor."""
    u = feature_map("contiguous", torch.float64).requires_grad_()
    b, penalty = ops.greedy_sign(u, 0.1)
    loss = b.sum() + penalty
    (plain,) = torch.autograd.grad(loss, u, retain_graph=True)
    (scaled,) = torch.autograd.grad(loss * 1024, u)
    torch.testing.assert_close(scaled, plain * 1024, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_native_greedy_sign_equals_its_reference(dtype):
    u = feature_map("sliced", dtype, (3, 5, 40, 41))
    (b, penalty), (b_reference, penalty_reference) = OPS.greedy_sign(u, 0.2), _reference(u, 0.2)
    assert torch.equal(b, b_reference) and b.stride() == b_reference.stride()
    torch.testing.assert_close(penalty, penalty_reference)
    u[0, 0, 0, :3] = torch.tensor([torch.inf, -torch.inf, torch.nan])  # without a penalty's gradient u is not looked at
    for grad_b in (None, torch.randn_like(u)):
        for grad_penalty in (None, torch.full_like(penalty, -2.0)):
            got = OPS.greedy_sign_backward(grad_b, grad_penalty, u, 0.2)
            want = _backward_reference(grad_b, grad_penalty, u, 0.2)
            assert got.stride() == want.stride()
            torch.testing.assert_close(got, want, equal_nan=True)


def test_greedy_sign_gives_the_same_bits_for_every_number_of_threads():
    u = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    try:
        penalties = set()
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            penalties.add(ops.greedy_sign(u, 0.1)[1].item())
    finally:
        torch.set_num_threads(before)
    assert len(penalties) == 1


def test_greedy_sign_under_autocast_and_compile():
    u = feature_map("contiguous").requires_grad_()

    def loss(u: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            b, penalty = ops.greedy_sign(u.flatten(1) @ torch.eye(120), 0.1)
        assert b.dtype == torch.bfloat16 and penalty.dtype == torch.float32
        return b.float().sum() + penalty

    (want,) = torch.autograd.grad(loss(u), u)
    (got,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(u), u)
    torch.testing.assert_close(got, want)


def test_mean_of_nothing_is_nan_as_in_torch():
    b, penalty = ops.greedy_sign(torch.empty(0, 16), 0.1)
    assert b.shape == (0, 16) and penalty.isnan()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bool])
@pytest.mark.parametrize("shape", [(0, 8), (8,), (5, 24), (2, 3, 64), (301, 128)])
def test_packing_equals_numpy(dtype, shape):
    u = torch.randn(shape, generator=torch.Generator().manual_seed(4)).to(dtype)
    bits = u if dtype == torch.bool else u >= 0
    codes = ops.pack_bits(u)
    assert codes.dtype == torch.uint8 and codes.is_contiguous()
    np.testing.assert_array_equal(codes.numpy(), np.packbits(bits.numpy(), axis=-1))
    assert torch.equal(ops.unpack_bits(codes), bits)
    assert torch.equal(_pack_reference(u), codes) and torch.equal(_unpack_reference(codes), bits)
    opcheck(OPS.pack_bits.default, (u,))
    opcheck(OPS.unpack_bits.default, (codes,))


def test_packing_takes_any_strides():
    u = torch.randn(16, 40, generator=torch.Generator().manual_seed(4))
    assert torch.equal(ops.pack_bits(u.T[::2, :8]), ops.pack_bits(u.T[::2, :8].contiguous()))
    codes = ops.pack_bits(u)
    assert torch.equal(ops.unpack_bits(codes[:, ::2]), ops.unpack_bits(codes[:, ::2].contiguous()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_packing_agrees_with_greedy_sign(dtype):
    u = torch.cat([special_values(dtype), torch.randn(6).to(dtype)])
    assert torch.equal(ops.unpack_bits(ops.pack_bits(u)), ops.greedy_sign(u, 0.1)[0] > 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("position", [0, 7, 100_000, 131_071])
def test_nan_has_no_sign(dtype, position):
    u = torch.zeros(1024, 128).to(dtype)
    u.view(-1)[position] = torch.nan
    for call in (lambda: ops.greedy_sign(u, 0.1), lambda: ops.pack_bits(u), lambda: _reference(u, 0.1)):
        with pytest.raises(ValueError, match="u must hold no NaN .*, got at least one") as caught:
            call()
        assert "\n" not in str(caught.value)


def test_errors_name_op_and_argument():
    integers = torch.zeros(4, 8, dtype=torch.int64)
    u = torch.zeros(4, 8)
    cases = [
        (lambda: ops.greedy_sign(integers, 0.1), TypeError, "greedy_sign: u must be float64"),
        (lambda: ops.pack_bits(integers), TypeError, "pack_bits: u must be"),
        (lambda: ops.pack_bits(integers.byte()), TypeError, "pack_bits: u must be"),  # uint8 is packed already
        (lambda: ops.pack_bits(u[:, :7]), ValueError, r"bits a multiple of 8, got \[4, 7\]"),
        (lambda: ops.unpack_bits(u), TypeError, "unpack_bits: codes must be packed codes of uint8"),
        (lambda: OPS.greedy_sign_backward(u[:2], None, u, 0.1), ValueError, "grad_b must match u"),
        (lambda: OPS.greedy_sign_backward(None, u, u, 0.1), ValueError, "grad_penalty must be one"),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
