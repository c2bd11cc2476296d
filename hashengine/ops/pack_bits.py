"""Packing of codes: eight bits per byte, the first bit in the most significant place (the order of numpy.packbits)."""

import torch
from torch import Tensor

from hashengine._validation import dtype_name
from hashengine.errors import invalid
from hashengine.ops._check import FLOATING, check_no_nan
from hashengine.ops._library import define_op
from hashengine.ops._plain import needs_plain_torch, untraced


def pack_bits(u: Tensor) -> Tensor:
    """Pack activations or bits into codes.

    A bit is set if a floating-point value is at least 0 (for which `greedy_sign` returns +1), or if a bool is true.
    Other dtypes are refused; in particular, uint8 always means codes that are packed already.

    Args:
        u: [..., bits] of float64, float32, float16, bfloat16 or bool; `bits` is a multiple of 8.

    Returns:
        Codes, uint8 [..., bits / 8], contiguous, the first bit in the most significant place.

    Raises:
        ValueError: `u` has another dtype, is a scalar or contains a NaN (checked on the CPU only, and not under a
            transform of `torch.func`), or the size of its last axis is not a multiple of 8.
    """
    return _pack_plain(u) if needs_plain_torch() else _pack_bits(u)


def unpack_bits(codes: Tensor) -> Tensor:
    """Unpack codes, the inverse of `pack_bits`.

    Args:
        codes: uint8 [..., bits / 8].

    Returns:
        Bits, bool [..., bits], contiguous.

    Raises:
        ValueError: `codes` is not uint8, or is a scalar.
    """
    return (_unpack_reference if needs_plain_torch() else _unpack_bits)(codes)


@untraced
def _check_pack(u: Tensor) -> None:
    if not isinstance(u, Tensor) or u.dtype not in (*FLOATING, torch.bool):
        actual = dtype_name(u) if isinstance(u, Tensor) else type(u).__name__
        raise invalid("pack_bits", "u", "float64, float32, float16, bfloat16 or bool", actual)
    if u.dim() < 1 or u.shape[-1] % 8:
        raise invalid("pack_bits", "u", "[..., bits] with bits a multiple of 8", list(u.shape))


def _check_unpack(codes: Tensor) -> None:
    if not isinstance(codes, Tensor) or codes.dtype != torch.uint8:
        advice = "pack activations with hashengine.ops.pack_bits first"
        actual = dtype_name(codes) if isinstance(codes, Tensor) else type(codes).__name__
        raise invalid("unpack_bits", "codes", "uint8", actual, advice)
    if codes.dim() < 1:
        raise invalid("unpack_bits", "codes", "[..., bits / 8]", "a scalar")


def _pack_reference(u: Tensor) -> Tensor:
    _check_pack(u)
    check_no_nan("pack_bits", "u", u)
    return _pack_formula(u)


def _pack_plain(u: Tensor) -> Tensor:
    _check_pack(u)
    return _pack_formula(u)


def _pack_formula(u: Tensor) -> Tensor:
    bits = u if u.dtype == torch.bool else u >= 0
    bytes_of_bits = bits.reshape(*u.shape[:-1], u.shape[-1] // 8, 8)  # the legacy exporter fixes sizes in `unflatten`
    return (bytes_of_bits * _place_values(u)).sum(-1).to(torch.uint8).contiguous()


def _place_values(like: Tensor) -> Tensor:
    """128, 64, ... 1, the values of the bits of a byte, in float32, because ONNX has no sum of uint8."""
    return 2 ** torch.arange(7, -1, -1, dtype=torch.float32, device=like.device)


def _pack_fake(u: Tensor) -> Tensor:
    _check_pack(u)
    return u.new_empty((*u.shape[:-1], u.shape[-1] // 8), dtype=torch.uint8)


def _unpack_reference(codes: Tensor) -> Tensor:
    _check_unpack(codes)
    # A quotient instead of a bitwise and, which the legacy ONNX exporter has only from opset 18 on.
    return (codes.unsqueeze(-1) // _place_values(codes).to(torch.uint8) % 2 != 0).flatten(-2).contiguous()


def _unpack_fake(codes: Tensor) -> Tensor:
    _check_unpack(codes)
    return codes.new_empty((*codes.shape[:-1], codes.shape[-1] * 8), dtype=torch.bool)


_pack_bits = define_op(
    "pack_bits(Tensor u) -> Tensor",
    reference=_pack_reference,
    fake=_pack_fake,
    decomposition=_pack_formula,
)
_unpack_bits = define_op(
    "unpack_bits(Tensor codes) -> Tensor",
    reference=_unpack_reference,
    fake=_unpack_fake,
    decomposition=_unpack_reference,
    is_integer=True,
)
