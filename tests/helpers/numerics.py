"""The one rule of accuracy: a kernel is never worse than twice eager torch's own error against float64."""

from torch import Tensor

from benchmarks.accuracy import inaccuracy


def assert_as_accurate_as_eager(fused: Tensor, eager: Tensor, exact: Tensor) -> None:
    """``max|fused - exact| <= 2 * max|eager - exact| + floor``, as :func:`benchmarks.accuracy.inaccuracy` has it."""
    problem = inaccuracy(fused, eager, exact)
    assert problem is None, problem
