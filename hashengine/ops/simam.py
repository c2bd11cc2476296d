"""SimAM, the parameter-free attention: Yang, Zhang, Li and Xie, ICML 2021 (PMLR 139:11863-11874).

In each channel plane of M = H * W positions, with ``n = max(M - 1, 1)``, mean ``m`` and ``v = sum((x - m)^2) / n``, the
minimal energy of a neuron x is ``e* = 4 (v + lam) / ((x - m)^2 + 2 v + 2 lam)`` (equation 5). The less energy, the more
a neuron stands out; its importance is ``1 / e* = (x - m)^2 / (4 (v + lam)) + 1/2``, and ``y = x * sigmoid(1 / e*)``.
"""

import torch
from torch import Tensor

from hashengine.ops._check import check_feature_map, check_gradient, check_like, wide_dtype
from hashengine.ops._library import define_op


def simam(x: Tensor, lam: float = 1e-4) -> Tensor:
    """SimAM: each activation times the sigmoid of its importance.

    Args:
        x: feature map [N, C, H, W], float64, float32, float16 or bfloat16, any strides. A 1 x 1 plane has variance 0,
            so that its gate is sigmoid(1/2).
        lam: the paper's lambda, above 0: 1e-4 for CIFAR, 0.1 for ImageNet.

    Returns:
        y: like ``x`` in shape, dtype and layout. Statistics are taken in float32 (float64 for float64).

    Raises:
        TypeError: ``x`` is not floating point.
        ValueError: ``x`` is not four-dimensional, or ``lam`` is not above 0.
    """
    return _simam(x, lam)[0]


def simam_energy(x: Tensor, lam: float = 1e-4) -> Tensor:
    """The importance map ``1 / e*`` that :func:`simam` puts through the sigmoid, at least 1/2 everywhere.

    Arguments, result and errors as for :func:`simam`.
    """
    return _simam_energy(x, lam)


def _check(op: str, x: Tensor, lam: float) -> None:
    check_feature_map(op, x)
    if not lam > 0:
        raise ValueError(f"{op}: lam must be above 0 (a constant plane divides by it), got {lam}")


def _centre(x: Tensor, lam: float) -> tuple[Tensor, Tensor, int]:
    """(x - m) [N, C, H, W], v + lam [N, C, 1, 1], and n, in the type that adds up."""
    wide = x.to(wide_dtype(x))
    n = max(x.shape[2] * x.shape[3] - 1, 1)
    d = wide - wide.mean((2, 3), keepdim=True)
    return d, d.square().sum((2, 3), keepdim=True) / n + lam, n


def _like(x: Tensor, value: Tensor) -> Tensor:
    return torch.empty_like(x).copy_(value)


def _energy_reference(x: Tensor, lam: float) -> Tensor:
    _check("simam_energy", x, lam)
    d, v, _ = _centre(x, lam)
    return _like(x, d.square() / (4 * v) + 0.5)


def _reference(x: Tensor, lam: float) -> tuple[Tensor, Tensor]:
    _check("simam", x, lam)
    wide = x.to(wide_dtype(x))
    n = max(x.shape[2] * x.shape[3] - 1, 1)
    mean = wide.mean((2, 3), keepdim=True)
    d = wide - mean
    variance = d.square().sum((2, 3), keepdim=True) / n
    y = _like(x, x * torch.sigmoid(d.square() / (4 * (variance + lam)) + 0.5))
    return y, torch.cat((mean, variance), -1).squeeze(2)


def _through_energy(grad_energy: Tensor, d: Tensor, v: Tensor, n: int) -> Tensor:
    """The gradient with respect to x of what depends on it through the energy d^2 / (4 v) + 1/2 alone.

    With g the energy's gradient: g d / (2 v) - mean(g d / (2 v)) - d * sum(g d^2) / (2 n v^2); the mean leaves through
    m, the last term through v, and sum(d) = 0 keeps the two apart.
    """
    direct = grad_energy * d / (2 * v)
    through_variance = d * ((grad_energy * d.square()).sum((2, 3), keepdim=True) / (2 * n * v.square()))
    return direct - direct.mean((2, 3), keepdim=True) - through_variance


def _energy_backward_reference(grad_energy: Tensor, x: Tensor, lam: float) -> Tensor:
    d, v, n = _centre(x, lam)
    return _like(x, _through_energy(grad_energy.to(d.dtype), d, v, n))


def _backward_reference(grad_y: Tensor, x: Tensor, stats: Tensor, lam: float) -> Tensor:
    _check_backward(grad_y, x, stats, lam)
    n = max(x.shape[2] * x.shape[3] - 1, 1)
    grad_y, wide = grad_y.to(stats.dtype), x.to(stats.dtype)
    mean, variance = stats[..., None, None].unbind(2)
    d, v = wide - mean, variance + lam
    gate = torch.sigmoid(d.square() / (4 * v) + 0.5)
    grad_energy = grad_y * wide * gate * (1 - gate)
    return _like(x, grad_y * gate + _through_energy(grad_energy, d, v, n))


def _check_backward(grad_y: Tensor, x: Tensor, stats: Tensor, lam: float) -> None:
    _check("simam_backward", x, lam)
    check_gradient("simam_backward", grad_y, x)
    check_like("simam_backward", stats, "stats", (*x.shape[:2], 2), wide_dtype(x), x)


def _energy_fake(x: Tensor, lam: float) -> Tensor:
    _check("simam_energy", x, lam)
    return torch.empty_like(x)


def _fake(x: Tensor, lam: float) -> tuple[Tensor, Tensor]:
    _check("simam", x, lam)
    return torch.empty_like(x), x.new_empty((*x.shape[:2], 2), dtype=wide_dtype(x))


def _backward_fake(grad_y: Tensor, x: Tensor, stats: Tensor, lam: float) -> Tensor:
    _check_backward(grad_y, x, stats, lam)
    return torch.empty_like(x)


def _energy_setup_context(ctx, inputs, output) -> None:
    x, ctx.lam = inputs
    ctx.save_for_backward(x)


def _setup_context(ctx, inputs, output) -> None:
    x, ctx.lam = inputs
    _, stats = output
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, stats)


def _backward(ctx, grad_y: Tensor | None, _) -> tuple[Tensor | None, None]:
    return (None if grad_y is None else _simam_backward(grad_y, *ctx.saved_tensors, ctx.lam)), None


_simam_energy_backward = define_op(
    "simam_energy_backward(Tensor grad_energy, Tensor x, float lam) -> Tensor",
    reference=_energy_backward_reference,
    fake=lambda grad_energy, x, lam: torch.empty_like(x),
)
_simam_energy = define_op(
    "simam_energy(Tensor x, float lam) -> Tensor",
    reference=_energy_reference,
    fake=_energy_fake,
    setup_context=_energy_setup_context,
    backward=lambda ctx, grad: (_simam_energy_backward(grad, *ctx.saved_tensors, ctx.lam), None),
)
_simam_backward = define_op(
    "simam_backward(Tensor grad_y, Tensor x, Tensor stats, float lam) -> Tensor",
    reference=_backward_reference,
    fake=_backward_fake,
)
_simam = define_op(
    "simam(Tensor x, float lam) -> (Tensor y, Tensor stats)",  # stats [N, C, 2]: mean and variance of a plane
    reference=_reference,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
