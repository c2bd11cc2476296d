"""Options of the index and of its readers that have a wrong type or size are refused in one line."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from hashengine import HammingIndex
from hashengine.errors import InputError
from hashengine.index import HammingKNN, read_codes

CODES = np.arange(20, dtype=np.uint8).reshape(10, 2)


def filled() -> HammingIndex:
    index = HammingIndex(16)
    index.add(CODES)
    return index


THREADS = "num_threads must be"
WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "threads above the limit": (
        lambda: filled().search(CODES, 1, num_threads=1 << 40),
        f"search: {THREADS} 1 to 4096, got 1099511627776",
    ),
    "threads beyond int64": (
        lambda: filled().count(CODES, num_threads=1 << 70),
        f"count: {THREADS} 1 to 4096, got 1180591620717411303424",
    ),
    "a bool": (
        lambda: filled().range_search(CODES, 1, num_threads=True),
        f"range_search: {THREADS} an integer from 1 to 4096, got True",
    ),
    "a float": (
        lambda: filled().search(CODES, 1, num_threads=2.0),
        f"search: {THREADS} an integer from 1 to 4096, got 2.0",
    ),
    "numpy's mmap_mode": (lambda: HammingIndex.load("index", mmap="r"), "load: mmap must be True or False, got 'r'"),
    "numpy's mmap_mode for codes": (
        lambda: read_codes("codes.npy", bit_order="msb_first", mmap="c"),
        "read_codes: mmap must be True or False, got 'c'",
    ),
    "streamed": (lambda: HammingIndex(16, "cpu", "no"), "HammingIndex: streamed must be True or False, got 'no'"),
    "streamed in load": (lambda: HammingIndex.load("index", streamed=1), "load: streamed must be True or False, got 1"),
    "streamed in to": (lambda: filled().to(streamed="cuda"), "to: streamed must be True or False, got 'cuda'"),
    "ref_includes_query": (
        lambda: HammingKNN()(CODES, 1, CODES, ref_includes_query="no"),
        "HammingKNN: ref_includes_query must be True or False, got 'no'",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_option_is_refused_in_one_line(case: str) -> None:
    call, message = WRONG[case]
    with pytest.raises(InputError) as caught:
        call()
    assert str(caught.value) == message


def test_as_many_threads_as_allowed_give_the_same_answer() -> None:
    for results in zip(filled().search(CODES, 3, num_threads=4096), filled().search(CODES, 3), strict=True):
        np.testing.assert_array_equal(*results)


def test_more_results_than_any_index_can_hold_may_be_asked_for() -> None:
    index = filled()
    for results in zip(index.range_search(CODES, 9, max_results=1 << 70), index.range_search(CODES, 9), strict=True):
        np.testing.assert_array_equal(*results)
    assert HammingIndex(16).range_search(CODES, 9, max_results=1 << 70)[0].tolist() == [0] * 11
