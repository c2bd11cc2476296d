"""triplet_attention: SIMD levels, dtypes, layouts, unusual shapes, NaN and ties against the formula in torch."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import opcheck

from hashengine import ops
from hashengine.ops._check import wide_dtype
from hashengine.ops.triplet_attention import _backward_reference, _reference
from tests.helpers.eager import eager_pool, eager_triplet, triplet_parameters
from tests.helpers.layouts import DTYPES, LAYOUTS, MEMORY_FORMATS, assert_gradients, feature_map
from tests.helpers.numerics import assert_as_accurate_as_eager
from tests.helpers.threads import with_threads

OPS = torch.ops.hashengine
EPS = 1e-5
# (shape of x, kernel size, number of branches). There are planes of one row and of one value, rows of fewer and of more
# than eight values, more rows than the convolution (csrc/cpu/triplet/conv.h) processes at a time, sums of more than 64
# values, and batches that the kernels split into parts.
SHAPES = [
    ((2, 3, 1, 37), 7, 3),
    ((5, 4, 1, 1), 7, 3),
    ((2, 1, 9, 1), 3, 3),
    ((9, 8, 7, 7), 7, 3),
    ((2, 13, 5, 11), 7, 3),
    ((1, 40, 8, 16), 7, 3),
    ((1, 3, 70, 41), 9, 3),
    ((2, 150, 9, 20), 3, 2),
    ((3, 5, 66, 4), 1, 3),
]


def run(forward, backward, x: Tensor, grad_y: Tensor, params: list[list[Tensor]], training: bool) -> dict[str, Tensor]:
    outputs = forward(x, *params, training, EPS)
    gradients = backward(grad_y, x, *params[:3], *outputs[1:], training, EPS)
    names = ("y", "mean", "var", "pooled", "index", "response", "grad_x", "grad_conv", "grad_weight", "grad_bias")
    return dict(zip(names, (*outputs, *gradients), strict=True))


def run_native(x: Tensor, grad_y: Tensor, params: list[list[Tensor]], training: bool) -> dict[str, Tensor]:
    return run(OPS.triplet_attention, OPS.triplet_attention_backward, x, grad_y, params, training)


def run_reference(x: Tensor, grad_y: Tensor, params: list[list[Tensor]], training: bool) -> dict[str, Tensor]:
    return run(_reference, _backward_reference, x, grad_y, params, training)


def assert_same_bits(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    for name, value in want.items():
        assert torch.equal(got[name], value), name


def assert_accurate(runs: list[tuple[dict[str, Tensor], ...]], names: tuple[str, ...]) -> None:
    """Compare the named results of all runs at once, by `assert_as_accurate_as_eager` or, in float64, up to rounding.

    Each run is a tuple (got, eager, exact) of dictionaries from names to results.
    """
    for name in names:
        got, eager, exact = (torch.cat([result[name].flatten() for result in kind]) for kind in zip(*runs, strict=True))
        if got.dtype == torch.float64:
            torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12 * exact.abs().max().item())
        else:
            assert_as_accurate_as_eager(got, eager, exact)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("branches", [2, 3])
@pytest.mark.parametrize("training", [False, True])
def test_schema_fake_autograd_and_gradients_are_consistent(layout, branches, training):
    if layout == "empty" and training:
        pytest.skip("an empty batch has no statistics")
    x = feature_map(layout, torch.float64, (2, 3, 4, 2))
    weight, gamma, beta, mean, var = triplet_parameters(branches, kernel_size=3)
    learned = [t.requires_grad_() for t in (*weight, *gamma, *beta)]
    inputs = (x.clone().requires_grad_(), weight, gamma, beta, mean, var, training, 1e-5)
    opcheck(OPS.triplet_attention.default, inputs)

    def function(x: Tensor, *tensors: Tensor) -> Tensor:
        parts = [list(tensors[i * branches : (i + 1) * branches]) for i in range(3)]
        return ops.triplet_attention(x, *parts, mean, var, training)[0]

    assert_gradients(function, x, *learned)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("training", [False, True])
def test_values_and_gradients_are_as_accurate_as_eager(dtype, training):
    x = feature_map("contiguous", dtype, (4, 6, 9, 8))
    results, grads = [], []
    for kind in ("fused", "eager", "exact"):
        parameters = triplet_parameters(3, torch.float64 if kind == "exact" else torch.float32, kernel_size=3)
        inputs = (x.double() if kind == "exact" else x.clone()).requires_grad_()
        if kind == "fused":
            y, _, _ = ops.triplet_attention(inputs, *parameters, training)
        else:
            y = eager_triplet(inputs, parameters, training)
        y.backward(feature_map("contiguous", dtype, (4, 6, 9, 8), seed=5).to(y.dtype))
        results.append(y.detach())
        grads.append(inputs.grad)
    assert results[0].dtype == grads[0].dtype == dtype
    assert_as_accurate_as_eager(*results)
    assert_as_accurate_as_eager(*grads)


@pytest.mark.parametrize("branches", [2, 3])
@pytest.mark.parametrize("training", [False, True])
def test_equals_the_official_forward(branches, training):
    x = feature_map("contiguous", torch.float64)
    parameters = triplet_parameters(branches)
    y, mean, var = ops.triplet_attention(x, *parameters, training)
    torch.testing.assert_close(y, eager_triplet(x, parameters, training))
    response = F.conv2d(eager_pool(x, 2), parameters[0][0], padding=3)
    want = (response.mean(), response.var(correction=0)) if training else (parameters[3][0][0], parameters[4][0][0])
    torch.testing.assert_close((mean[0], var[0]), want)


def test_separate_pool_convolution_and_gate_give_the_same_result():
    x = feature_map("contiguous", torch.float64)
    weight, gamma, beta, mean, var = triplet_parameters(3)
    maps = [
        F.batch_norm(F.conv2d(pool, weight[i], padding=3), mean[i], var[i], gamma[i], beta[i])
        for i, pool in enumerate(ops.triplet_pool(x))
    ]
    want, _, _ = ops.triplet_attention(x, weight, gamma, beta, mean, var, False)
    torch.testing.assert_close(ops.triplet_gate(x, *maps), want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", MEMORY_FORMATS)
@pytest.mark.parametrize("training", [True, False])
def test_is_as_accurate_as_the_reference(simd_level, dtype, memory_format, training):
    all_runs = []
    for shape, kernel_size, branches in SHAPES:
        runs = []
        for seed in range(3):
            x, grad_y = (feature_map("contiguous", dtype, shape, 2 * seed + i) for i in range(2))
            x = x.contiguous(memory_format=MEMORY_FORMATS[memory_format])
            params = triplet_parameters(branches, wide_dtype(x), kernel_size)
            got, eager = run_native(x, grad_y, params, training), run_reference(x, grad_y, params, training)
            exact_params = [[tensor.double() for tensor in kind] for kind in params]
            exact = run_reference(x.double(), grad_y.double(), exact_params, training)
            assert got["y"].stride() == got["grad_x"].stride() == x.stride()
            assert torch.equal(got["index"], exact["index"])
            assert all(got[name].dtype == eager[name].dtype for name in exact)
            runs.append((got, eager, exact))
        assert_accurate(runs, ("y", "pooled", "response", "grad_x"))
        all_runs += runs
    # A run gives only a few values of each of the following results. Their errors vary by chance, so the values of all
    # runs are compared at once.
    assert_accurate(all_runs, ("mean", "var", "grad_conv", "grad_weight", "grad_bias"))


@pytest.mark.parametrize("memory_format", MEMORY_FORMATS)
def test_sums_of_long_axes_keep_their_accuracy(simd_level, memory_format):
    """The values are far from zero, because sequential addition of such values loses much accuracy."""
    for shape in ((1, 2048, 2, 3), (1, 2, 700, 3), (1, 2, 3, 700)):
        x = (
            feature_map("contiguous", torch.float32, shape)
            .add(30)
            .contiguous(memory_format=MEMORY_FORMATS[memory_format])
        )
        pooled = OPS.triplet_attention(x, *triplet_parameters(3, x.dtype, 3), False, EPS)[3]
        eager, exact = (_reference(v, *triplet_parameters(3, v.dtype, 3), False, EPS)[3] for v in (x, x.double()))
        assert_as_accurate_as_eager(pooled, eager, exact)


@pytest.mark.parametrize("memory_format", MEMORY_FORMATS)
@pytest.mark.parametrize("values", ["constant", "few values", "minus infinity"])
def test_a_tied_maximum_has_the_lowest_index(simd_level, memory_format, values):
    x = feature_map("contiguous", torch.float32, (2, 37, 11, 19)).round()
    x = x.contiguous(memory_format=MEMORY_FORMATS[memory_format])
    if values != "few values":
        x.fill_(2.0 if values == "constant" else -torch.inf)
    params = triplet_parameters(3, x.dtype, 3)
    index = OPS.triplet_attention(x, *params, False, EPS)[4]
    assert torch.equal(index, _reference(x, *params, False, EPS)[4])
    assert values == "few values" or not index.any()


@pytest.mark.parametrize("memory_format", MEMORY_FORMATS)
def test_nan_and_infinity_propagate_as_in_torch(simd_level, memory_format):
    x = feature_map("contiguous", torch.float32, (3, 20, 9, 21)).contiguous(memory_format=MEMORY_FORMATS[memory_format])
    x[0, 3, 2, 20] = x[0, 7, 2, 20] = x[0, 3, 8, 0] = torch.nan
    x[1, 4, 4, 4] = torch.inf
    x[1, 5, 4, 4] = -torch.inf
    params, grad_y = triplet_parameters(3, x.dtype, 3), torch.ones_like(x)
    got, want = run_native(x, grad_y, params, False), run_reference(x, grad_y, params, False)
    assert torch.equal(got["index"], want["index"])
    for name in ("y", "pooled", "response"):
        assert torch.equal(got[name].isnan(), want[name].isnan()), name
        torch.testing.assert_close(got[name], want[name], equal_nan=True)
    assert got["y"][0].isnan().any() and got["y"][2].isfinite().all()


@pytest.mark.parametrize("memory_format", MEMORY_FORMATS)
@pytest.mark.parametrize("shape", [(1, 70, 18, 9), (3, 33, 17, 20), (17, 6, 5, 9)])
def test_number_of_threads_does_not_change_the_bits(memory_format, shape):
    x, grad_y = (feature_map("contiguous", torch.float32, shape, seed) for seed in (2, 3))
    x = x.contiguous(memory_format=MEMORY_FORMATS[memory_format])
    params = triplet_parameters(3, x.dtype)
    first, *others = with_threads(lambda: run_native(x, grad_y, params, True))
    for result in others:
        assert_same_bits(result, first)


@pytest.mark.parametrize("layout", ["sliced", "expanded", "permuted"])
def test_other_strides_give_the_result_of_a_contiguous_copy(layout):
    x = feature_map("contiguous").permute(0, 2, 1, 3) if layout == "permuted" else feature_map(layout)
    params, grad_y = triplet_parameters(3, x.dtype), feature_map("channels_last", shape=tuple(x.shape), seed=3)
    got = run_native(x, grad_y, params, True)
    assert_same_bits(got, run_native(x.contiguous(), grad_y.contiguous(), params, True))
    assert got["y"].stride() == got["grad_x"].stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", MEMORY_FORMATS)
def test_inference_equals_the_forward_in_eval_mode(simd_level, dtype, memory_format):
    for shape, kernel_size, branches in SHAPES:
        x = feature_map("contiguous", dtype, shape).contiguous(memory_format=MEMORY_FORMATS[memory_format])
        params = triplet_parameters(branches, wide_dtype(x), kernel_size)
        want, *_ = OPS.triplet_attention(x, *params, False, EPS)
        got = OPS.triplet_attention_inference(x, *params, EPS)
        assert torch.equal(got, want) and got.stride() == want.stride()


def test_parameters_of_another_dtype_are_converted():
    x, grad_y = feature_map("contiguous"), feature_map("contiguous", seed=3)
    half = triplet_parameters(3, torch.bfloat16)
    single = [[tensor.float() for tensor in kind] for kind in half]
    assert_same_bits(run_native(x, grad_y, half, True), run_native(x, grad_y, single, True))


def test_parameters_of_several_dtypes_and_strides_are_converted():
    x, grad_y = feature_map("contiguous"), feature_map("contiguous", seed=3)
    params = triplet_parameters(3, torch.float32)
    dtypes = itertools.cycle([torch.float16, torch.float32, torch.bfloat16, torch.float64, torch.float16])
    mixed = [[tensor.to(dtype) for tensor, dtype in zip(kind, dtypes, strict=False)] for kind in params]
    transposed = [tensor.half().mT.contiguous().mT for tensor in params[0]]
    for given in (mixed, [transposed, *([tensor.half() for tensor in kind] for kind in params[1:])]):
        single = [[tensor.float().contiguous() for tensor in kind] for kind in given]
        assert_same_bits(run_native(x, grad_y, given, True), run_native(x, grad_y, single, True))


@pytest.mark.parametrize("training", [True, False])
def test_parameters_in_half_precision_are_converted_together(training):
    """Each conversion is a kernel on a GPU, which takes as long as the whole op on a small map."""
    params = [[t.bfloat16().requires_grad_() for t in kind] for kind in triplet_parameters(3, torch.float32)[:3]]
    statistics = [[tensor.bfloat16() for tensor in kind] for kind in triplet_parameters(3, torch.float32)[3:]]
    x = feature_map("contiguous", torch.bfloat16).requires_grad_()
    with torch.profiler.profile() as forward:
        y = OPS.triplet_attention(x, *params, *statistics, training, EPS)[0]
    with torch.profiler.profile() as backward:
        y.backward(torch.ones_like(y))
    assert count(forward, "aten::_to_copy") == count(forward, "aten::cat") == 1
    assert count(backward, "aten::cat") == 1 and count(backward, "aten::_to_copy") == 4  # and the three gradients
    for tensor in sum(params, []):
        assert tensor.grad is not None and tensor.grad.dtype == torch.bfloat16 and tensor.grad.shape == tensor.shape


def count(profile: torch.profiler.profile, op: str) -> int:
    """The number of calls of an op."""
    return sum(event.count for event in profile.key_averages() if event.key == op)


def test_an_empty_batch_gives_empty_results_and_zero_gradients():
    x, params = feature_map("empty"), triplet_parameters(3, torch.float32)
    got = run_native(x, x, params, False)
    assert got["y"].shape == got["grad_x"].shape == x.shape
    assert not got["grad_conv"].any() and not got["grad_weight"].any() and not got["grad_bias"].any()
    assert torch.equal(got["mean"], torch.cat(params[3])) and torch.equal(got["var"], torch.cat(params[4]))
    assert OPS.triplet_attention_inference(x, *params, EPS).shape == x.shape
