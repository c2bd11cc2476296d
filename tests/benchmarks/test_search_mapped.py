"""`mapped`: its result row, the verification of its answers, and wrong options."""

import numpy as np
import pytest

from benchmarks.search import cgroup, mapped
from hashengine import HammingIndex
from tests.helpers.benchmarks import assert_refused, invoke, read_lines, run_command


@pytest.mark.parametrize("cgroup_permitted", [True, False])
def test_searches_and_reads_are_timed_with_and_without_a_cgroup(tmp_path, monkeypatch, cgroup_permitted):
    if not cgroup_permitted:
        monkeypatch.setattr(cgroup, "create", lambda limit_bytes: None)
    options = ["--codes", 300_000, "--queries", 2, "--threads", 1, "--rounds", 2, "--folder", tmp_path, "--cache", 64]
    printed = invoke("mapped", *options, "--output", tmp_path / "rows.jsonl")
    assert "of a plain read's rate" in printed
    (row,) = read_lines(tmp_path / "rows.jsonl")
    limits = ("cgroup", "eviction") if cgroup_permitted else ("eviction",)  # this machine may permit no cgroup
    assert row["limit"] in limits
    for name in ("search", "read"):
        assert len(row["seconds"][name]) == len(row["disk_bytes"][name]) == 2
    search_rate_over_read_rate = row["of_read"]
    assert search_rate_over_read_rate > 0 and row["queries"] == 2
    assert not list(tmp_path.glob("mapped-*")), "the folder must be removed"


def test_wrong_answers_fail_the_command(tmp_path, monkeypatch):
    save = HammingIndex.save

    def save_other_codes(self, path):
        self.update(np.arange(len(self)), np.zeros((len(self), 8), np.uint8))
        save(self, path)

    monkeypatch.setattr(mapped.HammingIndex, "save", save_other_codes)
    result = run_command("mapped", "--codes", 1000, "--folder", tmp_path, "--rounds", 1)
    assert result.exit_code != 0 and "the process that searches failed" in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bits", 63], "mapped: bits must be a multiple of 8, got 63"),
        (["--codes", 5, "-k", 9], "mapped: k must be at most the number of codes, 5, got 9"),
    ],
)
def test_wrong_options_give_an_error_of_one_line(options, message):
    assert_refused(message, "mapped", *options)


def test_a_disk_with_too_little_free_space_is_refused(tmp_path):
    message = "mapped: folder must be on a disk with 16000000.0 GB free"
    assert_refused(message, "mapped", "--codes", 10**15, "--folder", tmp_path)
