"""Triplet attention's pooling (ZPool), all three branches at once."""

import torch
from torch import Tensor

from hashengine.ops._branches import BRANCHES, map_shape, max_and_mean, unpool
from hashengine.ops._check import check_feature_map, wide_dtype
from hashengine.ops._library import define_op


def triplet_pool(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Maximum and mean of ``x`` over H, over W and over C.

    Misra et al., WACV 2021, equation 1 (Z-pool). Where a maximum is tied its gradient goes to the lowest index.

    Args:
        x: feature map [N, C, H, W], float64, float32, float16 or bfloat16, any strides; C, H and W at least 1.

    Returns:
        ``pool_cw`` [N, 2, C, W], ``pool_hc`` [N, 2, H, C] and ``pool_hw`` [N, 2, H, W], in x's dtype, contiguous; the
        maximum lies in channel 0, the mean, taken in float32, in channel 1.

    Raises:
        TypeError: ``x`` is not floating point.
        ValueError: ``x`` is not four-dimensional, or C, H or W is 0.
    """
    return _triplet_pool(x)[:3]


def _reference(x: Tensor) -> tuple[Tensor, ...]:
    _check(x)
    pools, indices = zip(*(max_and_mean(x.to(wide_dtype(x)), branch) for branch in BRANCHES), strict=True)
    return (*(pool.to(x.dtype).contiguous() for pool in pools), *(index.int().contiguous() for index in indices))


def _fake(x: Tensor) -> tuple[Tensor, ...]:
    _check(x)
    shapes = [map_shape(x, branch) for branch in BRANCHES]
    return (
        *(x.new_empty((n, 2, rows, columns)) for n, rows, columns in shapes),
        *(x.new_empty(shape, dtype=torch.int32) for shape in shapes),
    )


def _check(x: Tensor) -> None:
    check_feature_map("triplet_pool", x)
    if 0 in x.shape[1:]:
        raise ValueError(f"triplet_pool: x must have at least one channel, row and column, got {list(x.shape)}")


def _backward_reference(grads: list[Tensor], indices: list[Tensor], x: Tensor) -> Tensor:
    wide = wide_dtype(x)
    parts = zip(grads, indices, BRANCHES, strict=True)
    return torch.empty_like(x).copy_(sum(unpool(grad.to(wide), index, x, branch) for grad, index, branch in parts))


def _setup_context(ctx, inputs, output) -> None:
    (x,) = inputs
    indices = output[3:]
    ctx.mark_non_differentiable(*indices)
    ctx.save_for_backward(x, *indices)


def _backward(ctx, *grads: Tensor) -> Tensor:
    x, *indices = ctx.saved_tensors
    return _triplet_pool_backward(list(grads[:3]), indices, x)


_triplet_pool_backward = define_op(
    "triplet_pool_backward(Tensor[] grads, Tensor[] indices, Tensor x) -> Tensor",
    reference=_backward_reference,
    fake=lambda grads, indices, x: torch.empty_like(x),
)
_triplet_pool = define_op(
    "triplet_pool(Tensor x) -> (Tensor pool_cw, Tensor pool_hc, Tensor pool_hw, "
    "Tensor index_cw, Tensor index_hc, Tensor index_hw)",
    reference=_reference,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
