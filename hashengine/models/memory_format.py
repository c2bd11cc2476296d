"""The memory layout of a network's convolutions: the fastest one that is not known to corrupt memory.

The convolutions of `HashNet` are faster in channels_last than in the contiguous layout. But on processors with AVX-512,
the oneDNN of torch 2.15 can write beyond a heap buffer when it computes the gradient of a convolution's weights. This
was observed with channels_last tensors of few channels: 3 input channels, stages of 8 and 16 channels, images of
32 x 32 pixels and a batch of 5. Within four training steps, the process crashed ("free(): invalid next size", a
segmentation fault) or hung. A network of plain torch modules failed in the same way. No failure was observed with
contiguous tensors, with `ONEDNN_MAX_CPU_ISA=AVX2`, or with 16 channels or more in the first stage.

It is not known which versions of oneDNN, which shapes and which instruction sets above AVX2 are affected. Therefore
every version of torch and every shape counts as affected on a processor with AVX-512. Failures were observed in
backward passes only; inference therefore stays in channels_last.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Set
from typing import TYPE_CHECKING

from hashengine import _environment

if TYPE_CHECKING:
    import torch

FIRST_FIXED_TORCH: tuple[int, int] | None = None  # no release is known to contain a fix

_X86 = ("x86_64", "amd64", "i386", "i686")
# The values of ONEDNN_MAX_CPU_ISA that prevent oneDNN from using AVX-512 (https://uxlfoundation.github.io/oneDNN).
_LIMITS_BELOW_AVX512 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2")


def known_problem(
    *,
    torch_version: str | None = None,
    has_onednn: bool | None = None,
    machine: str | None = None,
    cpu_flags: Set[str] | None = None,
    environment: Mapping[str, str] | None = None,
) -> str | None:
    """Why training convolutions in channels_last on this CPU is unsafe; None if no problem is known.

    The arguments describe an installation; the defaults are the properties of this one.

    Args:
        torch_version: such as "2.15.0+cpu".
        has_onednn: whether torch was built with oneDNN.
        machine: the architecture, as `platform.machine` names it.
        cpu_flags: the processor's instruction set extensions, as Linux names them. On x86 an empty set means that they
            are unknown; such a processor counts as affected.
        environment: the environment variables. oneDNN reads the limit on its instruction sets from them when the first
            convolution runs.
    """
    if torch_version is None or has_onednn is None:
        import torch

        torch_version = torch_version or torch.__version__
        has_onednn = torch.backends.mkldnn.is_available() if has_onednn is None else has_onednn
    machine = platform.machine() if machine is None else machine
    cpu_flags = _environment.cpu_flags() if cpu_flags is None else cpu_flags
    environment = os.environ if environment is None else environment

    if not has_onednn or machine.lower() not in _X86:
        return None  # oneDNN has the affected code on x86 only
    if cpu_flags and "avx512f" not in cpu_flags:
        return None
    limit = environment.get("ONEDNN_MAX_CPU_ISA") or environment.get("DNNL_MAX_CPU_ISA") or ""
    if limit.upper() in _LIMITS_BELOW_AVX512:
        return None
    if FIRST_FIXED_TORCH and _release(torch_version) >= FIRST_FIXED_TORCH:
        return None
    processor = "a CPU with AVX-512" if cpu_flags else "a CPU that may have AVX-512"
    return (
        f"oneDNN in torch {torch_version} can corrupt memory when it trains channels_last convolutions on {processor}; "
        "HashNet trains with contiguous tensors instead"
    )


def training_format(device: torch.device) -> torch.memory_format:
    """The layout for the tensors and weights of convolutions that are trained on `device`."""
    import torch

    if device.type == "cpu" and known_problem() is not None:
        return torch.contiguous_format
    return torch.channels_last


def _release(torch_version: str) -> tuple[int, int]:
    major, minor = torch_version.split(".")[:2]
    return int(major), int(minor)
