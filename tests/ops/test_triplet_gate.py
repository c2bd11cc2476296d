"""triplet_gate: every layout and dtype against the formula in float64."""

import pytest
import torch
from torch.library import opcheck

from hashengine import ops
from hashengine.ops.triplet_gate import _backward_reference, _reference
from tests.helpers.eager import gate_maps
from tests.helpers.layouts import DTYPES, LAYOUTS, MEMORY_FORMATS, assert_gradients, feature_map
from tests.helpers.numerics import assert_close_to_exact
from tests.helpers.threads import with_threads

OPS = torch.ops.hashengine
# [N, C, H, W]. There are planes of one row and of one value, and planes whose rows do not fill whole vectors.
SHAPES = [(2, 3, 1, 37), (5, 4, 1, 1), (9, 8, 7, 7), (1, 70, 9, 3), (2, 13, 5, 11)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("branches", [2, 3])
def test_schema_fake_autograd_and_gradients_are_consistent(layout, branches):
    x = feature_map(layout, torch.float64)
    inputs = (x.requires_grad_(), *(m if m is None else m.requires_grad_() for m in gate_maps(x, branches)))
    opcheck(OPS.triplet_gate.default, inputs)
    maps = [m for m in inputs[1:] if m is not None]
    assert_gradients(ops.triplet_gate, x, *maps)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_result_keeps_the_layout(layout):
    x = feature_map(layout)
    assert ops.triplet_gate(x, *gate_maps(x)).stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", MEMORY_FORMATS)
@pytest.mark.parametrize("branches", [2, 3])
def test_is_as_accurate_as_the_reference(dtype, layout, branches):
    for shape in SHAPES:
        x = feature_map(layout, dtype, shape, seed=2)
        grad_y = feature_map("contiguous", dtype, shape, seed=3)
        maps = gate_maps(x, branches)
        exact_maps = [None if value is None else value.double() for value in maps]
        y = OPS.triplet_gate(x, *maps)
        assert y.stride() == x.stride()
        assert_close_to_exact(y, _reference(x, *maps), _reference(x.double(), *exact_maps))
        grads = OPS.triplet_gate_backward(grad_y, x, *maps)
        eager = _backward_reference(grad_y, x, *maps)
        exact = _backward_reference(grad_y.double(), x.double(), *exact_maps)
        for results in list(zip(grads, eager, exact, strict=True))[: branches + 1]:
            assert_close_to_exact(*results)


def test_other_strides_give_the_result_of_a_contiguous_copy():
    x = feature_map("contiguous").permute(0, 2, 1, 3)
    maps = gate_maps(x)
    y = ops.triplet_gate(x, *maps)
    assert torch.equal(y, ops.triplet_gate(x.contiguous(), *maps)) and y.stride() == torch.empty_like(x).stride()


def test_maps_of_another_dtype_are_converted():
    x = feature_map("contiguous").permute(0, 2, 1, 3)
    halves = [value.half() for value in gate_maps(x)]
    grads = OPS.triplet_gate_backward(x, x, *halves)
    assert [grad.dtype for grad in grads] == [x.dtype, torch.half, torch.half, torch.half]
    assert torch.equal(ops.triplet_gate(x, *halves), ops.triplet_gate(x, *(value.float() for value in halves)))


def test_number_of_threads_does_not_change_the_bits():
    x = feature_map("contiguous", shape=(1, 70, 18, 9))
    one, three = with_threads(lambda: OPS.triplet_gate_backward(x, x, *gate_maps(x)), (1, 3))
    assert all(map(torch.equal, one, three))
