"""The soak that a GPU gets, on the CPU for some seconds; and what it tells of a wrong answer."""

import re

import pytest

from hashengine.index import _search
from tests import soak


def test_devices_that_are_the_cpu_answer_as_the_cpu():
    summary = soak.run(["cpu", "cpu"], seconds=6, seed=0, most_codes=3000)
    assert re.match(r"\d+ steps of \d+ indexes on cpu, cpu in \d+ s, all answers those of the CPU\nseed 0, ", summary)
    for what in ("search", "range_search", "count", "save_and_load", "on cpu, cpu, streamed", "k = N", "sparse codes"):
        assert re.search(rf"^ *\d+ {what}$", summary, flags=re.MULTILINE), what


@pytest.mark.parametrize("failing", [False, True])
def test_what_is_wrong_is_told_with_the_seed_that_shows_it_again(monkeypatch, capsys, failing):
    merged_topk = _search.merged_topk

    def wrong(*args, **options):
        if failing:
            raise RuntimeError("no such kernel")
        distances, rows = merged_topk(*args, **options)
        return distances + 1, rows

    def told(seed: int) -> tuple[str, str]:
        with pytest.raises(RuntimeError if failing else SystemExit) as caught:
            soak.run(["cpu", "cpu"], seconds=60, seed=seed, most_codes=500)
        return capsys.readouterr().err, str(caught.value)

    monkeypatch.setattr(_search, "merged_topk", wrong)
    where, what = told(0)
    assert what == "no such kernel" if failing else re.match(r"not the CPU's answer: .* differ, the first at", what)
    seed = re.match(r"--seed (\d+), step \d+: search of \d+ queries, ", where)[1]
    assert told(int(seed)) == (where, what)


def test_the_command_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["soak", "--device", "cpu", "--minutes", "0", "--seed", "7"])
    soak.main()
    assert capsys.readouterr().out.startswith("seed 7\n1 steps of 1 indexes on cpu in 0 s")
    monkeypatch.setattr("sys.argv", ["soak", "--device", "tpu9"])
    with pytest.raises(SystemExit, match="error: device must be 'cpu', .* got 'tpu9'"):
        soak.main()


def test_every_placement_is_named_once():
    assert soak.placements(["cuda"]) == [
        {"device": ["cuda"], "streamed": False},
        {"device": ["cuda"], "streamed": True},
        {"device": ["cuda"] * 3, "streamed": False},
        {"device": ["cuda"] * 3, "streamed": True},
        {"device": ["cpu"], "streamed": False},
    ]
