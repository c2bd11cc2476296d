"""Greedy sign: binary codes with a straight-through gradient, and a cubic penalty.

Su, Zhang, Han and Tian, "Greedy Hash: Towards Fast Optimization for Accurate Hash Coding in CNN", NeurIPS 2018:
equation 6 with p = 3 gives the penalty. Section 3.2 gives the gradient: the backward treats the sign as the identity,
so the gradient of the code is also the gradient of the activations.
"""

from typing import Any

import torch
from torch import Tensor

from hashengine._validation import check_constant, dtype_name
from hashengine.errors import invalid
from hashengine.ops._check import check_floating, check_gradient, check_no_nan, check_number, wide_dtype
from hashengine.ops._library import define_op
from hashengine.ops._plain import in_dtype_and_layout_of, is_functionalized, needs_plain_torch


def greedy_sign(u: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Binarise activations, and compute the penalty for the distance of their magnitudes from 1.

    `b = +1 if u >= 0 else -1`, so that zero is +1, and `penalty = alpha * mean(||u| - 1|^3)`. The backward computes the
    following gradient, with sign(0) = 0; the native kernels need one pass over `u` for it:

        grad_u = grad_b + grad_penalty * alpha * 3 / numel * (|u| - 1)^2 * sign(|u| - 1) * sign(u)

    The caller adds the penalty to the loss. If the loss is scaled, as by AMP's GradScaler or for gradient accumulation,
    the penalty is then scaled with it.

    Args:
        u: activations [...], float64, float32, float16 or bfloat16, any strides.
        alpha: weight of the penalty, a finite number of 0 or more; the paper takes 0.1 for CIFAR-10 and 1 for
            ImageNet-100.

    Returns:
        `b` with the shape, dtype and layout of `u`, and `penalty`, a scalar: float64 for float64, otherwise float32.

    Raises:
        ValueError: `u` is not floating point, or contains a NaN, or `alpha` is out of range. NaN is checked on the CPU
            only, because the check would synchronize a GPU, and not under a transform of `torch.func`.
    """
    check_constant("greedy_sign", "alpha", alpha)
    return _plain(u, alpha) if needs_plain_torch() else _greedy_sign(u, alpha)


class _StraightThrough(torch.autograd.Function):
    """The signs, +1 or -1, with the derivative of the identity, for transforms and forward-mode differentiation."""

    generate_vmap_rule = True

    @staticmethod
    def forward(u: Tensor) -> Tensor:
        return _signs(u)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad_b: Tensor) -> Tensor:
        return grad_b

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return tangent.clone()


def _signs(u: Tensor) -> Tensor:
    return in_dtype_and_layout_of(u, torch.where(u >= 0, 1.0, -1.0))


def _penalty(u: Tensor, alpha: float) -> Tensor:
    mean = (u.to(wide_dtype(u)).abs() - 1).abs().pow(3).mean()
    return torch.ops.aten.mul.Scalar(mean, alpha)  # `mean * alpha` has a float64 tangent


def _check(where: str, u: Tensor, alpha: float) -> None:
    check_floating(where, "u", u)
    check_number(where, "alpha", alpha, least=0)


def _plain(u: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    _check("greedy_sign", u, alpha)
    # A trace that calls `_StraightThrough` cannot be saved, `torch.compile` ignores its `jvp`, and
    # `torch.func.functionalize` does not support it.
    if torch._C._is_tracing() or torch.compiler.is_compiling() or is_functionalized():
        return _signs(u) + (u - u.detach()).nan_to_num(), _penalty(u, alpha)
    return _StraightThrough.apply(u), _penalty(u, alpha)


def _formula(u: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    return _signs(u), _penalty(u, alpha)


def _reference(u: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    _check("greedy_sign", u, alpha)
    check_no_nan("greedy_sign", "u", u)
    return _formula(u, alpha)


def _fake(u: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    _check("greedy_sign", u, alpha)
    return torch.empty_like(u), u.new_empty((), dtype=wide_dtype(u))


def _check_backward(grad_b: Tensor | None, grad_penalty: Tensor | None, u: Tensor, alpha: float) -> None:
    _check("greedy_sign_backward", u, alpha)
    if grad_b is not None:
        check_gradient("greedy_sign_backward", "grad_b", grad_b, u)
    wide = wide_dtype(u)
    if grad_penalty is not None and (
        grad_penalty.numel() != 1 or grad_penalty.dtype != wide or grad_penalty.device != u.device
    ):
        expected = f"one value of {str(wide).removeprefix('torch.')} on {u.device}"
        actual = f"{dtype_name(grad_penalty)} {list(grad_penalty.shape)} on {grad_penalty.device}"
        raise invalid("greedy_sign_backward", "grad_penalty", expected, actual)


def _backward_reference(grad_b: Tensor | None, grad_penalty: Tensor | None, u: Tensor, alpha: float) -> Tensor:
    _check_backward(grad_b, grad_penalty, u, alpha)
    wide = u.to(wide_dtype(u))
    grad_u = torch.zeros_like(wide) if grad_b is None else grad_b.to(wide.dtype)
    if grad_penalty is not None:
        excess = wide.abs() - 1
        grad_u = grad_u + grad_penalty * (alpha * 3 / max(u.numel(), 1)) * excess * excess.abs() * wide.sign()
    return torch.ops.aten.copy(torch.empty_like(u), grad_u)  # never grad_b itself


def _backward_fake(grad_b: Tensor | None, grad_penalty: Tensor | None, u: Tensor, alpha: float) -> Tensor:
    _check_backward(grad_b, grad_penalty, u, alpha)
    return torch.empty_like(u)


def _setup_context(ctx: Any, inputs: tuple[Tensor, float], output: tuple[Tensor, Tensor]) -> None:
    u, ctx.alpha = inputs
    ctx.save_for_backward(u)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_b: Tensor | None, grad_penalty: Tensor | None) -> tuple[Tensor | None, None]:
    if grad_b is None and grad_penalty is None:
        return None, None
    (u,) = ctx.saved_tensors
    return _greedy_sign_backward(grad_b, grad_penalty, u, ctx.alpha), None


_greedy_sign_backward = define_op(
    "greedy_sign_backward(Tensor? grad_b, Tensor? grad_penalty, Tensor u, float alpha) -> Tensor",
    reference=_backward_reference,
    fake=_backward_fake,
    decomposition=_backward_reference,
)
_greedy_sign = define_op(
    "greedy_sign(Tensor u, float alpha) -> (Tensor b, Tensor penalty)",
    reference=_reference,
    fake=_fake,
    decomposition=_formula,
    setup_context=_setup_context,
    backward=_backward,
)
