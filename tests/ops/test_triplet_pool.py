"""triplet_pool: every layout and dtype against the formula in float64."""

import pytest
import torch
from torch.library import opcheck

from hashengine import ops
from hashengine.ops.triplet_pool import _backward_reference, _reference
from tests.helpers.layouts import DTYPES, LAYOUTS, MEMORY_FORMATS, assert_gradients, feature_map
from tests.helpers.numerics import assert_close_to_exact
from tests.helpers.threads import with_threads

OPS = torch.ops.hashengine
# [N, C, H, W]. There are planes of one row and of one value, and planes whose rows do not fill whole vectors.
SHAPES = [(2, 3, 1, 37), (5, 4, 1, 1), (9, 8, 7, 7), (1, 70, 9, 3), (2, 13, 5, 11)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_schema_fake_autograd_and_gradients_are_consistent(layout):
    x = feature_map(layout, torch.float64)
    opcheck(OPS.triplet_pool.default, (x.clone().requires_grad_(),))
    opcheck(OPS.triplet_pool.default, (x,))
    assert_gradients(ops.triplet_pool, x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", MEMORY_FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_is_as_accurate_as_the_reference(dtype, layout, shape):
    x = feature_map(layout, dtype, shape)
    got, exact = OPS.triplet_pool(x), _reference(x.double())
    for pool, eager, want in zip(got[:3], _reference(x), exact, strict=False):
        assert_close_to_exact(pool, eager, want)
    for index, want in zip(got[3:], exact[3:], strict=True):
        assert torch.equal(index, want)
    generator = torch.Generator().manual_seed(3)
    grads = [torch.randn(pool.shape, generator=generator, dtype=torch.float64).to(dtype) for pool in got[:3]]
    indices = list(got[3:])
    grad_x = OPS.triplet_pool_backward(grads, indices, x)
    assert grad_x.dtype == dtype and grad_x.stride() == x.stride()
    want = _backward_reference([grad.double() for grad in grads], indices, x.double())
    assert_close_to_exact(grad_x, _backward_reference(grads, indices, x), want)


def test_gradient_of_tied_maxima_goes_to_the_lowest_index():
    x = torch.zeros(1, 3, 2, 2, requires_grad=True)
    for pool, lowest in zip(ops.triplet_pool(x), ((..., 0, slice(None)), (..., 0), (0, 0)), strict=True):
        (grad,) = torch.autograd.grad(pool[:, 0].sum(), x, retain_graph=True)
        want = torch.zeros_like(x)
        want[lowest] = 1
        torch.testing.assert_close(grad, want)


def test_other_strides_give_the_result_of_a_contiguous_copy():
    x = feature_map("contiguous").permute(0, 2, 1, 3)
    for pool, want in zip(ops.triplet_pool(x), ops.triplet_pool(x.contiguous()), strict=True):
        assert torch.equal(pool, want)


def test_number_of_threads_does_not_change_the_bits():
    x = feature_map("contiguous", shape=(1, 70, 18, 9))
    one, three = with_threads(lambda: OPS.triplet_pool(x), (1, 3))
    assert all(map(torch.equal, one, three))
