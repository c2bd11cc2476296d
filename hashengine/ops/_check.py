"""Argument checks of the references and the fakes. `csrc/binding` makes the same checks with the same messages.

All checks except `check_no_nan` read only dtypes, shapes and devices, so they also run on fake tensors. `check_no_nan`
reads values; the references call it and the fakes do not.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hashengine import _validation
from hashengine._validation import dtype_name, nan_error, number_form
from hashengine.errors import invalid, shown
from hashengine.ops._plain import untraced

FLOATING: tuple[torch.dtype, ...] = tuple(getattr(torch, name) for name in _validation.FLOATING)


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype of sums over `x` and of statistics: float64 for float64, otherwise float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_floating(where: str, name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise invalid(where, name, "a torch tensor", type(tensor).__name__)
    if (layout := str(tensor.layout).removeprefix("torch.")) != "strided":
        raise invalid(where, name, "a dense tensor", f"one of layout {layout}", "call .to_dense() first")
    if tensor.dtype not in FLOATING:
        raise invalid(where, name, "float64, float32, float16 or bfloat16", dtype_name(tensor))


@untraced
def check_feature_map(where: str, x: Tensor, *, not_empty: bool = False) -> None:
    """Check that `x` is a floating-point tensor [N, C, H, W]; with `not_empty`, only N may be 0."""
    check_floating(where, "x", x)
    if x.dim() != 4:
        raise invalid(where, "x", "[N, C, H, W]", list(x.shape))
    if not_empty and 0 in x.shape[1:]:
        raise invalid(where, "x", "[N, C, H, W] with C, H and W at least 1", list(x.shape))


def check_same_device(where: str, name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.device != x.device:
        raise invalid(where, name, f"on x's device, {x.device}", tensor.device, "move one of them")


def check_like(where: str, name: str, tensor: Tensor, shape: Sequence[int], dtype: torch.dtype, x: Tensor) -> None:
    """Check a gradient, or a tensor that an earlier op returned, against `shape`, `dtype` and the device of `x`."""
    if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype or tensor.device != x.device:
        expected = f"{str(dtype).removeprefix('torch.')} {list(shape)} on {x.device}"
        raise invalid(where, name, expected, f"{dtype_name(tensor)} {list(tensor.shape)} on {tensor.device}")


def check_gradient(where: str, name: str, gradient: Tensor, x: Tensor) -> None:
    """Check the gradient of a result that has the shape and dtype of `x`."""
    check_like(where, name, gradient, x.shape, x.dtype, x)


def check_number(
    where: str, name: str, value: float, *, above: float | None = None, least: float | None = None
) -> None:
    """Check that `value` is finite, and greater than `above` or at least `least`; one of these bounds is given."""
    is_in_range = value >= least if least is not None else above is not None and value > above
    if not (is_in_range and value < math.inf):
        raise invalid(where, name, number_form(above, least), _short(value))


def _short(value: float) -> str:
    try:
        return f"{value:g}"
    except OverflowError:  # an integer
        return shown(value)


def check_no_nan(where: str, name: str, tensor: Tensor) -> None:
    """Check that a tensor on the CPU has no NaN.

    Tensors on a GPU are not checked, because reading a value there would synchronize.
    """
    if tensor.device.type == "cpu" and tensor.is_floating_point() and bool(tensor.isnan().any()):
        raise nan_error(where, name)
