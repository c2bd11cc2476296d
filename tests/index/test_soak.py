"""tests/soak.py (random operations on an index) on the CPU for a few seconds, and its report of a failure."""

import re

import pytest

from hashengine.index import execution
from tests import soak


def test_two_workers_on_the_cpu_give_the_same_answers_as_one():
    summary = soak.run(["cpu", "cpu"], seconds=6, seed=0, most_codes=3000)
    assert re.match(r"\d+ steps of \d+ indexes on cpu, cpu in \d+ s, all answers equal to the CPU's\nseed 0, ", summary)
    for what in ("search", "range_search", "count", "save_and_load", "on cpu, cpu, streamed", "k = N", "sparse codes"):
        assert re.search(rf"^ *\d+ {what}$", summary, flags=re.MULTILINE), what


@pytest.mark.parametrize("failing", [False, True])
def test_a_failure_is_reported_with_the_seed_that_repeats_it(monkeypatch, capsys, failing):
    merge_topk = execution.merge_topk

    def wrong(*args, **options):
        if failing:
            raise RuntimeError("no such kernel")
        distances, rows = merge_topk(*args, **options)
        return distances + 1, rows

    def report(seed: int) -> tuple[str, str]:
        with pytest.raises(RuntimeError if failing else SystemExit) as caught:
            soak.run(["cpu", "cpu"], seconds=60, seed=seed, most_codes=500)
        return capsys.readouterr().err, str(caught.value)

    monkeypatch.setattr(execution, "merge_topk", wrong)
    where, what = report(0)
    assert what == "no such kernel" if failing else re.match(r"not the CPU's answer: .* differ, the first at", what)
    seed = re.match(r"--seed (\d+), step \d+: search of \d+ queries, ", where)[1]
    assert report(int(seed)) == (where, what)


def test_the_command_line_prints_the_seed_and_refuses_an_invalid_device(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["soak", "--device", "cpu", "--minutes", "0", "--seed", "7"])
    soak.main()
    assert capsys.readouterr().out.startswith("seed 7\n1 steps of 1 indexes on cpu in 0 s")
    monkeypatch.setattr("sys.argv", ["soak", "--device", "tpu9"])
    with pytest.raises(SystemExit, match="error: HammingIndex: device must be 'cpu', .* got 'tpu9'"):
        soak.main()


def test_each_placement_is_listed_once():
    assert soak.placements(["cuda"]) == [
        {"device": ["cuda"], "streamed": False},
        {"device": ["cuda"], "streamed": True},
        {"device": ["cuda"] * 3, "streamed": False},
        {"device": ["cuda"] * 3, "streamed": True},
        {"device": ["cpu"], "streamed": False},
    ]
