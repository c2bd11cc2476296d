"""Torch's own defaults, whatever the program has set, for results that must not depend on the program's defaults."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def torch_defaults() -> Iterator[None]:
    """Create tensors and modules in float32 on the CPU unless a dtype or a device is given.

    The default dtype belongs to the process, and it is restored at the end.
    """
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(before)
