"""Triplet attention's inference with each sample in the shared memory of a cluster of blocks, run by the emulation.

Small batches of 16 slices and more are spread over clusters, so a case names the cluster that it is to take.
"""

import ctypes

import pytest
import torch
from torch import Tensor

from tests.cuda.test_triplet import DTYPES, LAYOUTS, THREE_LAUNCHES, Case, normal
from tests.emulation.harness import FORWARD, SCHEDULES, load_emulation
from tests.helpers.numerics import assert_as_accurate_as_eager


@pytest.fixture(scope="module")
def emulation():
    return load_emulation()


def cluster_of(emulation, sizes: list[int], capability: int = 90) -> int:
    """How many blocks keep a sample in their shared memory for inference; 0: it takes three launches."""
    shape = torch.tensor(sizes)
    emulation.library.emulation_set_capability(capability)
    return emulation.library.cluster_of_triplet_inference(ctypes.c_void_p(shape.data_ptr()))


def check_resident(emulation, case: Case, cluster: int, schedules=(FORWARD,), capability: int = 90) -> Tensor:
    assert cluster_of(emulation, case.sizes, capability) == cluster
    y, *others = [case.inference(emulation, schedule, capability) for schedule in schedules]
    assert all(torch.equal(y, other) for other in others)
    eager, exact = case.formula(case.x.dtype, False)["y"], case.formula(torch.float64, False)["y"]
    assert_as_accurate_as_eager(y, eager.to(y.dtype), exact)
    return y


@pytest.mark.parametrize(
    "shape, layout, dtype, cluster",
    [
        ((128, 64, 56, 56), "contiguous", torch.bfloat16, 8),
        ((128, 128, 28, 28), "contiguous", torch.bfloat16, 4),
        ((128, 128, 28, 28), "contiguous", torch.float64, 0),
        ((128, 256, 56, 56), "contiguous", torch.bfloat16, 0),  # too large
        ((128, 512, 7, 7), "contiguous", torch.bfloat16, 2),
        ((128, 512, 7, 7), "channels_last", torch.bfloat16, 0),  # blocks after each other with little to load
        ((1, 512, 7, 7), "channels_last", torch.bfloat16, 8),  # one wave of blocks
    ],
    ids=str,
)
def test_which_layers_are_resident(emulation, shape, layout, dtype, cluster):
    sizes = [*shape, 3, 7, int(layout == "channels_last"), DTYPES.index(dtype)]
    assert cluster_of(emulation, sizes) == cluster
    assert cluster_of(emulation, sizes, THREE_LAUNCHES) == 0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_resident_in_every_dtype(emulation, dtype, layout):
    check_resident(emulation, Case(normal(0, 2, 17, 16, 8).to(dtype), layout), 2)


@pytest.mark.parametrize(
    "shape, cluster, layout",
    [
        ((3, 1, 1, 1), 1, "contiguous"),
        ((2, 13, 5, 11), 1, "channels_last"),
        ((1, 35, 5, 14), 4, "contiguous"),  # 4-byte vectors; the A0 map has fewer lines than the cluster has blocks
        ((1, 3, 70, 9), 8, "channels_last"),
        ((2, 66, 9, 10), 8, "contiguous"),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resident_in_every_cluster(emulation, shape, cluster, layout, dtype):
    check_resident(emulation, Case(normal(0, *shape).to(dtype), layout), cluster)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_resident_under_every_schedule(emulation, layout):
    check_resident(emulation, Case(normal(0, 2, 17, 18, 8).float(), layout), 2, SCHEDULES)


@pytest.mark.parametrize("width, cluster", [(172, 8), (176, 0)])
def test_the_largest_resident_sample(emulation, width, cluster):
    """Of a multiprocessor with 99 KB of shared memory."""
    check_resident(emulation, Case(normal(0, 1, 16, 16, width).float()), cluster, capability=120)


def test_resident_blocks_without_a_slice(emulation):
    case = Case(normal(0, 1, 64, 5, 48).bfloat16(), "channels_last")
    check_resident(emulation, case, 8, (FORWARD, 7), capability=120)


@pytest.mark.parametrize("branches, kernel_size", [(2, 7), (2, 3), (3, 1), (3, 9), (3, 13)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_resident_in_every_kernel(emulation, branches, kernel_size, layout):
    check_resident(emulation, Case(normal(0, 1, 33, 34, 8).float(), layout, branches, kernel_size), 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_resident_unaligned(emulation, dtype):
    check_resident(emulation, Case(normal(0, 1, 17, 6, 8).to(dtype), offset=1), 2)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_resident_special_values(emulation, dtype):
    """NaN and infinities cross the borders between a cluster's blocks as far as the convolution takes them."""
    x = normal(0, 2, 33, 10, 8).to(dtype)
    x[0, 7, 2, 3] = torch.nan
    x[1, 9, 0, 7] = torch.inf
    case = Case(x, kernel_size=3)
    assert cluster_of(emulation, case.sizes) == 4
    y, expected = case.inference(emulation), case.formula(torch.float64, False)["y"]
    assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.isinf(), expected.to(dtype).isinf())
    assert 0 < y.isnan().sum() < y.numel() // 2
