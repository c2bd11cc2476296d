"""The sign, packing and attention ops on a GPU, against eager torch or the same ops on the CPU. Skipped without a GPU.

tests/cuda tests the logic of the kernels without a GPU. These tests run the compiled kernels and the binding on a GPU.
"""

from collections.abc import Callable

import pytest
import torch

from hashengine import _native, nn, ops
from hashengine.ops.triplet_attention import triplet_attention_inference
from tests.helpers.eager import eager_greedy_sign, eager_simam, eager_triplet, triplet_parameters
from tests.helpers.layouts import LAYOUTS, feature_map
from tests.helpers.numerics import assert_as_accurate_as_eager

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or _native.build_config().get("build") != "cuda",
    reason="needs a GPU and the native CUDA module",
)
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((1, 1, 1, 1), (3, 4, 5, 6), (4, 33, 64, 9), (64, 64, 8, 8))
# Some have planes that SimAM's kernels hold in a warp, in a block or in a cluster, and one has larger planes.
FEATURE_MAPS = ((2, 64, 7, 7), (3, 5, 13, 11), (2, 16, 56, 56), (1, 3, 224, 224), (1, 2, 700, 701), (2, 2048, 7, 7))


def on_gpu(layout: str, dtype: torch.dtype, shape=(3, 4, 5, 6), seed: int = 0) -> torch.Tensor:
    """Return `feature_map` on the GPU, with the same strides."""
    u = feature_map(layout, dtype, shape, seed)
    if layout == "expanded":
        return u[:1, ..., :1].cuda().expand(u.shape)
    return torch.empty_strided(u.shape, u.stride(), dtype=dtype, device="cuda").copy_(u)


@pytest.mark.parametrize("layout", LAYOUTS[:-1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_greedy_sign_is_as_accurate_as_eager(layout, dtype):
    for shape in SHAPES:
        u, grad_b = on_gpu(layout, dtype, shape), on_gpu("channels_last", dtype, shape, seed=1)
        inputs = u.detach().requires_grad_()
        b, penalty = ops.greedy_sign(inputs, 0.3)
        (grad,) = torch.autograd.grad((b, penalty), inputs, (grad_b, torch.full_like(penalty, 0.7)))
        eager = eager_greedy_sign(u, 0.3, grad_b, torch.tensor(0.7, dtype=dtype, device="cuda"))
        exact = eager_greedy_sign(
            u.double(), 0.3, grad_b.double(), torch.tensor(0.7, dtype=torch.float64, device="cuda")
        )
        assert torch.equal(b, eager[0]) and b.stride() == torch.empty_like(u).stride()
        if dtype != torch.float64:  # the float64 reference is no more accurate than the kernel
            assert_as_accurate_as_eager(penalty, eager[1].to(penalty.dtype), exact[1])
        assert_as_accurate_as_eager(grad, eager[2], exact[2])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_of_greedy_sign_and_pack_bits(layout, dtype):
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


def results_and_gradient(
    function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, upstream: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return y = function(x), and the gradient of x for the gradient `upstream` of y."""
    x = x.detach().requires_grad_()
    y = function(x)
    (grad,) = torch.autograd.grad(y, x, upstream.to(y.dtype))
    return y.detach(), grad


def to_gpu(parameters: list[list[torch.Tensor]], dtype: torch.dtype) -> list[list[torch.Tensor]]:
    return [[tensor.to("cuda", dtype) for tensor in tensors] for tensors in parameters]


@pytest.mark.parametrize("layout", LAYOUTS[:-1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", FEATURE_MAPS, ids=str)
def test_simam_is_as_accurate_as_eager(shape, dtype, layout):
    x, upstream = on_gpu(layout, dtype, shape), on_gpu("contiguous", dtype, shape, seed=1)
    fused = results_and_gradient(lambda x: ops.simam(x, 0.01), x, upstream)
    eager = results_and_gradient(lambda x: eager_simam(x, 0.01), x, upstream)
    exact = results_and_gradient(lambda x: eager_simam(x, 0.01), x.double(), upstream)
    assert fused[0].stride() == torch.empty_like(x).stride()
    for mine, theirs, want in zip(fused, eager, exact, strict=True):
        assert_as_accurate_as_eager(mine, theirs, want)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape", FEATURE_MAPS, ids=str)
def test_triplet_attention_is_as_accurate_as_eager(shape, training, dtype, layout):
    x, upstream = on_gpu(layout, dtype, shape), on_gpu("contiguous", dtype, shape, seed=1)
    doubles = to_gpu(triplet_parameters(3), torch.float64)
    reals = doubles if dtype == torch.float64 else to_gpu(triplet_parameters(3), torch.float32)
    fused = results_and_gradient(lambda x: ops.triplet_attention(x, *reals, training)[0], x, upstream)
    eager = results_and_gradient(lambda x: eager_triplet(x, reals, training), x, upstream)
    exact = results_and_gradient(lambda x: eager_triplet(x, doubles, training), x.double(), upstream)
    assert fused[0].stride() == torch.empty_like(x).stride()
    for mine, theirs, want in zip(fused, eager, exact, strict=True):
        assert_as_accurate_as_eager(mine, theirs, want)
    if not training:
        assert_as_accurate_as_eager(triplet_attention_inference(x, *reals), eager[0], exact[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_and_statistics_of_triplet_attention_are_close_to_those_of_the_cpu(dtype):
    torch.manual_seed(0)
    layers = [nn.TripletAttention().double().to(device) for device in ("cpu", "cuda")]
    layers[1].load_state_dict(layers[0].state_dict())
    for layer in layers:
        for step in range(2):
            x = feature_map("contiguous", dtype, (4, 8, 9, 7), seed=step).to(next(layer.parameters()).device)
            layer(x).double().square().sum().backward()
    tolerance = {} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-3}  # sums over 4 * 8 * 9 * 7 rounded terms
    for cpu, gpu in zip(layers[0].parameters(), layers[1].parameters(), strict=True):
        torch.testing.assert_close(gpu.grad.cpu(), cpu.grad, **tolerance)
    torch.testing.assert_close([b.cpu() for b in layers[1].buffers()], list(layers[0].buffers()), **tolerance)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_of_the_attention_ops(layout):
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    x = on_gpu(layout, torch.float32).requires_grad_()
    parameters = to_gpu(triplet_parameters(3), torch.float32)
    torch.library.opcheck(torch.ops.hashengine.simam.default, (x, 0.1), test_utils=checks)
    if layout != "empty":
        arguments = (x, *parameters, True, 1e-5)
        torch.library.opcheck(torch.ops.hashengine.triplet_attention.default, arguments, test_utils=checks)
    arguments = (x.detach(), *parameters, 1e-5)
    torch.library.opcheck(torch.ops.hashengine.triplet_attention_inference.default, arguments, test_utils=checks)


def test_triplet_attention_with_ties_and_nan_gives_the_indices_of_the_cpu():
    x = feature_map("contiguous", torch.float32, (2, 6, 9, 8)).round()
    parameters = triplet_parameters(3, torch.float32)
    for value in (None, torch.nan):
        if value is not None:
            x[1, 2, 3, 4] = x[1, 2, 5, 4] = value
        want = torch.ops.hashengine.triplet_attention(x, *parameters, False, 1e-5)
        got = torch.ops.hashengine.triplet_attention(x.cuda(), *to_gpu(parameters, torch.float32), False, 1e-5)
        assert torch.equal(got[4].cpu(), want[4])  # the indices
        assert torch.equal(got[0].isnan().cpu(), want[0].isnan())


@pytest.mark.parametrize("layer", [nn.SimAM, nn.TripletAttention])
def test_layers_run_on_another_stream_in_a_graph_and_under_autocast(layer):
    module = layer().cuda()
    x = on_gpu("channels_last", torch.bfloat16, (4, 32, 14, 14)).requires_grad_()

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        y = module(x)
        return y, torch.autograd.grad(y, x, torch.ones_like(y))[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            want = step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    graph.replay()
    assert all(map(torch.equal, got, want))
    with torch.autocast("cuda", torch.bfloat16):
        assert all(map(torch.equal, step(), want))
    assert len({step()[1].double().sum().item() for _ in range(10)}) == 1


@pytest.mark.parametrize("layer", [nn.SimAM, nn.TripletAttention])
def test_layers_compile_as_one_graph(layer):
    module = layer().cuda()
    x = on_gpu("channels_last", torch.float32, (2, 8, 9, 7))
    upstream = on_gpu("contiguous", torch.float32, (2, 8, 9, 7), seed=1)
    want = results_and_gradient(module, x, upstream)
    got = results_and_gradient(torch.compile(module, fullgraph=True, backend="aot_eager"), x, upstream)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_simam_and_triplet_attention_of_more_than_two_to_the_31_elements():
    shape = (3, 1024, 1024, 700)  # 2.2e9 values, in bfloat16, so that x and y fit in GPU memory
    x = torch.randn(shape[0], 1, *shape[2:], device="cuda").to(torch.bfloat16).repeat(1, shape[1], 1, 1)
    x[-1, -1] += 1
    y = ops.simam(x)
    for plane in ((0, 0), (-1, -2), (-1, -1)):
        alone = ops.simam(x[plane][None, None].clone())[0, 0]
        torch.testing.assert_close(y[plane], alone, rtol=2**-7, atol=0)
    del y
    parameters = to_gpu(triplet_parameters(3), torch.float32)
    y = triplet_attention_inference(x, *parameters)
    last = triplet_attention_inference(x[-1:].clone(), *parameters)
    torch.testing.assert_close(y[-1:], last, rtol=2**-7, atol=0)


def test_repeated_runs_of_greedy_sign_give_the_same_penalty():
    u = on_gpu("contiguous", torch.float32, (64, 64, 33, 8))
    assert len({ops.greedy_sign(u, 0.1)[1].item() for _ in range(20)}) == 1


def test_greedy_sign_and_pack_bits_run_on_the_current_stream_and_in_a_graph():
    """A capture fails on a launch on another stream, on a synchronization, and if the host reads a value."""
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
def test_the_ops_run_on_the_device_of_the_tensor():
    u = torch.randn(100, 64, device="cuda:1")
    b, penalty = ops.greedy_sign(u, 0.1)
    assert b.device == penalty.device == u.device
    assert torch.equal(ops.pack_bits(u).cpu(), ops.pack_bits(u.cpu()))
    x = u.view(10, 10, 8, 8)
    for layer in (nn.SimAM().cuda(1), nn.TripletAttention().cuda(1)):
        assert layer(x).device == u.device


def test_greedy_sign_of_nan_is_minus_one_with_a_nan_penalty():
    u = torch.full((4, 8), torch.nan, device="cuda")
    b, penalty = ops.greedy_sign(u, 0.1)
    assert penalty.isnan() and b.eq(-1).all()
