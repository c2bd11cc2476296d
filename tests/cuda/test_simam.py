"""SimAM's CUDA kernels, run on the host by the emulation of CUDA's execution model (tests/emulation).

A schedule is the order in which the emulator runs blocks and threads.
"""

import numpy as np
import pytest
import torch

from hashengine.ops._check import wide_dtype
from tests.emulation.harness import FORWARD, SCHEDULES, Emulation, array, load_emulation, sparse_array
from tests.helpers.architectures import PAIRS

LAM = 0.01
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
HALVES = DTYPES[2:]


@pytest.fixture(scope="module")
def emulation() -> Emulation:
    return load_emulation()


class Case:
    """Random x and grad_y [samples, channels, positions] in one of the layouts, and methods that compute results."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        channels_last: bool = False,
        offset: int = 0,
        mean: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.shape, self.dtype, self.channels_last, self.offset = shape, dtype, channels_last, offset
        random = torch.Generator().manual_seed(seed)
        self.x = self.map(torch.randn(shape, generator=random, dtype=torch.float64) + mean)
        self.grad_y = self.map(torch.randn(shape, generator=random, dtype=torch.float64))
        samples, channels, positions = shape
        self.sizes = (samples, channels, positions, channels_last, dtype)

    def map(self, values: torch.Tensor | None = None) -> torch.Tensor:
        """Return memory for a feature map, filled with `values` or with NaN."""
        samples, channels, positions = self.shape
        memory = array(samples * channels * positions, self.dtype, self.offset)
        view = memory.view(samples, positions, channels).mT if self.channels_last else memory.view(self.shape)
        return view if values is None else view.copy_(values)

    def forward(self, emulation: Emulation, capability: int = 90, **options: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return y, and the means and variances, [samples, channels, 2]."""
        y, stats = self.map(), array(2 * self.shape[0] * self.shape[1], wide_dtype(self.x))
        workspace = emulation.workspace("simam", *self.sizes, capability=capability)
        arguments = (self.x, y, stats, *self.sizes, LAM, workspace)
        emulation.call("simam_forward", *arguments, capability=capability, **options)
        return y, stats.view(*self.shape[:2], 2)

    def backward(self, emulation: Emulation, stats: torch.Tensor, capability: int = 90, **options: int) -> torch.Tensor:
        """Return grad_x."""
        grad_x = self.map()
        workspace = emulation.workspace("simam_backward", *self.sizes, capability=capability)
        arguments = (self.grad_y, self.x, stats, grad_x, *self.sizes, LAM, workspace)
        emulation.call("simam_backward", *arguments, capability=capability, **options)
        return grad_x

    def exact(self) -> tuple[np.ndarray, ...]:
        """Return y, mean, variance and grad_x in numpy's longdouble, the gradient by the formula in simam.h."""
        x, grad_y = (tensor.double().numpy().astype(np.longdouble) for tensor in (self.x, self.grad_y))
        n = max(self.shape[2] - 1, 1)
        mean = x.mean(2, keepdims=True)
        d = x - mean
        variance = (d * d).sum(2, keepdims=True) / n
        v = variance + LAM
        gate = 1 / (1 + np.exp(-(d * d / (4 * v) + 0.5)))
        s = grad_y * x * gate * (1 - gate) * d / (2 * v)
        share = (s * d).sum(2, keepdims=True) / (n * v)
        grad_x = grad_y * gate + s - s.mean(2, keepdims=True) - d * share
        return x * gate, mean[..., 0], variance[..., 0], grad_x

    def eager(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return y and grad_x, computed with torch's ops in the dtype of x, in the form used by the paper's authors."""
        x = self.x.clone().requires_grad_()
        d = (x - x.mean(2, keepdim=True)).pow(2)
        y = x * torch.sigmoid(d / (4 * (d.sum(2, keepdim=True) / max(self.shape[2] - 1, 1) + LAM)) + 0.5)
        (grad_x,) = torch.autograd.grad(y, x, self.grad_y)
        return y.detach(), grad_x


def assert_as_accurate_as_eager(fused: torch.Tensor, eager: torch.Tensor, exact: np.ndarray, what: str) -> None:
    """Check like the function of this name in tests/helpers/numerics.py.

    Here `exact` is wider than float64, so results in float64 can be checked too.
    """
    fused_error, eager_error = (float(np.abs(t.double().numpy() - exact).max()) for t in (fused, eager))
    floor = torch.finfo(fused.dtype).eps * float(np.abs(exact).max())
    assert fused_error <= 2 * eager_error + floor, (
        f"{what}: {fused_error:.3e}, eager {eager_error:.3e}, floor {floor:.3e}"
    )


def check(emulation: Emulation, case: Case, schedules=SCHEDULES, capability: int = 90) -> None:
    """Check that results are accurate, and that every schedule gives the same bits."""
    exact_y, mean, variance, exact_grad = case.exact()
    eager_y, eager_grad = case.eager()
    runs = []
    for schedule in schedules:
        got_y, stats = case.forward(emulation, schedule=schedule, capability=capability)
        got_grad = case.backward(emulation, stats, schedule=schedule, capability=capability)
        runs.append((got_y, stats, got_grad))
    for got in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(got, runs[0], strict=True))
    got_y, stats, got_grad = runs[0]
    # A value of a sum passes through at most 32 additions in a thread, 5 in a warp, 16 in a block and 8 in a cluster.
    # 3 roundings follow. A squared deviation contains the rounding of the deviation twice, and the square of the mean's
    # error.
    roundoff = 64 * torch.finfo(stats.dtype).eps / 2
    scale = np.abs(case.x.double().numpy()).mean(2)
    assert (np.abs(stats[..., 0].numpy() - mean) <= roundoff * scale).all()
    assert (np.abs(stats[..., 1].numpy() - variance) <= 1.1 * roundoff * variance + 2 * (roundoff * scale) ** 2).all()
    assert_as_accurate_as_eager(got_y, eager_y, exact_y, "y")
    assert_as_accurate_as_eager(got_grad, eager_grad, exact_grad, "grad_x")


# --- NCHW: each kind of plan (csrc/cuda/simam/simam.cu), at its limits ------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
def test_planes_in_a_warp(emulation, dtype, offset):
    # A team of 1, 2, 4, ... lanes processes a plane. A lane holds up to 16 elements (8 of float64) or 4 vectors. The
    # 300 planes of one position need two blocks.
    for positions in [2, 7, 16, 17, 32, 49, 64, 196, 256]:
        check(emulation, Case((3, 7, positions), dtype, offset=offset), schedules=(FORWARD, 7))
    check(emulation, Case((100, 3, 1), dtype, offset=offset))
    check(emulation, Case((2, 37, 49), dtype, offset=offset))
    check(emulation, Case((1, 9, 512), dtype, offset=offset))


@pytest.mark.parametrize("dtype", DTYPES)
def test_planes_around_the_capacities_of_a_warp_and_a_block(emulation, dtype):
    width = {torch.float64: 1, torch.float32: 4}.get(dtype, 8)  # elements per vector
    held = 8 if dtype == torch.float64 else 4  # vectors per thread
    for vectors in (32 * held, 32 * held + 1, 512 * held, 512 * held + 1):
        check(emulation, Case((1, 2, vectors * width), dtype), schedules=(FORWARD, 7))
    for positions in (511, 513, 4095, 4097):  # odd: a thread loads one element at a time
        check(emulation, Case((1, 2, positions), dtype), schedules=(FORWARD, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_planes_in_a_cluster_and_larger(emulation, dtype):
    width = 4 if dtype == torch.float32 else 8
    check(emulation, Case((1, 3, 3 * 2048 * width), dtype), schedules=(FORWARD, 7))
    for vectors in (8 * 2048, 8 * 2048 + 1):
        check(emulation, Case((1, 1, vectors * width), dtype), schedules=(8,))
    for positions in (8 * 4096 - 1, 8 * 4096 + 1):  # odd: a thread loads one element at a time
        check(emulation, Case((1, 2, positions), dtype), schedules=(FORWARD, 7))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("positions", [16_392, 20_001])
def test_planes_larger_than_a_block_without_clusters(emulation, dtype, positions):
    check(emulation, Case((1, 3, positions), dtype), schedules=SCHEDULES, capability=80)


# --- NHWC: slabs ------------------------------------------------------------------------------------------------------
# A slab is a few adjacent channels of one sample. It has a row of these channels for each position.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 3, 8, 40, 72])
def test_slabs(emulation, dtype, channels):
    for positions in (1, 2, 49, 196):
        check(emulation, Case((3, channels, positions), dtype, channels_last=True), schedules=(FORWARD, 7))
    check(emulation, Case((2, channels, 50), dtype, channels_last=True, offset=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wide_slabs(emulation, dtype):
    check(emulation, Case((1, 2048, 4), dtype, channels_last=True))
    check(emulation, Case((2, 520, 9), dtype, channels_last=True))
    check(emulation, Case((2, 301, 2), dtype, channels_last=True))


@pytest.mark.parametrize("dtype", HALVES)
def test_slabs_in_a_cluster_and_larger(emulation, dtype):
    cases = [  # (channels, positions)
        (32, 257),  # a cluster of two
        (40, 1025),  # clusters of eight, and a slab with partial rows
        (32, 2048),  # the longest slab with rows of 64 bytes that fits in a cluster
        (32, 2049),  # rows of 32 bytes
        (16, 4097),  # too long for a cluster
    ]
    for channels, positions in cases:
        check(emulation, Case((1, channels, positions), dtype, channels_last=True), schedules=(FORWARD, 7))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [5, 40])
def test_slabs_larger_than_a_block_without_clusters(emulation, dtype, channels):
    case = Case((2, channels, 2100), dtype, channels_last=True)
    check(emulation, case, schedules=SCHEDULES[2:], capability=80)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("capability", [90, 120])
@pytest.mark.parametrize("device", [{"code": 80}, {"largest_cluster": 4}, {"largest_cluster": 1}], ids=str)
def test_no_cluster_is_launched_where_it_cannot_run(emulation, dtype, channels_last, capability, device):
    case = Case((1, 16, 16_000), dtype, channels_last)  # clusters of eight; channels_last: of two
    with emulation.device(**device):
        check(emulation, case, (FORWARD,), capability)


# --- values -----------------------------------------------------------------------------------------------------------

# A shape and a compute capability for each kind of plan of NCHW planes in float32.
PLANS = {
    "warp, staged": ((2, 3, 49), 90),
    "warp, direct": ((2, 3, 64), 90),
    "block": ((1, 2, 2056), 90),
    "cluster": ((1, 2, 20_000), 90),
    "split": ((1, 2, 20_000), 80),
}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape, capability", PLANS.values(), ids=PLANS)
def test_a_mean_much_larger_than_the_deviation(emulation, shape, capability, channels_last):
    check(emulation, Case(shape, torch.float32, channels_last, mean=1000.0), (FORWARD,), capability)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape, capability", PLANS.values(), ids=PLANS)
def test_a_nan_affects_its_own_plane_only(emulation, shape, capability, channels_last):
    case = Case(shape, torch.float32, channels_last)
    y, stats = case.forward(emulation, capability=capability)
    grad_x = case.backward(emulation, stats, capability=capability)
    case.x[-1, 1, -1] = torch.nan
    nan_y, nan_stats = case.forward(emulation, capability=capability)
    nan_grad = case.backward(emulation, nan_stats, capability=capability)
    for before, after in ((y, nan_y), (stats, nan_stats), (grad_x, nan_grad)):
        assert after[-1, 1].isnan().all()
        after[-1, 1] = before[-1, 1]
        assert torch.equal(before, after)


@pytest.mark.parametrize(("device", "code"), PAIRS)
def test_every_device_gives_the_results_with_the_code_that_it_runs(emulation, device, code):
    """No cluster is launched with code in which a cluster is a single block."""
    with emulation.device(code=code):
        check(
            emulation, Case((1, 8, 3000), torch.bfloat16, channels_last=True), schedules=(FORWARD,), capability=device
        )


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_constant_plane(emulation, channels_last):
    case = Case((2, 8, 9), torch.float32, channels_last)
    case.x.fill_(3.0)
    y, stats = case.forward(emulation)
    half = torch.sigmoid(torch.tensor(0.5))
    assert torch.equal(stats, torch.tensor([3.0, 0.0]).expand(2, 8, 2))
    torch.testing.assert_close(y, (3 * half).expand(2, 8, 9))
    torch.testing.assert_close(case.backward(emulation, stats), case.grad_y * half)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("side", [7, 11, 14, 22, 31, 56])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_constant_plane_in_half_precision_has_no_variance(emulation, dtype, side, channels_last):
    """For sides of 11, 22 and 31, value * H * W * (1 / (H * W)) is not the value in float32."""
    case = Case((1, 8, side * side), dtype, channels_last)
    values = torch.tensor([1.0, 3.0, 1.1, -7.3, 0.013, 100.0, 1e-3, -1.9]).to(dtype)
    case.x.copy_(values[:, None].expand(8, side * side))
    for capability in (80, 90):
        stats = case.forward(emulation, capability=capability)[1]
        assert torch.equal(stats, torch.stack([values.float(), torch.zeros(8)], 1)[None])


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_an_empty_map(emulation, shape, channels_last):
    case = Case(shape, torch.float32, channels_last)
    y, stats = case.forward(emulation)
    assert y.numel() == 0 and stats.isnan().all()  # not written
    assert case.backward(emulation, stats).numel() == 0


# --- beyond 2^31 elements: only the last blocks run, in sparse memory -------------------------------------------------


def test_planes_beyond_two_to_the_31_elements(emulation):
    samples, channels, positions = 2**15 + 1, 2**10, 2**6  # 2^31 elements and one sample more
    sizes = (samples, channels, positions, False, torch.float16)
    x, y, grad_x = (sparse_array(samples * channels * positions, torch.float16) for _ in range(3))
    stats = sparse_array(2 * samples * channels, torch.float32)
    case = Case((1, 32, positions), torch.float16)
    tail = 32 * positions
    x[-tail:] = case.x.flatten()
    last = samples * channels // 32 - 1  # the last group of 32 planes; a block has 128 planes, two lanes per plane
    emulation.call("simam_forward", x, y, stats, *sizes, LAM, None, first_block=last // 4)
    emulation.call("simam_backward", x, x, stats, grad_x, *sizes, LAM, None, first_block=last // 4)
    expected_y, expected_stats = case.forward(emulation)
    case.grad_y.copy_(case.x)
    assert torch.equal(y[-tail:], expected_y.flatten()) and torch.equal(stats[-64:], expected_stats.flatten())
    assert torch.equal(grad_x[-tail:], case.backward(emulation, expected_stats).flatten())
    assert not y[: 4 * tail].any() and not stats[:256].any() and not grad_x[: 4 * tail].any()


@pytest.mark.parametrize("channels_last", [False, True])
def test_slabs_beyond_two_to_the_31_elements(emulation, channels_last):
    samples, channels, positions = 2**17 + 1, 8, 2**11 + 8
    sizes = (samples, channels, positions, channels_last, torch.float16)
    x, y, grad_x = (sparse_array(samples * channels * positions, torch.float16) for _ in range(3))
    stats = sparse_array(2 * samples * channels, torch.float32)
    case = Case((1, channels, positions), torch.float16, channels_last)
    sample = channels * positions
    x[-sample:] = (case.x.mT if channels_last else case.x).flatten()
    sample_blocks = 4 if channels_last else channels  # one cluster, or one block per plane
    first_block = (samples - 1) * sample_blocks
    emulation.call("simam_forward", x, y, stats, *sizes, LAM, None, first_block=first_block)
    emulation.call("simam_backward", x, x, stats, grad_x, *sizes, LAM, None, first_block=first_block)
    expected_y, expected_stats = case.forward(emulation)
    case.grad_y.copy_(case.x)
    expected_grad = case.backward(emulation, expected_stats)
    flat = [(tensor.mT if channels_last else tensor).flatten() for tensor in (expected_y, expected_grad)]
    assert torch.equal(y[-sample:], flat[0]) and torch.equal(grad_x[-sample:], flat[1])
    assert torch.equal(stats[-2 * channels :], expected_stats.flatten())
    assert not y[:sample].any() and not grad_x[:sample].any()
