"""The layers, built on `hashengine.ops`, and functions that put them into existing networks."""

from hashengine.nn.attach import AttachReport, attach, detach
from hashengine.nn.fuse import FuseReport, fuse, unfuse
from hashengine.nn.greedy_hash import GreedyHash
from hashengine.nn.plain import PlainSimAM, PlainTripletAttention
from hashengine.nn.recalibrate import recalibrate
from hashengine.nn.simam import SimAM
from hashengine.nn.triplet_attention import TripletAttention

__all__ = [
    "AttachReport",
    "FuseReport",
    "GreedyHash",
    "PlainSimAM",
    "PlainTripletAttention",
    "SimAM",
    "TripletAttention",
    "attach",
    "detach",
    "fuse",
    "recalibrate",
    "unfuse",
]
