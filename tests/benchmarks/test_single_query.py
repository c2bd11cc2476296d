"""`single-query`: its result rows and table, the verification of its answers, and wrong options."""

import numpy as np
import pytest

from benchmarks.search import latency, report, row_names, single_query
from hashengine import HammingIndex, _native
from tests.helpers.benchmarks import assert_refused, invoke, read_lines, run_command

pytest.importorskip("faiss")
pytestmark = pytest.mark.skipif(not _native.available(), reason="the native module is not in use")


@pytest.fixture(autouse=True)
def short_measurements(monkeypatch):
    monkeypatch.setattr(latency, "_ROUNDS", 2)
    monkeypatch.setattr(latency, "_BURST_SECONDS", 0.001)


def test_every_number_of_codes_and_of_busy_processes_gives_a_row(tmp_path):
    file = tmp_path / "single-query-here.jsonl"
    options = ["--codes", 50, "--codes", 300, "--busy", 0, "--busy", 1, "-k", 3, "--threads", 1]
    printed = invoke("single-query", *options, "--output", file)
    rows = read_lines(file)
    assert [(row["busy"], row["codes"]) for row in rows] == [(0, 50), (0, 300), (1, 50), (1, 300)]
    names = {
        row_names.OURS,
        row_names.TENSOR,
        row_names.ONE_THREAD,
        row_names.NATIVE,
        row_names.NATIVE_ONE_CODE,
        row_names.OP,
        row_names.FAISS,
    }
    assert all(set(row["latency"]) == names for row in rows)
    assert all(0 < at["p50"] <= at["p99"] for row in rows for at in row["latency"].values())
    assert printed.count("busy processes") == 4
    assert report.single_query_files(tmp_path) == [file]
    table = report.single_query_tables(report.read(file))
    assert [line.split("|")[1:3] for line in table.splitlines()[4:]] == [
        [" 50 ", " 0 "],
        [" 300 ", " 0 "],
        [" 50 ", " 1 "],
        [" 300 ", " 1 "],
    ]


def test_busy_processes_run_during_the_measurement_and_end_after_an_error():
    with pytest.raises(ZeroDivisionError), single_query.busy_processes(2) as processes:
        assert [process.poll() for process in processes] == [None, None]
        raise ZeroDivisionError
    assert None not in [process.returncode for process in processes]


def test_wrong_answers_fail_the_command(monkeypatch):
    search = HammingIndex.search

    def other_ids(self, queries, k, **options):
        distances, ids = search(self, queries, k, **options)
        return distances, np.asarray(ids) + 1

    monkeypatch.setattr(single_query.HammingIndex, "search", other_ids)
    result = run_command("single-query", "--codes", 50, "--busy", 0)
    assert result.exit_code != 0 and "the answer must equal that of FAISS" in str(result.exception)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bits", 63], "single-query: bits must be a multiple of 8, got 63"),
        (["--codes", 5, "-k", 9], "single-query: k must be at most the smallest number of codes, 5, got 9"),
    ],
)
def test_wrong_options_give_an_error_of_one_line(options, message):
    assert_refused(message, "single-query", *options)
