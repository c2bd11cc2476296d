"""The one rule of accuracy: a kernel is never worse than twice eager torch's own error against float64."""

import torch
from torch import Tensor


def assert_as_accurate_as_eager(fused: Tensor, eager: Tensor, exact: Tensor) -> None:
    """``max|fused - exact| <= 2 * max|eager - exact| + floor``.

    The floor is one unit in the last place of the largest result, half of which rounding the exact value costs and half
    the last operation: without it a case in which eager happens to hit every value would demand the impossible.

    Args:
        fused: what is tested. eager: the same by plain torch ops in the same dtype. exact: the same in float64.
    """
    assert fused.shape == eager.shape == exact.shape
    assert exact.dtype == torch.float64
    if not exact.numel():
        return
    fused_error, eager_error = ((x.double() - exact).abs().max().item() for x in (fused, eager))
    floor = torch.finfo(fused.dtype).eps * exact.abs().max().item()
    assert fused_error <= 2 * eager_error + floor, (
        f"fused {fused_error:.3e}, eager {eager_error:.3e}, floor {floor:.3e}"
    )
