"""Triplet attention's CUDA kernels, run on the host by the emulation, against the formula in plain torch.

Each case goes through forward and backward: all launches, and the maps that they hand to each other. Which paths a
shape takes: float32 rows of a multiple of 4 and half-precision rows of a multiple of 8 go by 16-byte vectors, other
even half-precision rows by 4 bytes, the rest element by element. Small slices go several at once, a slot each. Rows
over 128, tiles over 1024 to 4096 positions, and 16 or more slices leave maps in parts.
"""

import importlib

import pytest
import torch
from torch import Tensor

from hashengine.ops._check import wide_dtype
from tests.emulation.harness import FORWARD, REVERSE, SCHEDULES, array, load_emulation
from tests.helpers.numerics import assert_as_accurate_as_eager

formula = importlib.import_module("hashengine.ops.triplet_attention")  # the package has the op under this name
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]  # in the order of the C++ enumeration
EPS = 1e-5
SAVED = ("pooled", "index", "response", "mean", "var")
LAYOUTS = ("contiguous", "channels_last")
THREE_LAUNCHES = 80  # a compute capability whose inference keeps no sample in shared memory
GRADIENTS = ("grad_x", "grad_conv_weight", "grad_bn_weight", "grad_bn_bias")


@pytest.fixture(scope="module")
def emulation():
    return load_emulation()


def normal(seed: int, *sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Case:
    """An x, a gradient and parameters, and what the kernels and the formula make of them."""

    def __init__(self, x: Tensor, layout: str = "contiguous", branches: int = 3, kernel_size: int = 7, offset: int = 0):
        self.x, self.layout, self.offset = x, layout, offset
        self.grad_y = normal(1, *x.shape).to(x.dtype)
        self.wide = wide_dtype(x)
        self.sizes = [*x.shape, branches, kernel_size, int(layout == "channels_last"), DTYPES.index(x.dtype)]
        self.lists = [
            [(normal(seed + 10 * b, *size) * scale + shift).to(self.wide) for b in range(branches)]
            for seed, size, scale, shift in (
                (2, (1, 2, kernel_size, kernel_size), 0.3, 0),
                (3, (1,), 0.2, 1),
                (4, (1,), 0.5, 0),
                (5, (1,), 0.2, 0),
                (6, (1,), 0, 1.3),
            )
        ]
        n, c, h, w = x.shape
        self.map_numel = sum([n * c * w, n * h * c, n * h * w][:branches])

    def roundings_of_batch_norm(self, exact: dict[str, Tensor]) -> dict[str, Tensor]:
        """What a unit roundoff in each term makes of BatchNorm's gradients, whose terms cancel by chance."""
        product = self.grad_y.double() * self.x.double() / len(self.lists[0])
        sizes = [formula._map_numel(self.x, branch) for _, branch in formula._branches(self.lists[0])]
        rows = []
        for (i, branch), response in zip(formula._branches(self.lists[0]), exact["response"].split(sizes), strict=True):
            normal = (response - exact["mean"][i]) * torch.rsqrt(exact["var"][i] + EPS)
            gate = torch.sigmoid(normal * self.lists[1][i].double() + self.lists[2][i].double())
            terms = formula.sum_over(product.abs(), branch).flatten() * gate * (1 - gate)
            rows.append((torch.dot(terms, normal.abs()), terms.sum()))
        unit = torch.finfo(self.wide).eps / 2
        return {name: unit * torch.stack(row) for name, row in zip(GRADIENTS[2:], zip(*rows, strict=True), strict=True)}

    def formula(self, dtype: torch.dtype, training: bool) -> dict[str, Tensor]:
        """By plain torch; in float64 the exact results."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        lists = [[t.to(wide) for t in tensors] for tensors in self.lists]
        x, grad_y = self.x.to(dtype), self.grad_y.to(dtype)
        y, mean, var, pooled, index, response = formula._reference(x, *lists, training, EPS)
        saved = (mean, var, pooled, index, response)
        grads = formula._backward_reference(grad_y, x, *lists[:3], *saved, training, EPS)
        return {
            **dict(y=y, mean=mean, var=var, pooled=pooled, index=index, response=response),
            **dict(zip(GRADIENTS, grads, strict=True)),
        }

    def to_memory(self, values: Tensor) -> Tensor:
        order = (0, 2, 3, 1) if self.layout == "channels_last" else (0, 1, 2, 3)
        return array(values.numel(), values.dtype, self.offset).copy_(values.permute(order).flatten())

    def from_memory(self, memory: Tensor) -> Tensor:
        n, c, h, w = self.x.shape
        if self.layout == "channels_last":
            return memory.view(n, h, w, c).permute(0, 3, 1, 2)
        return memory.view(n, c, h, w)

    def arguments(self, *lists: list[Tensor]) -> tuple[Tensor, Tensor]:
        shape = torch.tensor(self.sizes)
        return shape, torch.tensor([tensor.data_ptr() for tensors in lists for tensor in tensors])

    def forward(self, emulation, training: bool, schedule: int = FORWARD) -> dict[str, Tensor]:
        x, y = self.to_memory(self.x), array(self.x.numel(), self.x.dtype, self.offset)
        shape, pointers = self.arguments(*self.lists)
        branches = len(self.lists[0])
        sizes = (2 * self.map_numel, self.map_numel, self.map_numel, branches, branches)
        saved = [
            array(size, torch.int32 if name == "index" else self.wide) for name, size in zip(SAVED, sizes, strict=True)
        ]
        _, saved_pointers = self.arguments(saved)
        workspace = emulation.workspace("triplet_forward", shape)
        emulation.call(
            "triplet_forward", shape, x, y, pointers, saved_pointers, training, EPS, workspace, schedule=schedule
        )
        return {"y": self.from_memory(y), **dict(zip(SAVED, saved, strict=True))}

    def inference(self, emulation, schedule: int = FORWARD, capability: int = 90) -> Tensor:
        x, y = self.to_memory(self.x), array(self.x.numel(), self.x.dtype, self.offset)
        shape, pointers = self.arguments(*self.lists)
        workspace = emulation.workspace("triplet_inference", shape, capability=capability)
        emulation.call(
            "triplet_inference", shape, x, y, pointers, EPS, workspace, schedule=schedule, capability=capability
        )
        return self.from_memory(y)

    def backward(
        self, emulation, saved: dict[str, Tensor], training: bool, schedule: int = FORWARD
    ) -> dict[str, Tensor]:
        x, grad_y = self.to_memory(self.x), self.to_memory(self.grad_y)
        grad_x = array(x.numel(), x.dtype, self.offset)
        shape, pointers = self.arguments(*self.lists)
        branches, size = self.sizes[4:6]
        grads = [array(numel, self.wide) for numel in (branches * 2 * size * size, branches, branches)]
        _, saved_pointers = self.arguments([saved[name].contiguous() for name in SAVED])
        _, grad_pointers = self.arguments(grads)
        workspace = emulation.workspace("triplet_backward", shape)
        emulation.call(
            "triplet_backward", shape, grad_y, x, pointers, saved_pointers, grad_x, grad_pointers, training, EPS,
            workspace, schedule=schedule,
        )  # fmt: skip
        grads[0] = grads[0].view(branches, 2, size, size)
        return dict(zip(GRADIENTS, (self.from_memory(grad_x), *grads), strict=True))


def check(emulation, case: Case, training: bool = True, schedules=(FORWARD,)) -> None:
    eager, exact = case.formula(case.x.dtype, training), case.formula(torch.float64, training)
    runs = []
    for schedule in schedules:
        got = case.forward(emulation, training, schedule)
        got.update(case.backward(emulation, got, training, schedule))
        runs.append(got)
    unit = case.roundings_of_batch_norm(exact)
    for name, value in runs[0].items():
        assert all(torch.equal(value, other[name]) for other in runs[1:]), name
        if name == "index":
            assert torch.equal(value, exact[name])
        elif name in unit:  # ten roundings in a term: product, sums, gate, slope, normal
            assert ((value.double() - exact[name]).abs() <= 10 * unit[name]).all(), name
        elif value.dtype == torch.float64:  # where the exact value is added up no better
            torch.testing.assert_close(value, exact[name], rtol=0, atol=1e-13 * exact[name].abs().max().item())
        else:
            assert_as_accurate_as_eager(value, eager[name].to(value.dtype), exact[name])
    if not training:
        for schedule in schedules:
            assert torch.equal(case.inference(emulation, schedule, THREE_LAUNCHES), runs[0]["y"])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(emulation, dtype, layout):
    check(emulation, Case(normal(0, 2, 16, 7, 8).to(dtype), layout))


@pytest.mark.parametrize(
    "shape",
    [
        (3, 1, 1, 1),  # an element a sample
        (2, 1, 1, 33),  # a branch is a row
        (1, 5, 9, 1),
        (2, 13, 5, 11),  # divides nothing
        (1, 40, 7, 7),  # slots, five slices at once, and several parts over C
        (1, 3, 4, 260),  # rows in parts, by vectors
        (1, 2, 57, 59),  # tiles in parts, element by element
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_shape(emulation, shape, layout):
    check(emulation, Case(normal(0, *shape).float(), layout))


@pytest.mark.parametrize("shape", [(1, 16, 40, 112), (1, 4, 26, 42)], ids=str)
def test_half_precision_in_parts(emulation, shape):
    check(emulation, Case(normal(0, *shape).bfloat16()))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_schedule_gives_the_same_bits(emulation, training, layout):
    check(emulation, Case(normal(0, 2, 17, 6, 8).float(), layout), training, SCHEDULES)


def test_more_blocks_than_a_warp_has_threads(emulation):
    """The block that merges the others' sums has some in each of its first two warps."""
    check(emulation, Case(normal(0, 40, 1, 2, 3).float(), kernel_size=1), True, (FORWARD, REVERSE))


@pytest.mark.parametrize(
    "branches, kernel_size, layout",
    [(2, 7, "channels_last"), (2, 3, "contiguous"), (3, 1, "contiguous"), (3, 9, "contiguous"), (3, 13, "contiguous")],
)
def test_every_kernel(emulation, branches, kernel_size, layout):
    check(emulation, Case(normal(0, 1, 9, 3, 8).float(), layout, branches, kernel_size))


def test_the_largest_kernel(emulation):
    """Its border leaves room for small tiles only. Forward alone: the weights' gradient has a block a weight."""
    case = Case(normal(0, 1, 9, 3, 40).float(), kernel_size=47)
    eager, exact = case.formula(torch.float32, True), case.formula(torch.float64, True)
    got = case.forward(emulation, True)
    for name in ("y", "response", "mean", "var"):
        assert_as_accurate_as_eager(got[name], eager[name], exact[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_unaligned_pointers(emulation, dtype):
    check(emulation, Case(normal(0, 1, 5, 6, 8).to(dtype), offset=1), False)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 17, 6, 8), (1, 33, 5, 140)], ids=str)
def test_ties_go_to_the_lowest_index(emulation, shape, layout):
    case = Case(normal(0, *shape).round().clamp(-1, 1).half(), layout)
    assert (case.formula(torch.float64, True)["index"] == 0).float().mean() > 0.2
    check(emulation, case, True, (FORWARD, 7))
    check(emulation, Case(torch.zeros(shape).half(), layout, kernel_size=3), False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(emulation, dtype):
    """NaN reaches what torch's max and convolution let it reach, and the first one is the maximum; so do infinities."""
    x = normal(0, 2, 5, 6, 8).to(dtype)
    x[0, 1, 2, 3] = x[0, 1, 4, 3] = x[0, 3, 2, 5] = torch.nan
    x[1, 2, 2, 1] = torch.inf
    x[1, 4, 0, 0] = -torch.inf
    case = Case(x, kernel_size=3)
    expected, got = case.formula(torch.float64, False), case.forward(emulation, False)
    for name, value in got.items():
        exact = expected[name].to(value.dtype)
        assert torch.equal(value.isnan(), exact.isnan()), name
        assert torch.equal(value.isinf(), exact.isinf()), name
    assert torch.equal(got["index"], expected["index"])
    assert got["y"].isnan().any() and not got["y"].isnan().all()
    for capability in (90, THREE_LAUNCHES):
        assert torch.equal(case.inference(emulation, capability=capability).isnan(), got["y"].isnan())


@pytest.mark.parametrize("training", [False, True])
def test_no_sample(emulation, training):
    """The running statistics, and no gradient; the op refuses to train on nothing."""
    case = Case(normal(0, 0, 3, 4, 8).float())
    if not training:
        got = case.forward(emulation, False)
        assert got["mean"].tolist() == [mean.item() for mean in case.lists[3]]
        assert got["var"].tolist() == [var.item() for var in case.lists[4]]
    grads = case.backward(emulation, case.formula(torch.float32, False), training)
    assert all(not grads[name].any() for name in GRADIENTS)
