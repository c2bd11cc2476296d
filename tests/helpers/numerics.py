"""The accuracy rule: against float64, a kernel's error is at most twice eager torch's error plus a rounding error.

`inaccuracy` states the rule exactly. The benchmarks import it, to verify by the same rule.
"""

from torch import Tensor, finfo, float64, testing


def inaccuracy(fused: Tensor, eager: Tensor, exact: Tensor) -> str | None:
    """None if `max|fused - exact| <= 2 * max|eager - exact| + floor`, otherwise a line with the three numbers.

    The floor is one unit in the last place of the largest exact value. Rounding the exact value to the dtype errs by up
    to half a unit, and the last operation of the kernel by up to another half. Without a floor, no kernel could pass a
    case in which eager torch is exact.

    Args:
        fused: the result under test.
        eager: the same result by plain torch ops, in the dtype of `fused`.
        exact: the same result in float64.
    """
    assert fused.shape == eager.shape == exact.shape
    assert exact.dtype == float64
    if not exact.numel():
        return None
    fused_error, eager_error = ((x.double() - exact).abs().max().item() for x in (fused, eager))
    floor = finfo(fused.dtype).eps * exact.abs().max().item()
    if fused_error <= 2 * eager_error + floor:  # false if the error is NaN
        return None
    return f"fused {fused_error:.3e}, eager {eager_error:.3e}, floor {floor:.3e}"


def assert_as_accurate_as_eager(fused: Tensor, eager: Tensor, exact: Tensor) -> None:
    """Fail if `fused` breaks the rule of `inaccuracy`; the message has the errors of `fused` and of `eager`."""
    problem = inaccuracy(fused, eager, exact)
    assert problem is None, problem


def assert_close_to_exact(fused: Tensor, eager: Tensor, exact: Tensor) -> None:
    """Check the rule of `inaccuracy`. Float64 results are checked by `assert_close`: there, `eager` equals `exact`."""
    if fused.dtype == float64:
        testing.assert_close(fused, exact)
    else:
        assert_as_accurate_as_eager(fused, eager, exact)
