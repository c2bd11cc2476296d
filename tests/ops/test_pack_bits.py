"""pack_bits and unpack_bits against numpy, for every dtype, and on strided inputs."""

import numpy as np
import pytest
import torch
from torch.library import opcheck

from hashengine import ops
from hashengine.ops.pack_bits import _pack_reference, _unpack_reference
from tests.helpers.eager import special_values
from tests.helpers.layouts import DTYPES

OPS = torch.ops.hashengine


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bool])
@pytest.mark.parametrize("shape", [(0, 8), (8,), (5, 24), (2, 3, 64), (301, 128)])
def test_packing_equals_numpy(dtype, shape):
    u = torch.randn(shape, generator=torch.Generator().manual_seed(4)).to(dtype)
    bits = u if dtype == torch.bool else u >= 0
    codes = ops.pack_bits(u)
    assert codes.dtype == torch.uint8 and codes.is_contiguous()
    np.testing.assert_array_equal(codes.numpy(), np.packbits(bits.numpy(), axis=-1))
    assert torch.equal(ops.unpack_bits(codes), bits)
    assert torch.equal(_pack_reference(u), codes) and torch.equal(_unpack_reference(codes), bits)
    opcheck(OPS.pack_bits.default, (u,))
    opcheck(OPS.unpack_bits.default, (codes,))


def test_strided_inputs_are_packed_like_contiguous_copies():
    u = torch.randn(16, 40, generator=torch.Generator().manual_seed(4))
    assert torch.equal(ops.pack_bits(u.T[::2, :8]), ops.pack_bits(u.T[::2, :8].contiguous()))
    codes = ops.pack_bits(u)
    assert torch.equal(ops.unpack_bits(codes[:, ::2]), ops.unpack_bits(codes[:, ::2].contiguous()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_packing_agrees_with_greedy_sign(dtype):
    u = torch.cat([special_values(dtype), torch.randn(6).to(dtype)])
    assert torch.equal(ops.unpack_bits(ops.pack_bits(u)), ops.greedy_sign(u, 0.1)[0] > 0)
