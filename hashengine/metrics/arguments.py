"""What the metrics take: codes and labels as tensors, or one line that says what is wrong with them."""

import operator
import warnings

import numpy as np
import torch
from torch import Tensor

from hashengine.errors import InputError

Array = Tensor | np.ndarray


def checked(
    query_codes: Array, query_labels: Array, database_codes: Array, database_labels: Array
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    query_codes = _codes("query_codes", query_codes)
    query_labels = _labels("query_labels", query_labels, query_codes)
    database_codes = _codes("database_codes", database_codes)
    database_labels = _labels("database_labels", database_labels, database_codes)
    if database_codes.device != query_codes.device:
        raise InputError(
            f"database_codes must be on the device of query_codes, {query_codes.device}, "
            f"got {database_codes.device}; move one"
        )
    bits, database_bits = 8 * query_codes.shape[1], 8 * database_codes.shape[1]
    if database_bits != bits:
        raise InputError(f"database_codes must have the {bits} bits of query_codes, got {database_bits}")
    if database_labels.shape[1:] != query_labels.shape[1:]:
        raise InputError(
            f"database_labels must be {_kind(query_labels)} as query_labels are, got {_kind(database_labels)}"
        )
    return query_codes, query_labels, database_codes, database_labels


def _kind(labels: Tensor) -> str:
    return "integers [N]" if labels.dim() == 1 else f"multi-hot [N, {labels.shape[1]}]"


def _codes(name: str, value: Array) -> Tensor:
    codes = _tensor(name, value)
    if codes.dtype != torch.uint8:
        raise InputError(
            f"{name} must be packed codes of uint8, got {codes.dtype}; pack bits with hashengine.ops.pack_bits"
        )
    if codes.dim() != 2 or not codes.numel():
        raise InputError(f"{name} must be [N, bits / 8] with at least one code, got shape {list(codes.shape)}")
    return codes


def _labels(name: str, value: Array, codes: Tensor) -> Tensor:
    """int64 [N] or bool [N, L]."""
    labels = _tensor(name, value)
    if labels.device != codes.device:
        raise InputError(f"{name} must be on the device of the codes, {codes.device}, got {labels.device}; move one")
    if labels.dim() not in (1, 2) or len(labels) != len(codes):
        raise InputError(f"{name} must be [N] or [N, L] for N = {len(codes)} codes, got shape {list(labels.shape)}")
    if labels.dim() == 1:
        if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
            raise InputError(f"{name} of shape [N] must be integers, got {labels.dtype}; multi-hot labels are [N, L]")
        return labels.long()
    if labels.dtype != torch.bool and not bool(((labels == 0) | (labels == 1)).all()):
        raise InputError(f"{name} of shape [N, L] must be bool or 0 and 1 (multi-hot), got other values")
    return labels.bool()


def _tensor(name: str, value: Array) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "biuf":
        got = f"an array of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
        raise InputError(f"{name} must be a torch tensor or a numpy array of numbers, got {got}")
    with warnings.catch_warnings():  # a memory-mapped file is read-only, and is only read
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(np.ascontiguousarray(value, value.dtype.newbyteorder("=")))


def integer(name: str, value: int, low: int, high: int | None = None, meaning: str = "") -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or number < low or (high is not None and number > high):
        expected = f"at least {low}" if high is None else f"from {low} to {high}{meaning}"
        raise InputError(f"{name} must be an integer {expected}, got {value!r}")
    return number
