"""triplet_attention's inference in one launch, in the emulator: a cluster of blocks holds a sample in shared memory.

The number of blocks per cluster depends on the shape and on the device. Each case states the number that it must get. A
schedule is the order in which the emulator runs blocks and threads.
"""

import pytest
import torch
from torch import Tensor

from tests.emulation.harness import FORWARD, SCHEDULES, Emulation, load_emulation, to_c
from tests.helpers.architectures import PAIRS
from tests.helpers.numerics import assert_as_accurate_as_eager
from tests.helpers.triplet_cases import DTYPES, H200_MULTIPROCESSORS, LAYOUTS, AttentionCase, Launchers, normal

WITHOUT_CLUSTERS = 80  # a compute capability for which inference takes three launches


@pytest.fixture(scope="module")
def emulation() -> Emulation:
    return load_emulation()


def cluster_blocks(launchers: Launchers, multiprocessors: int = H200_MULTIPROCESSORS) -> int:
    """Return the number of blocks per cluster for inference; 0 if inference takes three launches."""
    launchers.emulation.set_device(launchers.capability, multiprocessors)
    return launchers.emulation.library.cluster_of_triplet_inference(to_c(launchers.shape))


def check(emulation: Emulation, case: AttentionCase, blocks: int, schedules=(FORWARD,), capability: int = 90) -> Tensor:
    """Check y: accurate, the same bits in every schedule, and computed in clusters of `blocks` blocks. Return y."""
    assert cluster_blocks(case.launchers(emulation, capability=capability)) == blocks
    y, *others = [case.inference(emulation, schedule, capability) for schedule in schedules]
    assert all(torch.equal(y, other) for other in others)
    eager, exact = case.formula(case.x.dtype, False)["y"], case.formula(torch.float64, False)["y"]
    assert_as_accurate_as_eager(y, eager.to(y.dtype), exact)
    return y


@pytest.mark.parametrize(
    "shape, layout, dtype, blocks",
    [
        ((128, 64, 56, 56), "contiguous", torch.bfloat16, 8),
        ((128, 128, 28, 28), "contiguous", torch.bfloat16, 4),
        ((128, 128, 28, 28), "contiguous", torch.float64, 0),
        ((128, 256, 56, 56), "contiguous", torch.bfloat16, 0),  # too large for a cluster
        ((128, 512, 7, 7), "contiguous", torch.bfloat16, 2),
        # no cluster: the blocks would not all run at the same time, and each would load little of x
        ((128, 512, 7, 7), "channels_last", torch.bfloat16, 0),
        ((1, 512, 7, 7), "channels_last", torch.bfloat16, 8),  # all blocks run at the same time
    ],
    ids=str,
)
def test_which_shapes_use_clusters(emulation, shape, layout, dtype, blocks):
    x = torch.empty(1, dtype=dtype).expand(shape)
    assert cluster_blocks(Launchers(emulation, x, layout, kernel_size=7)) == blocks
    assert cluster_blocks(Launchers(emulation, x, layout, kernel_size=7, capability=WITHOUT_CLUSTERS)) == 0


def test_a_small_batch_spreads_over_the_multiprocessors_of_the_device(emulation):
    launchers = Launchers(emulation, torch.empty(1, dtype=torch.bfloat16).expand(4, 64, 28, 28), "contiguous")
    assert [cluster_blocks(launchers, multiprocessors) for multiprocessors in (8, 16, 32, 132)] == [2, 4, 8, 8]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_every_dtype_except_float64(emulation, dtype, layout):
    check(emulation, AttentionCase(normal(0, 2, 17, 16, 8).to(dtype), layout), 2)


@pytest.mark.parametrize(
    "shape, blocks, layout",
    [
        ((3, 1, 1, 1), 1, "contiguous"),
        ((2, 13, 5, 11), 1, "channels_last"),
        ((1, 35, 5, 14), 4, "contiguous"),  # the last block has no row of the [H, W] map; bfloat16 in 4-byte vectors
        ((1, 3, 70, 9), 8, "channels_last"),
        ((2, 66, 9, 10), 8, "contiguous"),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cluster_sizes(emulation, shape, blocks, layout, dtype):
    check(emulation, AttentionCase(normal(0, *shape).to(dtype), layout), blocks)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_schedule_gives_the_same_bits(emulation, layout):
    check(emulation, AttentionCase(normal(0, 2, 17, 18, 8).float(), layout), 2, SCHEDULES)


@pytest.mark.parametrize("width, blocks", [(172, 8), (176, 0)])
def test_the_largest_sample(emulation, width, blocks):
    """With 99 KB of shared memory per block, a cluster of 8 holds a sample of width 172, but not one of width 176."""
    check(emulation, AttentionCase(normal(0, 1, 16, 16, width).float()), blocks, capability=120)


def test_blocks_without_a_slice(emulation):
    """In channels_last, x has five slices (H = 5), and the cluster has eight blocks."""
    case = AttentionCase(normal(0, 1, 64, 5, 48).bfloat16(), "channels_last")
    check(emulation, case, 8, (FORWARD, 7), capability=120)


@pytest.mark.parametrize("branches, kernel_size", [(2, 7), (2, 3), (3, 1), (3, 9), (3, 13)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernel_sizes(emulation, branches, kernel_size, layout):
    check(emulation, AttentionCase(normal(0, 1, 33, 34, 8).float(), layout, branches, kernel_size), 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_unaligned_pointers(emulation, dtype):
    check(emulation, AttentionCase(normal(0, 1, 17, 6, 8).to(dtype), offset=1), 2)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_special_values(emulation, dtype):
    """The convolution carries NaN and infinities across the borders between the blocks of a cluster."""
    x = normal(0, 2, 33, 10, 8).to(dtype)
    x[0, 7, 2, 3] = torch.nan
    x[1, 9, 0, 7] = torch.inf
    case = AttentionCase(x, kernel_size=3)
    assert cluster_blocks(case.launchers(emulation)) == 4
    y, expected = case.inference(emulation), case.formula(torch.float64, False)["y"]
    assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.isinf(), expected.to(dtype).isinf())
    assert 0 < y.isnan().sum() < y.numel() // 2


@pytest.mark.parametrize("shape, blocks", [((3, 1, 1, 1), 1), ((2, 13, 5, 11), 1), ((2, 66, 9, 10), 8)], ids=str)
@pytest.mark.parametrize("capability", [90, 120])
def test_no_cluster_is_launched_where_it_cannot_run(emulation, shape, blocks, capability):
    case = AttentionCase(normal(0, *shape).bfloat16())
    with emulation.device(code=80):  # the kernel is empty in this code
        check(emulation, case, 0, capability=capability)
    for largest in (1, 4, 8):
        with emulation.device(largest_cluster=largest):
            check(emulation, case, blocks if blocks <= largest else 0, capability=capability)


@pytest.mark.parametrize(("device", "code"), PAIRS)
def test_every_device_gives_the_results_with_the_code_that_it_runs(emulation, device, code):
    case = AttentionCase(normal(0, 2, 66, 9, 10).bfloat16())
    with emulation.device(code=code):
        check(emulation, case, 8 if code >= 90 else 0, capability=device)
