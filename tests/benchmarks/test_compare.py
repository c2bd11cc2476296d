"""`python -m benchmarks compare`: its statistics, its errors, and a checkout compared with itself."""

import math
from pathlib import Path

import pytest

from benchmarks.compare import Comparison, compare, confidence_rank, rows, summary
from hashengine.errors import InputError
from tests.helpers.paths import ROOT


@pytest.mark.parametrize("count", [6, 9, 27])  # the fewest rounds, the default, and three times the default
def test_the_confidence_limit_exceeds_the_median_with_at_most_the_stated_risk(count: int) -> None:
    def risk(rank: int) -> float:
        return sum(math.comb(count, heads) for heads in range(rank + 1)) / 2**count

    rank = confidence_rank(count)
    assert risk(rank) <= 0.02 < risk(rank + 1)


def test_a_cell_is_slower_only_if_nearly_all_rounds_exceed_the_tolerance() -> None:
    assert Comparison("a", 1.1, 1.0, [1.0, 1.05, *[1.1] * 7]).is_slower
    assert not Comparison("a", 1.1, 1.0, [1.0, 1.0, *[1.1] * 7]).is_slower
    assert not Comparison("a", 1.01, 1.0, [1.01] * 9).is_slower


def test_the_summary_names_slower_cells() -> None:
    comparisons = [Comparison("fast", 1.0, 1.0, [1.0] * 9), Comparison("slow", 2.0, 1.0, [2.0] * 9)]
    assert summary(comparisons).splitlines() == [
        "2 cells, time of this checkout divided by the other's: median 1.500, 1.000 to 2.000",
        "slower by more than the noise: 1",
        "  slow: 2.000",
    ]
    assert rows(comparisons)[1]["ratio"] == 2.0


def test_a_checkout_is_compared_with_itself() -> None:
    if not list(ROOT.glob("hashengine/_C.*so")):
        pytest.skip("the native module is not built in place")
    (comparison,) = compare(ROOT, only="pack_bits/128x64", rounds=6, seconds=0)
    assert comparison.cell == "kernels/pack_bits/128x64/forward"
    assert comparison.seconds > 0 and comparison.other_seconds > 0
    assert len(comparison.ratios) in (6, 18)  # 18 if noise made the first 6 look slower
    assert comparison.ratios == sorted(comparison.ratios)


def test_an_unbuilt_checkout_and_too_few_rounds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="other must be a folder with hashengine's native module built"):
        compare(tmp_path)
    (tmp_path / "hashengine").mkdir()
    (tmp_path / "hashengine" / "_C.abi.so").touch()
    with pytest.raises(InputError, match="rounds must be at least 6"):
        compare(tmp_path, rounds=2)
