"""Torch's own defaults, and random numbers of one's own, for results that do not depend on the caller's settings."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.overrides import TorchFunctionMode

_random_lock = threading.RLock()  # held while the generator of the process is in another state


def _renew_lock() -> None:
    """In a forked process: another thread of the parent may hold the lock."""
    global _random_lock
    _random_lock = threading.RLock()


os.register_at_fork(after_in_child=_renew_lock)


@cache
def _float32() -> type[TorchFunctionMode]:
    """A torch function mode for the current thread: functions that would return the default dtype return float32."""
    import torch
    from torch.overrides import TorchFunctionMode

    always = {
        *(torch.empty, torch.empty_permuted, torch.empty_strided, torch.zeros, torch.ones, torch.eye),
        *(torch.rand, torch.randn, torch.linspace, torch.logspace),
    }
    for_floats = {torch.tensor, torch.as_tensor, torch.full, torch.arange, torch.scalar_tensor}

    class Float32(TorchFunctionMode):
        def __torch_function__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
            named = kwargs or {}
            if named.get("dtype") is None and (func in always or (func in for_floats and _has_float(args, named))):
                named = {**named, "dtype": torch.float32}
            return func(*args, **named)

    return Float32


def _has_float(args: tuple[Any, ...], named: dict[str, Any]) -> bool:
    """Whether a number of Python among the arguments, or in lists of them, is a float."""
    values = [*args, *named.values()]
    while values:
        value = values.pop()
        if isinstance(value, float):
            return True
        if isinstance(value, (list, tuple)):
            values += value
    return False


@contextmanager
def torch_defaults() -> Iterator[None]:
    """Create tensors and modules in float32 on the CPU unless a dtype or a device is given, and record gradients.

    The modes of the caller, such as inference mode and autocast, do not apply. Other threads do not see the block:
    `torch.set_default_dtype` would change their dtype, too. Therefore `torch.get_default_dtype` is that of the caller,
    and an operation that makes floating-point values of integers, such as a quotient of two integer tensors, has to
    name its dtype.
    """
    import torch

    autocast_off = [torch.autocast(device, enabled=False) for device in ("cpu", "cuda")]
    with torch.device("cpu"), torch.inference_mode(False), torch.enable_grad(), autocast_off[0], autocast_off[1]:
        with _float32()():
            yield


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
