"""The three branches of triplet attention: their pooled axes, and conversions between the input x and their maps.

Misra, Nalamada, Arasanipalai and Hou, "Rotate to Attend: Convolutional Triplet Attention Module", WACV 2021.
The map of a branch spans the two axes that are not pooled: [N, C, W], [N, H, C] or [N, H, W].
"""

import functools
import operator
from collections.abc import Iterable

import torch
from torch import Tensor

BRANCHES = ("cw", "hc", "hw")  # the name of a branch gives the axes of its map
_POOLED_AXIS = {"cw": 2, "hc": 3, "hw": 1}


def map_shape(x: Tensor, branch: str) -> tuple[int, int, int]:
    n, c, h, w = x.shape
    return {"cw": (n, c, w), "hc": (n, h, c), "hw": (n, h, w)}[branch]


def map_numel(x: Tensor, branch: str) -> int:
    n, rows, columns = map_shape(x, branch)
    return n * rows * columns


def add(tensors: Iterable[Tensor]) -> Tensor:
    """The elementwise sum of `tensors`."""
    return functools.reduce(operator.add, tensors)


def _transpose_hc(reduced: Tensor, branch: str) -> Tensor:
    """Swap the last two axes for the branch "hc": its map is [N, H, C], but x reduced over W is [N, C, H]."""
    return reduced.transpose(1, 2) if branch == "hc" else reduced


def sum_over(x: Tensor, branch: str) -> Tensor:
    """The sum of `x` [N, C, H, W] over the pooled axis of `branch`: a map."""
    return _transpose_hc(x.sum(_POOLED_AXIS[branch]), branch)


def max_and_mean(x: Tensor, branch: str) -> tuple[Tensor, Tensor]:
    """Z-pool: the maximum and the mean as [N, 2, rows, columns], and the index of the maximum [N, rows, columns].

    If the maximum occurs more than once, the index is that of its first occurrence.
    """
    values, index = x.max(_POOLED_AXIS[branch])
    mean = x.mean(_POOLED_AXIS[branch])
    return torch.stack((_transpose_hc(values, branch), _transpose_hc(mean, branch)), 1), _transpose_hc(index, branch)


def spread(branch_map: Tensor, branch: str) -> Tensor:
    """A view of a map that broadcasts against x [N, C, H, W]."""
    return _transpose_hc(branch_map, branch).unsqueeze(_POOLED_AXIS[branch])


def unpool(grad_pool: Tensor, index: Tensor, x: Tensor, branch: str) -> Tensor:
    """The gradient of `max_and_mean` with respect to x.

    The gradient of the maximum goes to its index; the gradient of the mean is divided evenly along the pooled axis.
    """
    axis = _POOLED_AXIS[branch]
    grad_max, grad_mean = grad_pool.unbind(1)
    even = (spread(grad_mean, branch) / x.shape[axis]).expand(x.shape)
    return even.scatter_add(axis, spread(index, branch).long(), spread(grad_max, branch))
