"""The checks of arguments: what they accept, and the one-line message for what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from hashengine import HammingIndex
from hashengine._validation import (
    as_tensor,
    check_array,
    check_bits,
    check_code_array,
    check_device,
    check_devices,
    check_filter,
    check_flag,
    check_ids,
    check_integer,
    check_labels,
    check_number,
    check_path,
    check_threads,
    to_callers_type,
)
from hashengine.errors import InputError
from hashengine.index import HammingKNN, rerank_vectors, reverse_bits
from hashengine.metrics import distance_counts

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
        (lambda: check_integer("f", "k", np.bool_(True), 1), "k must be an integer of at least 1, got "),
        (
            lambda: check_integer("f", "k", torch.tensor(True), 1),
            "k must be an integer of at least 1, got tensor",
        ),
        (lambda: check_integer("f", "k", np.float64(8), 1), "k must be an integer of at least 1, got "),
        (lambda: check_bits("f", 64.0), "bits must be an integer from 8 to 65536, got 64.0"),
        (lambda: check_number("f", "lam", 0.0, above=0), "lam must be a finite number above 0, got 0.0"),
        (lambda: check_number("f", "lam", "1", above=0), "lam must be a finite number above 0, got '1'"),
        (lambda: check_number("f", "lam", True, above=0), "lam must be a finite number above 0, got True"),
        (
            lambda: check_number("f", "lam", torch.tensor(True), above=0),
            "lam must be a finite number above 0, got tens",
        ),
        (lambda: check_number("f", "lam", float("inf"), above=0), "lam must be a finite number above 0, got inf"),
        (
            lambda: check_number("f", "alpha", float("nan"), least=0),
            "alpha must be a finite number of 0 or more, got nan",
        ),
        (lambda: check_number("f", "alpha", None, least=0), "alpha must be a finite number of 0 or more, got None"),
        (lambda: check_integer("f", "k", 10**5000, 1, 9), "k must be 1 to 9, got an integer of 16610 bits"),
        (lambda: check_integer("f", "k", -(10**5000), 1), "k must be at least 1, got an integer of 16610 bits"),
        (lambda: check_integer("f", "k", [10**5000], 1), "k must be an integer of at least 1, got a list"),
        (lambda: check_bits("f", 10**5000), "bits must be 8 to 65536, got an integer of 16610 bits"),
        (lambda: check_number("f", "lam", 10**5000, above=0), "lam must be a finite number above 0, got an integer of"),
        (lambda: check_flag("f", "mmap", 10**5000), "mmap must be True or False, got an integer of 16610 bits"),
        (
            lambda: check_integer("f", "k", torch.tensor(5, device="meta"), 1),
            "k must be an integer of at least 1, got tensor(...",
        ),
        (lambda: check_integer("f", "k", np.array(True), 1), "k must be an integer of at least 1, got array(True)"),
        *(
            (
                lambda value=value: check_number("f", "lam", value, above=0),
                f"lam must be a finite number above 0, got {repr(value)[:5]}",
            )
            for value in (
                np.array(True),
                np.array("0.1"),
                np.str_("0.1"),
                bytearray(b"0.1"),
                memoryview(b"0.1"),
                np.complex64(0.1),
                np.array(0.1 + 0j),
                torch.tensor(0.1 + 0j),
                torch.tensor(0.1, device="meta"),
                np.timedelta64(1, "s"),
            )
        ),
        (lambda: check_path("f", "path", "a\0b"), r"path must be a path that a file system can have, got 'a\x00b'"),
        (lambda: check_path("f", "path", Path("a\0b")), "path must be a path that a file system can have, got"),
        (
            lambda: check_labels("f", (np.zeros((5, 0)), CLASSES), 5, 5),
            "query_labels must be [5], or multi-hot with at least 2 columns, got [5, 0]",
        ),
        (lambda: check_flag("f", "mmap", "r"), "mmap must be True or False, got 'r'"),
        (lambda: check_flag("f", "mmap", 1), "mmap must be True or False, got 1"),
        (lambda: check_path("f", "path", 5), "path must be a path, got int"),
        (lambda: check_path("f", "path", ""), "path must be a path, got an empty string; '.' is the working folder"),
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
        (
            lambda: check_labels("f", (CLASSES[:, None], CLASSES[:, None]), 5, 5),
            "query_labels must be [5], or multi-hot with at least 2 columns, got [5, 1]; pass query_labels[:, 0]",
        ),
        (
            lambda: check_labels("f", (CLASSES, CLASSES.astype(complex)), 5, 5),
            "code_labels must be numbers, got an array of complex128",
        ),
        (lambda: check_threads("f", 0), "num_threads must be 1 to 4096, got 0"),
        (lambda: check_threads("f", 10**12), "num_threads must be 1 to 4096, got 1000000000000"),
        (lambda: check_threads("f", True), "num_threads must be an integer from 1 to 4096, got True"),
        (lambda: check_threads("f", 2.0), "num_threads must be an integer from 1 to 4096, got 2.0"),
        (
            lambda: check_labels("f", (CLASSES, np.full(5, 1 << 63, np.uint64)), 5, 5),
            "code_labels must be integers below 2^63, got a greater one",
        ),
        (
            lambda: check_labels("f", (torch.tensor([2**64 - 1] * 5, dtype=torch.uint64), CLASSES), 5, 5),
            "query_labels must be integers below 2^63, got a greater one",
        ),
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
    assert check_bits("f", 64) == check_bits("f", np.int64(64)) == check_bits("f", torch.tensor(64)) == 64
    assert (check_threads("f", None), check_threads("f", 2)) == (0, 2)
    assert check_path("f", "path", "a/b") == Path("a/b")
    assert check_device("f", "cpu") == torch.device("cpu") and check_devices("f", "cpu") == (torch.device("cpu"),)
    for number in (0.1, np.float32(0.1), torch.tensor(0.1), 1):
        assert check_number("f", "lam", number, above=0) == float(number)
    assert check_flag("f", "mmap", True) is check_flag("f", "mmap", np.bool_(True)) is True
    largest = np.full(5, (1 << 63) - 1, np.uint64)
    assert check_labels("f", (largest, largest), 5, 5)[0].tolist() == [(1 << 63) - 1] * 5
    multi_hot, ones = check_labels("f", (np.eye(2), torch.ones(5, 2)), 2, 5)
    assert multi_hot.dtype == ones.dtype == torch.bool
    for filter in (np.ones(5, bool), torch.ones(2, 5, dtype=torch.bool), np.ones((2, 1), np.uint8)):
        assert check_filter("f", filter, 2, 5).shape == filter.shape


FORMS = {
    "masked": (lambda array: np.ma.masked_equal(array, 1), "an array without a mask, got a masked array; fill it with"),
    "sparse": (lambda array: torch.from_numpy(array).to_sparse(), "a dense tensor, got one of layout sparse_coo; call"),
    "nested": (lambda array: torch.nested.nested_tensor([torch.from_numpy(array)]), "a dense tensor, got a nested one"),
    "meta": (lambda array: torch.from_numpy(array).to("meta"), "a tensor with values, got one on the device 'meta'"),
    "quantized": (lambda array: torch.quantize_per_tensor(torch.ones(array.shape), 1, 0, torch.quint8), ""),
    "object": (lambda array: array.astype(object), ""),
    "string": (lambda array: array.astype(str), ""),
    "longdouble": (lambda array: array.astype(np.longdouble), ""),
    "list": (lambda array: array.tolist(), ""),
}
F8, ROWS = np.ones((5, 16)), np.zeros((5, 2), np.int64)
INDEX = HammingIndex(16)
INDEX.add(CODES)
ARRAY_ARGUMENTS = {
    "add: codes": (CODES, lambda x: HammingIndex(16).add(x)),
    "add: ids": (CLASSES, lambda x: HammingIndex(16).add(CODES, x)),
    "search: queries": (CODES, lambda x: INDEX.search(x, 1)),
    "search: filter": (CLASSES < 3, lambda x: INDEX.search(CODES, 1, filter=x)),
    "range_search: queries": (CODES, lambda x: INDEX.range_search(x, 1)),
    "count: query_labels": (CLASSES, lambda x: INDEX.count(CODES, labels=(x, CLASSES))),
    "count: code_labels": (np.eye(5), lambda x: INDEX.count(CODES, labels=(np.eye(5), x))),
    "rerank: query_activations": (F8, lambda x: INDEX.rerank(x, ROWS)),
    "rerank: ids": (ROWS, lambda x: INDEX.rerank(F8, x)),
    "rerank_vectors: query_vectors": (F8, lambda x: rerank_vectors(x, F8, ROWS)),
    "rerank_vectors: vectors": (F8, lambda x: rerank_vectors(F8, x, ROWS)),
    "HammingKNN: query": (F8, lambda x: HammingKNN()(x, 1)),
    "HammingKNN: reference": (CODES, lambda x: HammingKNN()(CODES, 1, x)),
    "distance_counts: queries": (CODES, lambda x: distance_counts(x, CODES, labels=(CLASSES, CLASSES))),
    "distance_counts: database": (CODES, lambda x: distance_counts(CODES, x, labels=(CLASSES, CLASSES))),
    "distance_counts: code_labels": (CLASSES, lambda x: distance_counts(CODES, CODES, labels=(CLASSES, x))),
    "reverse_bits: codes": (CODES, reverse_bits),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested", "ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("argument", ARRAY_ARGUMENTS)
@pytest.mark.parametrize("form", FORMS)
def test_an_array_that_cannot_be_used_is_refused_with_one_line_that_names_the_argument(form, argument) -> None:
    array, call = ARRAY_ARGUMENTS[argument]
    make, message = FORMS[form]
    with pytest.raises(InputError) as caught:
        call(make(array))
    assert str(caught.value).startswith(f"{argument} must be {message}") and "\n" not in str(caught.value)


@pytest.mark.parametrize("argument", ARRAY_ARGUMENTS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "int4"])
def test_arrays_of_ml_dtypes_are_refused_with_one_line_that_names_the_argument(dtype, argument) -> None:
    array, call = ARRAY_ARGUMENTS[argument]
    with pytest.raises(InputError) as caught:
        call(array.astype(getattr(pytest.importorskip("ml_dtypes"), dtype)))
    assert str(caught.value).startswith(f"{argument} must be ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("argument", ARRAY_ARGUMENTS)
def test_arrays_of_the_other_byte_order_are_accepted(argument) -> None:
    array, call = ARRAY_ARGUMENTS[argument]
    results, swapped = call(array), call(array.astype(array.dtype.newbyteorder(">")))
    if isinstance(results, tuple):
        for result, expected in zip(swapped, results, strict=True):
            np.testing.assert_array_equal(result, expected)


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
