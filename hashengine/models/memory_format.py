"""The memory layout of a network's convolutions: the fastest one that is not known to corrupt memory.

The convolutions of `HashNet` are faster in channels_last than in the contiguous layout. But on x86, the oneDNN of torch
2.15 can write beyond a heap buffer when it computes the gradient of a convolution's weights. This was observed with
channels_last tensors of few channels: with AVX-512, in stages of 8 and 16 channels; with AVX2, in stages of 4 channels.
The process crashed ("free(): invalid next size", "double free or corruption", a segmentation fault) or hung. A network
of plain torch modules failed in the same way with AVX-512. No failure was observed with contiguous tensors.

It is not known which versions of oneDNN, which shapes and which instruction sets are affected. Therefore every version
of torch, every shape and every x86 processor counts as affected. Failures were observed in backward passes only;
inference therefore stays in channels_last.
"""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

FIRST_FIXED_TORCH: tuple[int, int] | None = None  # no release is known to contain a fix

_X86 = ("x86_64", "amd64", "i386", "i686")


def known_problem(
    *, torch_version: str | None = None, has_onednn: bool | None = None, machine: str | None = None
) -> str | None:
    """Why training convolutions in channels_last on this CPU is unsafe; None if no problem is known.

    The arguments describe an installation; the defaults are the properties of this one.

    Args:
        torch_version: such as "2.15.0+cpu".
        has_onednn: whether torch was built with oneDNN.
        machine: the architecture, as `platform.machine` names it.
    """
    if torch_version is None or has_onednn is None:
        import torch

        torch_version = torch_version or torch.__version__
        has_onednn = torch.backends.mkldnn.is_available() if has_onednn is None else has_onednn
    machine = platform.machine() if machine is None else machine

    if not has_onednn or machine.lower() not in _X86:
        return None  # oneDNN has the affected code on x86 only
    if FIRST_FIXED_TORCH and _release(torch_version) >= FIRST_FIXED_TORCH:
        return None
    return (
        f"oneDNN in torch {torch_version} can corrupt memory when it trains channels_last convolutions; HashNet trains "
        "with contiguous tensors instead"
    )


def training_format(device: torch.device) -> torch.memory_format:
    """The layout for the tensors and weights of convolutions that are trained on `device`.

    On "meta" it is the contiguous one, because `fully_shard` refuses other parameters there.
    """
    import torch

    if device.type == "meta" or (device.type == "cpu" and known_problem() is not None):
        return torch.contiguous_format
    return torch.channels_last


def _release(torch_version: str) -> tuple[int, int]:
    major, minor = torch_version.split(".")[:2]
    return int(major), int(minor)
