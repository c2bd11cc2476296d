"""The emulation of CUDA's execution model (tests/emulation) sees the mistakes that it is there for, and no others."""

import ctypes

import numpy as np
import pytest
import torch
from emulation.harness import FORWARD, REVERSE, SCHEDULES, array, load_emulation, random_array


@pytest.fixture(scope="module")
def emulation():
    return load_emulation()


def run_toy(emulation, name: str, right: bool, schedule: int, blocks: int = 5) -> tuple[np.ndarray, np.ndarray]:
    threads = 96
    values = random_array(blocks * threads, torch.float32)
    out = array(blocks * threads, torch.float32)
    extra = []
    if name == "toy_last_block":
        extra = [array(blocks, torch.float32), torch.zeros(1, dtype=torch.int32)]
    emulation.call(name, values, out, blocks, right, *extra, schedule=schedule)
    v = values.numpy().reshape(blocks, threads)
    expected = {
        "toy_reverse": lambda: v[:, ::-1].ravel(),
        "toy_broadcast_twice": lambda: np.full(blocks * threads, v[0, 0] + v[0, 1]),
        "toy_last_block": lambda: np.add.accumulate(v[0, :blocks])[-1:],
    }[name]()
    return out.numpy()[: expected.size], expected


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["toy_reverse", "toy_broadcast_twice", "toy_last_block"])
def test_right_synchronisation_passes_under_every_schedule(emulation, name, schedule):
    got, expected = run_toy(emulation, name, True, schedule)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(
    "name, caught_in",
    [
        ("toy_reverse", {"forward", "reverse", "random"}),
        ("toy_broadcast_twice", {"forward", "random"}),  # each order has its blind spots
        ("toy_last_block", {"random"}),
    ],
)
def test_a_missing_barrier_changes_the_result(emulation, name, caught_in):
    orders = {"forward": [FORWARD], "reverse": [REVERSE], "random": range(2, 22)}
    wrong_in = set()
    for order, schedules in orders.items():
        runs = [run_toy(emulation, name, False, schedule) for schedule in schedules]
        if any(not np.array_equal(got, expected) for got, expected in runs):
            wrong_in.add(order)
    assert wrong_in == caught_in


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_votes_and_shuffles(emulation, schedule):
    blocks, lanes = 3, np.arange(32)
    out = array(blocks * 32 * 8, torch.int32)
    emulation.call("toy_warp", out, blocks, schedule=schedule)
    every_third = sum(1 << lane for lane in range(0, 32, 3))
    low = lanes < 16
    expected = np.stack(
        [
            np.full(32, every_third),
            np.where(lanes + 5 < 32, lanes + 5, lanes),
            np.full(32, 7),
            low,
            ~low,
            lanes ^ 3,
            np.full(32, lanes.sum()),
        ],
        axis=1,
    )
    got = out.numpy().reshape(blocks, 32, 8)
    np.testing.assert_array_equal(got[:, :, :7], np.broadcast_to(expected, (blocks, 32, 7)))
    np.testing.assert_array_equal(got[:, :, 7], np.repeat(np.arange(blocks), 32).reshape(blocks, 32))


@pytest.mark.parametrize(
    "name, complaint",
    [
        ("toy_foreign_mask", "lane 1 is not in its own mask 00000001"),
        ("toy_absent_lane", "lane 0 reads lane 20, which takes no part"),
        ("toy_divergent", "deadlock in block 0: 63 of 64 threads at a barrier, a warp at __syncwarp"),
        ("toy_mixed_operations", "different operations: __syncwarp and __ballot_sync"),
        ("toy_too_many_threads", "invalid launch configuration"),
    ],
)
def test_mistakes_are_reported(emulation, name, complaint):
    with pytest.raises(RuntimeError, match=complaint):
        emulation.call(name)
    got, expected = run_toy(emulation, "toy_reverse", True, FORWARD)  # and the next launch is not harmed
    np.testing.assert_array_equal(got, expected)


def test_half_precision_conversions(emulation):
    library = emulation.library
    library.from_half.restype = ctypes.c_float
    library.to_half.restype = library.to_bfloat16.restype = ctypes.c_uint16
    bits = np.arange(65536, dtype=np.uint16)
    halves = bits.view(np.float16)
    widened = np.array([library.from_half(int(b)) for b in bits], np.float32)
    np.testing.assert_array_equal(widened, halves.astype(np.float32))

    finite = np.sort(halves[np.isfinite(halves)].astype(np.float32))
    midpoints = (finite[1:] + finite[:-1]) / 2  # the ties
    candidates = np.concatenate([finite, midpoints, np.nextafter(midpoints, np.float32(np.inf))])
    candidates = np.concatenate([candidates, np.array([65519.9, 65520.0, 1e30, -1e30, np.inf, -np.inf], np.float32)])
    narrow = np.array([library.to_half(ctypes.c_float(x)) for x in candidates], np.uint16)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(narrow, candidates.astype(np.float16).view(np.uint16))
    brain = np.array([library.to_bfloat16(ctypes.c_float(x)) for x in candidates], np.uint16)
    np.testing.assert_array_equal(brain, torch.from_numpy(candidates).bfloat16().view(torch.uint16).numpy())
    assert np.isnan(np.array([library.to_half(ctypes.c_float(np.nan))], np.uint16).view(np.float16)).all()
