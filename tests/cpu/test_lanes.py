"""csrc/cpu/common/lanes.h, the vector arithmetic of the CPU kernels, at each SIMD level that has its own code."""

import ctypes
import os
import shlex
import subprocess
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import DTypeLike

from hashengine import _toolchain
from tests.helpers.hamming_levels import IS_ARM
from tests.helpers.paths import ROOT

LEVELS = ("scalar", "avx2")  # in the order of SimdLevel; avx512 runs the code of avx2, and neon that of scalar
SPECIAL = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 3.4e38], np.float32)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = _toolchain.find_compiler(os.environ)
    if isinstance(compiler, _toolchain.Missing):
        pytest.skip(f"no C++ compiler: {compiler}")
    path = tmp_path_factory.mktemp("lanes") / "lanes.so"
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-Wno-psabi", f"-I{ROOT}/csrc", f"-I{ROOT}/csrc/include"]
    sources = [str(ROOT / "tests/cpu/lanes.cpp"), str(ROOT / "csrc/cpu/common/simd_level.cpp")]
    subprocess.run([*shlex.split(compiler), *flags, *sources, "-o", str(path)], check=True)
    return ctypes.CDLL(str(path))


@pytest.fixture(params=LEVELS)
def run(request: pytest.FixtureRequest, library: ctypes.CDLL) -> Callable[..., np.ndarray]:
    """A function run(name, x, dtype of the result), which calls a function of tests/cpu/lanes.cpp at a level."""
    level = LEVELS.index(request.param)
    if request.param == "avx2" and (IS_ARM or library.lanes_supported_levels() < 2):
        pytest.skip("this CPU has no AVX2")

    def call(name: str, x: np.ndarray, dtype: DTypeLike = np.float32) -> np.ndarray:
        x = np.ascontiguousarray(x)
        y = np.empty(x.shape, dtype)
        getattr(library, name)(level, *(ctypes.c_void_p(a.ctypes.data) for a in (x, y)), ctypes.c_int64(x.size))
        return y

    return call


def units_in_the_last_place(got: np.ndarray, exact: np.ndarray) -> float:
    return float(np.max(np.abs(got - exact) / np.spacing(exact.astype(np.float32))))


@pytest.mark.parametrize(
    ("name", "function", "low", "high", "units"),  # units in the last place for x from low to high
    [
        ("lanes_exp", np.exp, -87, 88, 1.2),
        ("lanes_exp2", np.exp2, -126, 0, 2.2),
        (
            "lanes_sigmoid",
            lambda x: 1 / (1 + np.exp(-x)),
            -87,
            88,
            2.5,  # the errors of exp, an addition and a division together
        ),
    ],
)
def test_exponentials_are_as_accurate_as_documented(
    run: Callable, name: str, function: Callable, low: float, high: float, units: float
) -> None:
    x = np.linspace(low, high, 800_000, dtype=np.float32)
    x = np.concatenate([x, np.float32([low, high, -0.0, 0.0] * 2), -np.geomspace(1e-30, 1, 800, dtype=np.float32)])
    assert units_in_the_last_place(run(name, x), function(x.astype(np.float64))) <= units


def test_exponentials_saturate_and_keep_nan(run: Callable) -> None:
    x = np.float32([-np.inf, -200, np.nan, -0.0, 0.0, -1e30, -126, -150])
    smallest = np.float32(2.0**-126)
    np.testing.assert_array_equal(
        run("lanes_exp2", x), [smallest, smallest, np.nan, 1, 1, smallest, smallest, smallest]
    )
    x = np.float32([-np.inf, -200, np.nan, np.inf, 200, 0.0, -0.0, 1e30])
    y = run("lanes_exp", x)
    assert np.isnan(y[2]) and np.isfinite(np.delete(y, 2)).all()
    assert y[0] == y[1] < 2e-38 and y[3] == y[4] == y[7] > 1e38 and y[5] == y[6] == 1
    np.testing.assert_array_equal(run("lanes_sigmoid", x)[[2, 3, 4, 5]], np.float32([np.nan, 1, 1, 0.5]))


def test_lanes_are_summed_in_a_fixed_order(run: Callable) -> None:
    x = np.random.default_rng(0).normal(size=(100, 8)).astype(np.float32) * np.float32([1, 1e4, 1e-4, 1, 10, 1, 1e6, 1])
    want = ((x[:, 0] + x[:, 4]) + (x[:, 2] + x[:, 6])) + ((x[:, 1] + x[:, 5]) + (x[:, 3] + x[:, 7]))
    np.testing.assert_array_equal(run("lanes_sum", x), np.repeat(want, 8).reshape(100, 8))


@pytest.mark.parametrize(("name", "dtype"), [("float16", torch.float16), ("bfloat16", torch.bfloat16)])
def test_every_half_is_widened_exactly_and_narrowed_back(run: Callable, name: str, dtype: torch.dtype) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    want = torch.from_numpy(bits.view(np.int16)).view(dtype).float().numpy()
    got = run(f"widen_{name}", bits)
    np.testing.assert_array_equal(got, want)  # NaN equals NaN
    np.testing.assert_array_equal(np.signbit(got), np.signbit(want))
    back = run(f"narrow_{name}", got, np.uint16)
    np.testing.assert_array_equal(back[~np.isnan(want)], bits[~np.isnan(want)])


@pytest.mark.parametrize(("name", "dtype"), [("float16", torch.float16), ("bfloat16", torch.bfloat16)])
def test_narrowing_rounds_to_nearest_even(run: Callable, name: str, dtype: torch.dtype) -> None:
    halves = torch.from_numpy(np.arange(1 << 16, dtype=np.uint16).view(np.int16)).view(dtype).float().numpy()
    finite = np.sort(halves[np.isfinite(halves)])
    middles = (finite[:-1].astype(np.float64) / 2 + finite[1:].astype(np.float64) / 2).astype(np.float32)
    random = np.random.default_rng(0).integers(0, 1 << 32, 1 << 18, dtype=np.uint32).view(np.float32)
    x = np.concatenate([middles, np.nextafter(middles, np.inf), np.nextafter(middles, -np.inf), random, SPECIAL])
    x = x[: x.size // 8 * 8]
    want = torch.from_numpy(x).to(dtype).float().numpy()
    got = torch.from_numpy(run(f"narrow_{name}", x, np.uint16).view(np.int16)).view(dtype).float().numpy()
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(np.signbit(got)[~np.isnan(x)], np.signbit(want)[~np.isnan(x)])


@pytest.mark.parametrize(("name", "dtype"), [("copy_first_float", np.float32), ("copy_first_float16", np.float16)])
def test_only_the_first_lanes_are_copied(library: ctypes.CDLL, name: str, dtype: DTypeLike) -> None:
    for count in range(8):
        x, y = np.arange(1, 9, dtype=dtype), np.full(8, -1, dtype)
        getattr(library, name)(*(ctypes.c_void_p(a.ctypes.data) for a in (x, y)), count)
        np.testing.assert_array_equal(y, np.where(np.arange(8) < count, x, -1))
