"""Packing of codes: eight bits to a byte, the first in the most significant bit (numpy.packbits' order)."""

import torch
from torch import Tensor

from hashengine.ops._check import FLOATING, check_codes, check_no_nan
from hashengine.ops._library import define_op


def pack_bits(u: Tensor) -> Tensor:
    """Pack activations or bits into codes.

    Floating-point ``u`` gives a set bit where ``u >= 0`` (as ``greedy_sign`` gives +1); bool is packed as it is. Other
    types are refused: uint8 always means packed already.

    Args:
        u: [..., bits] of float64, float32, float16, bfloat16 or bool, bits a multiple of 8.

    Returns:
        codes: uint8 [..., bits / 8], contiguous, the first bit in the most significant place.

    Raises:
        TypeError: another dtype.
        ValueError: bits is not a multiple of 8, or ``u`` holds a NaN (checked on the CPU only).
    """
    return _pack_bits(u)


def unpack_bits(codes: Tensor) -> Tensor:
    """Unpack codes, the inverse of :func:`pack_bits`.

    Args:
        codes: uint8 [..., bits / 8].

    Returns:
        bits: bool [..., bits], contiguous.

    Raises:
        TypeError: ``codes`` is not uint8.
    """
    return _unpack_bits(codes)


def _check_pack(u: Tensor) -> None:
    if u.dtype not in (*FLOATING, torch.bool):
        raise TypeError(f"pack_bits: u must be float64, float32, float16, bfloat16 or bool, got {u.dtype}")
    if u.dim() < 1 or u.shape[-1] % 8:
        raise ValueError(f"pack_bits: u must be [..., bits] with bits a multiple of 8, got {list(u.shape)}")


def _check_unpack(codes: Tensor) -> None:
    check_codes("unpack_bits", codes)
    if codes.dim() < 1:
        raise ValueError("unpack_bits: codes must be [..., bits / 8], got a scalar")


def _pack_reference(u: Tensor) -> Tensor:
    _check_pack(u)
    check_no_nan("pack_bits", u)
    bits = u if u.dtype == torch.bool else u >= 0
    weights = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8, device=u.device)
    return (bits.unflatten(-1, (u.shape[-1] // 8, 8)) * weights).sum(-1, dtype=torch.uint8).contiguous()


def _pack_fake(u: Tensor) -> Tensor:
    _check_pack(u)
    return u.new_empty((*u.shape[:-1], u.shape[-1] // 8), dtype=torch.uint8)


def _unpack_reference(codes: Tensor) -> Tensor:
    _check_unpack(codes)
    places = torch.arange(7, -1, -1, dtype=torch.uint8, device=codes.device)
    return ((codes.unsqueeze(-1) >> places) & 1).flatten(-2).to(torch.bool).contiguous()


def _unpack_fake(codes: Tensor) -> Tensor:
    _check_unpack(codes)
    return codes.new_empty((*codes.shape[:-1], codes.shape[-1] * 8), dtype=torch.bool)


_pack_bits = define_op("pack_bits(Tensor u) -> Tensor", reference=_pack_reference, fake=_pack_fake)
_unpack_bits = define_op("unpack_bits(Tensor codes) -> Tensor", reference=_unpack_reference, fake=_unpack_fake)
