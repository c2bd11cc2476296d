"""The checks of arguments: what they accept, and the one-line message for what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from hashengine._validation import (
    as_tensor,
    check_array,
    check_bits,
    check_code_array,
    check_device,
    check_devices,
    check_filter,
    check_ids,
    check_integer,
    check_labels,
    check_number,
    check_path,
    check_threads,
    to_callers_type,
)
from hashengine.errors import InputError

CODES = np.zeros((5, 2), np.uint8)
CLASSES = np.arange(5)


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (
            lambda: check_array("f", "x", [1], ("uint8",)),
            "x must be a torch tensor or a numpy array of uint8, got list",
        ),
        (lambda: check_array("f", "x", CODES, ("int8", "bool")), "x must be int8 or bool, got uint8"),
        (lambda: check_array("f", "x", CODES, ("a", "b", "c")), "x must be a, b or c, got uint8"),
        (lambda: check_integer("f", "k", 0, 1, 9, "the rows"), "k must be 1 to 9 (the rows), got 0"),
        (lambda: check_integer("f", "k", 1.0, 1, 9), "k must be an integer from 1 to 9, got 1.0"),
        (lambda: check_integer("f", "k", True, 1), "k must be an integer of at least 1, got True"),
        (lambda: check_number("f", "lam", 0.0, above=0), "lam must be above 0, got 0.0"),
        (lambda: check_number("f", "lam", "1", above=0), "lam must be above 0, got '1'"),
        (lambda: check_number("f", "alpha", float("nan"), least=0), "alpha must be 0 or more, got nan"),
        (lambda: check_number("f", "alpha", None, least=0), "alpha must be 0 or more, got None"),
        (lambda: check_path("f", "path", 5), "path must be a path, got int"),
        (lambda: check_bits("f", 12), "bits must be a multiple of 8, got 12"),
        (lambda: check_bits("f", 1 << 17), "bits must be 8 to 65536, got 131072"),
        (lambda: check_code_array("f", "codes", CODES, 64), "codes must be [rows, 8], for 64 bits, got [5, 2]"),
        (lambda: check_code_array("f", "codes", CODES[0]), "codes must be [rows, bits / 8], got [2]"),
        (lambda: check_ids("f", CLASSES, 4), "ids must be [4], one per code, got [5]"),
        (lambda: check_ids("f", CLASSES - 1), "ids must be 0 or more, got -1"),
        (lambda: check_ids("f", np.array([3, 1, 3])), "ids must be unique, got 3 more than once"),
        (
            lambda: check_filter("f", np.ones(4, bool), 2, 5),
            "filter must be [5], or [2, 5] with one row per query, for 5 codes, got [4]",
        ),
        (
            lambda: check_filter("f", CODES, 2, 5),
            "filter must be [1], or [2, 1] with one row per query, for 5 codes, got [5, 2]",
        ),
        (lambda: check_labels("f", CLASSES, 5, 5), "labels must be a pair (query_labels, code_labels), got ndarray"),
        (
            lambda: check_labels("f", (CLASSES, [1]), 5, 5),
            "code_labels must be a torch tensor or a numpy array, got list",
        ),
        (
            lambda: check_labels("f", (CLASSES, np.eye(5)), 5, 5),
            "query_labels and code_labels must be of one kind and width, got [5] and [5, 5]",
        ),
        (
            lambda: check_labels("f", (CLASSES / 2, CLASSES), 5, 5),
            "query_labels must be integers for the shape [5], got",
        ),
        (lambda: check_threads("f", 0), "num_threads must be at least 1, got 0"),
        (lambda: check_device("f", 3), "device must be 'cpu', 'cuda', 'cuda:1' or a torch.device, got int"),
        (lambda: check_device("f", "meta", auto=True), "device must be 'auto', 'cpu', 'cuda', 'cuda:1' or"),
        (lambda: check_devices("f", []), "device must be a device or a list of at least one, got an empty list"),
    ],
)
def test_a_wrong_argument_is_refused_with_one_line(check: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError) as caught:
        check()
    assert str(caught.value).startswith(f"f: {message}") and "\n" not in str(caught.value)


def test_right_arguments_are_returned_in_the_form_that_the_library_uses() -> None:
    assert check_integer("f", "k", np.int32(3), 1) == 3 and type(check_integer("f", "k", np.int32(3), 1)) is int
    assert check_bits("f", 64) == 64
    assert (check_threads("f", None), check_threads("f", 2)) == (0, 2)
    assert check_path("f", "path", "a/b") == Path("a/b")
    assert check_device("f", "cpu") == torch.device("cpu") and check_devices("f", "cpu") == (torch.device("cpu"),)
    for number in (0.1, np.float32(0.1), torch.tensor(0.1), 1):
        check_number("f", "lam", number, above=0)
    multi_hot, ones = check_labels("f", (np.eye(2), torch.ones(5, 2)), 2, 5)
    assert multi_hot.dtype == ones.dtype == torch.bool
    for filter in (np.ones(5, bool), torch.ones(2, 5, dtype=torch.bool), np.ones((2, 1), np.uint8)):
        assert check_filter("f", filter, 2, 5).shape == filter.shape


def test_as_tensor_shares_the_memory_of_a_contiguous_array_and_keeps_the_values_of_others() -> None:
    array = np.arange(6).reshape(2, 3)
    assert as_tensor(array).data_ptr() == array.ctypes.data
    array.flags.writeable = False
    assert as_tensor(array).data_ptr() == array.ctypes.data
    for copied in (array.T, array[:, ::-1], array.astype(">i8")):
        assert as_tensor(copied).tolist() == copied.tolist()


def test_results_are_of_the_same_library_as_the_argument() -> None:
    (result,) = to_callers_type(CODES, torch.ones(2))
    assert isinstance(result, np.ndarray)
    (result,) = to_callers_type(torch.ones(1), torch.ones(2))
    assert isinstance(result, torch.Tensor)
