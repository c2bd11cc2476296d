"""pytest-benchmark cases of most ops and of an index's search: a quick check for regressions during development.

`make bench` times each case within seconds, and pytest-benchmark can compare runs (`--benchmark-compare`). The numbers
in the documentation come from `python -m benchmarks` instead, which verifies the answers and also measures other
implementations. The test suite runs each case once, untimed.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hashengine import HammingIndex, nn, ops

FEATURES = (8, 64, 28, 28)  # a batch of feature maps: N, C, H, W
ACTIVATIONS = (1024, 64)  # images, bits


def backward(outputs: Sequence[Tensor], inputs: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """A function that computes the gradient of the inputs. It can be called repeatedly."""
    outputs = [y for y in outputs if y.requires_grad]
    grads = [torch.ones_like(y) for y in outputs]
    return lambda: torch.autograd.grad(outputs, inputs, grads, retain_graph=True)


def gate_maps(x: Tensor) -> list[Tensor]:
    """Random maps of the shapes that `triplet_gate` requires for x."""
    n, c, h, w = x.shape
    return [torch.randn(n, 1, c, w), torch.randn(n, 1, h, c), torch.randn(n, 1, h, w)]


TRIPLET_ATTENTION = nn.TripletAttention()
ATTENTION: dict[str, Callable[[Tensor], Any]] = {
    "simam": lambda x: (ops.simam(x),),
    "simam_energy": lambda x: (ops.simam_energy(x),),
    "triplet_pool": ops.triplet_pool,
    "triplet_gate": lambda x: (ops.triplet_gate(x, *gate_maps(x)),),
    "triplet_attention": lambda x: (TRIPLET_ATTENTION(x),),
}


@pytest.mark.parametrize("op", ATTENTION)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_attention(benchmark, op, direction):
    x = torch.randn(FEATURES).requires_grad_(direction == "backward")
    if direction == "forward":
        (y, *_) = benchmark(ATTENTION[op], x)
        assert y.isfinite().all()
    else:
        (grad,) = benchmark(backward(ATTENTION[op](x), x))
        assert grad.shape == x.shape


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_greedy_sign(benchmark, direction):
    u = torch.randn(ACTIVATIONS).requires_grad_(direction == "backward")
    if direction == "forward":
        b, _ = benchmark(ops.greedy_sign, u, 0.1)
        assert b.abs().eq(1).all()
    else:
        (grad,) = benchmark(backward(ops.greedy_sign(u, 0.1), u))
        assert grad.shape == u.shape


def test_pack_bits(benchmark):
    assert benchmark(ops.pack_bits, torch.randn(ACTIVATIONS)).shape == (1024, 8)


def test_unpack_bits(benchmark):
    assert benchmark(ops.unpack_bits, ops.pack_bits(torch.randn(ACTIVATIONS))).shape == ACTIVATIONS


@pytest.mark.parametrize("bits", [64, 256])
@pytest.mark.parametrize("queries", [1, 100])
def test_search(benchmark, bits, queries):
    rng = np.random.default_rng(0)
    index = HammingIndex(bits)
    index.add(rng.integers(0, 256, (100_000, bits // 8), dtype=np.uint8))
    batch = rng.integers(0, 256, (queries, bits // 8), dtype=np.uint8)
    distances, ids = benchmark(index.search, batch, 10)
    assert distances.shape == ids.shape == (queries, 10)


def test_hamming_topk(benchmark):
    codes = ops.pack_bits(torch.randn(20_000, 64))
    distances, _ = benchmark(ops.hamming_topk, codes[:10], codes, 10)
    assert (distances[:, 0] == 0).all()
