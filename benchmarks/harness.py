"""Parts that the benchmarks share: result rows and their files, the machine's description, and the deadline."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

import torch

from hashengine import _environment

Step = TypeVar("Step")
Row = dict[str, Any]  # one line of a results file


class WrongAnswer(Exception):
    """A result is wrong, so the call that computed it is not timed."""


def fail_if_any(failures: Sequence[str], measurements: int) -> None:
    """End the program with exit code 1 and one line per failure, if there are failures."""
    if failures:
        raise SystemExit(f"{len(failures)} of {measurements} measurements failed:\n" + "\n".join(failures))


def within_minutes(minutes: float, steps: Sequence[Step]) -> Iterator[Step]:
    """Yield the steps until `minutes` have passed; then print how many were not started."""
    deadline = time.monotonic() + 60 * minutes
    for done, step in enumerate(steps):
        if time.monotonic() > deadline:
            print(f"stopped after {minutes:g} minutes, without {len(steps) - done} of {len(steps)} measurements")
            return
        yield step


def set_threads(threads: int | None) -> int:
    """Set torch's number of threads to `threads`, or to the number of cores if it is None; returns the number."""
    threads = threads or os.cpu_count() or 1
    torch.set_num_threads(threads)
    return threads


def console_width(columns: int) -> int | None:
    """The width for a rich console: None for a terminal, which has its own width; `columns` for any other stdout."""
    return None if sys.stdout.isatty() else columns


def describe_machine(device: torch.device | None = None) -> Row:
    """The machine, the versions and the commit of a measurement; also the GPU, if `device` is a CUDA device."""
    versions = _environment.versions()
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "cpu": _environment.processor(),
        "simd_level": _environment.simd_level(),
        **{name: versions[name] for name in ("python", "torch", "hashengine")},
        "threads": torch.get_num_threads(),
    } | (_environment.describe_gpu(device) if device is not None and device.type == "cuda" else {})


def _commit() -> str:
    """The commit of the checkout, marked "-dirty" if a tracked file has changed."""
    if shutil.which("git") is None:
        return "unknown"
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def append_rows(file: Path, rows: Sequence[Row]) -> None:
    """Append the rows to a JSON Lines file, which is created if it is missing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)


def read_rows(file: Path, key: Sequence[str]) -> list[Row]:
    """Read the newest row of each measurement; the file may have rows of several runs.

    Args:
        file: a JSON Lines file.
        key: the fields that identify a measurement.
    """
    newest = {}
    for row in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
        newest[json.dumps([row.get(name) for name in key])] = row
    return list(newest.values())
