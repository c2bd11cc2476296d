"""`hamming --levels`: its result rows and table, its limits, the verification of its answers, and wrong options."""

import re

import numpy as np
import pytest

from benchmarks import timing
from benchmarks.search import levels
from benchmarks.search.row_names import FAISS
from hashengine import HammingIndex, _native
from tests.helpers.benchmarks import assert_refused, invoke, read_lines, run_command
from tests.helpers.hamming_levels import native_levels

pytest.importorskip("faiss")
pytestmark = pytest.mark.skipif(not _native.available(), reason="the native module is not in use")

SIZES = ("--codes", 300, "--bits", 32, "--bits", 64, "--queries", 1, "--queries", 3, "-k", 1, "-k", 7, "-k", 1000)


@pytest.fixture(autouse=True)
def short_measurements(monkeypatch):
    monkeypatch.setattr(timing, "_PAUSE_SECONDS_PER_TURN", 0)
    monkeypatch.setattr(timing, "_BURST_SECONDS", 0.0005)


@pytest.fixture
def no_limits(monkeypatch):
    """Such short searches are not faster at a higher level."""
    monkeypatch.setattr(levels, "judge", lambda *arguments: [])


def test_every_cell_gives_a_row_with_the_time_of_every_level(tmp_path, no_limits):
    file = tmp_path / "rows.jsonl"
    printed = invoke("hamming", "--levels", *SIZES, "--threads", 1, "--output", file)
    rows = read_lines(file)
    expected = [(bits, queries, k) for bits in (32, 64) for queries in (1, 3) for k in (1, 7)]  # k = 1,000 is too large
    assert [(row["bits"], row["queries"], row["k"]) for row in rows] == expected
    for row in rows:
        has_limit = (row["bits"], row["queries"]) == (64, 1)
        assert list(row["seconds"]) == native_levels() + ([FAISS] if has_limit else [])
        assert all(times and min(times) > 0 for times in row["seconds"].values())
    assert "32 bits, 300 codes" in printed and "64 bits, 300 codes" in printed and "k = 7" in printed


@pytest.mark.parametrize(
    ("cell", "seconds", "failures"),
    [
        ((32, 2, 10), {"scalar": 3.0, "avx2": 1.0, "avx512": 1.09}, []),
        ((32, 2, 10), {"scalar": 3.0, "avx2": 1.0, "avx512": 1.2}, ["avx512 takes 1.20 times as long as avx2"]),
        ((32, 2, 10), {"scalar": 1.0, "avx2": 2.0, "avx512": 2.0}, ["avx2 takes 2.00 .*scalar", "avx512 .*scalar"]),
        ((64, 1, 10), {"scalar": 3.0, "avx2": 1.0, FAISS: 2.0}, ["scalar is 0.67 times as fast as FAISS, less than 1"]),
        ((256, 1000, 10_000), {"scalar": 9.0, "avx2": 1.0, FAISS: 8.1}, []),
        ((256, 1000, 10_000), {"scalar": 9.0, "avx2": 1.0, FAISS: 7.9}, ["avx2 is 7.90 times .* less than 8 times"]),
    ],
)
def test_limits(cell, seconds, failures):
    names = [name for name in seconds if name != FAISS]
    found = levels.judge(levels.Cell(*cell), {name: [time] * 3 for name, time in seconds.items()}, names)
    assert len(found) == len(failures)
    for (_, line), expected in zip(found, failures, strict=True):
        assert line.startswith(f"{cell[0]} bits, {cell[1]:,} queries, k = {cell[2]:,}: ")
        assert re.search(expected, line)


@pytest.mark.parametrize(
    ("times", "doubtful", "failures"),
    [
        (
            (1.0, 9.0, 1.5),
            ["low", "middle", "high"],
            ["middle takes 9.00 times .* low", "high takes 1.50 times .* low"],
        ),
        ((9.0, 1.0, 1.5), ["middle", "high"], ["high takes 1.50 times as long as middle"]),
        ((9.0, 1.0, 1.0), [], []),
    ],
)
def test_searches_that_break_a_limit_are_timed_again_and_named(monkeypatch, times, doubtful, failures):
    rounds, names = [], ["low", "middle", "high"]

    def time_in_rounds(searches, count, warm_up=True):
        rounds.append((list(searches), count, warm_up))
        return {name: [time] * count for name, time in zip(names, times, strict=True) if name in searches}

    monkeypatch.setattr(levels, "time_in_rounds", time_in_rounds)
    seconds, found = levels.measure(levels.Cell(32, 2, 1), dict.fromkeys(names), 3, names)
    close = [name for name, time in zip(names, times, strict=True) if time <= 2]
    assert rounds == [(names, 1, False), (close, 3, True)] + ([(doubtful, 9, True)] if doubtful else [])
    assert [len(seconds[name]) for name in names] == [
        9 if name in doubtful else 3 if name in close else 1 for name in names
    ]
    assert len(found) == len(failures) and all(map(re.search, failures, [failure.line for failure in found]))


def test_a_level_is_set_for_its_own_searches_only(monkeypatch):
    monkeypatch.setenv("HASHENGINE_SIMD_LEVEL", "auto")
    index, codes = HammingIndex(16), np.arange(8, dtype=np.uint8).reshape(4, 2)
    index.add(codes)
    seen = []
    monkeypatch.setattr(index, "search", lambda *_: seen.append(levels.os.environ["HASHENGINE_SIMD_LEVEL"]))
    levels._search_at("scalar", index, codes, 1)
    assert (seen, levels.os.environ["HASHENGINE_SIMD_LEVEL"]) == (["scalar"], "auto")
    monkeypatch.delenv("HASHENGINE_SIMD_LEVEL")
    levels._search_at("scalar", index, codes, 1)
    assert (seen, "HASHENGINE_SIMD_LEVEL" in levels.os.environ) == (["scalar"] * 2, False)


def test_wrong_answers_fail_the_command(monkeypatch):
    search = HammingIndex.search

    def other_ids(self, queries, k, **options):
        distances, ids = search(self, queries, k, **options)
        return distances, np.asarray(ids) + 1

    monkeypatch.setattr(HammingIndex, "search", other_ids)
    result = run_command("hamming", "--levels", *SIZES)
    assert result.exit_code == 1 and "the answers of scalar must equal those of" in str(result.exception)


def test_wrong_options_are_refused():
    assert_refused("hamming: --levels must be alone", "hamming", "--levels", "--task", "map")
    assert_refused("hamming: queries must be one number", "hamming", "--queries", 1, "--queries", 2)
