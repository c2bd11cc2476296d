"""triplet_gate's CUDA kernels, run on the host by the emulation, against the formula in plain torch.

test_triplet_attention.py describes how the shape decides the way in which the kernels process x.
"""

import importlib

import pytest
import torch
from torch import Tensor

from tests.emulation.harness import FORWARD, SCHEDULES, Emulation, load_emulation
from tests.helpers.triplet_cases import (
    DTYPES,
    H200_MULTIPROCESSORS,
    LAYOUTS,
    TILED_SHAPES,
    HugeInput,
    Launchers,
    check_runs,
    normal,
    pointers,
)

op = importlib.import_module("hashengine.ops.triplet_gate")  # the package has a function of this name


@pytest.fixture(scope="module")
def emulation() -> Emulation:
    return load_emulation()


def gate(launchers: Launchers, maps: list[Tensor]) -> Tensor:
    memory, y = launchers.result()
    launchers.call("triplet_gate_forward", launchers.to_memory(launchers.x), pointers(maps), memory)
    return y


def gate_backward(launchers: Launchers, grad_y: Tensor, maps: list[Tensor]) -> tuple[Tensor, ...]:
    """Return the gradients of x and of each map."""
    memory, grad_x = launchers.result()
    grads = launchers.maps(1, launchers.map_dtype)
    x, grad_y, workspace = (
        launchers.to_memory(launchers.x),
        launchers.to_memory(grad_y),
        launchers.workspace("triplet_gate_backward"),
    )
    launchers.call("triplet_gate_backward", grad_y, x, pointers(maps), memory, pointers(grads), workspace)
    return (grad_x, *grads)


def check(
    emulation: Emulation, x: Tensor, layout: str, branches: int = 3, schedules=(FORWARD,), offset: int = 0
) -> None:
    runs = [Launchers(emulation, x, layout, branches, offset=offset, schedule=schedule) for schedule in schedules]
    dtype = runs[0].map_dtype
    maps = [normal(seed, n, 1, *size).to(dtype) for seed, (n, *size) in enumerate(runs[0].map_sizes)]
    grad_y, missing = normal(9, *x.shape).to(x.dtype), [None] * (3 - branches)
    doubles = [*(values.double() for values in maps), *missing]
    check_runs(
        [(gate(run, maps),) for run in runs],
        (op._reference(x, *maps, *missing),),
        (op._reference(x.double(), *doubles),),
    )
    check_runs(
        [gate_backward(run, grad_y, maps) for run in runs],
        op._backward_reference(grad_y, x, *maps, *missing)[: branches + 1],
        op._backward_reference(grad_y.double(), x.double(), *doubles)[: branches + 1],
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(emulation, dtype, layout):
    check(emulation, normal(0, 2, 16, 7, 8).to(dtype), layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", TILED_SHAPES, ids=str)
def test_shapes(emulation, shape, layout):
    check(emulation, normal(0, *shape).float(), layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_the_branch_that_pools_channels(emulation, layout):
    check(emulation, normal(0, 1, 9, 3, 8).half(), layout, branches=2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_schedule_gives_the_same_bits(emulation, layout):
    check(emulation, normal(0, 2, 17, 6, 8).bfloat16(), layout, 3, SCHEDULES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_unaligned_pointers(emulation, dtype):
    check(emulation, normal(0, 1, 5, 6, 8).to(dtype), "contiguous", offset=1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_in_a_map_reaches_its_line(emulation, dtype, layout):
    x = normal(0, 2, 5, 6, 8).to(dtype)
    x[0, 1, 2, 3] = x[0, 1, 4, 3] = x[0, 3, 2, 5] = torch.nan
    x[1, 2, 2, 1] = torch.inf
    x[1, 4, 0, 0] = -torch.inf
    x[1, :, 3, 3] = -torch.inf
    launchers = Launchers(emulation, x, layout)
    maps = [torch.zeros(n, 1, *size, dtype=launchers.map_dtype) for n, *size in launchers.map_sizes]
    maps[0][1, 0, 0, 0] = torch.nan
    expected = x.isnan()
    expected[1, 0, :, 0] = True
    assert torch.equal(gate(launchers, maps).isnan(), expected)


def test_more_than_two_to_the_31_elements(emulation):
    huge = HugeInput(rows=16)
    x, y, maps = huge.zeros(), huge.zeros(), huge.maps(1)
    huge.tail(x)[:] = normal(0, 1, huge.c, huge.rows, huge.w)
    emulation.call(
        "triplet_gate_forward", huge.shape, x, pointers(maps), y, end_block=1,  # the last tile
        multiprocessors=H200_MULTIPROCESSORS,
    )  # fmt: skip
    tail, tails = huge.tail(x), huge.tails(maps)
    huge.check(y, op._reference(tail, *tails), op._reference(tail.double(), *(t.double() for t in tails)))
