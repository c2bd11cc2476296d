"""The three branches of triplet attention: which axis each pools away, and the way between its maps and x.

Misra, Nalamada, Arasanipalai and Hou, "Rotate to Attend: Convolutional Triplet Attention Module", WACV 2021.
A branch's map lies over the two axes that it keeps: [N, C, W], [N, H, C] and [N, H, W].
"""

import torch
from torch import Tensor

BRANCHES = ("cw", "hc", "hw")
_POOLED_AXIS = {"cw": 2, "hc": 3, "hw": 1}


def map_shape(x: Tensor, branch: str) -> tuple[int, int, int]:
    n, c, h, w = x.shape
    return {"cw": (n, c, w), "hc": (n, h, c), "hw": (n, h, w)}[branch]


def pooled_length(x: Tensor, branch: str) -> int:
    return x.shape[_POOLED_AXIS[branch]]


def _to_map(reduced: Tensor, branch: str) -> Tensor:
    """[N, C, H] -> [N, H, C] for the branch whose map turns; the others lie right already."""
    return reduced.transpose(1, 2) if branch == "hc" else reduced


def sum_over(x: Tensor, branch: str) -> Tensor:
    """X [N, C, H, W] summed over the branch's pooled axis: a map."""
    return _to_map(x.sum(_POOLED_AXIS[branch]), branch)


def max_and_mean(x: Tensor, branch: str) -> tuple[Tensor, Tensor]:
    """ZPool: [N, 2, rows, columns], the maximum before the mean, and the index of the maximum [N, rows, columns].

    The index is the lowest where maxima are tied.
    """
    values, index = x.max(_POOLED_AXIS[branch])
    mean = x.mean(_POOLED_AXIS[branch])
    return torch.stack((_to_map(values, branch), _to_map(mean, branch)), 1), _to_map(index, branch)


def spread(branch_map: Tensor, branch: str) -> Tensor:
    """A map as a view that broadcasts against x [N, C, H, W]."""
    return _to_map(branch_map, branch).unsqueeze(_POOLED_AXIS[branch])


def unpool(grad_pool: Tensor, index: Tensor, x: Tensor, branch: str) -> Tensor:
    """The gradient of :func:`max_and_mean`: to the maximum's index, and evenly to all."""
    grad_max, grad_mean = grad_pool.unbind(1)
    even = (spread(grad_mean, branch) / pooled_length(x, branch)).expand(x.shape)
    return even.scatter_add(_POOLED_AXIS[branch], spread(index, branch).long(), spread(grad_max, branch))
