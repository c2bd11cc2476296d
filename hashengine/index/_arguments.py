"""Checks of what a user gives to an index, and its way to tensors and back."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hashengine.errors import InputError

Array = Tensor | np.ndarray


def as_tensor(array: Array) -> Tensor:
    """``array`` where it is."""
    if isinstance(array, np.ndarray):
        # torch takes neither negative strides nor read-only memory without complaint
        return torch.from_numpy(array if array.flags.writeable and array.flags.c_contiguous else array.copy())
    return array.detach()


def on_cpu(array: Array) -> Tensor:
    return as_tensor(array).cpu()


def like(model: Array, *results: Tensor) -> tuple[Array, ...]:
    """``results`` in the library of ``model`` and on its device."""
    if isinstance(model, np.ndarray):
        return tuple(result.cpu().numpy() for result in results)
    return tuple(result.to(model.device) for result in results)


def check_array(array: Array, name: str, content: str) -> None:
    if not isinstance(array, (Tensor, np.ndarray)):
        raise TypeError(f"{name} must be a torch tensor or a numpy array of {content}, got {type(array).__name__}")


def checked_bits(bits: int) -> int:
    if isinstance(bits, bool) or not isinstance(bits, int) or bits < 8 or bits % 8:
        raise InputError(f"HammingIndex: bits must be a positive multiple of 8, got {bits!r}")
    if bits > 65536:
        raise InputError(f"HammingIndex: bits must be at most 65536, got {bits}")
    return bits


def checked_integer(value: int, name: str, low: int, high: int | None = None, meaning: str = "") -> int:
    is_integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not is_integer or value < low or (high is not None and value > high):
        expected = f"at least {low}" if high is None else f"{low} to {meaning} ({high})"
        raise InputError(f"{name} must be {expected}, got {value!r}")
    return int(value)


def checked_codes(codes: Array, name: str, bits: int | None = None) -> Tensor:
    """uint8 [rows, bits / 8], on its device; of any width where bits is None."""
    check_array(codes, name, "uint8")
    if codes.dtype not in (torch.uint8, np.uint8):
        raise TypeError(
            f"{name} must be packed codes of uint8, got {codes.dtype}; "
            "pack activations with hashengine.ops.pack_bits first"
        )
    if bits is None and (codes.ndim != 2 or codes.shape[1] == 0):
        raise InputError(f"{name} must be [rows, bits / 8], got {list(codes.shape)}")
    if bits is not None and (codes.ndim != 2 or codes.shape[1] != bits // 8):
        raise InputError(f"{name} must be [rows, {bits // 8}] for {bits} bits, got {list(codes.shape)}")
    return as_tensor(codes)


def checked_ids(ids: Array, count: int | None = None, *, unique: bool = True) -> Tensor:
    """int64 [count], on the CPU, not negative; of any count where it is None."""
    if not isinstance(ids, (Tensor, np.ndarray)) or ids.dtype not in (torch.int64, np.int64):
        raise TypeError(f"ids must be a torch tensor or a numpy array of int64, got {getattr(ids, 'dtype', type(ids))}")
    if ids.ndim != 1 or count not in (None, len(ids)):
        raise InputError(f"ids must be [{'rows' if count is None else count}], one a code, got {list(ids.shape)}")
    tensor = on_cpu(ids)
    if len(tensor) and int(tensor.min()) < 0:
        raise InputError(f"ids must not be negative, got {int(tensor.min())}")
    if unique:
        values, counts = tensor.unique(return_counts=True)
        if len(values) != len(tensor):
            raise InputError(f"ids must be unique, got {int(values[counts > 1][0])} more than once")
    return tensor


def checked_filter(filter: Array, queries: int, count: int) -> Tensor:
    """A mask of ``count`` codes, bool, or its bitmap, uint8: one for all queries or a row a query, on its device."""
    check_array(filter, "filter", "bool or uint8")
    if filter.dtype not in (torch.bool, torch.uint8, np.bool_, np.uint8):
        raise TypeError(f"filter must be a mask of bool or a bitmap of uint8, got {filter.dtype}")
    is_mask = filter.dtype in (torch.bool, np.bool_)
    width = count if is_mask else (count + 7) // 8
    if tuple(filter.shape) not in ((width,), (queries, width)):
        kind = "a mask (bool)" if is_mask else "a bitmap (uint8)"
        raise InputError(
            f"filter must be [{width}], or [{queries}, {width}] with a row a query, as {kind} of {count} codes, "
            f"got {list(filter.shape)}"
        )
    return as_tensor(filter)


def checked_threads(num_threads: int | None) -> int:
    """As the ops take it: 0 for all."""
    return 0 if num_threads is None else checked_integer(num_threads, "num_threads", 1)


def checked_labels(labels: tuple[Array, Array], queries: int, count: int) -> tuple[Tensor, Tensor]:
    """Labels of queries and codes, on their devices: int64 [Q] and [N], or bool [Q, L] and [N, L]."""
    if not isinstance(labels, (tuple, list)) or len(labels) != 2:
        raise TypeError(f"labels must be (query_labels, code_labels), got {type(labels).__name__}")
    sides = [_label_side(*side) for side in zip(labels, ("query_labels", "code_labels"), (queries, count), strict=True)]
    if sides[0].shape[1:] != sides[1].shape[1:]:
        raise InputError(
            "labels must be of one kind and width for queries and codes, "
            f"got {list(sides[0].shape)} and {list(sides[1].shape)}"
        )
    return sides[0], sides[1]


def _label_side(labels: Array, name: str, rows: int) -> Tensor:
    check_array(labels, name, "integers [rows], or of zeros and ones [rows, labels]")
    tensor = as_tensor(labels)
    if tensor.dim() not in (1, 2) or len(tensor) != rows:
        raise InputError(f"{name} must be [{rows}], or [{rows}, labels] as multi-hot, got {list(tensor.shape)}")
    if tensor.dim() == 1:
        if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
            raise TypeError(f"{name} must be integers where they are [rows], got {tensor.dtype}")
        return tensor.long()
    if tensor.dtype == torch.bool:
        return tensor
    ones = tensor == 1
    if not bool((ones | (tensor == 0)).all()):
        raise InputError(f"{name} must be zeros and ones where they are [rows, labels], got other values")
    return ones
