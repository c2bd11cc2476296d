"""The CUDA kernels without a GPU: run on the host by an emulation of CUDA's execution model, and compiled by nvcc.

The emulation (tests/emulation) interleaves threads and blocks in several orders and poisons shared memory, so that a
missing barrier shows. What it cannot see is left to the tests that need a GPU: memory ordering, and speed.
"""

import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from hashengine import _toolchain
from tests.emulation.harness import (
    CSRC,
    EMULATION,
    FORWARD,
    KERNELS,
    SCHEDULES,
    array,
    compile_once,
    load_emulation,
    random_array,
    sparse_array,
)

FLOATING = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@pytest.fixture(scope="module")
def emulation():
    return load_emulation()


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


# --- greedy_sign ------------------------------------------------------------------------------------------------------

# Around one vector, one warp, one block of the largest size (16,384) and several blocks; odd sizes go one by one.
GREEDY_SIZES = [0, 1, 8, 33, 520, 4096, 16384, 16385, 20480]


def emulate_forward(emulation, u: torch.Tensor, alpha: float, schedule: int = FORWARD, offset: int = 0):
    b = array(u.numel(), u.dtype, offset)
    penalty = array(1, sum_dtype(u.dtype))
    workspace = emulation.workspace("greedy_sign", u.numel())
    arguments = (u, b, penalty, u.numel(), alpha, u.dtype, workspace)
    emulation.call("greedy_sign_forward", *arguments, schedule=schedule)
    return b, penalty


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("numel", GREEDY_SIZES)
@pytest.mark.parametrize("dtype", FLOATING)
def test_greedy_sign_forward(emulation, dtype, numel, offset):
    alpha = 0.1
    u = random_array(numel, dtype, offset)
    exact = u.double().numpy().astype(np.longdouble)
    expected = alpha * (np.abs(np.abs(exact) - 1) ** 3).sum() / numel if numel else np.nan

    results = [emulate_forward(emulation, u, alpha, schedule, offset) for schedule in SCHEDULES]
    for b, penalty in results:
        torch.testing.assert_close(b.double(), torch.where(u.double() >= 0, 1.0, -1.0).double(), rtol=0, atol=0)
        assert penalty.numpy().tobytes() == results[0][1].numpy().tobytes()
    # All terms are positive, so roundings add up relative to the sum: 5 in the cube of |u| - 1, a chain of at most 16
    # in a thread and 5 + 5 in warp and block, no more again over the blocks, 3 for mean, alpha and the end.
    roundings = 5 + 2 * (16 + 5 + 5) + 3
    tolerance = roundings * unit_roundoff(sum_dtype(dtype)) * float(expected)
    assert penalty.item() == pytest.approx(float(expected), abs=tolerance, rel=0, nan_ok=numel == 0)


@pytest.mark.parametrize("dtype", FLOATING)
def test_greedy_sign_of_special_values(emulation, dtype):
    values = [0.0, -0.0, 1.0, -1.0, float("inf"), -float("inf"), float("nan"), torch.finfo(dtype).tiny]
    u = array(len(values), dtype).copy_(torch.tensor(values, dtype=torch.float64))
    b, penalty = emulate_forward(emulation, u, 1.0, FORWARD)
    assert b.tolist() == [1, 1, 1, -1, 1, -1, -1, 1]
    assert penalty.isnan().item()
    _, penalty = emulate_forward(emulation, u[:4].clone(), 1.0, FORWARD)
    assert penalty.item() == 0.5  # two zeros at distance one, two codes at distance zero

    grad_u = emulate_backward(emulation, array(8, dtype).fill_(2), torch.ones(1, dtype=sum_dtype(dtype)), u, 8 / 3)
    infinity = float("inf")
    # Factor one: sign(0) = 0, no slope at the codes; just above zero the penalty pushes up by one.
    assert grad_u[:6].tolist() == [2, 2, 2, 2, infinity, -infinity]
    assert grad_u[6].isnan() and grad_u[7] == 1


def emulate_backward(emulation, grad_b, grad_penalty, u, alpha: float, schedule: int = FORWARD, offset: int = 0):
    grad_u = array(u.numel(), u.dtype, offset)
    arguments = (grad_b, grad_penalty, u, grad_u, u.numel(), alpha, u.dtype)
    emulation.call("greedy_sign_backward", *arguments, schedule=schedule)
    return grad_u


@pytest.mark.parametrize("used", ["both", "b", "penalty"])
@pytest.mark.parametrize("numel, offset", [(0, 0), (1, 0), (33, 0), (520, 0), (520, 1), (8200, 0), (8201, 1)])
@pytest.mark.parametrize("dtype", FLOATING)
def test_greedy_sign_backward(emulation, dtype, numel, offset, used):
    alpha = 0.1
    real = sum_dtype(dtype)
    u = random_array(numel, dtype, offset)
    grad_b = random_array(numel, dtype, offset, seed=1) if used != "penalty" else None
    grad_penalty = torch.tensor([1000.0], dtype=real) if used != "b" else None

    wide = u.double().numpy().astype(np.longdouble)
    excess = np.abs(wide) - 1
    scale = grad_penalty.item() * alpha * 3 / max(numel, 1) if grad_penalty is not None else 0
    from_penalty = scale * excess * np.abs(excess) * np.sign(wide)
    expected = from_penalty + (grad_b.double().numpy() if grad_b is not None else 0)
    # Roundings: 2 in the scale, 4 in its product with the slope, 1 in the sum, then to dtype.
    tolerance = 6 * unit_roundoff(real) * np.abs(from_penalty) + unit_roundoff(real) * np.abs(expected)
    tolerance += unit_roundoff(dtype) * (np.abs(expected) + tolerance + torch.finfo(dtype).smallest_normal)

    for schedule in SCHEDULES:
        grad_u = emulate_backward(emulation, grad_b, grad_penalty, u, alpha, schedule, offset)
        assert (np.abs(grad_u.double().numpy() - expected) <= tolerance).all()


def test_a_gradient_that_was_not_asked_for_adds_nothing(emulation):
    u = array(8, torch.float32).fill_(float("inf"))
    grad_u = emulate_backward(emulation, array(8, torch.float32).fill_(3), None, u, 1.0)
    assert grad_u.tolist() == [3] * 8


# --- packing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("code_bytes", [0, 1, 3, 255, 300, 2049])
@pytest.mark.parametrize("dtype", [*FLOATING, torch.bool])
def test_packing(emulation, dtype, code_bytes, offset):
    values = torch.randn(8 * code_bytes, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u = array(8 * code_bytes, dtype, offset).copy_(values >= 0 if dtype == torch.bool else values)
    if dtype != torch.bool and code_bytes:
        u[:6] = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), -torch.finfo(dtype).tiny])
    expected = np.packbits((u if dtype == torch.bool else u >= 0).numpy())
    for schedule in SCHEDULES:
        codes = array(code_bytes, torch.uint8, offset)
        emulation.call("pack_bits", u, codes, code_bytes, dtype, schedule=schedule)
        np.testing.assert_array_equal(codes.numpy(), expected)
        bits = array(8 * code_bytes, torch.uint8, offset)
        emulation.call("unpack_bits", codes, bits, code_bytes, schedule=schedule)
        np.testing.assert_array_equal(bits.numpy(), np.unpackbits(expected))


def test_every_byte_unpacks(emulation):
    codes = torch.arange(256, dtype=torch.uint8)
    bits = array(2048, torch.uint8)
    emulation.call("unpack_bits", codes, bits, 256)
    np.testing.assert_array_equal(bits.numpy(), np.unpackbits(codes.numpy()))


# --- beyond 2^31 elements: only the last block runs, and only the pages that it touches exist -------------------------


def test_greedy_sign_far_out(emulation):
    numel, block = 2**32 + 2**20, 4096
    u, b, grad_u = (sparse_array(numel, torch.float16) for _ in range(3))
    tail = random_array(block, torch.float16)
    u[-block:] = tail
    penalty, workspace = array(1, torch.float32), emulation.workspace("greedy_sign", numel)
    last = numel // block - 1
    emulation.call("greedy_sign_forward", u, b, penalty, numel, 1.0, u.dtype, workspace, first_block=last)
    assert torch.equal(b[-block:], torch.where(tail >= 0, 1.0, -1.0).half())
    assert not b[:block].any() and not b[-2 * block : -block].any()
    emulation.call("greedy_sign_backward", u, None, u, grad_u, numel, 1.0, u.dtype, first_block=last)
    assert torch.equal(grad_u[-block:], tail)
    assert not grad_u[:block].any() and not grad_u[-2 * block : -block].any()


def test_packing_far_out(emulation):
    block, code_bytes = 1024, 2**31 + 2**20
    u, bits, codes = (sparse_array(numel, torch.uint8) for numel in (8 * code_bytes, 8 * code_bytes, code_bytes))
    tail = torch.randint(0, 2, (8 * block,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    u[-8 * block :] = tail
    last = code_bytes // block - 1
    emulation.call("pack_bits", u, codes, code_bytes, torch.bool, first_block=last)
    np.testing.assert_array_equal(codes[-block:].numpy(), np.packbits(tail.numpy()))
    assert not codes[:block].any() and not codes[-2 * block : -block].any()
    emulation.call("unpack_bits", codes, bits, code_bytes, first_block=last)
    assert torch.equal(bits[-8 * block :], tail)
    assert not bits[: 8 * block].any() and not bits[-16 * block : -8 * block].any()


# --- sanitizers and nvcc ----------------------------------------------------------------------------------------------


def run_sanitized(name: str) -> subprocess.CompletedProcess:
    return subprocess.run([compile_once("sanitized", SANITIZERS), name], capture_output=True, text=True)


@pytest.mark.parametrize("op", [path.stem.removeprefix("sanitized_") for path in EMULATION.glob("sanitized_*.cpp")])
def test_sanitizers_find_nothing(op):
    clean = run_sanitized(op)
    assert (clean.returncode, clean.stdout) == (0, "clean\n"), clean.stderr


@pytest.mark.parametrize(
    "mistake, complaint, kernel",
    [
        ("overrun", "heap-buffer-overflow", "overrun_kernel"),
        ("dynamic_overrun", "heap-buffer-overflow", "dynamic_overrun_kernel"),
        ("exited_peer", "use-after-poison", "exited_peer_kernel"),
    ],
)
def test_sanitizers_find_mistakes(mistake, complaint, kernel):
    found = run_sanitized(mistake)
    assert found.returncode != 0 and complaint in found.stderr and kernel in found.stderr


def has_kernel(source: Path) -> bool:
    """Whether a source, or a header beside it that it includes, defines a kernel; the others only call launchers."""
    text = source.read_text()
    included = (source.parent / name for name in re.findall(r'^#include "([^"]+)"', text, re.MULTILINE))
    return "__global__" in text or any(has_kernel(header) for header in included if header.exists())


# The other architectures take as long again: for make test-full and CI.
ARCHITECTURES = ("90a", *(pytest.param(name, marks=pytest.mark.slow) for name in ("80", "100", "120")))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", KERNELS, ids=lambda source: source.name)
def test_nvcc_compiles_without_warning_or_spill(source, architecture, tmp_path):
    torch_cuda = torch.version.cuda or "13.0"
    nvcc = _toolchain.find_nvcc(os.environ, torch_cuda, _toolchain.wheel_homes(torch_cuda))
    if isinstance(nvcc, _toolchain.Missing):
        pytest.skip(str(nvcc))
    if int(architecture.rstrip("a")) not in nvcc.arches:
        pytest.skip(f"nvcc {nvcc.release} does not make sm_{architecture}")
    command = [f"{nvcc.home}/bin/nvcc", "-O3", "-Werror", "all-warnings", "-Xptxas", "-v", "-cubin"]
    command += [f"-arch=sm_{architecture}", f"-I{CSRC / 'include'}", str(source), "-o", str(tmp_path / "kernel.cubin")]
    compiled = subprocess.run(command, capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", compiled.stderr)
    assert bool(frames) == has_kernel(source), compiled.stderr
    assert set(frames) <= {("0", "0", "0")}, compiled.stderr
