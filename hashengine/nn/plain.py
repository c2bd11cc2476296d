"""Attention for plain networks: networks without shortcuts, such as VGG.

A gate below 1 does no harm in a residual block, because the block adds its input to the attention's output. It does no
harm before a BatchNorm either, because the BatchNorm rescales its input. In a plain network, the gates of all layers
multiply. With one attention for each of VGG's five stages, triplet attentions with a gate of 1/2 leave 1/32 of the
signal, and SimAMs with a gate of 0.65 leave about 1/9. The two layers here multiply their result by a constant.
Thereby the lowest gate of SimAM and the initial gates of triplet attention are 1.
"""

import math
from typing import Any

from torch import Tensor, nn

from hashengine.nn.simam import SimAM
from hashengine.nn.triplet_attention import TripletAttention
from hashengine.ops._plain import needs_plain_torch


def _scale(y: Tensor, factor: float) -> Tensor:
    """`y` times `factor`, in place unless a transform is active: `torch.func.linearize` refuses such an operation."""
    return y * factor if needs_plain_torch() else y.mul_(factor)


class PlainSimAM(SimAM):
    """SimAM divided by sigmoid(1/2): the gates are between 1, for a neuron at the mean of its plane, and 1.607.

    Arguments and errors are those of `SimAM`.
    """

    _SCALE = 1 + math.exp(-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the attention to `x` [N, C, H, W]; the result has the same shape and dtype."""
        return _scale(super().forward(x), self._SCALE)


class PlainTripletAttention(TripletAttention):
    """Triplet attention times 2, so that gates are in (0, 2). Its initial output is its input, bit for bit.

    The weights and biases of its BatchNorms are initialised with 0, so that each gate is `2 * sigmoid(0)`. The slope of
    the sigmoid is greatest there. A bias that saturates the sigmoid near 1 would also preserve the signal, but
    then the gates would hardly learn.

    Arguments and errors are those of `TripletAttention`.
    """

    def __init__(self, channels: int | None = None, **options: Any):
        super().__init__(channels, **options)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.zeros_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the attention to `x` [N, C, H, W]; the result has the same shape and dtype."""
        return _scale(super().forward(x), 2)
