"""Inputs of the triplet kernels, and calls of their launchers in the emulation (tests/emulation)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hashengine.ops import _branches, _check
from tests.emulation.harness import FORWARD, Emulation, array, sparse_array
from tests.helpers.numerics import assert_as_accurate_as_eager

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]  # in the order of the C++ enumeration
LAYOUTS = ("contiguous", "channels_last")
H200_MULTIPROCESSORS = 132  # the launchers derive the sizes of their grids from it

# Shapes [N, C, H, W] that the kernels of triplet_pool and triplet_gate split into tiles in different ways.
TILED_SHAPES = [
    (3, 1, 1, 1),  # one element per sample
    (2, 13, 5, 11),  # no size is a multiple of the vector width
    # The remaining comments describe the contiguous layout.
    # small slices, processed several at a time; the map over C is computed in several parts
    (1, 40, 7, 7),
    # each row is too long for one tile, so the map over W is computed in parts; elements are loaded as vectors
    (1, 3, 4, 264),
    # a slice is too large for one block, so the map over H is computed in parts; elements are loaded one by one
    (1, 2, 57, 59),
]


def normal(seed: int, *sizes: int) -> Tensor:
    """Return normally distributed float64 values."""
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pointers(tensors: Sequence[Tensor]) -> Tensor:
    """Return the addresses of contiguous tensors, in an int64 tensor as the launchers take them."""
    assert all(tensor.is_contiguous() for tensor in tensors)
    return torch.tensor([tensor.data_ptr() for tensor in tensors])


class Launchers:
    """Calls the launchers for one shape, dtype and layout of x, on an emulated device with H200_MULTIPROCESSORS.

    x, and all other tensors of its shape, begin `offset` elements after an address that is aligned to 16 bytes.
    """

    def __init__(
        self,
        emulation: Emulation,
        x: Tensor,
        layout: str,
        branches: int = 3,
        kernel_size: int = 1,
        offset: int = 0,
        schedule: int = FORWARD,
        capability: int = 90,
    ) -> None:
        self.emulation, self.x, self.offset, self.schedule, self.capability = emulation, x, offset, schedule, capability
        self.order = (0, 2, 3, 1) if layout == "channels_last" else (0, 1, 2, 3)
        self.map_sizes = [_branches.map_shape(x, branch) for branch in _branches.BRANCHES[:branches]]
        self.map_dtype = _check.wide_dtype(x)
        self.shape = torch.tensor(
            [*x.shape, branches, kernel_size, LAYOUTS.index(layout), DTYPES.index(x.dtype)]
        )  # as in tests/emulation/triplet_shape.h

    def call(self, function: str, *arguments: object) -> None:
        """Run a launcher."""
        self.emulation.call(
            function,
            self.shape,
            *arguments,
            schedule=self.schedule,
            capability=self.capability,
            multiprocessors=H200_MULTIPROCESSORS,
        )

    def workspace(self, op: str) -> Tensor:
        """Return the scratch memory of a launcher, filled with NaN."""
        return self.emulation.workspace(
            op, self.shape, capability=self.capability, multiprocessors=H200_MULTIPROCESSORS
        )

    def to_memory(self, values: Tensor) -> Tensor:
        """Return a copy of `values` [N, C, H, W] in the memory order of the layout."""
        return array(values.numel(), values.dtype, self.offset).copy_(values.permute(self.order).flatten())

    def result(self) -> tuple[Tensor, Tensor]:
        """Return memory for a result of the shape of x, and its view as [N, C, H, W]."""
        memory = array(self.x.numel(), self.x.dtype, self.offset)
        view = memory.view([self.x.shape[axis] for axis in self.order])
        return memory, view.permute([self.order.index(axis) for axis in range(4)])

    def maps(self, channels: int, dtype: torch.dtype) -> list[Tensor]:
        """Return memory for one map per branch, [N, channels, rows, columns]."""
        return [array(n * channels * r * c, dtype).view(n, channels, r, c) for n, r, c in self.map_sizes]

    def flat(self, channels: int, dtype: torch.dtype) -> Tensor:
        """Return memory for the maps of all branches, one after another."""
        return array(channels * sum(map(math.prod, self.map_sizes)), dtype)


def check_runs(runs: list[tuple[Tensor, ...]], eager: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> None:
    """Check that all runs give equal bits, that indices are exact and that other results are as accurate as eager."""
    for got, reference, truth, *others in zip(runs[0], eager, exact, *runs[1:], strict=True):
        assert all(torch.equal(got, other) for other in others)
        if truth.dtype == torch.int32:
            assert torch.equal(got, truth)
        elif reference.dtype == torch.float64:  # the float64 reference is no more accurate than the kernel
            torch.testing.assert_close(got, truth, rtol=0, atol=1e-13 * truth.abs().max().item())
        else:  # kernels return maps in the type of their sums; the binding rounds them to the dtype of x
            assert_as_accurate_as_eager(got.to(reference.dtype), reference, truth)


class HugeInput:
    """x [1, 16, 2^21, 128] of float16 has 2^32 elements. Only the last `rows` rows of H are read and written.

    Memory is sparse: only the pages that are touched exist. The tests run the last block of the grid alone.
    """

    c, h, w = 16, 2**21, 128
    shape = torch.tensor([1, c, h, w, 3, 1, LAYOUTS.index("contiguous"), DTYPES.index(torch.float16)])

    def __init__(self, rows: int) -> None:
        self.rows, self.last_block = rows, self.h // rows - 1

    def zeros(self) -> Tensor:
        """Return zeros of the shape of x, in sparse memory."""
        return sparse_array(self.c * self.h * self.w, torch.float16).view(1, self.c, self.h, self.w)

    def maps(self, channels: int) -> list[Tensor]:
        """Return one map per branch, in sparse memory, random in the part that belongs to the last rows."""
        sizes = [(channels, self.c, self.w), (channels, self.h, self.c), (channels, self.h, self.w)]
        maps = [sparse_array(n * r * c, torch.float32).view(1, n, r, c) for n, r, c in sizes]
        for seed, tail in enumerate(self.tails(maps)):
            tail[:] = normal(seed, *tail.shape)
        return maps

    def tail(self, values: Tensor) -> Tensor:
        """Return the last rows."""
        return values[:, :, -self.rows :]

    def tails(self, maps: list[Tensor]) -> list[Tensor]:
        """Return the parts of the maps that belong to the last rows. The map of the first branch has no axis H."""
        return [maps[0], *map(self.tail, maps[1:])]

    def check(self, got: Tensor, eager: Tensor, exact: Tensor) -> None:
        """Check that the last `rows` rows are accurate; of the other rows, that the first and last `rows` are zero."""
        assert_as_accurate_as_eager(self.tail(got), eager, exact)
        assert not got[:, :, : self.rows].any() and not got[:, :, -2 * self.rows : -self.rows].any()


class AttentionCase:
    """An x, a gradient and random parameters, and the results that kernels and plain torch compute from them."""

    EPS = 1e-5
    SAVED = ("pooled", "index", "response", "mean", "var")
    GRADIENTS = ("grad_x", "grad_conv_weight", "grad_bn_weight", "grad_bn_bias")

    def __init__(
        self, x: Tensor, layout: str = "contiguous", branches: int = 3, kernel_size: int = 7, offset: int = 0
    ) -> None:
        self.x, self.layout, self.branches, self.kernel_size, self.offset = x, layout, branches, kernel_size, offset
        self.grad_y = normal(1, *x.shape).to(x.dtype)
        self.wide = _check.wide_dtype(x)
        self.lists = [  # conv_weight, bn_weight, bn_bias, running_mean, running_var
            [(normal(seed + 10 * b, *size) * scale + shift).to(self.wide) for b in range(branches)]
            for seed, size, scale, shift in (
                (2, (1, 2, kernel_size, kernel_size), 0.3, 0),
                (3, (1,), 0.2, 1),
                (4, (1,), 0.5, 0),
                (5, (1,), 0.2, 0),
                (6, (1,), 0, 1.3),
            )
        ]

    def launchers(self, emulation: Emulation, schedule: int = FORWARD, capability: int = 90) -> Launchers:
        return Launchers(
            emulation, self.x, self.layout, self.branches, self.kernel_size, self.offset, schedule, capability
        )

    def parameter_pointers(self) -> Tensor:
        return pointers([tensor for tensors in self.lists for tensor in tensors])

    def rounding_errors_of_batch_norm(self, exact: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return upper limits for the errors of BatchNorm's gradients if each term of their sums is rounded once.

        The terms may cancel, so these errors can be large relative to the gradients.
        """
        product = self.grad_y.double() * self.x.double() / self.branches
        names = _branches.BRANCHES[: self.branches]
        sizes = [math.prod(_branches.map_shape(self.x, branch)) for branch in names]
        rows = []
        for i, (branch, response) in enumerate(zip(names, exact["response"].split(sizes), strict=True)):
            normalized = (response - exact["mean"][i]) * torch.rsqrt(exact["var"][i] + self.EPS)
            gate = torch.sigmoid(normalized * self.lists[1][i].double() + self.lists[2][i].double())
            terms = _branches.sum_over(product.abs(), branch).flatten() * gate * (1 - gate)
            rows.append((torch.dot(terms, normalized.abs()), terms.sum()))
        unit = torch.finfo(self.wide).eps / 2
        columns = zip(*rows, strict=True)
        return {name: unit * torch.stack(row) for name, row in zip(self.GRADIENTS[2:], columns, strict=True)}

    def formula(self, dtype: torch.dtype, training: bool) -> dict[str, Tensor]:
        """Return the results of plain torch in `dtype`. Those in float64 count as exact."""
        # A plain import of this module gives a function, because hashengine.ops has a function of the same name.
        from importlib import import_module

        op = import_module("hashengine.ops.triplet_attention")
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        lists = [[t.to(wide) for t in tensors] for tensors in self.lists]
        x, grad_y = self.x.to(dtype), self.grad_y.to(dtype)
        y, mean, var, pooled, index, response = op._reference(x, *lists, training, self.EPS)
        saved = (mean, var, pooled, index, response)
        grads = op._backward_reference(grad_y, x, *lists[:3], *saved, training, self.EPS)
        return {
            **dict(y=y, mean=mean, var=var, pooled=pooled, index=index, response=response),
            **dict(zip(self.GRADIENTS, grads, strict=True)),
        }

    def forward(self, emulation: Emulation, training: bool, schedule: int = FORWARD) -> dict[str, Tensor]:
        """Return y and the arrays that the forward saves."""
        launchers = self.launchers(emulation, schedule)
        memory, y = launchers.result()
        saved = {
            "pooled": launchers.flat(2, self.wide),
            "index": launchers.flat(1, torch.int32),
            "response": launchers.flat(1, self.wide),
            "mean": array(self.branches, self.wide),
            "var": array(self.branches, self.wide),
        }
        saved_pointers = pointers([saved[name] for name in self.SAVED])
        launchers.call(
            "triplet_forward", launchers.to_memory(self.x), memory, self.parameter_pointers(), saved_pointers, training,
            self.EPS, launchers.workspace("triplet_forward"),
        )  # fmt: skip
        return {"y": y, **saved}

    def inference(self, emulation: Emulation, schedule: int = FORWARD, capability: int = 90) -> Tensor:
        """Return y, computed with the running statistics."""
        launchers = self.launchers(emulation, schedule, capability)
        memory, y = launchers.result()
        launchers.call(
            "triplet_inference", launchers.to_memory(self.x), memory, self.parameter_pointers(), self.EPS,
            launchers.workspace("triplet_inference"),
        )  # fmt: skip
        return y

    def backward(
        self, emulation: Emulation, saved: dict[str, Tensor], training: bool, schedule: int = FORWARD
    ) -> dict[str, Tensor]:
        """Return the gradients, computed from the arrays that a forward saved."""
        launchers = self.launchers(emulation, schedule)
        memory, grad_x = launchers.result()
        size = self.kernel_size
        grads = [array(n, self.wide) for n in (self.branches * 2 * size * size, self.branches, self.branches)]
        saved_arrays = [saved[name].contiguous() for name in self.SAVED]
        launchers.call(
            "triplet_backward", launchers.to_memory(self.grad_y), launchers.to_memory(self.x),
            self.parameter_pointers(), pointers(saved_arrays), memory, pointers(grads), training, self.EPS,
            launchers.workspace("triplet_backward"),
        )  # fmt: skip
        grads[0] = grads[0].view(self.branches, 2, size, size)
        return dict(zip(self.GRADIENTS, (grad_x, *grads), strict=True))
