"""The first minutes on a GPU, without a network: `make gpu-first WHEELS=folder`.

The steps are, in this order:

- setup: a virtual environment that also sees the system's torch, the wheels of the folder, and the CUDA module;
- limits: rates of the units of a multiprocessor (benchmarks/kernels/limits.cu), which the plans assume;
- tests: the tests that need a GPU;
- memcheck, racecheck, synccheck: the same tests under compute-sanitizer, as `make gpu-sanitize` runs them;
- search, kernels, networks: the benchmarks, the most important rows first;
- faiss: FAISS's GPU index, if its wheel is in the folder: it is large, so it is installed here;
- predictions: what was measured beside what reviews of the machine code predicted.

A step that fails or takes longer than STEP_SECONDS does not stop the others. Everything that a step prints goes to a
file in the output folder as it comes, and a line for each finished step to summary.jsonl. This file needs nothing but
Python.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = ROOT / "build" / "gpu-first"  # the virtual environment
PREDICTIONS = ROOT / "benchmarks" / "predictions.json"
STEP_SECONDS = 480.0
_LARGE = re.compile(r"faiss|torch|nvidia|triton", re.IGNORECASE)  # wheels that `setup` does not install
_PYTHON = str(ENVIRONMENT / "bin" / "python")
_GPU_TESTS = ["-m", "pytest", "-q", "tests/gpu"]
# SMALL of the Makefile
_SMALL = "packing or nan or (accurate and (7 or 11)) and not 2048 or (equals_the_cpu and (70 or 1000))"
_SANITIZER = ["compute-sanitizer", "--error-exitcode", "1"]


def commands(step: str, wheels: Path | None, output: Path) -> list[list[str]]:
    """The commands of a step, which run one after the other."""
    if step == "setup":
        small = [str(wheel) for wheel in _wheels(wheels) if not _LARGE.match(wheel.name)]
        return [
            [sys.executable, "-m", "venv", "--system-site-packages", str(ENVIRONMENT)],
            *([[_PYTHON, "-m", "pip", "install", "--no-index", "--no-deps", *small]] if small else []),
            [_PYTHON, "setup.py", "build_ext", "--inplace"],
            [_PYTHON, "-m", "hashengine", "doctor"],
        ]
    if step == "limits":
        binary = str(ROOT / "build" / "limits")
        source, architecture = "benchmarks/kernels/limits.cu", "-gencode=arch=compute_90a,code=sm_90a"
        return [["nvcc", "-O3", "-std=c++17", architecture, source, "-o", binary], [binary]]
    if step == "tests":
        return [[_PYTHON, *_GPU_TESTS], [_PYTHON, "-m", "pytest", "-q", "tests/cuda/test_hamming_topk.py", "-k", "gpu"]]
    if step == "memcheck":
        return [[*_SANITIZER, "--tool", step, _PYTHON, *_GPU_TESTS, "-x", "-k", "not 31"]]
    if step in ("racecheck", "synccheck"):
        return [[*_SANITIZER, "--tool", step, _PYTHON, *_GPU_TESTS, "-x", "-k", _SMALL]]
    rows = ["--output", str(output / f"{step}.jsonl")]
    device = ["--device", "cuda"]
    if step == "search":
        return [[_PYTHON, "-m", "benchmarks.search.gpu_suite", "--minutes", "6", *rows]]
    if step == "kernels":
        layouts = ["--layout", "contiguous", "--layout", "channels_last"]
        return [
            [_PYTHON, "-m", "benchmarks", "kernels", "--minutes", "6", "--seconds", "0.5", *device, *layouts, *rows]
        ]
    if step == "networks":
        networks = ["resnet50", "resnet18", "--attention", "triplet", "--attention", "simam", "--batch", "128"]
        options = [
            "--minutes",
            "6",
            "--steps",
            "20",
            "--no-compile",
            "--dtype",
            "bfloat16",
            "--layout",
            "channels_last",
        ]
        return [[_PYTHON, "-m", "benchmarks", "model", *networks, *options, *device, *rows]]
    if step == "faiss":
        large = [str(wheel) for wheel in _wheels(wheels) if wheel.name.startswith("faiss")]
        if not large:
            return []
        search = [_PYTHON, "-m", "benchmarks.search.gpu_suite", "--minutes", "6", *rows]
        return [[_PYTHON, "-m", "pip", "install", "--no-index", "--no-deps", *large], search]
    return [[sys.executable, str(Path(__file__)), "--compare", str(output)]]


STEPS = (
    "setup", "limits", "tests", "memcheck", "racecheck", "synccheck", "search", "kernels", "networks", "faiss",
    "predictions",
)  # fmt: skip


def _wheels(folder: Path | None) -> list[Path]:
    return [] if folder is None else sorted(folder.glob("*.whl"))


def run_step(step: str, lines: Sequence[Sequence[str]], output: Path, seconds: float) -> dict[str, object]:
    """Run the commands until one fails or the time is over; their output goes to `output`/<step>.log.

    Returns:
        The step, its status ("ok", "failed", "timed out", or "skipped" if there is no command) and its seconds.
    """
    if not lines:
        return {"step": step, "status": "skipped", "seconds": 0.0}
    start, status = time.monotonic(), "ok"
    environment = os.environ | {"HASHENGINE_BUILD": "cuda", "HASHENGINE_REQUIRE_NATIVE": "1", "PYTHONUNBUFFERED": "1"}
    environment.setdefault("TORCH_CUDA_ARCH_LIST", "9.0a")
    with open(output / f"{step}.log", "ab") as log:
        for line in lines:
            log.write(f"$ {' '.join(line)}\n".encode())
            log.flush()
            left = seconds - (time.monotonic() - start)
            status = _run(line, log.fileno(), environment, left)
            if status != "ok":
                break
    return {"step": step, "status": status, "seconds": round(time.monotonic() - start, 1)}


def _run(line: Sequence[str], log: int, environment: dict[str, str], seconds: float) -> str:
    try:
        process = subprocess.Popen(
            line, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    except OSError as error:
        os.write(log, f"{error}\n".encode())
        return "failed"
    try:
        return "ok" if process.wait(max(seconds, 0)) == 0 else "failed"
    except subprocess.TimeoutExpired:
        return "timed out"
    finally:  # also the processes that the command started
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()


def compare(output: Path) -> list[dict[str, object]]:
    """Each prediction with what was measured: the first row that has all its fields.

    A prediction has `what`, the `file` of the rows, the fields that `match`, the `figure` of the row (a dot leads into
    a field), and the predicted range from `low` to `high`. `measured` is None if there is no such row; `ratio` is that
    to the middle of the range. The predictions come from the machine code of the kernels before they first ran.
    """
    found = []
    for prediction in json.loads(PREDICTIONS.read_text(encoding="utf-8")):
        file = output / prediction["file"]
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
        values = [_figure(row, prediction["figure"]) for row in rows if _matches(row, prediction["match"])]
        values = [value for value in values if value is not None]
        measured = values[0] if values else None
        middle = (prediction["low"] + prediction["high"]) / 2
        ratio = None if measured is None else measured / middle
        found.append(prediction | {"measured": measured, "ratio": ratio})
    return found


def _matches(row: Mapping[str, Any], fields: Mapping[str, Any]) -> bool:
    return all(row.get(name) == value for name, value in fields.items())


def _figure(row: Mapping[str, Any], name: str) -> float | None:
    value: Any = row
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the steps; returns 1 if one of them did not end well."""
    parser = argparse.ArgumentParser(description="The first minutes on a GPU, without a network.")
    parser.add_argument("steps", nargs="*", metavar="step", help=f"of {', '.join(STEPS)}; all of them by default")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels that the system lacks")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "gpu-first")
    parser.add_argument("--seconds", type=float, default=STEP_SECONDS, help="the most time of a step")
    parser.add_argument("--compare", type=Path, metavar="FOLDER", help="print the predictions beside FOLDER's rows")
    given = parser.parse_args(arguments)
    if given.compare is not None:
        for row in compare(given.compare):
            measured = "not measured" if row["measured"] is None else f"{row['measured']:.4g}, ratio {row['ratio']:.2f}"
            print(f"{row['what']}: predicted {row['low']:.4g} to {row['high']:.4g}, {measured}")
        return 0
    if unknown := [step for step in given.steps if step not in STEPS]:
        parser.error(f"step must be one of {', '.join(STEPS)}, got {unknown[0]!r}")
    if given.wheels is not None and not given.wheels.is_dir():
        parser.error(f"--wheels must be a folder, got {str(given.wheels)!r}")
    given.output.mkdir(parents=True, exist_ok=True)
    results = []
    for step in STEPS:
        if given.steps and step not in given.steps:
            continue
        print(f"{step}: see {given.output / step}.log", flush=True)
        result = run_step(step, commands(step, given.wheels, given.output), given.output, given.seconds)
        results.append(result)
        with open(given.output / "summary.jsonl", "a", encoding="utf-8") as summary:
            summary.write(json.dumps(result) + "\n")
        print(f"{step}: {result['status']} after {result['seconds']} s", flush=True)
    return int(any(result["status"] not in ("ok", "skipped") for result in results))


if __name__ == "__main__":
    sys.exit(main())
