"""The CUDA emulator (tests/emulation) runs correct toy kernels correctly, and detects the mistakes in faulty ones."""

import contextlib
import ctypes

import numpy as np
import pytest
import torch

from tests.emulation.harness import FORWARD, REVERSE, SCHEDULES, Emulation, array, load_emulation, random_array


@pytest.fixture(scope="module")
def emulation() -> Emulation:
    return load_emulation()


def run_toy(
    emulation: Emulation, name: str, correct: bool, schedule: int, blocks: int = 5
) -> tuple[np.ndarray, np.ndarray]:
    """Return the result of a toy kernel and the expected result. If not `correct`, the kernel has a mistake."""
    threads = 96
    values = random_array(blocks * threads, torch.float32)
    out = array(blocks * threads, torch.float32)
    extra = []
    if name == "toy_last_block":
        extra = [array(blocks, torch.float32), torch.zeros(1, dtype=torch.int32)]
    emulation.call(name, values, out, blocks, correct, *extra, schedule=schedule)
    v = values.numpy().reshape(blocks, threads)
    expected = {
        "toy_reverse": lambda: v[:, ::-1].ravel(),
        "toy_broadcast_twice": lambda: np.full(blocks * threads, v[0, 0] + v[0, 1]),
        "toy_last_block": lambda: np.add.accumulate(v[0, :blocks])[-1:],
    }[name]()
    return out.numpy()[: expected.size], expected


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["toy_reverse", "toy_broadcast_twice", "toy_last_block"])
def test_correct_synchronisation_passes_under_every_schedule(emulation, name, schedule):
    got, expected = run_toy(emulation, name, True, schedule)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(
    "name, caught_in",
    [
        ("toy_reverse", {"forward", "reverse", "random"}),
        ("toy_broadcast_twice", {"forward", "random"}),
        ("toy_last_block", {"random"}),
    ],
)
def test_a_mistake_in_synchronisation_changes_the_result(emulation, name, caught_in):
    orders = {"forward": [FORWARD], "reverse": [REVERSE], "random": range(2, 22)}
    wrong_in = set()
    for order, schedules in orders.items():
        runs = [run_toy(emulation, name, False, schedule) for schedule in schedules]
        if any(not np.array_equal(got, expected) for got, expected in runs):
            wrong_in.add(order)
    assert wrong_in == caught_in


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_votes_and_shuffles_return_the_values_of_the_lanes(emulation, schedule):
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
        ("toy_absent_lane", "lane 0 reads lane 20, which does not participate"),
        ("toy_divergent", "deadlock in block 0: 63 of 64 threads at a barrier, a warp at __syncwarp"),
        ("toy_mixed_operations", "different operations: __syncwarp and __ballot_sync"),
        ("toy_too_many_threads", "invalid launch configuration"),
    ],
)
def test_mistakes_in_warps_and_launches_are_reported(emulation, name, complaint):
    with pytest.raises(RuntimeError, match=complaint):
        emulation.call(name)
    got, expected = run_toy(emulation, "toy_reverse", True, FORWARD)  # a failed launch does not affect the next one
    np.testing.assert_array_equal(got, expected)


# --- dynamic shared memory, clusters and asynchronous copies ----------------------------------------------------------

THREADS = 96
OUT = object()  # stands for the output array
BARRIER, ARRIVE_AND_WAIT, NOTHING, ARRIVE_TWICE, WAIT_ALONE, ARRIVE_ALONE = range(6)
CORRECT, NOT_COMMITTED, NOT_WAITED, TOO_FEW_WAITED, NO_BARRIER_AFTER_WAIT, NO_BARRIER_BEFORE_REUSE = range(6)


def reverse_clusters(
    emulation: Emulation, cluster: int, arrives: bool, stays: bool, schedule: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the result of toy_cluster_reverse and the expected result."""
    blocks = 2 * cluster
    values, out = random_array(blocks * THREADS, torch.float32), array(blocks * THREADS, torch.float32)
    emulation.call("toy_cluster_reverse", values, out, blocks, cluster, arrives, stays, schedule=schedule)
    return out.numpy(), 2 * values.numpy().reshape(2, -1)[:, ::-1].ravel()


def gather_clusters(emulation: Emulation, cluster: int, start: int, schedule: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the result of toy_cluster_gather and the expected result. `start`: BARRIER, ... or one of the mistakes."""
    blocks = 3 * cluster
    values, out = random_array(blocks * THREADS, torch.float32), array(blocks * THREADS, torch.float32)
    emulation.call("toy_cluster_gather", values, out, blocks, cluster, start, schedule=schedule)
    first = values.numpy().reshape(3, cluster, THREADS)[:, :, 0]
    return out.numpy().reshape(3, cluster, THREADS)[:, :, :cluster], np.stack([first] * cluster, axis=1)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("cluster", [1, 2, 8, 16])
def test_correct_clusters_pass_under_every_schedule(emulation, cluster, schedule):
    np.testing.assert_array_equal(*reverse_clusters(emulation, cluster, True, True, schedule))
    np.testing.assert_array_equal(*gather_clusters(emulation, cluster, BARRIER, schedule))
    np.testing.assert_array_equal(*gather_clusters(emulation, cluster, ARRIVE_AND_WAIT, schedule))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_missing_cluster_barrier_changes_the_result(emulation, schedule):
    got, expected = reverse_clusters(emulation, 2, False, True, schedule)
    assert not np.array_equal(got, expected)
    got, expected = gather_clusters(emulation, 8, NOTHING, schedule)
    assert not np.array_equal(got, expected)


@pytest.mark.parametrize(
    ("start", "complaint"),
    [
        (ARRIVE_TWICE, "a thread arrives twice at the barrier of the cluster"),
        (WAIT_ALONE, "a thread waits at the barrier of the cluster without having arrived"),
        (ARRIVE_ALONE, "a thread exits before it waits for the cluster"),
    ],
)
def test_halves_of_a_cluster_barrier_that_do_not_match_are_detected(emulation, start, complaint):
    with pytest.raises(RuntimeError, match=complaint):
        gather_clusters(emulation, 2, start, FORWARD)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_block_that_exits_before_its_peers_read_is_detected(emulation, schedule):
    with contextlib.suppress(RuntimeError):  # raised if a peer maps the address after the exit
        got, expected = reverse_clusters(emulation, 8, True, False, schedule)
        assert not np.array_equal(got, expected)
    out = torch.zeros(1)
    emulation.call("toy_exited_peer", out, False, schedule=schedule)
    assert out.isnan().all()
    with pytest.raises(RuntimeError, match="block 1 of the cluster has exited"):
        emulation.call("toy_exited_peer", out, True, schedule=schedule)


def run_pipeline(emulation: Emulation, copies: int, schedule: int) -> bool:
    """Run toy_pipeline, and return whether its result is correct. `copies`: CORRECT or one of the mistakes."""
    blocks, rounds = 2, 4
    values, out = random_array(rounds * THREADS, torch.float32), array(blocks * THREADS, torch.float32)
    emulation.call("toy_pipeline", values, out, blocks, rounds, copies, schedule=schedule)
    rows = values.numpy().reshape(rounds, THREADS)[:, ::-1]
    expected = np.add.accumulate(rows)[-1]
    return np.array_equal(out.numpy().reshape(blocks, THREADS), np.broadcast_to(expected, (blocks, THREADS)))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_asynchronous_copies_are_complete_after_the_wait(emulation, schedule):
    assert run_pipeline(emulation, CORRECT, schedule)
    values, out = random_array(128, torch.float32), array(128, torch.float32)
    emulation.call("toy_zero_fill", values, out, schedule=schedule)
    values.view(32, 4)[:, 3] = 0
    assert torch.equal(out, values)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("mistake", range(NOT_COMMITTED, NO_BARRIER_BEFORE_REUSE + 1))
def test_a_mistake_in_a_pipeline_of_copies_changes_the_result(emulation, mistake, schedule):
    assert not run_pipeline(emulation, mistake, schedule)


@pytest.mark.parametrize(
    "name, arguments, capability, complaint",
    [
        ("toy_copy", (OUT, 3), 90, "the size must be 4, 8 or 16 bytes, got 3 with 0 zeros"),
        ("toy_copy", (OUT, 4), 90, "the target is not in this block's shared memory"),
        ("toy_copy_unaligned", (), 90, "an address is not a multiple of 16"),
        ("toy_cluster_reverse", (OUT, 2, 2, True, True), 80, "clusters need compute capability 9.0"),
        ("toy_cluster_reverse", (OUT, 3, 2, True, True), 90, "the grid is not a multiple of the cluster size 2"),
        ("toy_cluster_reverse", (OUT, 32, 32, True, True), 90, "32 blocks per cluster"),
        ("toy_dynamic_shared", (228 << 10,), 90, "233472 bytes of dynamic shared memory"),
        ("toy_dynamic_shared", (164 << 10,), 80, "167936 bytes of dynamic shared memory"),
        ("toy_shared_not_requested", (), 90, "65536 bytes of dynamic shared memory that were not requested"),
    ],
)
def test_invalid_launches_and_copies_are_reported(emulation, name, arguments, capability, complaint):
    values, out = array(32 * THREADS, torch.float32), array(32 * THREADS, torch.float32)
    arguments = [out if argument is OUT else argument for argument in arguments]
    if name != "toy_dynamic_shared":
        arguments.insert(0, values)
    with pytest.raises(RuntimeError, match=complaint):
        emulation.call(name, *arguments, capability=capability)


@pytest.mark.parametrize(
    "device, complaint",
    [
        ({"code": 80}, "clusters need code for 9.0"),
        ({"largest_cluster": 1}, "2 blocks of a cluster do not run at the same time"),
    ],
)
def test_clusters_that_the_device_cannot_run_are_reported(emulation, device, complaint):
    values, out = array(4 * THREADS, torch.float32), array(4 * THREADS, torch.float32)
    with emulation.device(**device), pytest.raises(RuntimeError, match=complaint):
        emulation.call("toy_cluster_reverse", values, out, 4, 2, True, True)


def test_half_precision_conversions_equal_those_of_numpy_and_torch(emulation):
    library = emulation.library
    library.from_half.restype = ctypes.c_float
    library.to_half.restype = library.to_bfloat16.restype = ctypes.c_uint16
    bits = np.arange(65536, dtype=np.uint16)
    halves = bits.view(np.float16)
    widened = np.array([library.from_half(int(b)) for b in bits], np.float32)
    np.testing.assert_array_equal(widened, halves.astype(np.float32))

    finite = np.sort(halves[np.isfinite(halves)].astype(np.float32))
    midpoints = (finite[1:] + finite[:-1]) / 2  # their rounding is a tie
    candidates = np.concatenate([finite, midpoints, np.nextafter(midpoints, np.float32(np.inf))])
    candidates = np.concatenate([candidates, np.array([65519.9, 65520.0, 1e30, -1e30, np.inf, -np.inf], np.float32)])
    narrow = np.array([library.to_half(ctypes.c_float(x)) for x in candidates], np.uint16)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(narrow, candidates.astype(np.float16).view(np.uint16))
    brain = np.array([library.to_bfloat16(ctypes.c_float(x)) for x in candidates], np.uint16)
    np.testing.assert_array_equal(brain, torch.from_numpy(candidates).bfloat16().view(torch.uint16).numpy())
    assert np.isnan(np.array([library.to_half(ctypes.c_float(np.nan))], np.uint16).view(np.float16)).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("correct", [True, False])
def test_a_kernel_that_starts_early_runs_before_the_previous_one_until_it_waits(emulation, schedule, correct):
    values, stored, out = (array(size, torch.float32) for size in (THREADS, 2 * THREADS, THREADS))
    values.copy_(torch.arange(THREADS))
    emulation.call("toy_successors", values, out, correct, stored, schedule=schedule)
    assert torch.equal(out, values + 3) == correct
