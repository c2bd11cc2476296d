"""triplet_attention's CUDA kernels, run on the host by the emulation, against the formula in plain torch.

Most cases run the forward, then the backward on the arrays that the forward saved. The shape decides how the kernels
process x (csrc/cuda/triplet/tiles.cuh defines slice and tile):
- A row is processed in 16-byte vectors if it has a multiple of 4 float32 or of 8 half-precision elements, and in 4-byte
  vectors if it has another even number of half-precision elements. All other rows, and rows of unaligned arrays, are
  processed one element at a time.
- Small slices are processed several at a time.
- Several blocks compute parts of a map, which are then merged, if a row has more than 128 elements, if a slice is too
  large for a block, or if x has more than 8 slices and few samples.
"""

import pytest
import torch

from tests.emulation.harness import FORWARD, REVERSE, SCHEDULES, Emulation, load_emulation
from tests.helpers.numerics import assert_as_accurate_as_eager
from tests.helpers.triplet_cases import DTYPES, LAYOUTS, AttentionCase, normal

WITHOUT_CLUSTERS = 80  # a compute capability for which inference takes three launches


@pytest.fixture(scope="module")
def emulation() -> Emulation:
    return load_emulation()


def check(emulation: Emulation, case: AttentionCase, training: bool = True, schedules=(FORWARD,)) -> None:
    """Check y, the saved arrays and the gradients. Every schedule must give the same bits.

    If `training` is false, inference in three launches must give the same y.
    """
    eager, exact = case.formula(case.x.dtype, training), case.formula(torch.float64, training)
    runs = []
    for schedule in schedules:
        got = case.forward(emulation, training, schedule)
        got.update(case.backward(emulation, got, training, schedule))
        runs.append(got)
    one_rounding = case.rounding_errors_of_batch_norm(exact)
    for name, value in runs[0].items():
        assert all(torch.equal(value, other[name]) for other in runs[1:]), name
        if name == "index":
            assert torch.equal(value, exact[name])
        elif name in one_rounding:  # ten roundings per term: in product, sums, gate, slope and normalization
            assert ((value.double() - exact[name]).abs() <= 10 * one_rounding[name]).all(), name
        elif value.dtype == torch.float64:  # the float64 reference is no more accurate than the kernel
            torch.testing.assert_close(value, exact[name], rtol=0, atol=1e-13 * exact[name].abs().max().item())
        else:
            assert_as_accurate_as_eager(value, eager[name].to(value.dtype), exact[name])
    if not training:
        for schedule in schedules:
            assert torch.equal(case.inference(emulation, schedule, WITHOUT_CLUSTERS), runs[0]["y"])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(emulation, dtype, layout):
    check(emulation, AttentionCase(normal(0, 2, 16, 7, 8).to(dtype), layout))


@pytest.mark.parametrize(
    "shape",
    [
        (3, 1, 1, 1),  # one element per sample
        (2, 1, 1, 33),  # every map is one row or one value
        (1, 5, 9, 1),  # a single column
        (2, 13, 5, 11),  # no size is a multiple of a vector
        # The remaining comments describe the contiguous layout.
        # small slices, processed several at a time; the map of the branch that pools C is computed in parts
        (1, 40, 7, 7),
        # each row is too long for one tile, so the map of the branch that pools W is computed in parts; elements are
        # loaded as vectors
        (1, 3, 4, 260),
        # a slice is too large for one block, so the map of the branch that pools H is computed in parts; elements are
        # loaded one by one
        (1, 2, 57, 59),
        # the map of the branch that pools C is convolved in tiles, two in the forward and three in the backward
        (1, 2, 70, 64),
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_shapes(emulation, shape, layout):
    check(emulation, AttentionCase(normal(0, *shape).float(), layout))


@pytest.mark.parametrize("shape", [(1, 16, 40, 112), (1, 4, 26, 42)], ids=str)
def test_maps_in_parts_in_half_precision(emulation, shape):
    check(emulation, AttentionCase(normal(0, *shape).bfloat16()))


def test_stages_with_several_slices_at_a_time(emulation):
    """The reduce pass has two slots. Its shared memory is enough for six slices, so the last stage has one slice."""
    check(emulation, AttentionCase(normal(0, 1, 7, 56, 56).bfloat16(), kernel_size=3), True, (FORWARD, 7))


def test_a_tile_with_a_single_row(emulation):
    """The rows are divided into 16 tiles of 16 rows, of which the last has one."""
    check(emulation, AttentionCase(normal(0, 1, 1, 241, 128).float(), kernel_size=1, offset=1))


@pytest.mark.parametrize("shape", [(1, 7, 37, 56), (1, 7, 3, 8)], ids=str)
def test_saved_maps_at_an_unaligned_address(emulation, shape):
    """The maps of C x W and of H x C precede that of H x W. They have 2 * 7 * (W + H) values, no multiple of 4."""
    check(emulation, AttentionCase(normal(0, *shape).float(), kernel_size=1))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_schedule_gives_the_same_bits(emulation, training, layout):
    check(emulation, AttentionCase(normal(0, 2, 17, 6, 8).float(), layout), training, SCHEDULES)


def test_more_blocks_than_threads_in_a_warp(emulation):
    """Each branch has 40 blocks, and a warp merges their statistics."""
    check(emulation, AttentionCase(normal(0, 40, 1, 2, 3).float(), kernel_size=1), True, (FORWARD, REVERSE))


@pytest.mark.parametrize(
    "branches, kernel_size, layout",
    [(2, 7, "channels_last"), (2, 3, "contiguous"), (3, 1, "contiguous"), (3, 9, "contiguous"), (3, 13, "contiguous")],
)
def test_kernel_sizes(emulation, branches, kernel_size, layout):
    check(emulation, AttentionCase(normal(0, 1, 9, 3, 8).float(), layout, branches, kernel_size))


def test_the_largest_kernel_size(emulation):
    """The border of a tile is so wide that only small tiles fit in shared memory.

    The backward is not run, because it has one block per weight, which is too many for the emulator.
    """
    case = AttentionCase(normal(0, 1, 9, 3, 40).float(), kernel_size=47)
    eager, exact = case.formula(torch.float32, True), case.formula(torch.float64, True)
    got = case.forward(emulation, True)
    for name in ("y", "response", "mean", "var"):
        assert_as_accurate_as_eager(got[name], eager[name], exact[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_unaligned_pointers(emulation, dtype):
    check(emulation, AttentionCase(normal(0, 1, 5, 6, 8).to(dtype), offset=1), False)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 17, 6, 8), (1, 33, 5, 140)], ids=str)
def test_the_lowest_index_wins_a_tie(emulation, shape, layout):
    case = AttentionCase(normal(0, *shape).round().clamp(-1, 1).half(), layout)
    assert (case.formula(torch.float64, True)["index"] == 0).float().mean() > 0.2
    check(emulation, case, True, (FORWARD, 7))
    check(emulation, AttentionCase(torch.zeros(shape).half(), layout, kernel_size=3), False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(emulation, dtype):
    """NaN and infinities appear at the same places as in torch. The index of a NaN maximum is that of the first NaN."""
    x = normal(0, 2, 5, 6, 8).to(dtype)
    x[0, 1, 2, 3] = x[0, 1, 4, 3] = x[0, 3, 2, 5] = torch.nan
    x[1, 2, 2, 1] = torch.inf
    x[1, 4, 0, 0] = -torch.inf
    case = AttentionCase(x, kernel_size=3)
    expected, got = case.formula(torch.float64, False), case.forward(emulation, False)
    for name, value in got.items():
        exact = expected[name].to(value.dtype)
        assert torch.equal(value.isnan(), exact.isnan()), name
        assert torch.equal(value.isinf(), exact.isinf()), name
    assert torch.equal(got["index"], expected["index"])
    assert got["y"].isnan().any() and not got["y"].isnan().all()
    for capability in (90, WITHOUT_CLUSTERS):
        assert torch.equal(case.inference(emulation, capability=capability).isnan(), got["y"].isnan())


@pytest.mark.parametrize("training", [False, True])
def test_an_empty_batch(emulation, training):
    """The running statistics are copied and all gradients are zero. (The op refuses to train on an empty batch.)"""
    case = AttentionCase(normal(0, 0, 3, 4, 8).float())
    if not training:
        got = case.forward(emulation, False)
        assert got["mean"].tolist() == [mean.item() for mean in case.lists[3]]
        assert got["var"].tolist() == [var.item() for var in case.lists[4]]
    grads = case.backward(emulation, case.formula(torch.float32, False), training)
    assert all(not grads[name].any() for name in case.GRADIENTS)
