"""The native CUDA ops on a GPU, against the same ops on the CPU; skipped where there is none.

The kernels' logic is proved without a GPU, in test_cuda_emulation; here stands what only a device shows.
"""

import pytest
import torch

from hashengine import _native, ops
from tests.layouts import LAYOUTS, feature_map
from tests.numerics import assert_as_accurate_as_eager
from tests.test_code_ops import formula

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or _native.build_config().get("build") != "cuda",
    reason="needs a GPU and the native CUDA module",
)
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((1, 1, 1, 1), (3, 4, 5, 6), (4, 33, 64, 9), (64, 64, 8, 8))


def on_gpu(layout: str, dtype: torch.dtype, shape=(3, 4, 5, 6), seed: int = 0) -> torch.Tensor:
    """As `feature_map`, with the same strides."""
    u = feature_map(layout, dtype, shape, seed)
    if layout == "expanded":
        return u[:1, ..., :1].cuda().expand(u.shape)
    return torch.empty_strided(u.shape, u.stride(), dtype=dtype, device="cuda").copy_(u)


@pytest.mark.parametrize("layout", LAYOUTS[:-1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_greedy_sign_equals_the_formula(layout, dtype):
    for shape in SHAPES:
        u, grad_b = on_gpu(layout, dtype, shape), on_gpu("channels_last", dtype, shape, seed=1)
        inputs = u.detach().requires_grad_()
        b, penalty = ops.greedy_sign(inputs, 0.3)
        (grad,) = torch.autograd.grad((b, penalty), inputs, (grad_b, torch.full_like(penalty, 0.7)))
        eager = formula(u, 0.3, grad_b, torch.tensor(0.7, dtype=dtype, device="cuda"))
        exact = formula(u.double(), 0.3, grad_b.double(), torch.tensor(0.7, dtype=torch.float64, device="cuda"))
        assert torch.equal(b, eager[0]) and b.stride() == torch.empty_like(u).stride()
        if dtype != torch.float64:  # there the exact value is added up no better than the kernel's
            assert_as_accurate_as_eager(penalty, eager[1].to(penalty.dtype), exact[1])
        assert_as_accurate_as_eager(grad, eager[2], exact[2])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(layout, dtype):
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    u = on_gpu(layout, dtype)
    torch.library.opcheck(torch.ops.hashengine.greedy_sign.default, (u.requires_grad_(), 0.1), test_utils=checks)
    rows = u.detach().flatten(1)
    torch.library.opcheck(torch.ops.hashengine.pack_bits.default, (rows,))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bool])
@pytest.mark.parametrize("shape", [(0, 8), (8,), (5, 24), (301, 128), (70_000, 64)])
def test_packing_equals_the_cpu(dtype, shape):
    u = torch.randn(shape, generator=torch.Generator().manual_seed(4)).to(dtype)
    codes = ops.pack_bits(u.cuda())
    assert torch.equal(codes.cpu(), ops.pack_bits(u))
    assert torch.equal(ops.unpack_bits(codes).cpu(), ops.unpack_bits(codes.cpu()))


def test_every_run_gives_the_same_bits():
    u = on_gpu("contiguous", torch.float32, (64, 64, 33, 8))
    assert len({ops.greedy_sign(u, 0.1)[1].item() for _ in range(20)}) == 1


def test_takes_the_current_stream_and_a_graph():
    """In a capture every launch on another stream, every synchronisation and every look at a value is an error."""
    u = on_gpu("contiguous", torch.float32, (64, 64, 8, 8)).flatten(1)
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        ops.pack_bits(ops.greedy_sign(u, 0.1)[0])
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        b, penalty = ops.greedy_sign(u, 0.1)
        codes = ops.pack_bits(b)
    u.normal_()
    graph.replay()
    want_b, want_penalty = ops.greedy_sign(u, 0.1)
    assert torch.equal(b, want_b) and torch.equal(penalty, want_penalty)
    assert torch.equal(codes, ops.pack_bits(u))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_takes_the_tensors_device():
    u = torch.randn(100, 64, device="cuda:1")
    b, penalty = ops.greedy_sign(u, 0.1)
    assert b.device == penalty.device == u.device
    assert torch.equal(ops.pack_bits(u).cpu(), ops.pack_bits(u.cpu()))


def test_nan_does_not_stop_the_device():
    u = torch.full((4, 8), torch.nan, device="cuda")
    b, penalty = ops.greedy_sign(u, 0.1)
    assert penalty.isnan() and b.eq(-1).all()
