"""Greedy sign: a two-valued code with a straight-through gradient and a cubic penalty.

Su, Zhang, Han and Tian, "Greedy Hash: Towards Fast Optimization for Accurate Hash Coding in CNN", NeurIPS 2018:
equation 6 with p = 3 gives the penalty, and section 3.2 the gradient that passes the sign unchanged.
"""

import torch
from torch import Tensor

from hashengine.ops._check import check_activations, check_no_nan
from hashengine.ops._library import define_op


def greedy_sign(u: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Binarise activations and price their distance from the code.

    ``b = +1 where u >= 0 else -1`` (two values: zero is not a third) and ``penalty = alpha * mean(||u| - 1|^3)``.
    The backward is one pass over ``u``::

        grad_u = grad_b + grad_penalty * alpha * 3 / numel * (|u| - 1)^2 * sign(|u| - 1) * sign(u)

    with sign(0) = 0. Add the penalty to the loss yourself: it is scaled with the loss, so AMP's GradScaler and gradient
    accumulation stay right.

    Args:
        u: activations [...], float64, float32, float16 or bfloat16, any strides.
        alpha: weight of the penalty; the paper takes 0.1 for CIFAR-10 and 1 for ImageNet-100.

    Returns:
        ``b`` like ``u`` in shape, dtype and layout, and ``penalty``, a scalar: float64 for float64, else float32.

    Raises:
        TypeError: ``u`` is not floating point.
        ValueError: ``u`` holds a NaN (checked on the CPU only; a GPU would have to stop to look).
    """
    return _greedy_sign(u, alpha)


def _reference(u: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    check_activations("greedy_sign", u)
    check_no_nan("greedy_sign", u)
    wide = u.to(_sum_dtype(u))
    b = torch.empty_like(u).copy_(torch.where(wide >= 0, 1.0, -1.0))
    penalty = alpha * (wide.abs() - 1).abs().pow(3).mean()
    return b, penalty


def _fake(u: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    check_activations("greedy_sign", u)
    return torch.empty_like(u), u.new_empty((), dtype=_sum_dtype(u))


def _backward_reference(grad_b: Tensor | None, grad_penalty: Tensor | None, u: Tensor, alpha: float) -> Tensor:
    wide = u.to(_sum_dtype(u))
    grad_u = torch.zeros_like(wide) if grad_b is None else grad_b.to(wide.dtype)
    if grad_penalty is not None:
        excess = wide.abs() - 1
        grad_u = grad_u + grad_penalty * (alpha * 3 / u.numel()) * excess * excess.abs() * wide.sign()
    return torch.empty_like(u).copy_(grad_u)


def _backward_fake(grad_b: Tensor | None, grad_penalty: Tensor | None, u: Tensor, alpha: float) -> Tensor:
    return torch.empty_like(u)


def _setup_context(ctx, inputs, output) -> None:
    u, ctx.alpha = inputs
    ctx.save_for_backward(u)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_b: Tensor | None, grad_penalty: Tensor | None) -> tuple[Tensor | None, None]:
    if grad_b is None and grad_penalty is None:
        return None, None
    (u,) = ctx.saved_tensors
    return _greedy_sign_backward(grad_b, grad_penalty, u, ctx.alpha), None


def _sum_dtype(u: Tensor) -> torch.dtype:
    return torch.float64 if u.dtype == torch.float64 else torch.float32


_greedy_sign_backward = define_op(
    "greedy_sign_backward(Tensor? grad_b, Tensor? grad_penalty, Tensor u, float alpha) -> Tensor",
    reference=_backward_reference,
    fake=_backward_fake,
)
_greedy_sign = define_op(
    "greedy_sign(Tensor u, float alpha) -> (Tensor b, Tensor penalty)",
    reference=_reference,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
