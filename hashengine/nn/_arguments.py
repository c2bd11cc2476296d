"""Checks of the constructors' arguments that have no effect. A wrong one is often meant for another parameter."""

from typing import Any

import torch

from hashengine._validation import as_integer
from hashengine.errors import invalid, shown


def check_channels(where: str, channels: Any, advice: str = "") -> None:
    """Require the number of channels, or None. `advice` says what another value was probably meant for."""
    number = as_integer(channels)
    if channels is not None and (number is None or number < 1):
        raise invalid(where, "channels", "a positive integer or None", shown(channels), advice)


def check_factory_arguments(where: str, device: Any, dtype: Any) -> None:
    """Require a device and a floating dtype as modules of torch take them; each may be None."""
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise invalid(where, "dtype", "a torch.dtype or None", shown(dtype))
    if dtype is not None and not dtype.is_floating_point:
        raise invalid(where, "dtype", "a floating dtype", str(dtype))
    if device is not None:
        try:
            torch.device(device)
        except (RuntimeError, TypeError):
            raise invalid(where, "device", "a torch device or None", shown(device)) from None
