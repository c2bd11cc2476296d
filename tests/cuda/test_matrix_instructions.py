"""The emulated 1-bit matrix instructions and __match_any_sync: results, and mistakes that must change them."""

import numpy as np
import pytest
import torch

from tests.emulation.harness import SCHEDULES, Emulation, array, load_emulation

NONE, NO_WAIT, COLUMNS_OVERWRITTEN, SWAPPED_STRIDES, NO_FENCE, ROWS_CHANGED, ONE_WARP_DIFFERS, ONE_WARP_STOPS = range(8)


@pytest.fixture(scope="module")
def emulation() -> Emulation:
    return load_emulation()


def bit_rows(count: int, seed: int) -> tuple[np.ndarray, torch.Tensor]:
    """Return random rows of 256 bits, uint32 [count, 8], and a copy in an aligned array."""
    words = np.random.default_rng(seed).integers(0, 2**32, (count, 8), dtype=np.uint32)
    return words, array(words.size, torch.int32).copy_(torch.from_numpy(words.view(np.int32).ravel()))


def products(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Return popcount(row & column), uint32 [rows, columns]."""
    return np.bitwise_count(rows[:, None] & columns[None]).sum(2, dtype=np.uint32)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_mma(emulation, schedule):
    (rows, row_array), (columns, column_array) = bit_rows(16, 0), bit_rows(8, 1)
    out = array(16 * 8, torch.int32)
    emulation.call("toy_mma", row_array, column_array, 1000, out, schedule=schedule)
    np.testing.assert_array_equal(out.numpy().reshape(16, 8), 1000 + products(rows, columns))


def wgmma(emulation: Emulation, mistake: int, schedule: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the result of toy_wgmma and the expected result."""
    (rows, row_array), (columns, column_array) = bit_rows(64, 2), bit_rows(256, 3)
    out = array(64 * 256, torch.int32)
    emulation.call("toy_wgmma", row_array, column_array, out, mistake, schedule=schedule)
    return out.numpy().reshape(64, 256), 2 * products(rows, columns)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_wgmma(emulation, schedule):
    got, expected = wgmma(emulation, NONE, schedule)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("mistake", [NO_WAIT, COLUMNS_OVERWRITTEN, SWAPPED_STRIDES])
def test_some_mistakes_change_the_result_of_wgmma(emulation, mistake):
    assert any(not np.array_equal(*wgmma(emulation, mistake, schedule)) for schedule in SCHEDULES)


@pytest.mark.parametrize(
    "mistake, complaint",
    [
        (NO_FENCE, r"wgmma_fence\(\) must come before the first wgmma"),
        (ROWS_CHANGED, r"the rows have changed before wgmma_wait\(\)"),
        (ONE_WARP_DIFFERS, "the threads of a warpgroup start different products"),
        (ONE_WARP_STOPS, "a thread has started fewer products than its warpgroup"),
    ],
)
def test_other_mistakes_around_wgmma_are_reported(emulation, mistake, complaint):
    for schedule in SCHEDULES:
        with pytest.raises(RuntimeError, match=complaint):
            wgmma(emulation, mistake, schedule)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_match_any_sync(emulation, schedule):
    values = np.random.default_rng(4).integers(-3, 3, 64, dtype=np.int32)
    out = array(64, torch.int32)
    emulation.call("toy_match", torch.from_numpy(values), out, 2, schedule=schedule)
    lanes = values.reshape(2, 32)
    same = (lanes[:, :, None] == lanes[:, None, :]).astype(np.uint64)
    expected = (same << np.arange(32, dtype=np.uint64)).sum(2).astype(np.uint32)
    np.testing.assert_array_equal(out.numpy().view(np.uint32).reshape(2, 32), expected)
