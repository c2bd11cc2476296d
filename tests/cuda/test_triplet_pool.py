"""triplet_pool's CUDA kernels, run on the host by the emulation, against the formula in plain torch.

test_triplet_attention.py describes how the shape decides the way in which the kernels process x.
"""

import importlib

import pytest
import torch
from torch import Tensor

from tests.emulation.harness import FORWARD, SCHEDULES, Emulation, load_emulation, sparse_array
from tests.helpers.numerics import assert_as_accurate_as_eager
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

op = importlib.import_module("hashengine.ops.triplet_pool")  # the package has a function of this name


@pytest.fixture(scope="module")
def emulation() -> Emulation:
    return load_emulation()


def pool(launchers: Launchers) -> tuple[Tensor, ...]:
    """Return the pooled maps of the three branches, then their indices."""
    pools, indices = launchers.maps(2, launchers.map_dtype), launchers.maps(1, torch.int32)
    x, workspace = launchers.to_memory(launchers.x), launchers.workspace("triplet_pool_forward")
    launchers.call("triplet_pool_forward", x, pointers(pools), pointers(indices), workspace)
    return (*pools, *(index.squeeze(1) for index in indices))


def pool_backward(launchers: Launchers, grads: list[Tensor], indices: list[Tensor]) -> Tensor:
    memory, grad_x = launchers.result()
    launchers.call("triplet_pool_backward", pointers(grads), pointers(indices), memory)
    return grad_x


def check(emulation: Emulation, x: Tensor, layout: str, schedules=(FORWARD,), offset: int = 0) -> None:
    runs = [Launchers(emulation, x, layout, offset=offset, schedule=schedule) for schedule in schedules]
    exact = op._reference(x.double())
    check_runs([pool(run) for run in runs], op._reference(x), exact)
    grads = [normal(1, *values.shape).to(x.dtype) for values in exact[:3]]
    wide, indices = [grad.to(runs[0].map_dtype) for grad in grads], list(exact[3:])
    check_runs(
        [(pool_backward(run, wide, indices),) for run in runs],
        (op._backward_reference(grads, indices, x),),
        (op._backward_reference([grad.double() for grad in grads], indices, x.double()),),
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
def test_every_schedule_gives_the_same_bits(emulation, layout):
    check(emulation, normal(0, 2, 17, 6, 8).bfloat16(), layout, SCHEDULES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_unaligned_pointers(emulation, dtype):
    check(emulation, normal(0, 1, 5, 6, 8).to(dtype), "contiguous", offset=1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 17, 6, 8), (1, 33, 5, 140)], ids=str)
def test_the_lowest_index_wins_a_tie(emulation, shape, layout):
    x = normal(0, *shape).round().clamp(-1, 1).half()
    check(emulation, x, layout, (FORWARD, 7))
    indices = pool(Launchers(emulation, torch.zeros(shape).half(), layout))[3:]
    assert not any(index.any() for index in indices)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(emulation, dtype, layout):
    """The maximum of a line with a NaN is NaN, with the index of the first NaN. Infinities are ordinary values."""
    x = normal(0, 2, 5, 6, 8).to(dtype)
    x[0, 1, 2, 3] = x[0, 1, 4, 3] = x[0, 3, 2, 5] = torch.nan
    x[1, 2, 2, 1] = torch.inf
    x[1, 4, 0, 0] = -torch.inf
    x[1, :, 3, 3] = -torch.inf
    got, expected = pool(Launchers(emulation, x, layout)), op._reference(x.double())
    for values, index, exact, exact_index in zip(got[:3], got[3:], expected[:3], expected[3:], strict=True):
        assert torch.equal(index, exact_index)
        torch.testing.assert_close(values[:, 0].double(), exact[:, 0], rtol=0, atol=0, equal_nan=True)
        assert torch.equal(values[:, 1].isnan(), exact[:, 1].isnan())
        assert torch.equal(values[:, 1].isinf(), exact[:, 1].isinf())


# --- beyond 2^31 elements ---------------------------------------------------------------------------------------------


def test_the_reduce_pass_beyond_two_to_the_31_elements(emulation):
    huge = HugeInput(rows=64)
    x = huge.zeros()
    huge.tail(x)[:] = normal(0, 1, huge.c, huge.rows, huge.w)
    # The reduce pass is the forward's first pass over x. It stores the maximum and the sum in partial maps over C, H
    # and W, which have these sizes. The map over H has one part per tile.
    sizes = [(1, 2, huge.h, huge.w), (huge.h // huge.rows, 2, huge.c, huge.w), (1, 2, huge.c, huge.h)]
    numels = [torch.Size(size).numel() for size in sizes]
    memory = sparse_array(sum(numels), torch.float32)
    emulation.call(
        "triplet_reduce_pool", huge.shape, x, memory, first_block=huge.last_block, multiprocessors=H200_MULTIPROCESSORS
    )
    maps = [part.view(size) for part, size in zip(memory.split(numels), sizes, strict=True)]
    tail = huge.tail(x)[0]
    for axis, got in enumerate((maps[0][0, :, -huge.rows :], maps[1][-1], maps[2][0, ..., -huge.rows :])):
        assert torch.equal(got[0], tail.float().amax(axis))
        assert_as_accurate_as_eager(got[1], tail.float().sum(axis), tail.double().sum(axis))
    assert not maps[1][:2].any() and not maps[1][-2].any()


def test_the_backward_beyond_two_to_the_31_elements(emulation):
    huge = HugeInput(rows=16)
    grad_x, grads = huge.zeros(), huge.maps(2)
    indices = [sparse_array(grad[:, 0].numel(), torch.int32).view(1, *grad.shape[2:]) for grad in grads]
    tails = [indices[0], *(index[:, -huge.rows :] for index in indices[1:])]
    for seed, (index, length) in enumerate(zip(tails, (huge.rows, huge.w, huge.c), strict=True)):
        index[:] = normal(seed + 5, *index.shape).mul(1000).int() % length
    index_in_tail = [tails[0].clone(), *tails[1:]]
    indices[0] += huge.h - huge.rows
    emulation.call(
        "triplet_pool_backward", huge.shape, pointers(grads), pointers(indices), grad_x, end_block=1,  # the last tile
        multiprocessors=H200_MULTIPROCESSORS,
    )  # fmt: skip
    wide = [grad.double() for grad in huge.tails(grads)]
    # The kernel divides by huge.h, the number of all rows. The reference sees only the tail and divides by huge.rows.
    # The ratio is a power of two, so scaling by it is exact.
    wide[0][:, 1] *= huge.rows / huge.h
    exact = op._backward_reference(wide, index_in_tail, huge.tail(grad_x).double())
    eager = op._backward_reference([grad.float() for grad in wide], index_in_tail, huge.tail(grad_x).float()).half()
    huge.check(grad_x, eager, exact)
