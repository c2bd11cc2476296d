"""Tensors and databases on the CPU with more than 2^31 elements, too many for signed 32-bit indices.

The tests need up to 17 GiB of free memory.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

import hashengine as he
from hashengine import _native, ops

FREE_GIB = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not _native.available(), reason="the native module is not built"),
]
large = pytest.mark.skipif(FREE_GIB < 17, reason=f"needs 17 GiB of free memory, got {FREE_GIB:.0f} GiB")


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    """2,049 samples of 2^20 values; only the first and the last sample are not zero."""
    x = torch.zeros(2049, 1024, 32, 32, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    for sample in (0, -1):
        x[sample] = torch.randn(x.shape[1:], generator=generator)
    assert x.numel() > 2**31
    return x


@large
@pytest.mark.parametrize("layer", [he.nn.SimAM, he.nn.TripletAttention])
def test_the_forward_of_a_large_batch_equals_that_of_single_samples(x: torch.Tensor, layer: type) -> None:
    layer = layer().eval()
    with torch.no_grad():
        y = layer(x)
        for sample in (slice(0, 1), slice(-1, None)):
            assert torch.equal(y[sample], layer(x[sample]))


@large
@pytest.mark.parametrize("layer", [he.nn.SimAM, he.nn.TripletAttention])
def test_the_backward_of_a_large_batch_equals_that_of_small_batches(x: torch.Tensor, layer: type) -> None:
    """In evaluation mode, samples are independent: eight samples have the same gradients in a large and a small batch.

    With fewer than eight samples, TripletAttention sums each sample in parts, which changes the order of the sums.
    """
    layer = layer().eval()

    def gradient(x: torch.Tensor) -> torch.Tensor:
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(layer(leaf), leaf, x)[0]

    grad_x = gradient(x)
    for samples in (slice(0, 8), slice(-8, None)):
        assert torch.equal(grad_x[samples], gradient(x[samples]))


@large
def test_code_ops_on_a_large_tensor_equal_those_on_its_last_rows(x: torch.Tensor) -> None:
    u = x.view(-1, 1024)
    assert torch.equal(ops.pack_bits(u)[-5:], ops.pack_bits(u[-5:]))
    assert torch.equal(ops.greedy_sign(u, 0.1)[0][-5:], ops.greedy_sign(u[-5:], 0.1)[0])
    grad_u = torch.ops.hashengine.greedy_sign_backward(u, None, u, 0.1)  # without grad_penalty, grad_u is grad_b
    assert torch.equal(grad_u[-5:], u[-5:])


def test_search_of_more_than_2_31_codes(tmp_path: Path) -> None:
    """The codes are a sparse file; only the last three are not zero."""
    count = 2**31 + 1000
    codes = np.memmap(tmp_path / "codes", np.uint8, "w+", shape=(count, 1))
    codes[-3:] = [[7], [255], [7]]
    queries = torch.tensor([[255], [7]], dtype=torch.uint8)
    mapped = torch.from_numpy(codes)
    distances, positions = ops.hamming_topk(queries, mapped, 4)
    assert distances.tolist() == [[0, 5, 5, 8], [0, 0, 3, 3]]
    assert positions.tolist() == [[count - 2, count - 3, count - 1, 0], [count - 3, count - 1, 0, 1]]
    lims, _, positions = ops.hamming_range(queries, mapped, 2)
    assert lims.tolist() == [0, 1, 3] and positions.tolist() == [count - 2, count - 3, count - 1]
    counts, _ = ops.hamming_count(queries[:1], mapped)
    assert counts[0, [0, 5, 8]].tolist() == [1, 2, count - 3]
