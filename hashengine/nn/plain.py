"""Attention for networks without shortcuts, which feel every factor that a gate puts on their signal.

A residual branch absorbs a gate below 1, and so does a BatchNorm that follows. A plain network passes it on: five
triplet attentions at 1/2, or five SimAMs at 0.65, leave a thirtieth or a ninth of the signal. These two start where
the network was: their gates are scaled so that "nothing stands out" means 1. The scale is applied in place, to the
layer's own result.
"""

import math

from torch import Tensor, nn

from hashengine.nn.simam import SimAM
from hashengine.nn.triplet_attention import TripletAttention


class PlainSimAM(SimAM):
    """SimAM over ``sigmoid(1/2)``: the gate of a neuron at its plane's mean is 1, that of the others up to 1.607."""

    _SCALE = 1 + math.exp(-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mul_(self._SCALE)


class PlainTripletAttention(TripletAttention):
    """Twice triplet attention, with gates in (0, 2), that starts as the identity, bit for bit.

    The BatchNorms start with weight and bias 0, so that every gate starts at ``2 * sigmoid(0)``, where the sigmoid's
    slope is greatest: attention is learned from there. A bias that saturates the sigmoid near 1 would start as safely
    and hardly learn.
    """

    def __init__(self, channels: int | None = None, **options):
        super().__init__(channels, **options)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.zeros_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mul_(2)
