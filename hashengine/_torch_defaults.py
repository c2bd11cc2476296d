"""Torch's own defaults, whatever the program has set, for results that must not depend on the program's defaults."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_lock = threading.Lock()  # held while one of the following two or the default dtype changes
_blocks = 0  # the number of `with torch_defaults()` blocks that run, in all threads
_before: torch.dtype | None = None  # the default dtype outside these blocks


@contextmanager
def torch_defaults() -> Iterator[None]:
    """Create tensors and modules in float32 on the CPU unless a dtype or a device is given.

    The default dtype belongs to the process. The first of several blocks that run at the same time sets it, and the
    last one restores it.
    """
    import torch

    global _blocks, _before
    with _lock:
        if _blocks == 0:
            _before = torch.get_default_dtype()
            torch.set_default_dtype(torch.float32)
        _blocks += 1
    try:
        with torch.device("cpu"):
            yield
    finally:
        with _lock:
            _blocks -= 1
            if _blocks == 0 and _before is not None:
                torch.set_default_dtype(_before)
