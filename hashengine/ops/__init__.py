"""The ops: functions on tensors, each with a schema, a plain-torch reference and a fake.

Ops with a derivative also have an autograd formula. `pack_filter` is not an op but a function in plain torch.

Each op is registered with torch's dispatcher as `torch.ops.hashengine.<op>`. Its reference runs on every device. If the
native module is loaded and has a kernel of the op, the kernel replaces the reference on the kernel's device.

A tensor of a wrong dtype, shape or device, or a number out of range, raises ValueError in the form of
`hashengine.errors`. The native kernels raise ValueError itself, and the references raise its subclass `InputError` with
the same message. An argument of another Python type, such as a numpy array for a tensor or a float for an integer,
does not reach the op: torch's dispatcher refuses it with RuntimeError.

In a process that was forked after this package was imported, torch has one thread. Torch's threads, those of OpenMP,
are not forked, and the first op that needed them would wait for them without end.
"""

import os

import torch

from hashengine import _native
from hashengine.ops._hamming import pack_filter
from hashengine.ops._library import refuse_tangents
from hashengine.ops.greedy_sign import greedy_sign
from hashengine.ops.hamming_count import hamming_count
from hashengine.ops.hamming_range import hamming_range
from hashengine.ops.hamming_topk import hamming_topk
from hashengine.ops.pack_bits import pack_bits, unpack_bits
from hashengine.ops.simam import simam, simam_energy
from hashengine.ops.triplet_attention import triplet_attention
from hashengine.ops.triplet_gate import triplet_gate
from hashengine.ops.triplet_pool import triplet_pool

_native.load()
if not _native.available():
    refuse_tangents()
os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))

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
    "triplet_gate",
    "triplet_pool",
    "unpack_bits",
]
