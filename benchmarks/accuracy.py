"""The one rule of accuracy, under which the tests and the benchmarks verify."""

from torch import Tensor, finfo, float64


def inaccuracy(fused: Tensor, eager: Tensor, exact: Tensor) -> str | None:
    """None where ``max|fused - exact| <= 2 * max|eager - exact| + floor``, else the three in one line.

    The floor is one unit in the last place of the largest result, half of which rounding the exact value costs and half
    the last operation: without it a case in which eager happens to hit every value would demand the impossible.

    Args:
        fused: what is tested. eager: the same by plain torch ops in the same dtype. exact: the same in float64.
    """
    assert fused.shape == eager.shape == exact.shape
    assert exact.dtype == float64
    if not exact.numel():
        return None
    fused_error, eager_error = ((x.double() - exact).abs().max().item() for x in (fused, eager))
    floor = finfo(fused.dtype).eps * exact.abs().max().item()
    if fused_error <= 2 * eager_error + floor:  # false for NaN
        return None
    return f"fused {fused_error:.3e}, eager {eager_error:.3e}, floor {floor:.3e}"
