"""triplet_attention's native CPU kernels against the formulas: SIMD levels, types, layouts, odd shapes, NaN, ties."""

import pytest
import torch
from torch import Tensor

from hashengine import _native
from hashengine.ops.triplet_attention import _backward_reference, _reference
from tests.helpers.layouts import feature_map
from tests.helpers.numerics import assert_as_accurate_as_eager

pytestmark = pytest.mark.skipif(not _native.available(), reason="the native module is not built")

OPS = torch.ops.hashengine
LEVELS = ("scalar", "avx2")  # avx512 takes avx2's
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
EPS = 1e-5
# x [N, C, H, W] with kernel size and branches. One row, one value, rows of fewer and more than eight values, more rows
# than a strip of the convolution has, chains of more than 64 additions, and batches that are split into parts.
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


@pytest.fixture(params=LEVELS)
def level(request, monkeypatch):
    from hashengine import _C

    if request.param not in _C.simd_levels():
        pytest.skip(f"this CPU has no {request.param}")
    monkeypatch.setenv("HASHENGINE_SIMD_LEVEL", request.param)


def parameters(branches: int, kernel_size: int, dtype: torch.dtype) -> list[list[Tensor]]:
    """conv_weight, bn_weight, bn_bias, running_mean, running_var."""
    generator = torch.Generator().manual_seed(1)

    def tensors(*shape: int, low: float) -> list[Tensor]:
        return [(torch.rand(shape, generator=generator) + low).to(dtype) for _ in range(branches)]

    weight = tensors(1, 2, kernel_size, kernel_size, low=-0.5)
    return [weight, tensors(1, low=0.5), tensors(1, low=-0.5), tensors(1, low=-0.5), tensors(1, low=0.5)]


def wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


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
    """By the rule over (got, eager, exact) of several inputs together; in float64, but for the order of sums."""
    for name in names:
        got, eager, exact = (torch.cat([result[name].flatten() for result in kind]) for kind in zip(*runs, strict=True))
        if got.dtype == torch.float64:
            torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12 * exact.abs().max().item())
        else:
            assert_as_accurate_as_eager(got, eager, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("training", [True, False])
def test_is_as_accurate_as_the_reference(level, dtype, memory_format, training):
    all_runs = []
    for shape, kernel_size, branches in SHAPES:
        runs = []
        for seed in range(3):
            x, grad_y = (feature_map("contiguous", dtype, shape, 2 * seed + i) for i in range(2))
            x = x.contiguous(memory_format=FORMATS[memory_format])
            params = parameters(branches, kernel_size, wide(x))
            got, eager = run_native(x, grad_y, params, training), run_reference(x, grad_y, params, training)
            exact_params = [[tensor.double() for tensor in kind] for kind in params]
            exact = run_reference(x.double(), grad_y.double(), exact_params, training)
            assert got["y"].stride() == got["grad_x"].stride() == x.stride()
            assert torch.equal(got["index"], exact["index"])
            assert all(got[name].dtype == eager[name].dtype for name in exact)
            runs.append((got, eager, exact))
        assert_accurate(runs, ("y", "pooled", "response", "grad_x"))
        all_runs += runs
    # A few numbers a branch: only many together make errors that can be compared.
    assert_accurate(all_runs, ("mean", "var", "grad_conv", "grad_weight", "grad_bias"))


@pytest.mark.parametrize("memory_format", FORMATS)
def test_sums_of_long_axes_keep_their_accuracy(level, memory_format):
    """Far from zero, where an addition after the other would lose the most."""
    for shape in ((1, 2048, 2, 3), (1, 2, 700, 3), (1, 2, 3, 700)):
        x = feature_map("contiguous", torch.float32, shape).add(30).contiguous(memory_format=FORMATS[memory_format])
        pooled = OPS.triplet_attention(x, *parameters(3, 3, x.dtype), False, EPS)[3]
        eager, exact = (_reference(v, *parameters(3, 3, v.dtype), False, EPS)[3] for v in (x, x.double()))
        assert_as_accurate_as_eager(pooled, eager, exact)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("values", ["constant", "few values", "minus infinity"])
def test_a_tied_maximum_has_the_lowest_index(level, memory_format, values):
    x = feature_map("contiguous", torch.float32, (2, 37, 11, 19)).round()
    x = x.contiguous(memory_format=FORMATS[memory_format])
    if values != "few values":
        x.fill_(2.0 if values == "constant" else -torch.inf)
    params = parameters(3, 3, x.dtype)
    index = OPS.triplet_attention(x, *params, False, EPS)[4]
    assert torch.equal(index, _reference(x, *params, False, EPS)[4])
    assert values == "few values" or not index.any()


@pytest.mark.parametrize("memory_format", FORMATS)
def test_nan_and_infinity_go_where_torch_sends_them(level, memory_format):
    x = feature_map("contiguous", torch.float32, (3, 20, 9, 21)).contiguous(memory_format=FORMATS[memory_format])
    x[0, 3, 2, 20] = x[0, 7, 2, 20] = x[0, 3, 8, 0] = torch.nan
    x[1, 4, 4, 4] = torch.inf
    x[1, 5, 4, 4] = -torch.inf
    params, grad_y = parameters(3, 3, x.dtype), torch.ones_like(x)
    got, want = run_native(x, grad_y, params, False), run_reference(x, grad_y, params, False)
    assert torch.equal(got["index"], want["index"])
    for name in ("y", "pooled", "response"):
        assert torch.equal(got[name].isnan(), want[name].isnan()), name
        torch.testing.assert_close(got[name], want[name], equal_nan=True)
    assert got["y"][0].isnan().any() and got["y"][2].isfinite().all()


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", [(1, 70, 18, 9), (3, 33, 17, 20), (17, 6, 5, 9)])
def test_the_number_of_threads_changes_no_bit(memory_format, shape):
    x, grad_y = (feature_map("contiguous", torch.float32, shape, seed) for seed in (2, 3))
    x = x.contiguous(memory_format=FORMATS[memory_format])
    params = parameters(3, 7, x.dtype)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run_native(x, grad_y, params, True))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert_same_bits(result, results[0])


@pytest.mark.parametrize("layout", ["sliced", "expanded", "permuted"])
def test_other_strides_give_what_a_contiguous_copy_gives(layout):
    x = feature_map("contiguous").permute(0, 2, 1, 3) if layout == "permuted" else feature_map(layout)
    params, grad_y = parameters(3, 7, x.dtype), feature_map("channels_last", shape=tuple(x.shape), seed=3)
    got = run_native(x, grad_y, params, True)
    assert_same_bits(got, run_native(x.contiguous(), grad_y.contiguous(), params, True))
    assert got["y"].stride() == got["grad_x"].stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_inference_equals_the_forward_in_eval_mode(level, dtype, memory_format):
    for shape, kernel_size, branches in SHAPES:
        x = feature_map("contiguous", dtype, shape).contiguous(memory_format=FORMATS[memory_format])
        params = parameters(branches, kernel_size, wide(x))
        want, *_ = OPS.triplet_attention(x, *params, False, EPS)
        got = OPS.triplet_attention_inference(x, *params, EPS)
        assert torch.equal(got, want) and got.stride() == want.stride()


def test_parameters_of_another_type_are_taken_by_value():
    x, grad_y = feature_map("contiguous"), feature_map("contiguous", seed=3)
    half = parameters(3, 7, torch.bfloat16)
    single = [[tensor.float() for tensor in kind] for kind in half]
    assert_same_bits(run_native(x, grad_y, half, True), run_native(x, grad_y, single, True))


def test_an_empty_batch_gives_empty_results_and_zero_gradients():
    x, params = feature_map("empty"), parameters(3, 7, torch.float32)
    got = run_native(x, x, params, False)
    assert got["y"].shape == got["grad_x"].shape == x.shape
    assert not got["grad_conv"].any() and not got["grad_weight"].any() and not got["grad_bias"].any()
    assert torch.equal(got["mean"], torch.cat(params[3])) and torch.equal(got["var"], torch.cat(params[4]))
    assert OPS.triplet_attention_inference(x, *params, EPS).shape == x.shape


def test_errors_are_one_line():
    x, params = feature_map("contiguous"), parameters(3, 3, torch.float32)
    outputs = OPS.triplet_attention(x, *params, True, EPS)

    def backward(grad_y: Tensor = x, **changed: Tensor):
        saved = dict(zip(("mean", "var", "pooled", "index", "response"), outputs[1:], strict=True)) | changed
        return OPS.triplet_attention_backward(grad_y, x, *params[:3], *saved.values(), True, EPS)

    cases = [
        (lambda: OPS.triplet_attention(x[0], *params, True, EPS), ValueError, r"x must be \[N, C, H, W\]"),
        (lambda: OPS.triplet_attention(x.int(), *params, True, EPS), TypeError, "x must be float64"),
        (lambda: OPS.triplet_attention(x[:0], *params, True, EPS), ValueError, "more than one value a branch"),
        (lambda: OPS.triplet_attention_inference(x[:, :, :0], *params, EPS), ValueError, "at least one channel"),
        (
            lambda: OPS.triplet_attention(x, [*params[0][:2], torch.zeros(1, 2, 5, 5)], *params[1:], True, EPS),
            ValueError,
            r"conv_weight\[2\] must have the kernel size of conv_weight\[0\], 3, got 5",
        ),
        (
            lambda: OPS.triplet_attention(x, *params[:4], [torch.zeros(2)] * 3, True, EPS),
            ValueError,
            r"running_var\[0\] must be \[1\], got \[2\]",
        ),
        (lambda: backward(x[:2]), ValueError, "grad_y must be"),
        (lambda: backward(x.double()), ValueError, "grad_y must be"),
        (lambda: backward(index=outputs[4][1:]), ValueError, "index must be"),
        (lambda: backward(pooled=outputs[3].double()), ValueError, "pooled must be"),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message) as caught:
            call()
        assert str(caught.value).startswith("triplet_attention") and "\n" not in str(caught.value)
