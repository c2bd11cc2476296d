"""The dtypes and memory layouts in which ops are tested, and a gradient check that works in every layout."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import gradcheck

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = ("contiguous", "channels_last", "sliced", "expanded", "empty")
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def feature_map(layout: str, dtype: torch.dtype = torch.float32, shape=(3, 4, 5, 6), seed: int = 0) -> Tensor:
    """Normal random numbers [N, C, H, W] in one of `LAYOUTS`; "empty" has N = 0."""
    generator = torch.Generator().manual_seed(seed)
    n, c, h, w = shape

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "contiguous": lambda: normal(n, c, h, w),
        "channels_last": lambda: normal(n, c, h, w).contiguous(memory_format=torch.channels_last),
        "sliced": lambda: normal(n, 2 * c, h + 1, w)[:, ::2, 1:],
        "expanded": lambda: normal(1, c, h, 1).expand(n, c, h, w),
        "empty": lambda: normal(0, c, h, w),
    }[layout]()


def assert_gradients(function: Callable, x: Tensor, *others: Tensor) -> None:
    """Compare gradients with finite differences along random directions.

    Finite differences do not work if `x` overlaps itself in memory. Its gradients are then compared with those of a
    contiguous copy.
    """
    if 0 in x.stride() and x.numel():
        results = []
        for leaf in (x.detach().requires_grad_(), x.detach().contiguous().requires_grad_()):
            outputs = function(leaf, *others)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            results.append(torch.autograd.grad([y.square().sum() for y in outputs], (leaf, *others), allow_unused=True))
        torch.testing.assert_close(*results)
    else:
        assert gradcheck(function, (x.detach().requires_grad_(), *others), fast_mode=True)
