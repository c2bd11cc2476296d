"""Torch's own defaults, and random numbers of one's own, for results that do not depend on the caller's settings."""

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
_random_lock = threading.RLock()  # held while the generator of the process is in another state


@contextmanager
def torch_defaults() -> Iterator[None]:
    """Create tensors and modules in float32 on the CPU unless a dtype or a device is given, and record gradients.

    The modes of the caller, such as inference mode and autocast, do not apply. The default dtype belongs to the
    process: the first of several blocks that run at the same time sets it, and the last one restores it.
    """
    import torch

    global _blocks, _before
    with _lock:
        if _blocks == 0:
            _before = torch.get_default_dtype()
            torch.set_default_dtype(torch.float32)
        _blocks += 1
    try:
        autocast_off = [torch.autocast(device, enabled=False) for device in ("cpu", "cuda")]
        with torch.device("cpu"), torch.inference_mode(False), torch.enable_grad(), autocast_off[0], autocast_off[1]:
            yield
    finally:
        with _lock:
            _blocks -= 1
            if _blocks == 0 and _before is not None:
                torch.set_default_dtype(_before)


@contextmanager
def own_random_numbers(seed: int) -> Iterator[None]:
    """Draw from torch's generator of the CPU as after `manual_seed(seed)`, and leave the state of the caller unchanged.

    The generator belongs to the process. Threads take turns in these blocks, but another thread that draws at the same
    time draws from the same numbers.
    """
    import torch

    with _random_lock, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
