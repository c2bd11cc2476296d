"""The ops: each a function with a schema, a plain-torch reference, a fake and an autograd formula.

They are registered with torch's dispatcher as ``torch.ops.hashengine.<op>``; the native kernels, where they were built,
take the references' place.
"""

from hashengine.ops._hamming import pack_filter
from hashengine.ops.greedy_sign import greedy_sign
from hashengine.ops.hamming_count import hamming_count
from hashengine.ops.hamming_range import hamming_range
from hashengine.ops.hamming_topk import hamming_topk
from hashengine.ops.pack_bits import pack_bits, unpack_bits
from hashengine.ops.simam import simam, simam_energy
from hashengine.ops.triplet_attention import triplet_attention, triplet_attention_inference
from hashengine.ops.triplet_attention_update import triplet_attention_update
from hashengine.ops.triplet_gate import triplet_gate
from hashengine.ops.triplet_pool import triplet_pool

__all__ = [
    "greedy_sign",
    "hamming_count",
    "hamming_range",
    "hamming_topk",
    "pack_bits",
    "pack_filter",
    "simam",
    "simam_energy",
    "triplet_attention",
    "triplet_attention_inference",
    "triplet_attention_update",
    "triplet_gate",
    "triplet_pool",
    "unpack_bits",
]
