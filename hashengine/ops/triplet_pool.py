"""The pooling of triplet attention (Z-pool), for all three branches in one op."""

from typing import Any

import torch
from torch import Tensor

from hashengine.errors import invalid
from hashengine.ops._branches import BRANCHES, add, map_shape, max_and_mean, unpool
from hashengine.ops._check import check_feature_map, check_like, wide_dtype
from hashengine.ops._library import define_op
from hashengine.ops._plain import in_dtype_and_layout_of, needs_plain_torch


def triplet_pool(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Maximum and mean of `x` over H, over W and over C.

    Misra et al., WACV 2021, equation 1 (Z-pool). The gradient of tied maxima goes to the lowest index.

    Args:
        x: feature map [N, C, H, W], float64, float32, float16 or bfloat16, any strides; C, H and W at least 1.

    Returns:
        `pool_cw` [N, 2, C, W], `pool_hc` [N, 2, H, C] and `pool_hw` [N, 2, H, W], in the dtype of `x`, contiguous.
        Channel 0 is the maximum. Channel 1 is the mean, which is computed in float32 (in float64 if `x` is float64).

    Raises:
        ValueError: `x` is not a floating-point feature map of four axes, or C, H or W is 0.
    """
    pool_cw, pool_hc, pool_hw, *_ = (_reference if needs_plain_torch() else _triplet_pool)(x)
    return pool_cw, pool_hc, pool_hw


def _reference(x: Tensor) -> tuple[Tensor, ...]:
    check_feature_map("triplet_pool", x, not_empty=True)
    pools, indices = zip(*(max_and_mean(x.to(wide_dtype(x)), branch) for branch in BRANCHES), strict=True)
    return (*(pool.to(x.dtype).contiguous() for pool in pools), *(index.int().contiguous() for index in indices))


def _fake(x: Tensor) -> tuple[Tensor, ...]:
    check_feature_map("triplet_pool", x, not_empty=True)
    shapes = [map_shape(x, branch) for branch in BRANCHES]
    return (
        *(x.new_empty((n, 2, rows, columns)) for n, rows, columns in shapes),
        *(x.new_empty(shape, dtype=torch.int32) for shape in shapes),
    )


def _check_backward(grads: list[Tensor], indices: list[Tensor], x: Tensor) -> None:
    where = "triplet_pool_backward"
    check_feature_map(where, x, not_empty=True)
    if len(grads) != 3 or len(indices) != 3:
        raise invalid(where, "grads and indices", "3 tensors each, one per branch", f"{len(grads)} and {len(indices)}")
    for grad, index, branch in zip(grads, indices, BRANCHES, strict=True):
        n, rows, columns = map_shape(x, branch)
        check_like(where, "grads", grad, (n, 2, rows, columns), x.dtype, x)
        check_like(where, "indices", index, (n, rows, columns), torch.int32, x)


def _backward_reference(grads: list[Tensor], indices: list[Tensor], x: Tensor) -> Tensor:
    _check_backward(grads, indices, x)
    wide = wide_dtype(x)
    parts = zip(grads, indices, BRANCHES, strict=True)
    return in_dtype_and_layout_of(x, add(unpool(grad.to(wide), index, x, branch) for grad, index, branch in parts))


def _backward_fake(grads: list[Tensor], indices: list[Tensor], x: Tensor) -> Tensor:
    _check_backward(grads, indices, x)
    return torch.empty_like(x)


def _setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, ...]) -> None:
    (x,) = inputs
    indices = output[3:]
    ctx.mark_non_differentiable(*indices)
    ctx.save_for_backward(x, *indices)


def _backward(ctx: Any, *grads: Tensor) -> Tensor:
    x, *indices = ctx.saved_tensors
    return _triplet_pool_backward(list(grads[:3]), indices, x)


_triplet_pool_backward = define_op(
    "triplet_pool_backward(Tensor[] grads, Tensor[] indices, Tensor x) -> Tensor",
    reference=_backward_reference,
    fake=_backward_fake,
    decomposition=_backward_reference,
)
_triplet_pool = define_op(
    "triplet_pool(Tensor x) -> (Tensor pool_cw, Tensor pool_hc, Tensor pool_hw, "
    "Tensor index_cw, Tensor index_hc, Tensor index_hw)",
    reference=_reference,
    fake=_fake,
    decomposition=_reference,
    setup_context=_setup_context,
    backward=_backward,
)
