"""The functions of the native module itself; its kernels are called as `torch.ops.hashengine.*`."""

from typing import Any

def build_config() -> dict[str, Any]:
    """How the module was compiled."""

def simd_level() -> str:
    """The instruction set that the CPU kernels use."""

def simd_levels() -> list[str]:
    """The instruction sets that this processor supports. By default, the last one is used."""
