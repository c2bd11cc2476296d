"""The CUDA kernels of triplet_pool and triplet_gate, run on the host by the emulation, against the formulas.

Which paths a shape takes: see test_cuda_triplet.py.
"""

import importlib

import pytest
import torch
from torch import Tensor

from hashengine.ops._branches import BRANCHES, map_shape
from hashengine.ops._check import wide_dtype
from tests.emulation.harness import FORWARD, SCHEDULES, array, load_emulation, sparse_array
from tests.helpers.numerics import assert_as_accurate_as_eager

pool_op = importlib.import_module("hashengine.ops.triplet_pool")  # the package has the ops under these names
gate_op = importlib.import_module("hashengine.ops.triplet_gate")
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]  # in the order of the C++ enumeration
LAYOUTS = ("contiguous", "channels_last")
SHAPES = [
    (3, 1, 1, 1),  # an element a sample
    (2, 13, 5, 11),  # divides nothing
    (1, 40, 7, 7),  # slots, and several parts over C
    (1, 3, 4, 264),  # rows in parts, by vectors
    (1, 2, 57, 59),  # tiles in parts, element by element
]


@pytest.fixture(scope="module")
def emulation():
    return load_emulation()


def normal(seed: int, *sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Kernels:
    """The four launchers on x's shape, dtype and layout, `offset` elements past an aligned address."""

    def __init__(self, emulation, x: Tensor, layout: str, branches: int, schedule: int, offset: int = 0):
        self.emulation, self.x, self.schedule, self.offset = emulation, x, schedule, offset
        self.order = (0, 2, 3, 1) if layout == "channels_last" else (0, 1, 2, 3)
        self.sizes = [map_shape(x, branch) for branch in BRANCHES[:branches]]
        self.shape = torch.tensor([*x.shape, branches, 1, int(layout == "channels_last"), DTYPES.index(x.dtype)])

    def call(self, function: str, *arguments) -> None:
        self.emulation.call(function, self.shape, *arguments, schedule=self.schedule)

    def to_memory(self, values: Tensor) -> Tensor:
        return array(values.numel(), values.dtype, self.offset).copy_(values.permute(self.order).flatten())

    def result(self) -> tuple[Tensor, Tensor]:
        """Memory for a result like x, and the view of it as [N, C, H, W]."""
        memory = array(self.x.numel(), self.x.dtype, self.offset)
        view = memory.view([self.x.shape[axis] for axis in self.order])
        return memory, view.permute([self.order.index(axis) for axis in range(4)])

    def maps(self, channels: int, dtype: torch.dtype) -> list[Tensor]:
        return [array(n * channels * r * c, dtype).view(n, channels, r, c) for n, r, c in self.sizes]

    def pool(self) -> tuple[Tensor, ...]:
        pools, indices = self.maps(2, wide_dtype(self.x)), self.maps(1, torch.int32)
        workspace = self.emulation.workspace("triplet_pool_forward", self.shape)
        self.call("triplet_pool_forward", self.to_memory(self.x), pointers(pools), pointers(indices), workspace)
        return (*pools, *(index.squeeze(1) for index in indices))

    def pool_backward(self, grads: list[Tensor], indices: list[Tensor]) -> Tensor:
        memory, grad_x = self.result()
        self.call("triplet_pool_backward", pointers(grads), pointers(indices), memory)
        return grad_x

    def gate(self, maps: list[Tensor]) -> Tensor:
        memory, y = self.result()
        self.call("triplet_gate_forward", self.to_memory(self.x), pointers(maps), memory)
        return y

    def gate_backward(self, grad_y: Tensor, maps: list[Tensor]) -> tuple[Tensor, ...]:
        memory, grad_x = self.result()
        grads = self.maps(1, wide_dtype(self.x))
        workspace = self.emulation.workspace("triplet_gate_backward", self.shape)
        x, grad_y = self.to_memory(self.x), self.to_memory(grad_y)
        self.call("triplet_gate_backward", grad_y, x, pointers(maps), memory, pointers(grads), workspace)
        return (grad_x, *grads)


def pointers(tensors: list[Tensor]) -> Tensor:
    assert all(tensor.is_contiguous() for tensor in tensors)
    return torch.tensor([tensor.data_ptr() for tensor in tensors])


def check(runs: list[tuple[Tensor, ...]], eager: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> None:
    for got, reference, truth, *others in zip(runs[0], eager, exact, *runs[1:], strict=True):
        assert all(torch.equal(got, other) for other in others)
        if truth.dtype == torch.int32:
            assert torch.equal(got, truth)
        elif reference.dtype == torch.float64:  # where the exact value is added up no better
            torch.testing.assert_close(got, truth, rtol=0, atol=1e-13 * truth.abs().max().item())
        else:  # maps leave the kernels in the type that adds up; the binding rounds them to x's
            assert_as_accurate_as_eager(got.to(reference.dtype), reference, truth)


def check_pool(emulation, x: Tensor, layout: str, schedules=(FORWARD,), offset: int = 0) -> None:
    runs = [Kernels(emulation, x, layout, 3, schedule, offset) for schedule in schedules]
    exact = pool_op._reference(x.double())
    check([run.pool() for run in runs], pool_op._reference(x), exact)
    grads = [normal(1, *pool.shape).to(x.dtype) for pool in exact[:3]]
    wide, indices = [grad.to(wide_dtype(x)) for grad in grads], list(exact[3:])
    check(
        [(run.pool_backward(wide, indices),) for run in runs],
        (pool_op._backward_reference(grads, indices, x),),
        (pool_op._backward_reference([grad.double() for grad in grads], indices, x.double()),),
    )


def check_gate(emulation, x: Tensor, layout: str, branches: int = 3, schedules=(FORWARD,), offset: int = 0) -> None:
    runs = [Kernels(emulation, x, layout, branches, schedule, offset) for schedule in schedules]
    maps = [normal(seed, n, 1, *size).to(wide_dtype(x)) for seed, (n, *size) in enumerate(runs[0].sizes)]
    grad_y, missing = normal(9, *x.shape).to(x.dtype), [None] * (3 - branches)
    doubles = [*(values.double() for values in maps), *missing]
    check(
        [(run.gate(maps),) for run in runs],
        (gate_op._reference(x, *maps, *missing),),
        (gate_op._reference(x.double(), *doubles),),
    )
    check(
        [run.gate_backward(grad_y, maps) for run in runs],
        gate_op._backward_reference(grad_y, x, *maps, *missing)[: branches + 1],
        gate_op._backward_reference(grad_y.double(), x.double(), *doubles)[: branches + 1],
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(emulation, dtype, layout):
    x = normal(0, 2, 16, 7, 8).to(dtype)
    check_pool(emulation, x, layout)
    check_gate(emulation, x, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(emulation, shape, layout):
    check_pool(emulation, normal(0, *shape).float(), layout)
    check_gate(emulation, normal(0, *shape).float(), layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_the_branch_over_channels(emulation, layout):
    check_gate(emulation, normal(0, 1, 9, 3, 8).half(), layout, branches=2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_schedule_gives_the_same_bits(emulation, layout):
    x = normal(0, 2, 17, 6, 8).bfloat16()
    check_pool(emulation, x, layout, SCHEDULES)
    check_gate(emulation, x, layout, 3, SCHEDULES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_unaligned_pointers(emulation, dtype):
    x = normal(0, 1, 5, 6, 8).to(dtype)
    check_pool(emulation, x, "contiguous", offset=1)
    check_gate(emulation, x, "contiguous", offset=1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 17, 6, 8), (1, 33, 5, 140)], ids=str)
def test_ties_go_to_the_lowest_index(emulation, shape, layout):
    x = normal(0, *shape).round().clamp(-1, 1).half()
    check_pool(emulation, x, layout, (FORWARD, 7))
    indices = Kernels(emulation, torch.zeros(shape).half(), layout, 3, FORWARD).pool()[3:]
    assert not any(index.any() for index in indices)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(emulation, dtype, layout):
    """A maximum is NaN where its line has one, and belongs to the first; so do infinities."""
    x = normal(0, 2, 5, 6, 8).to(dtype)
    x[0, 1, 2, 3] = x[0, 1, 4, 3] = x[0, 3, 2, 5] = torch.nan
    x[1, 2, 2, 1] = torch.inf
    x[1, 4, 0, 0] = -torch.inf
    x[1, :, 3, 3] = -torch.inf
    kernels = Kernels(emulation, x, layout, 3, FORWARD)
    got, expected = kernels.pool(), pool_op._reference(x.double())
    for pool, index, exact, exact_index in zip(got[:3], got[3:], expected[:3], expected[3:], strict=True):
        assert torch.equal(index, exact_index)
        torch.testing.assert_close(pool[:, 0].double(), exact[:, 0], rtol=0, atol=0, equal_nan=True)
        assert torch.equal(pool[:, 1].isnan(), exact[:, 1].isnan())
        assert torch.equal(pool[:, 1].isinf(), exact[:, 1].isinf())
    maps = [torch.zeros(n, 1, *size, dtype=wide_dtype(x)) for n, *size in kernels.sizes]
    maps[0][1, 0, 0, 0] = torch.nan
    y = kernels.gate(maps)
    expected = x.isnan()
    expected[1, 0, :, 0] = True
    assert torch.equal(y.isnan(), expected)


# --- beyond 2^31 elements: only the last block runs, and only the pages that it touches exist -------------------------


class FarOut:
    """x [1, 16, 2^21, 128] of float16, and its maps, where only the `rows` last rows are read and written."""

    c, h, w = 16, 2**21, 128
    shape = torch.tensor([1, c, h, w, 3, 1, LAYOUTS.index("contiguous"), DTYPES.index(torch.float16)])

    def __init__(self, rows: int):
        self.rows, self.last_block = rows, self.h // rows - 1

    def zeros(self) -> Tensor:
        return sparse_array(self.c * self.h * self.w, torch.float16).view(1, self.c, self.h, self.w)

    def maps(self, channels: int) -> list[Tensor]:
        """A map a branch, random in what the last rows reach."""
        sizes = [(channels, self.c, self.w), (channels, self.h, self.c), (channels, self.h, self.w)]
        maps = [sparse_array(n * r * c, torch.float32).view(1, n, r, c) for n, r, c in sizes]
        for seed, tail in enumerate(self.tails(maps)):
            tail[:] = normal(seed, *tail.shape)
        return maps

    def tail(self, values: Tensor) -> Tensor:
        return values[:, :, -self.rows :]

    def tails(self, maps: list[Tensor]) -> list[Tensor]:
        return [maps[0], *map(self.tail, maps[1:])]

    def check(self, got: Tensor, eager: Tensor, exact: Tensor) -> None:
        assert_as_accurate_as_eager(self.tail(got), eager, exact)
        assert not got[:, :, : self.rows].any() and not got[:, :, -2 * self.rows : -self.rows].any()


def test_reduction_far_out(emulation):
    far = FarOut(rows=32)
    x = far.zeros()
    far.tail(x)[:] = normal(0, 1, far.c, far.rows, far.w)
    sizes = [(1, 2, far.h, far.w), (far.h // far.rows, 2, far.c, far.w), (1, 2, far.c, far.h)]  # parts, then as x lies
    numels = [torch.Size(size).numel() for size in sizes]
    memory = sparse_array(sum(numels), torch.float32)
    emulation.call("triplet_pool_pass", far.shape, x, memory, first_block=far.last_block)
    maps = [part.view(size) for part, size in zip(memory.split(numels), sizes, strict=True)]
    tail = far.tail(x)[0]
    for axis, got in enumerate((maps[0][0, :, -far.rows :], maps[1][-1], maps[2][0, ..., -far.rows :])):
        assert torch.equal(got[0], tail.float().amax(axis))
        assert_as_accurate_as_eager(got[1], tail.float().sum(axis), tail.double().sum(axis))
    assert not maps[1][:2].any() and not maps[1][-2].any()


def test_gate_far_out(emulation):
    far = FarOut(rows=16)
    x, y, maps = far.zeros(), far.zeros(), far.maps(1)
    far.tail(x)[:] = normal(0, 1, far.c, far.rows, far.w)
    emulation.call("triplet_gate_forward", far.shape, x, pointers(maps), y, first_block=far.last_block)
    tail, tails = far.tail(x), far.tails(maps)
    far.check(y, gate_op._reference(tail, *tails), gate_op._reference(tail.double(), *(t.double() for t in tails)))


def test_pool_backward_far_out(emulation):
    far = FarOut(rows=16)
    grad_x, grads = far.zeros(), far.maps(2)
    indices = [sparse_array(grad[:, 0].numel(), torch.int32).view(1, *grad.shape[2:]) for grad in grads]
    tails = [indices[0], *(index[:, -far.rows :] for index in indices[1:])]
    for seed, (index, length) in enumerate(zip(tails, (far.rows, far.w, far.c), strict=True)):
        index[:] = normal(seed + 5, *index.shape).mul(1000).int() % length
    in_tail = [tails[0].clone(), *tails[1:]]
    indices[0] += far.h - far.rows
    emulation.call(
        "triplet_pool_backward", far.shape, pointers(grads), pointers(indices), grad_x, first_block=far.last_block
    )
    wide = [grad.double() for grad in far.tails(grads)]
    wide[0][:, 1] *= far.rows / far.h  # the mean is over all rows, a power of two as those of the tail are
    exact = pool_op._backward_reference(wide, in_tail, far.tail(grad_x).double())
    eager = pool_op._backward_reference([grad.float() for grad in wide], in_tail, far.tail(grad_x))
    far.check(grad_x, eager, exact)
