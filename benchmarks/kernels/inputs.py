"""The input x of a measured op: its dtype, its layout and its values."""

import enum

import torch
from torch import Tensor


class Dtype(str, enum.Enum):
    """The dtypes of x."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class Layout(str, enum.Enum):
    """The memory formats of x."""

    contiguous = "contiguous"
    channels_last = "channels_last"


def make_input(shape: tuple[int, ...], dtype: Dtype, layout: Layout, device: torch.device) -> Tensor:
    """Normal random numbers, the same for the same arguments."""
    x = torch.randn(shape, generator=torch.Generator(device).manual_seed(1), device=device).to(getattr(torch, dtype))
    return x.contiguous(memory_format=torch.channels_last) if layout is Layout.channels_last else x
