"""SimAM, a parameter-free attention: Yang, Zhang, Li and Xie, ICML 2021 (PMLR 139:11863-11874).

In each channel plane of M = H * W positions, with `n = max(M - 1, 1)`, mean `m` and `v = sum((x - m)^2) / n`, the
minimal energy of a neuron x is `e* = 4 (v + lam) / ((x - m)^2 + 2 v + 2 lam)` (equation 5; lam is the paper's lambda).
The lower its energy, the more a neuron stands out: its importance is `1 / e* = (x - m)^2 / (4 (v + lam)) + 1/2`. The
result is `y = x * sigmoid(1 / e*)`.
"""

from typing import Any

import torch
from torch import Tensor

from hashengine._validation import check_constant
from hashengine.ops._check import (
    check_feature_map,
    check_gradient,
    check_like,
    check_number,
    wide_dtype,
)
from hashengine.ops._library import define_op
from hashengine.ops._plain import in_dtype_and_layout_of, needs_plain_torch, untraced

LEAST_LAM = 1e-18  # the gradient divides by its square, which must not round to 0 in float32


def simam(x: Tensor, lam: float = 1e-4) -> Tensor:
    """SimAM: multiply each activation by the sigmoid of its importance.

    Args:
        x: feature map [N, C, H, W], float64, float32, float16 or bfloat16, any strides. The variance of a 1 x 1 plane
            is 0, so its gate is sigmoid(1/2).
        lam: the paper's lambda, a finite number of 1e-18 or more. The paper uses 1e-4 for CIFAR and 0.1 for ImageNet.

    Returns:
        `y` with the shape, dtype and layout of `x`. Statistics are computed in float32 (in float64 for float64).

    Raises:
        ValueError: `x` is not a floating-point feature map of four axes, or `lam` is out of range.
    """
    check_constant("simam", "lam", lam)
    return (_reference if needs_plain_torch() else _simam)(x, lam)[0]


def simam_energy(x: Tensor, lam: float = 1e-4) -> Tensor:
    """The importance `1 / e*` of each activation, at least 1/2. `simam` multiplies the activation by its sigmoid.

    Args:
        x: feature map [N, C, H, W], as for `simam`.
        lam: the paper's lambda, as for `simam`.

    Returns:
        The importance, with the shape, dtype and layout of `x`.

    Raises:
        ValueError: as for `simam`.
    """
    check_constant("simam_energy", "lam", lam)
    return (_energy_reference if needs_plain_torch() else _simam_energy)(x, lam)


@untraced
def _check(where: str, x: Tensor, lam: float) -> None:
    check_feature_map(where, x)
    check_number(where, "lam", lam, least=LEAST_LAM)


def _divisor(x: Tensor) -> Any:
    """The divisor n of the variance. It follows the size of `x` in an exported graph and, as a tensor, in a trace."""
    n: Any = x.shape[2] * x.shape[3] - 1
    return n.clamp(min=1) if isinstance(n, Tensor) else torch.sym_max(n, 1)


def _centre(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The centred x [N, C, H, W], and the mean and variance [N, C, 1, 1] of each plane, in `wide_dtype(x)`."""
    wide = x.to(wide_dtype(x))
    mean = wide.mean((2, 3), keepdim=True)
    d = wide - mean
    return d, mean, d.square().sum((2, 3), keepdim=True) / _divisor(x)


def _importance(d: Tensor, variance: Tensor, lam: float) -> Tensor:
    return d.square() / (4 * (variance + lam)) + 0.5


def _reference(x: Tensor, lam: float) -> tuple[Tensor, Tensor]:
    _check("simam", x, lam)
    d, mean, variance = _centre(x)
    y = in_dtype_and_layout_of(x, x * torch.sigmoid(_importance(d, variance, lam)))
    return y, torch.cat((mean, variance), -1).squeeze(2)


def _energy_reference(x: Tensor, lam: float) -> Tensor:
    _check("simam_energy", x, lam)
    d, _, variance = _centre(x)
    return in_dtype_and_layout_of(x, _importance(d, variance, lam))


def _grad_through_importance(grad: Tensor, d: Tensor, variance: Tensor, n: Any, lam: float) -> Tensor:
    """The gradient with respect to x, given the gradient `grad` with respect to the importance.

    With d = x - m and V = v + lam (`shifted` in the code), the result is
    grad d / (2 V) - mean(grad d / (2 V)) - d sum(grad d^2) / (2 n V^2).
    The second term is the gradient through m and the third is the gradient through v. v depends on m, too, but that
    adds no term, because sum(d) = 0.
    """
    shifted = variance + lam
    direct = grad * d / (2 * shifted)
    through_variance = d * ((direct * d).sum((2, 3), keepdim=True) / (n * shifted))  # V^2 would overflow earlier
    return direct - direct.mean((2, 3), keepdim=True) - through_variance


def _backward_reference(grad_y: Tensor, x: Tensor, stats: Tensor, lam: float) -> Tensor:
    _check_backward(grad_y, x, stats, lam)
    grad_y, wide = grad_y.to(stats.dtype), x.to(stats.dtype)
    mean, variance = stats[..., None, None].unbind(2)
    d = wide - mean
    gate = torch.sigmoid(_importance(d, variance, lam))
    grad_importance = grad_y * wide * gate * (1 - gate)
    return in_dtype_and_layout_of(
        x, grad_y * gate + _grad_through_importance(grad_importance, d, variance, _divisor(x), lam)
    )


def _energy_backward_reference(grad_energy: Tensor, x: Tensor, lam: float) -> Tensor:
    _check_energy_backward(grad_energy, x, lam)
    d, _, variance = _centre(x)
    return in_dtype_and_layout_of(x, _grad_through_importance(grad_energy.to(d.dtype), d, variance, _divisor(x), lam))


def _check_backward(grad_y: Tensor, x: Tensor, stats: Tensor, lam: float) -> None:
    _check("simam_backward", x, lam)
    check_gradient("simam_backward", "grad_y", grad_y, x)
    check_like("simam_backward", "stats", stats, (*x.shape[:2], 2), wide_dtype(x), x)


def _check_energy_backward(grad_energy: Tensor, x: Tensor, lam: float) -> None:
    _check("simam_energy_backward", x, lam)
    check_gradient("simam_energy_backward", "grad_energy", grad_energy, x)


def _fake(x: Tensor, lam: float) -> tuple[Tensor, Tensor]:
    _check("simam", x, lam)
    return torch.empty_like(x), x.new_empty((*x.shape[:2], 2), dtype=wide_dtype(x))


def _energy_fake(x: Tensor, lam: float) -> Tensor:
    _check("simam_energy", x, lam)
    return torch.empty_like(x)


def _backward_fake(grad_y: Tensor, x: Tensor, stats: Tensor, lam: float) -> Tensor:
    _check_backward(grad_y, x, stats, lam)
    return torch.empty_like(x)


def _energy_backward_fake(grad_energy: Tensor, x: Tensor, lam: float) -> Tensor:
    _check_energy_backward(grad_energy, x, lam)
    return torch.empty_like(x)


def _setup_context(ctx: Any, inputs: tuple[Tensor, float], output: tuple[Tensor, Tensor]) -> None:
    x, ctx.lam = inputs
    _, stats = output
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, stats)


def _energy_setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
    x, ctx.lam = inputs
    ctx.save_for_backward(x)


def _backward(ctx: Any, grad_y: Tensor | None, _: None) -> tuple[Tensor | None, None]:
    return (None if grad_y is None else _simam_backward(grad_y, *ctx.saved_tensors, ctx.lam)), None


def _energy_backward(ctx: Any, grad_energy: Tensor) -> tuple[Tensor, None]:
    return _simam_energy_backward(grad_energy, *ctx.saved_tensors, ctx.lam), None


_simam_energy_backward = define_op(
    "simam_energy_backward(Tensor grad_energy, Tensor x, float lam) -> Tensor",
    reference=_energy_backward_reference,
    fake=_energy_backward_fake,
    decomposition=_energy_backward_reference,
)
_simam_energy = define_op(
    "simam_energy(Tensor x, float lam) -> Tensor",
    reference=_energy_reference,
    fake=_energy_fake,
    decomposition=_energy_reference,
    setup_context=_energy_setup_context,
    backward=_energy_backward,
)
_simam_backward = define_op(
    "simam_backward(Tensor grad_y, Tensor x, Tensor stats, float lam) -> Tensor",
    reference=_backward_reference,
    fake=_backward_fake,
    decomposition=_backward_reference,
)
_simam = define_op(
    "simam(Tensor x, float lam) -> (Tensor y, Tensor stats)",  # stats [N, C, 2]: mean and variance of each plane
    reference=_reference,
    fake=_fake,
    decomposition=_reference,
    setup_context=_setup_context,
    backward=_backward,
)
