"""Calls a function with several numbers of torch threads."""

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch

Result = TypeVar("Result")


def with_threads(function: Callable[[], Result], counts: Iterable[int] = (1, 2, 5)) -> list[Result]:
    """The result of `function()` for each number of threads in `counts`."""
    before = torch.get_num_threads()
    results = []
    try:
        for count in counts:
            torch.set_num_threads(count)
            results.append(function())
    finally:
        torch.set_num_threads(before)
    return results
