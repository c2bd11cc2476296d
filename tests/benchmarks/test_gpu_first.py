"""`make gpu-first`: its steps, their time limits, what a failing step leaves, and the comparison with predictions."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu_first
from benchmarks.search.gpu_suite import suite
from tests.helpers.paths import ROOT


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_failing_and_a_slow_step_do_not_stop_the_others(tmp_path, monkeypatch, capsys):
    lines = {
        "setup": [python("print('made')")],
        "limits": [python("print('begun', flush=True); import sys; sys.exit(3)"), python("print('never')")],
        "tests": [python("print('slow', flush=True); import time; time.sleep(60)")],
        "memcheck": [["a-program-that-does-not-exist"]],
        "search": [python("print('searched')")],
    }
    monkeypatch.setattr(gpu_first, "commands", lambda step, wheels, output: lines.get(step, []))
    start = time.monotonic()
    assert gpu_first.main(["--output", str(tmp_path), "--seconds", "5"]) == 1
    assert time.monotonic() - start < 60
    results = [json.loads(line) for line in (tmp_path / "summary.jsonl").read_text().splitlines()]
    statuses = {result["step"]: result["status"] for result in results}
    assert list(statuses) == list(gpu_first.STEPS)
    assert [statuses[step] for step in lines] == ["ok", "failed", "timed out", "failed", "ok"]
    assert {statuses[step] for step in statuses.keys() - lines.keys()} == {"skipped"}
    logs = {step: (tmp_path / f"{step}.log").read_text() for step in lines}
    assert "made" in logs["setup"] and "slow" in logs["tests"] and "searched" in logs["search"]
    assert "begun" in logs["limits"] and "never" not in logs["limits"].replace("print('never')", "")
    assert "a-program-that-does-not-exist" in logs["memcheck"]
    assert "tests: timed out after" in capsys.readouterr().out


def test_steps_can_be_chosen_and_what_they_started_ends_with_them(tmp_path, monkeypatch):
    script = f"import subprocess, sys; p = subprocess.Popen({python('import time; time.sleep(600)')!r}); print(p.pid)"
    monkeypatch.setattr(gpu_first, "commands", lambda step, wheels, output: [python(script)])
    assert gpu_first.main(["limits", "search", "--output", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"limits.log", "search.log", "summary.jsonl"}
    pid = (tmp_path / "search.log").read_text().split()[-1]
    deadline = time.monotonic() + 60  # a killed process may need some time to end
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_running(pid)


def is_running(pid: str) -> bool:
    try:
        return ") Z" not in Path("/proc", pid, "stat").read_text()  # Z: it has ended, but nobody has waited for it
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_wrong_arguments_are_refused(tmp_path, capsys):
    for arguments, message in (
        (["nothing"], "step must be one of setup, "),
        (["--wheels", "nowhere"], "--wheels must"),
    ):
        with pytest.raises(SystemExit) as caught:
            gpu_first.main([*arguments, "--output", str(tmp_path)])
        assert caught.value.code == 2 and message in capsys.readouterr().err


def test_the_set_up_takes_small_wheels_and_faiss_has_a_step_of_its_own(tmp_path):
    for name in ("ninja-1.whl", "faiss_gpu-1.whl", "torch-2.whl", "nvidia_cublas-1.whl"):
        (tmp_path / name).touch()
    installed = gpu_first.commands("setup", tmp_path, tmp_path)[1]
    assert [name for name in installed if name.endswith(".whl")] == [str(tmp_path / "ninja-1.whl")]
    assert str(tmp_path / "faiss_gpu-1.whl") in gpu_first.commands("faiss", tmp_path, tmp_path)[0]
    (tmp_path / "faiss_gpu-1.whl").unlink()
    assert gpu_first.commands("faiss", tmp_path, tmp_path) == []
    assert gpu_first.STEP_SECONDS <= 8 * 60


def test_the_commands_have_options_that_exist(tmp_path):
    """The programs of the benchmarks parse their options before they look for a GPU."""
    for step in ("search", "kernels", "networks"):
        for _, *line in gpu_first.commands(step, None, tmp_path):
            done = subprocess.run([sys.executable, *line], cwd=ROOT, capture_output=True, text=True)
            assert "device must be" in done.stderr and "option" not in done.stderr, done.stderr


def test_predictions_are_compared_with_what_was_measured(tmp_path):
    predictions = json.loads(gpu_first.PREDICTIONS.read_text())
    assert all(0 < prediction["low"] < prediction["high"] for prediction in predictions)
    cases = {(case.codes, case.bits, case.queries, case.k) for what, case in suite() if what == "search"}
    for prediction in predictions:
        if prediction["file"] == "search.jsonl":
            match = prediction["match"]
            assert (match["codes"], match["bits"], match["queries"], match["k"]) in cases
    search = next(prediction for prediction in predictions if prediction["file"] == "search.jsonl")
    kernel = next(prediction for prediction in predictions if prediction["file"] == "kernels.jsonl")
    middle = (search["low"] + search["high"]) / 2
    rows = [search["match"] | {"k": 77, "distances_per_s": 1.0}, search["match"] | {"distances_per_s": 2 * middle}]
    (tmp_path / "search.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    row = kernel["match"] | {"percent_of_floor": {"eager": 5.0, "fused": 50.0}}
    (tmp_path / "kernels.jsonl").write_text(json.dumps(row) + "\n")
    found = {prediction["what"]: prediction for prediction in gpu_first.compare(tmp_path)}
    assert found[search["what"]]["ratio"] == pytest.approx(2) and found[kernel["what"]]["measured"] == 50.0
    assert sum(prediction["measured"] is None for prediction in found.values()) == len(predictions) - 2
    done = subprocess.run([sys.executable, gpu_first.__file__, "--compare", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0 and "ratio 2.00" in done.stdout and "not measured" in done.stdout
