"""Checks of what a user gives: arrays, codes, ids, filters, labels, integers and devices.

Each check takes ``where``, the function that the user called, and raises `InputError` in the form of
`hashengine.errors`. Importing this module does not import torch: an array can be checked before anything needs torch.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from hashengine.errors import invalid

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Array: TypeAlias = "Tensor | np.ndarray"
DeviceName: TypeAlias = "str | torch.device"
Labels: TypeAlias = "tuple[Array, Array]"

MAX_BITS = 65_536
OLDEST_CAPABILITY = (8, 0)  # the compute capability that the CUDA kernels require


def is_tensor(value: object) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def dtype_name(array: Array) -> str:
    """ "uint8" for torch.uint8 and for numpy's uint8 in any byte order."""
    return str(array.dtype).removeprefix("torch.") if is_tensor(array) else array.dtype.name


def as_tensor(array: Array) -> Tensor:
    """`array` as a tensor on its device, without its autograd graph; a copy only where torch cannot view the memory."""
    import torch

    if not isinstance(array, np.ndarray):
        return array.detach()
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    # torch supports neither negative strides nor, without a warning, read-only memory.
    return torch.from_numpy(array if array.flags.writeable and array.flags.c_contiguous else array.copy())


def to_callers_type(model: Array, *results: Tensor) -> tuple[Any, ...]:
    """`results` in the library of `model` (numpy or torch) and on its device."""
    if isinstance(model, np.ndarray):
        return tuple(result.cpu().numpy() for result in results)
    return tuple(result.to(model.device) for result in results)


def check_array(where: str, name: str, array: Any, dtypes: Collection[str], advice: str = "") -> None:
    """A torch tensor or a numpy array of one of `dtypes`."""
    expected = " or ".join(dtypes)
    if not isinstance(array, np.ndarray) and not is_tensor(array):
        raise invalid(where, name, f"a torch tensor or a numpy array of {expected}", type(array).__name__)
    if dtype_name(array) not in dtypes:
        raise invalid(where, name, expected, dtype_name(array), advice)


def check_integer(where: str, name: str, value: Any, low: int, high: int | None = None, meaning: str = "") -> int:
    """An integer from `low` to `high`, inclusive; `meaning` says what `high` is, such as "the number of codes"."""
    try:
        number = None if isinstance(value, (bool, np.bool_)) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < low or (high is not None and number > high):
        limit = "" if high is None else f" to {high}" + (f" ({meaning})" if meaning else "")
        expected = f"an integer of at least {low}" if high is None else f"an integer, {low}{limit}"
        raise invalid(where, name, expected, repr(value))
    return number


def check_bits(where: str, bits: Any) -> int:
    """The length of a code: a multiple of 8 up to `MAX_BITS`."""
    number = check_integer(where, "bits", bits, 8, MAX_BITS)
    if number % 8:
        raise invalid(where, "bits", "a multiple of 8", number)
    return number


def check_codes(where: str, name: str, codes: Any, bits: int | None = None) -> Tensor:
    """Packed codes, uint8 [rows, bits / 8], as a tensor on their device; of any width if `bits` is None."""
    check_array(where, name, codes, ("uint8",), "pack activations with hashengine.ops.pack_bits first")
    shape = list(codes.shape)
    if bits is not None and (len(shape) != 2 or shape[1] != bits // 8):
        raise invalid(where, name, f"[rows, {bits // 8}], for {bits} bits", shape)
    if len(shape) != 2 or shape[1] == 0:
        raise invalid(where, name, "[rows, bits / 8]", shape)
    return as_tensor(codes)


def check_ids(where: str, ids: Any, count: int | None = None, *, unique: bool = True) -> Tensor:
    """int64 [count] on the CPU, none of them negative; of any count if it is None."""
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
    """A mask (bool) or a bitmap (uint8) of `count` codes, for all queries or one row per query, on its device."""
    check_array(where, "filter", filter, ("bool", "uint8"))
    is_mask = dtype_name(filter) == "bool"
    width = count if is_mask else (count + 7) // 8
    if tuple(filter.shape) not in ((width,), (queries, width)):
        kind = "a mask (bool)" if is_mask else "a bitmap (uint8)"
        expected = f"{kind} of {count} codes, [{width}] or one row per query, [{queries}, {width}]"
        raise invalid(where, "filter", expected, list(filter.shape))
    return as_tensor(filter)


def check_labels(where: str, labels: Any, queries: int, count: int) -> tuple[Tensor, Tensor]:
    """Labels of queries and codes, on their devices: int64 [Q] and [N], or multi-hot bool [Q, L] and [N, L]."""
    if not isinstance(labels, (tuple, list)) or len(labels) != 2:
        raise invalid(where, "labels", "a pair (query_labels, code_labels)", type(labels).__name__)
    query_labels = _check_label_side(where, "query_labels", labels[0], queries)
    code_labels = _check_label_side(where, "code_labels", labels[1], count)
    if query_labels.shape[1:] != code_labels.shape[1:]:
        actual = f"{list(query_labels.shape)} and {list(code_labels.shape)}"
        raise invalid(where, "labels", "of one kind and width for queries and codes", actual)
    return query_labels, code_labels


def _check_label_side(where: str, name: str, labels: Any, rows: int) -> Tensor:
    import torch

    if not isinstance(labels, np.ndarray) and not is_tensor(labels):
        raise invalid(where, name, "a torch tensor or a numpy array", type(labels).__name__)
    if labels.ndim not in (1, 2) or len(labels) != rows:
        raise invalid(where, name, f"[{rows}], or multi-hot [{rows}, labels]", list(labels.shape))
    if isinstance(labels, np.ndarray) and labels.dtype.kind not in "biuf":
        raise invalid(where, name, "numbers", f"an array of {labels.dtype}")
    tensor = as_tensor(labels)
    if tensor.dim() == 1:
        if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
            raise invalid(where, name, f"integers where their shape is [{rows}]", dtype_name(tensor))
        return tensor.long()
    if tensor.dtype == torch.bool:
        return tensor
    ones = tensor == 1
    if not bool((ones | (tensor == 0)).all()):
        raise invalid(where, name, f"zeros and ones where their shape is [{rows}, labels]", "other values")
    return ones


def check_threads(where: str, num_threads: int | None) -> int:
    """The number of threads as the ops take it: 0 for all of torch's."""
    return 0 if num_threads is None else check_integer(where, "num_threads", num_threads, 1)


def check_device(where: str, name: DeviceName, *, auto: bool = False, capability: bool = False) -> torch.device:
    """A CPU or CUDA device that is present; a CUDA device gets its number.

    Args:
        where: the function or command to name in an error.
        name: "cpu", "cuda", "cuda:1" or a torch.device.
        auto: accept "auto" as well: a GPU if torch sees one, else the CPU.
        capability: refuse a GPU that is too old for the CUDA kernels.
    """
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
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise invalid(where, "device", names, repr(str(device)))
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


def _version(number: int) -> str:
    import torch

    return ".".join(map(str, torch.cuda.get_device_capability(number)))


def check_devices(where: str, devices: DeviceName | Sequence[DeviceName]) -> tuple[torch.device, ...]:
    """One device or several, as `check_device` returns them; a device may be named more than once."""
    names = tuple(devices) if isinstance(devices, (list, tuple)) else (devices,)
    if not names:
        raise invalid(where, "device", "a device or a list of at least one", "an empty list")
    return tuple(check_device(where, name, capability=True) for name in names)
