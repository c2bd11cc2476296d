"""Argument checks that references and fakes share: one line names op, argument, what was expected and what came."""

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def wide_dtype(x: Tensor) -> torch.dtype:
    """The type in which x is summed and what is derived from it is kept: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_activations(op: str, tensor: Tensor, argument: str = "u") -> None:
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{op}: {argument} must be float64, float32, float16 or bfloat16, got {tensor.dtype}")


def check_feature_map(op: str, tensor: Tensor, argument: str = "x") -> None:
    check_activations(op, tensor, argument)
    if tensor.dim() != 4:
        raise ValueError(f"{op}: {argument} must be [N, C, H, W], got {list(tensor.shape)}")


def check_device(op: str, tensor: Tensor, x: Tensor, argument: str) -> None:
    if tensor.device != x.device:
        raise ValueError(f"{op}: {argument} must be on x's device, {x.device}, got {tensor.device}; move one")


def check_like(op: str, tensor: Tensor, argument: str, shape: Sequence[int], dtype: torch.dtype, x: Tensor) -> None:
    """An argument that an earlier op made or that belongs to its result: shape, dtype and x's device."""
    if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype or tensor.device != x.device:
        raise ValueError(
            f"{op}: {argument} must be {dtype} {list(shape)} on {x.device}, "
            f"got {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
        )


def check_gradient(op: str, grad_y: Tensor, x: Tensor) -> None:
    check_like(op, grad_y, "grad_y", x.shape, x.dtype, x)


def check_no_nan(op: str, tensor: Tensor, argument: str = "u") -> None:
    """On the CPU only: a GPU would have to stop to look."""
    if tensor.device.type == "cpu" and tensor.is_floating_point() and bool(tensor.isnan().any()):
        raise ValueError(
            f"{op}: {argument} must hold no NaN (it has no sign), got at least one; look for a diverged model"
        )


def check_codes(op: str, codes: Tensor, argument: str = "codes") -> None:
    if codes.dtype != torch.uint8:
        raise TypeError(
            f"{op}: {argument} must be packed codes of uint8, got {codes.dtype}; "
            "pack activations with hashengine.ops.pack_bits first"
        )
