"""The last step of triplet attention: the input x times the mean of the branches' gates."""

from typing import Any

import torch
from torch import Tensor

from hashengine.errors import invalid
from hashengine.ops._branches import BRANCHES, add, map_shape, spread, sum_over
from hashengine.ops._check import check_feature_map, check_floating, check_gradient, check_same_device, wide_dtype
from hashengine.ops._library import define_op
from hashengine.ops._plain import in_dtype_and_layout_of, needs_plain_torch, untraced


def triplet_gate(x: Tensor, map_cw: Tensor, map_hc: Tensor, map_hw: Tensor | None = None) -> Tensor:
    """Multiply `x` by the mean of the sigmoids of two or three maps, each broadcast along the axis that it lacks.

    This is the part of equation 2 of Misra et al., WACV 2021, that follows convolution and BatchNorm.

    Args:
        x: feature map [N, C, H, W], float64, float32, float16 or bfloat16, any strides.
        map_cw: the map of the first branch before the sigmoid, [N, 1, C, W]; floating point, like the other maps.
        map_hc: the map of the second branch, [N, 1, H, C].
        map_hw: the map of the third branch, [N, 1, H, W]; without it, the mean is over two branches.

    Returns:
        `y` with the shape, dtype and layout of `x`.

    Raises:
        ValueError: a dtype, a shape or a device is wrong.
    """
    return (_reference if needs_plain_torch() else _triplet_gate)(x, map_cw, map_hc, map_hw)


def mean_gate(gates: list[Tensor]) -> Tensor:
    """The mean of two or three gates [N, rows, columns], after the sigmoid, each broadcast against x [N, C, H, W]."""
    return add(spread(gate, branch) for gate, branch in zip(gates, BRANCHES, strict=False)) / len(gates)


def _reference(x: Tensor, map_cw: Tensor, map_hc: Tensor, map_hw: Tensor | None) -> Tensor:
    _check("triplet_gate", x, map_cw, map_hc, map_hw)
    return in_dtype_and_layout_of(x, x * mean_gate(_gates(x, map_cw, map_hc, map_hw)))


def _fake(x: Tensor, map_cw: Tensor, map_hc: Tensor, map_hw: Tensor | None) -> Tensor:
    _check("triplet_gate", x, map_cw, map_hc, map_hw)
    return torch.empty_like(x)


@untraced
def _check(where: str, x: Tensor, *maps: Tensor | None) -> None:
    check_feature_map(where, x)
    for branch, branch_map in zip(BRANCHES, maps, strict=True):
        if branch_map is None:
            continue
        name = f"map_{branch}"
        check_floating(where, name, branch_map)
        n, rows, columns = map_shape(x, branch)
        if tuple(branch_map.shape) != (n, 1, rows, columns):
            expected = f"{[n, 1, rows, columns]} for x {list(x.shape)}"
            raise invalid(where, name, expected, list(branch_map.shape))
        check_same_device(where, name, branch_map, x)


def _gates(x: Tensor, *maps: Tensor | None) -> list[Tensor]:
    return [torch.sigmoid(m.squeeze(1).to(wide_dtype(x))) for m in maps if m is not None]


def _check_backward(grad_y: Tensor, x: Tensor, *maps: Tensor | None) -> None:
    _check("triplet_gate_backward", x, *maps)
    check_gradient("triplet_gate_backward", "grad_y", grad_y, x)


def _backward_reference(
    grad_y: Tensor, x: Tensor, map_cw: Tensor, map_hc: Tensor, map_hw: Tensor | None
) -> tuple[Tensor, ...]:
    _check_backward(grad_y, x, map_cw, map_hc, map_hw)
    wide = wide_dtype(x)
    maps = [branch_map for branch_map in (map_cw, map_hc, map_hw) if branch_map is not None]
    gates = _gates(x, *maps)
    grad_x = in_dtype_and_layout_of(x, grad_y * mean_gate(gates))
    product = grad_y.to(wide) * x.to(wide) / len(gates)
    grad_maps = [
        (sum_over(product, branch) * gate * (1 - gate)).unsqueeze(1).to(branch_map.dtype).contiguous()
        for gate, branch, branch_map in zip(gates, BRANCHES, maps, strict=False)
    ]
    if map_hw is None:
        grad_maps.append(x.new_empty(0))
    return grad_x, *grad_maps


def _backward_fake(
    grad_y: Tensor, x: Tensor, map_cw: Tensor, map_hc: Tensor, map_hw: Tensor | None
) -> tuple[Tensor, ...]:
    _check_backward(grad_y, x, map_cw, map_hc, map_hw)
    return (
        torch.empty_like(x),
        *(x.new_empty(0) if m is None else m.new_empty(m.shape) for m in (map_cw, map_hc, map_hw)),
    )


def _setup_context(ctx: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    x, map_cw, map_hc, map_hw = ctx.saved_tensors  # activation checkpointing allows only one look at them
    *grads, grad_hw = _triplet_gate_backward(grad_y, x, map_cw, map_hc, map_hw)
    return *grads, None if map_hw is None else grad_hw


_triplet_gate_backward = define_op(
    "triplet_gate_backward(Tensor grad_y, Tensor x, Tensor map_cw, Tensor map_hc, Tensor? map_hw)"
    " -> (Tensor grad_x, Tensor grad_cw, Tensor grad_hc, Tensor grad_hw)",
    reference=_backward_reference,
    fake=_backward_fake,
    decomposition=_backward_reference,
)
_triplet_gate = define_op(
    "triplet_gate(Tensor x, Tensor map_cw, Tensor map_hc, Tensor? map_hw) -> Tensor",
    reference=_reference,
    fake=_fake,
    decomposition=_reference,
    setup_context=_setup_context,
    backward=_backward,
)
