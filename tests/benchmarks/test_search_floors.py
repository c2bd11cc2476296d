"""`hamming-floors`: its numbers of instructions, its rows and table, the verification of answers, and wrong options."""

import pytest

from benchmarks import timing
from benchmarks.harness import WrongAnswer
from benchmarks.search import floors
from benchmarks.search.row_names import FAISS, OURS
from hashengine import HammingIndex
from tests.helpers.benchmarks import assert_refused, invoke, read_lines

pytest.importorskip("faiss")

SIZES = ("--codes", 300, "--queries", 5, "--bits", 8, "--bits", 64, "-k", 1, "-k", 7, "--rounds", 1, "--threads", 1)


@pytest.fixture(autouse=True)
def short_measurements(monkeypatch):
    monkeypatch.setattr(timing, "_PAUSE_SECONDS_PER_TURN", 0)
    monkeypatch.setattr(timing, "_BURST_SECONDS", 0.0005)


@pytest.mark.parametrize(
    ("bits", "level", "instructions"),
    [
        # 9 fields of 7 bits and one of 1 bit: 28 loads; full adders 5 + 7 + 8 + 4 + 2 + 1, half adders 1
        (64, "avx512", (28 + 27 * 2 + 2) / 512),
        (64, "avx2", (28 + 27 * 5 + 2) / 256),
        (8, "avx512", (4 + 3 * 2 + 2) / 512),  # a field of 7 bits and one of 1 bit
        (64, "popcnt", None),
    ],
)
def test_the_instructions_of_bit_slicing(bits, level, instructions):
    assert floors.sliced_instructions(bits, level) == instructions


def test_the_instructions_of_the_population_count():
    assert floors.counted_instructions(64, "avx512") == 4 / 8
    assert floors.counted_instructions(1024, "avx512") == (16 * 3 + 1) / 8
    assert floors.counted_instructions(64, "scalar") is None


def test_every_length_and_k_gives_a_row(tmp_path):
    file = tmp_path / "rows.jsonl"
    printed = invoke("hamming-floors", *SIZES, "--output", file)
    rows = read_lines(file)
    assert [(row["bits"], row["k"]) for row in rows] == [(bits, k) for bits in (8, 64) for k in (1, 7)]
    for row in rows:
        assert {floors.EQUAL_CODES, OURS, FAISS} <= set(row["rates"]) and min(row["rates"].values()) > 0
        assert row["share_of_floor"] > 0 and row["times_faiss"] > 0
    assert "300 codes, 5 queries" in printed and "times FAISS" in printed


def test_a_wrong_answer_ends_the_command(monkeypatch):
    search = HammingIndex.search

    def wrong(self, queries, k):
        distances, ids = search(self, queries, k)
        return distances + 1, ids

    monkeypatch.setattr(HammingIndex, "search", wrong)
    with pytest.raises(WrongAnswer, match="^hamming-floors: 64 bits, k = 2: the answers must equal those of"):
        floors.run(codes=50, queries=3, bits=[64], ks=[2], threads=1, rounds=1, output=None)


def test_wrong_options_are_refused():
    assert_refused("hamming-floors: bits must be", "hamming-floors", "--bits", 12)
