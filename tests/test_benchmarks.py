"""The benchmark's command: it verifies before it times, prints a table and keeps what it measured."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks import hamming
from benchmarks.__main__ import app

pytest.importorskip("faiss")
SMALL = ["hamming", "--codes", "3000", "--queries", "20", "--bits", "64", "--bits", "72", "-k", "5", "--rounds", "2"]


@pytest.mark.parametrize("data", ["random", "clustered"])
def test_prints_the_table_and_appends_the_results(tmp_path, data):
    output = tmp_path / "results" / "hamming.jsonl"
    for _ in range(2):
        result = CliRunner().invoke(app, [*SMALL, "--data", data, "--threads", "1", "--output", str(output)])
        assert result.exit_code == 0, result.output
        assert "faiss counting" in result.output and "times faiss" in result.output
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["bits"] for row in rows] == [64, 72, 64, 72]
    for row in rows:
        assert {"cpu", "commit", "torch", "faiss", "simd_level", "threads"} <= row.keys()
        assert all(len(times) == 2 and min(times) > 0 for times in row["seconds"].values())


def test_wrong_answers_are_not_timed(monkeypatch):
    def off_by_one(self, queries, k):
        distances, ids = search(self, queries, k)
        return distances, ids + 1

    search = hamming.HammingIndex.search
    monkeypatch.setattr(hamming.HammingIndex, "search", off_by_one)
    result = CliRunner().invoke(app, SMALL)
    assert result.exit_code != 0 and "must equal FAISS's before they are timed" in result.output


@pytest.mark.parametrize(("option", "message"), [(["--bits", "63"], "bits must be"), (["-k", "9999"], "k must be")])
def test_wrong_options_are_refused_in_one_line(option, message):
    result = CliRunner().invoke(app, [*SMALL, *option])
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {message}") and result.stderr.count("\n") == 1


def test_clustered_codes_lie_around_centres():
    codes = hamming.draw_codes(hamming.Data.clustered, 2000, 64, np.random.default_rng(1))
    distances = np.bitwise_count(codes ^ codes[:1]).sum(1)
    same, other = distances[distances < 20], distances[distances >= 20]
    assert len(same) < 50 and 28 < other.mean() < 36
