"""Triplet attention's gate: x times the mean of its branches' gates."""

import torch
from torch import Tensor

from hashengine.ops._branches import BRANCHES, map_shape, spread, sum_over
from hashengine.ops._check import check_activations, check_device, check_feature_map, wide_dtype
from hashengine.ops._library import define_op


def triplet_gate(x: Tensor, map_cw: Tensor, map_hc: Tensor, map_hw: Tensor | None = None) -> Tensor:
    """Multiply ``x`` by the mean of the sigmoids of its two or three maps, each spread along the axis it lacks.

    Misra et al., WACV 2021, equation 2: what follows convolution and BatchNorm in each branch, and the branches' mean.

    Args:
        x: feature map [N, C, H, W], float64, float32, float16 or bfloat16, any strides.
        map_cw, map_hc, map_hw: the branches' maps before the sigmoid, [N, 1, C, W], [N, 1, H, C] and [N, 1, H, W], any
            of these types; without ``map_hw`` the mean is over two branches.

    Returns:
        y: like ``x`` in shape, dtype and layout.

    Raises:
        TypeError: a tensor is not floating point.
        ValueError: a shape or a device does not fit.
    """
    return _triplet_gate(x, map_cw, map_hc, map_hw)


def mean_gate(gates: list[Tensor]) -> Tensor:
    """The mean of the branches' gates [N, rows, columns], after the sigmoid, spread over x [N, C, H, W]."""
    return sum(spread(gate, branch) for gate, branch in zip(gates, BRANCHES, strict=False)) / len(gates)


def _reference(x: Tensor, map_cw: Tensor, map_hc: Tensor, map_hw: Tensor | None) -> Tensor:
    _check(x, map_cw, map_hc, map_hw)
    return torch.empty_like(x).copy_(x * mean_gate(_gates(x, map_cw, map_hc, map_hw)))


def _fake(x: Tensor, map_cw: Tensor, map_hc: Tensor, map_hw: Tensor | None) -> Tensor:
    _check(x, map_cw, map_hc, map_hw)
    return torch.empty_like(x)


def _check(x: Tensor, *maps: Tensor | None) -> None:
    check_feature_map("triplet_gate", x)
    for branch, branch_map in zip(BRANCHES, maps, strict=True):
        if branch_map is None:
            continue
        check_activations("triplet_gate", branch_map, f"map_{branch}")
        check_device("triplet_gate", branch_map, x, f"map_{branch}")
        n, rows, columns = map_shape(x, branch)
        if tuple(branch_map.shape) != (n, 1, rows, columns):
            raise ValueError(
                f"triplet_gate: map_{branch} must be {[n, 1, rows, columns]} for x {list(x.shape)}, "
                f"got {list(branch_map.shape)}"
            )


def _gates(x: Tensor, *maps: Tensor | None) -> list[Tensor]:
    return [torch.sigmoid(m.squeeze(1).to(wide_dtype(x))) for m in maps if m is not None]


def _backward_reference(
    grad_y: Tensor, x: Tensor, map_cw: Tensor, map_hc: Tensor, map_hw: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = wide_dtype(x)
    maps = (map_cw, map_hc, map_hw)
    gates = _gates(x, *maps)
    grad_x = torch.empty_like(x).copy_(grad_y * mean_gate(gates))
    product = grad_y.to(wide) * x.to(wide) / len(gates)
    grad_maps = [
        (sum_over(product, branch) * gate * (1 - gate)).unsqueeze(1).to(branch_map.dtype).contiguous()
        for gate, branch, branch_map in zip(gates, BRANCHES, maps, strict=False)
    ]
    if map_hw is None:
        grad_maps.append(x.new_empty(0))
    return grad_x, *grad_maps


def _backward_fake(grad_y, x, map_cw, map_hc, map_hw):
    return (
        torch.empty_like(x),
        *(x.new_empty(0) if m is None else m.new_empty(m.shape) for m in (map_cw, map_hc, map_hw)),
    )


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    *grads, grad_hw = _triplet_gate_backward(grad_y, *ctx.saved_tensors)
    return *grads, None if ctx.saved_tensors[3] is None else grad_hw


_triplet_gate_backward = define_op(
    "triplet_gate_backward(Tensor grad_y, Tensor x, Tensor map_cw, Tensor map_hc, Tensor? map_hw)"
    " -> (Tensor grad_x, Tensor grad_cw, Tensor grad_hc, Tensor grad_hw)",
    reference=_backward_reference,
    fake=_backward_fake,
)
_triplet_gate = define_op(
    "triplet_gate(Tensor x, Tensor map_cw, Tensor map_hc, Tensor? map_hw) -> Tensor",
    reference=_reference,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
