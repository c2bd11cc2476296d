"""The layers: drop-in modules built on :mod:`hashengine.ops`."""

from hashengine.nn.greedy_hash import GreedyHash
from hashengine.nn.simam import SimAM
from hashengine.nn.triplet_attention import TripletAttention

__all__ = ["GreedyHash", "SimAM", "TripletAttention"]
