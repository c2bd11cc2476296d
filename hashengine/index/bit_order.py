"""The order of bits in a byte: the library's own, that of outside data, and the way from one to the other."""

from __future__ import annotations

import numpy as np
import torch

from hashengine.errors import InputError
from hashengine.index._arguments import Array, check_array

OWN = "msb_first"  # as numpy.packbits and pack_bits give it
_ORDERS = (OWN, "lsb_first")


def reverse_bits(codes: Array) -> Array:
    """Turn codes from one bit order into the other: bit i of every byte becomes bit 7 - i; its own inverse.

    Args:
        codes: uint8 of any shape, torch on any device or numpy.

    Returns:
        uint8 of that shape, new memory, in the codes' library, on their device.

    Raises:
        TypeError: another type or dtype.
    """
    check_array(codes, "codes", "uint8")
    if codes.dtype not in (torch.uint8, np.uint8):
        raise TypeError(f"codes must be uint8, got {codes.dtype}")
    codes = codes >> 4 | codes << 4
    codes = (codes & 0xCC) >> 2 | (codes & 0x33) << 2
    return (codes & 0xAA) >> 1 | (codes & 0x55) << 1


def checked_order(bit_order: str) -> str:
    if bit_order not in _ORDERS:
        raise InputError(f"bit_order must be 'msb_first' or 'lsb_first', got {bit_order!r}")
    return bit_order


def converted(codes: Array, bit_order: str) -> Array:
    """``codes`` from ``bit_order`` to the library's own order, or back."""
    return codes if checked_order(bit_order) == OWN else reverse_bits(codes)
