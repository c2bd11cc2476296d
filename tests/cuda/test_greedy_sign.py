"""greedy_sign's kernels in the CUDA emulator, compared with numpy in extended precision."""

import numpy as np
import pytest
import torch

from tests.emulation.harness import FORWARD, SCHEDULES, Emulation, array, load_emulation, random_array, sparse_array

FLOATING = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(scope="module")
def emulation() -> Emulation:
    return load_emulation()


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


# Numbers of elements. Up to 16,384 elements take one block. The odd sizes are loaded as single elements, and the even
# ones as vectors if the arrays are aligned.
SIZES = [0, 1, 8, 33, 520, 4096, 16384, 16385, 20480]


def emulate_forward(
    emulation: Emulation, u: torch.Tensor, alpha: float, schedule: int = FORWARD, offset: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return b and the penalty."""
    b = array(u.numel(), u.dtype, offset)
    penalty = array(1, sum_dtype(u.dtype))
    workspace = emulation.workspace("greedy_sign", u.numel())
    arguments = (u, b, penalty, u.numel(), alpha, u.dtype, workspace)
    emulation.call("greedy_sign_forward", *arguments, schedule=schedule)
    return b, penalty


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("dtype", FLOATING)
def test_forward(emulation, dtype, numel, offset):
    alpha = 0.1
    u = random_array(numel, dtype, offset)
    exact = u.double().numpy().astype(np.longdouble)
    expected = alpha * (np.abs(np.abs(exact) - 1) ** 3).sum() / numel if numel else np.nan

    results = [emulate_forward(emulation, u, alpha, schedule, offset) for schedule in SCHEDULES]
    for b, penalty in results:
        torch.testing.assert_close(b.double(), torch.where(u.double() >= 0, 1.0, -1.0).double(), rtol=0, atol=0)
        assert penalty.numpy().tobytes() == results[0][1].numpy().tobytes()
    # All terms are positive, so the relative errors of the roundings add up: 5 in the cube of |u| - 1, at most 16 in a
    # thread's sum, 5 + 5 in the sums of a warp and a block, at most 16 + 5 + 5 in the sum over the blocks, and 3 for
    # the mean, alpha and the final rounding.
    roundings = 5 + 2 * (16 + 5 + 5) + 3
    tolerance = roundings * unit_roundoff(sum_dtype(dtype)) * float(expected)
    assert penalty.item() == pytest.approx(float(expected), abs=tolerance, rel=0, nan_ok=numel == 0)


@pytest.mark.parametrize("dtype", FLOATING)
def test_special_values(emulation, dtype):
    values = [0.0, -0.0, 1.0, -1.0, float("inf"), -float("inf"), float("nan"), torch.finfo(dtype).tiny]
    u = array(len(values), dtype).copy_(torch.tensor(values, dtype=torch.float64))
    b, penalty = emulate_forward(emulation, u, 1.0, FORWARD)
    assert b.tolist() == [1, 1, 1, -1, 1, -1, -1, 1]
    assert penalty.isnan().item()
    _, penalty = emulate_forward(emulation, u[:4].clone(), 1.0, FORWARD)
    assert penalty.item() == 0.5  # two of the four values differ by 1 from +-1, two by 0

    grad_u = emulate_backward(emulation, array(8, dtype).fill_(2), torch.ones(1, dtype=sum_dtype(dtype)), u, 8 / 3)
    infinity = float("inf")
    # alpha = 8 / 3 makes the factor 3 * alpha / numel equal to 1. The penalty adds 0 at u = 0 and at u = +-1, and -1
    # just above zero.
    assert grad_u[:6].tolist() == [2, 2, 2, 2, infinity, -infinity]
    assert grad_u[6].isnan() and grad_u[7] == 1


def emulate_backward(
    emulation: Emulation,
    grad_b: torch.Tensor | None,
    grad_penalty: torch.Tensor | None,
    u: torch.Tensor,
    alpha: float,
    schedule: int = FORWARD,
    offset: int = 0,
) -> torch.Tensor:
    grad_u = array(u.numel(), u.dtype, offset)
    arguments = (grad_b, grad_penalty, u, grad_u, u.numel(), alpha, u.dtype)
    emulation.call("greedy_sign_backward", *arguments, schedule=schedule)
    return grad_u


@pytest.mark.parametrize("used", ["both", "b", "penalty"])  # the outputs of the forward that have a gradient
# More than 4,096 elements take several blocks. Odd sizes and an offset of 1 prevent loads of vectors.
@pytest.mark.parametrize("numel, offset", [(0, 0), (1, 0), (33, 0), (520, 0), (520, 1), (8200, 0), (8201, 1)])
@pytest.mark.parametrize("dtype", FLOATING)
def test_backward(emulation, dtype, numel, offset, used):
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
    # Roundings: 2 in the scale, 4 in the product of scale and slope, 1 in the sum, and 1 in the conversion to dtype.
    tolerance = 6 * unit_roundoff(real) * np.abs(from_penalty) + unit_roundoff(real) * np.abs(expected)
    tolerance += unit_roundoff(dtype) * (np.abs(expected) + tolerance + torch.finfo(dtype).smallest_normal)

    for schedule in SCHEDULES:
        grad_u = emulate_backward(emulation, grad_b, grad_penalty, u, alpha, schedule, offset)
        assert (np.abs(grad_u.double().numpy() - expected) <= tolerance).all()


def test_a_missing_gradient_contributes_nothing(emulation):
    u = array(8, torch.float32).fill_(float("inf"))
    grad_u = emulate_backward(emulation, array(8, torch.float32).fill_(3), None, u, 1.0)
    assert grad_u.tolist() == [3] * 8


# --- more than 2^31 elements: only the last block runs, and only the pages that it accesses exist --------------------


def test_more_than_two_to_the_31_elements(emulation):
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
