"""Result rows and their files, the machine's description, the deadline and failures."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks import harness
from benchmarks.harness import append_rows, read_rows


def test_the_newest_row_of_each_measurement_is_read(tmp_path):
    file = tmp_path / "new" / "rows.jsonl"
    append_rows(file, [{"op": "a", "k": 1, "seconds": 1.0}, {"op": "b", "seconds": 2.0}])
    append_rows(file, [{"op": "a", "k": 1, "seconds": 3.0}, {"op": "a", "k": 2, "seconds": 4.0}])
    assert [(row["op"], row["seconds"]) for row in read_rows(file, ("op", "k"))] == [("a", 3.0), ("b", 2.0), ("a", 4.0)]


def test_the_machine_and_the_versions_are_described():
    fields = ["time", "commit", "cpu", "simd_level", "python", "torch", "hashengine", "threads"]
    machine = harness.describe_machine(torch.device("cpu"))
    assert list(machine) == fields and machine["torch"] == torch.__version__ and machine["cpu"]


def test_no_step_is_started_after_the_deadline(monkeypatch, capsys):
    now = iter([0, 0, 60, 61])  # seconds at the start and before each step
    monkeypatch.setattr(harness, "time", SimpleNamespace(monotonic=lambda: next(now)))
    assert list(harness.within_minutes(1, ["a", "b", "c"])) == ["a", "b"]
    assert "stopped after 1 minutes, without 1 of 3 measurements" in capsys.readouterr().out


def test_failures_end_the_program_with_a_line_per_failure():
    harness.fail_if_any([], 3)
    with pytest.raises(SystemExit, match="2 of 3 measurements failed:\na\nb"):
        harness.fail_if_any(["a", "b"], 3)


def test_the_number_of_threads_is_the_given_one_or_the_number_of_cores(monkeypatch):
    given = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    monkeypatch.setattr(harness.os, "cpu_count", lambda: 7)
    assert [harness.set_threads(None), harness.set_threads(3)] == given == [7, 3]
