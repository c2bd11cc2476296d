"""Checks of arguments: arrays, codes, ids, filters, labels, integers, paths and devices.

Each check takes `where`, the function that the user called, and raises `InputError` in the form of
`hashengine.errors`. Importing this module does not import torch, because modules that work without torch use it, too.
"""

from __future__ import annotations

import math
import operator
import os
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from hashengine.errors import InputError, invalid, shown

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from typing_extensions import TypeIs

Array: TypeAlias = "Tensor | np.ndarray"
DeviceName: TypeAlias = "str | torch.device"
Labels: TypeAlias = "tuple[Array, Array]"

MAX_BITS = 65_536
MOST_THREADS = 4096  # torch takes any number that fits into 31 bits, and then fails to start the threads
_INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
FLOATING = ("float64", "float32", "float16", "bfloat16")  # dtypes of activations and vectors
OLDEST_CAPABILITY = (8, 0)  # the compute capability that the CUDA kernels require


def is_tensor(value: object) -> TypeIs[Tensor]:
    """Whether `value` is a torch tensor. This does not import torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def dtype_name(array: Array) -> str:
    """The name of a dtype without its library and byte order, such as "uint8"."""
    return str(array.dtype).removeprefix("torch.") if is_tensor(array) else array.dtype.name


class _WritableView:
    """Presents the memory of a read-only array as writable, because torch warns about read-only arrays."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array  # keeps the memory alive
        address, _ = array.__array_interface__["data"]
        self.__array_interface__ = array.__array_interface__ | {"data": (address, False)}


def as_tensor(array: Array) -> Tensor:
    """`array` as a tensor on its device, without its autograd graph. The caller must not write to the tensor.

    If `array` is a torch tensor, or a C-contiguous numpy array in native byte order, the result shares its memory. The
    numpy array may also be read-only or mapped. Other arrays are copied.
    """
    import torch

    if not isinstance(array, np.ndarray):
        return array.detach()
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if not array.flags.c_contiguous or array.size == 0:  # torch refuses negative strides, for example
        return torch.from_numpy(array.copy())
    return torch.from_numpy(array if array.flags.writeable else np.asarray(_WritableView(array)))


def to_callers_type(like: Array, *results: Tensor) -> tuple[Any, ...]:
    """`results` in the library of `like` (numpy or torch) and on its device."""
    if isinstance(like, np.ndarray):
        return tuple(result.cpu().numpy() for result in results)
    return tuple(result.to(like.device) for result in results)


def check_array(
    where: str, name: str, array: Any, dtypes: Collection[str], advice: str = "", *, may_be_meta: bool = False
) -> None:
    """Require a dense torch tensor or numpy array of one of `dtypes`."""
    *others, last = dtypes
    expected = f"{', '.join(others)} or {last}" if others else last
    check_dense(where, name, array, f"a torch tensor or a numpy array of {expected}", may_be_meta=may_be_meta)
    if dtype_name(array) not in dtypes:
        raise invalid(where, name, expected, dtype_name(array), advice)


def check_dense(where: str, name: str, array: Any, expected: str, *, may_be_meta: bool = False) -> None:
    """Require a torch tensor or a numpy array, of any dtype, that has one value in memory for each entry.

    With `may_be_meta`, a tensor on the device "meta", which has no values, is accepted: ops compute shapes with it.
    """
    if isinstance(array, np.ndarray):
        if isinstance(array, np.ma.MaskedArray):
            advice = "fill it with .filled(value), or leave out the masked entries"
            raise invalid(where, name, "an array without a mask", "a masked array", advice)
        if (module := array.dtype.type.__module__) != "numpy":  # torch cannot read bfloat16 of ml_dtypes, for example
            raise invalid(
                where,
                name,
                "an array of a dtype of numpy",
                f"{array.dtype.name} of {module}",
                "convert it with .astype",
            )
    elif not is_tensor(array):
        raise invalid(where, name, expected, type(array).__name__)
    elif array.is_nested:
        raise invalid(where, name, "a dense tensor", "a nested one", "call .to_padded_tensor(padding) first")
    elif (layout := str(array.layout).removeprefix("torch.")) != "strided":
        raise invalid(where, name, "a dense tensor", f"one of layout {layout}", "call .to_dense() first")
    elif array.is_quantized:
        raise invalid(where, name, "a tensor that is not quantized", dtype_name(array), "call .dequantize() first")
    elif array.device.type == "meta" and not may_be_meta:
        raise invalid(where, name, "a tensor with values", "one on the device 'meta'")


def is_bool(value: Any) -> bool:
    """Whether `value` is a bool of Python, numpy or torch, or an array of them."""
    is_array = isinstance(value, np.ndarray) or is_tensor(value)
    return isinstance(value, (bool, np.bool_)) or (is_array and dtype_name(value) == "bool")


def as_integer(value: Any) -> int | None:
    """`value` as an int if it is an integer of Python, numpy or torch; None for everything else, such as a bool."""
    if is_bool(value):
        return None
    try:
        return operator.index(value)
    except (TypeError, RuntimeError):  # RuntimeError: a tensor on the device "meta"
        return None


def check_integer(where: str, name: str, value: Any, low: int, high: int | None = None, meaning: str = "") -> int:
    """Require an integer from `low` to `high`, inclusive. `meaning` explains `high`, such as "the number of codes"."""
    number = as_integer(value)
    if number is None or number < low or (high is not None and number > high):
        expected = f"at least {low}" if high is None else f"{low} to {high}" + (f" ({meaning})" if meaning else "")
        if number is None:
            expected = f"an integer {'of' if high is None else 'from'} {expected}"
        raise invalid(where, name, expected, shown(value))
    return number


def check_callable(where: str, name: str, value: Any) -> None:
    """Require a function or None."""
    if value is not None and not callable(value):
        raise invalid(where, name, "a function or None", type(value).__name__)


def number_form(above: float | None, least: float | None) -> str:
    """The words for a finite number that is greater than `above`, or at least `least`; the other one is None."""
    return f"a finite number above {above}" if least is None else f"a finite number of {least} or more"


def check_number(where: str, name: str, value: Any, *, above: float | None = None, least: float | None = None) -> float:
    """Require a finite number that is greater than `above`, or at least `least`; one of these bounds is given."""
    check_constant(where, name, value)
    try:
        number = float(value) if _may_be_number(value) else math.nan
    except (TypeError, ValueError, RuntimeError, OverflowError):  # RuntimeError: a tensor of several values
        number = math.nan
    is_in_range = number >= least if least is not None else above is not None and number > above
    if not (is_in_range and number < math.inf):
        raise invalid(where, name, number_form(above, least), shown(value))
    return number


def check_constant(where: str, name: str, value: Any) -> None:
    """Require that a number is no tensor that requires a gradient, which would be lost."""
    if is_tensor(value) and value.requires_grad:
        raise invalid(where, name, "a number", "a tensor that requires a gradient", "pass its value as a float")


def _may_be_number(value: Any) -> bool:
    """Whether `value` is no text, bool or complex number: `float` reads a number from these, too."""
    if isinstance(value, (np.ndarray, np.generic)):
        return value.dtype.kind in "iufV"  # V is that of ml_dtypes
    if is_tensor(value) and value.is_complex():
        return False
    return not (isinstance(value, (str, bytes, bytearray, memoryview)) or is_bool(value))


def check_flag(where: str, name: str, value: Any) -> bool:
    """Require a truth value, because a string such as "no" or "r" would count as true."""
    if not isinstance(value, (bool, np.bool_)):
        raise invalid(where, name, "True or False", shown(value))
    return bool(value)


def nan_error(where: str, name: str) -> InputError:
    """The error for a NaN among activations."""
    return invalid(where, name, "free of NaN, which has no sign", "at least one", "check for a diverged model")


def check_bits(where: str, bits: Any) -> int:
    """Require the length of a code: a positive multiple of 8 up to `MAX_BITS`."""
    number = check_integer(where, "bits", bits, 8, MAX_BITS)
    if number % 8:
        raise invalid(where, "bits", "a multiple of 8", number)
    return number


def check_code_array(where: str, name: str, codes: Any, bits: int | None = None, *, may_be_meta: bool = False) -> None:
    """Require packed codes, uint8 [rows, bits / 8], torch or numpy. If `bits` is None, they may have any width.

    `may_be_meta` is as for `check_dense`.
    """
    advice = "pack activations with hashengine.ops.pack_bits first"
    check_array(where, name, codes, ("uint8",), advice, may_be_meta=may_be_meta)
    shape = codes.shape
    if bits is not None and (len(shape) != 2 or shape[1] != bits // 8):
        raise invalid(where, name, f"[rows, {bits // 8}], for {bits} bits", list(shape))
    if len(shape) != 2 or shape[1] == 0:
        raise invalid(where, name, "[rows, bits / 8]", list(shape))


def check_codes(where: str, name: str, codes: Any, bits: int | None = None) -> Tensor:
    """Check `codes` as `check_code_array` does, and return them as a tensor on their device."""
    check_code_array(where, name, codes, bits)
    return as_tensor(codes)


def check_ids(where: str, ids: Any, count: int | None = None, *, unique: bool = True) -> Tensor:
    """Require ids, int64 [count], that are 0 or more, and return them on the CPU.

    If `count` is None, any number of ids is valid. If `unique` is true, no id may repeat.
    """
    check_array(where, "ids", ids, ("int64",))
    if ids.ndim != 1 or count not in (None, len(ids)):
        raise invalid(where, "ids", f"[{'rows' if count is None else count}], one per code", list(ids.shape))
    tensor = as_tensor(ids).cpu()
    if len(tensor) and int(tensor.min()) < 0:
        raise invalid(where, "ids", "0 or more", int(tensor.min()))
    if unique:
        values, counts = tensor.unique(return_counts=True)
        if len(values) != len(tensor):
            raise invalid(where, "ids", "unique", f"{int(values[counts > 1][0])} more than once")
    return tensor


def check_filter(where: str, filter: Any, queries: int, count: int) -> Tensor:
    """Require a mask (bool) or a bitmap (uint8) of `count` codes, either one for all queries or one row per query."""
    check_array(where, "filter", filter, ("bool", "uint8"))
    is_mask = dtype_name(filter) == "bool"
    width = count if is_mask else (count + 7) // 8
    check_filter_shape(where, filter.shape, width, queries, count)
    return as_tensor(filter)


def check_filter_shape(where: str, shape: Sequence[int], width: int, queries: int, count: int) -> None:
    """Require the shape [width], or [queries, width], of a filter of `count` codes."""
    if len(shape) not in (1, 2) or shape[-1] != width or (len(shape) == 2 and shape[0] != queries):
        expected = f"[{width}], or [{queries}, {width}] with one row per query, for {count} codes"
        raise invalid(where, "filter", expected, list(shape))


def check_labels(where: str, labels: Any, queries: int, count: int) -> tuple[Tensor, Tensor]:
    """Require labels of queries and codes. Returns int64 [Q] and [N], or multi-hot bool [Q, L] and [N, L]."""
    given = check_label_pair(where, labels)
    query_labels = _check_label_side(where, "query_labels", given[0], queries)
    code_labels = _check_label_side(where, "code_labels", given[1], count)
    check_labels_of_one_kind(where, query_labels, code_labels)
    return query_labels, code_labels


def check_label_pair(where: str, labels: Any) -> Sequence[Any]:
    """Require a tuple or a list with two entries, which are not checked."""
    if not isinstance(labels, (tuple, list)) or len(labels) != 2:
        raise invalid(where, "labels", "a pair (query_labels, code_labels)", type(labels).__name__)
    return labels


def check_labels_of_one_kind(where: str, query_labels: Tensor, code_labels: Tensor) -> None:
    """Require that both are integer labels, or that both are multi-hot labels with the same number of columns."""
    if query_labels.shape[1:] != code_labels.shape[1:]:
        actual = f"{list(query_labels.shape)} and {list(code_labels.shape)}"
        raise invalid(where, "query_labels and code_labels", "of one kind and width", actual)


def check_label_columns(where: str, name: str, shape: Sequence[int]) -> None:
    """Require two columns of multi-hot labels.

    One column may hold classes, and 0 would then be no label but the absence of one. Without a column, no item would be
    relevant.
    """
    if len(shape) == 2 and shape[1] < 2:
        advice = f"pass {name}[:, 0] for classes, and add a column of zeros to multi-hot labels"
        raise invalid(where, name, f"[{shape[0]}], or multi-hot with at least 2 columns", list(shape), advice)


def _check_label_side(where: str, name: str, labels: Any, rows: int) -> Tensor:
    import torch

    check_dense(where, name, labels, "a torch tensor or a numpy array")
    if labels.ndim not in (1, 2) or len(labels) != rows:
        raise invalid(where, name, f"[{rows}], or multi-hot [{rows}, labels]", list(labels.shape))
    check_label_columns(where, name, labels.shape)
    if dtype_name(labels) not in ("bool", *_INTEGERS, *FLOATING):
        raise invalid(where, name, "numbers", f"an array of {labels.dtype}")
    tensor = as_tensor(labels)
    if tensor.dim() == 1:
        if dtype_name(tensor) not in _INTEGERS:
            raise invalid(where, name, f"integers for the shape [{rows}]", dtype_name(tensor))
        integers = tensor.long()
        if tensor.dtype == torch.uint64 and bool((integers < 0).any()):
            raise invalid(where, name, "integers below 2^63", "a greater one")
        return integers
    if tensor.dtype == torch.bool:
        return tensor
    ones = tensor == 1
    if not bool((ones | (tensor == 0)).all()):
        raise invalid(where, name, f"zeros and ones for the shape [{rows}, labels]", "other values")
    return ones


def is_path(text: str) -> bool:
    """Whether a file system can have this path. A NUL and half of a surrogate pair are not possible."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def check_path(where: str, name: str, path: Any) -> Path:
    """Require a path: a string that is not empty, or a path object."""
    if not isinstance(path, (str, os.PathLike)) or not isinstance(os.fspath(path), str):
        raise invalid(where, name, "a path", type(path).__name__)
    if not is_path(os.fspath(path)):
        raise invalid(where, name, "a path that a file system can have", repr(os.fspath(path)))
    if not os.fspath(path):
        raise invalid(where, name, "a path", "an empty string", "'.' is the working folder")
    return Path(path)


def check_threads(where: str, num_threads: int | None) -> int:
    """The number of threads in the form that the ops take. None becomes 0, which means all of torch's threads."""
    return 0 if num_threads is None else check_integer(where, "num_threads", num_threads, 1, MOST_THREADS)


def check_device(where: str, name: DeviceName, *, auto: bool = False, capability: bool = False) -> torch.device:
    """Require a CPU or CUDA device that is present. The name "cuda" stands for the current CUDA device.

    Args:
        where: the function or command to name in an error.
        name: "cpu", "cuda", "cuda:1" or a torch.device.
        auto: accept "auto" as well: a GPU if torch sees one, otherwise the CPU.
        capability: refuse a GPU that is too old for the CUDA kernels.
    """
    import torch

    device = check_device_name(where, name, auto=auto)
    if device.type == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        advice = "torch finds no GPU, and 'hashengine doctor' says why"
        raise invalid(where, "device", "'cpu'", repr(str(device)), advice)
    number = torch.cuda.current_device() if device.index is None else device.index
    if number >= count:
        raise invalid(where, "device", f"one of {count} GPUs, 'cuda:0' to 'cuda:{count - 1}'", repr(str(device)))
    if capability and torch.cuda.get_device_capability(number) < OLDEST_CAPABILITY:
        actual = f"'{device}' ({torch.cuda.get_device_name(number)}) of {_version(number)}"
        oldest = ".".join(map(str, OLDEST_CAPABILITY))
        raise invalid(where, "device", f"a GPU of compute capability {oldest} or more", actual, "use 'cpu'")
    return torch.device("cuda", number)


def check_device_name(where: str, name: DeviceName, *, auto: bool = False) -> torch.device:
    """Require the name of a CPU or CUDA device, which need not be present; the arguments are as in `check_device`."""
    import torch

    names = ["'cpu', 'cuda', 'cuda:1' or a torch.device", "'auto', 'cpu', 'cuda', 'cuda:1' or a torch.device"][auto]
    if auto and name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not isinstance(name, (str, torch.device)):
        raise invalid(where, "device", names, type(name).__name__)
    try:
        device = torch.device(name)
    except RuntimeError:
        raise invalid(where, "device", names, repr(name)) from None
    if device.type not in ("cpu", "cuda"):
        raise invalid(where, "device", names, repr(str(device)))
    return device


def _version(number: int) -> str:
    import torch

    return ".".join(map(str, torch.cuda.get_device_capability(number)))


def check_devices(where: str, devices: DeviceName | Sequence[DeviceName]) -> tuple[torch.device, ...]:
    """Check one or several devices as `check_device` does with `capability`; a device may be named more than once."""
    names = tuple(devices) if isinstance(devices, (list, tuple)) else (devices,)
    if not names:
        raise invalid(where, "device", "a device or a list of at least one", "an empty list")
    return tuple(check_device(where, name, capability=True) for name in names)
