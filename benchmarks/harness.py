"""What every benchmark shares: timing in rounds, the machine's description, results as lines of JSON."""

import json
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

import torch

import hashengine
from hashengine import InputError, _native

Step = TypeVar("Step")

_SETTLE_SECONDS = 0.05  # OpenMP threads of the last system spin a while after their work; the next one must not pay
_BURST_SECONDS = 0.05  # calls follow each other so long: the first of them wakes threads that have gone to sleep


def time_in_rounds(systems: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of a call of each system in each round, after a round to warm up; of short calls the median of a burst.

    The systems take turns, so that whatever disturbs the machine disturbs them alike; compare them round by round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for turn in range(rounds + 1):
        for name, system in systems.items():
            time.sleep(_SETTLE_SECONDS)
            burst: list[float] = []
            end = time.perf_counter() + _BURST_SECONDS
            while not burst or time.perf_counter() < end:
                start = time.perf_counter()
                system()
                burst.append(time.perf_counter() - start)
            if turn:
                seconds[name].append(statistics.median(burst))
    return seconds


def median_ratio(numerator: list[float], denominator: list[float]) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def begun_within(minutes: float, steps: Sequence[Step]) -> Iterator[Step]:
    """The steps, as long as time is left to begin one; tells how many there was none for."""
    deadline = time.monotonic() + 60 * minutes
    for done, step in enumerate(steps):
        if time.monotonic() > deadline:
            print(f"stopped after {minutes:g} minutes, without {len(steps) - done} of {len(steps)} measurements")
            return
        yield step


def find_device(name: str) -> torch.device:
    """The device of a name such as "cuda:1", if it is here; "cuda" is the first."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device must be cpu, cuda or cuda:N, got {name}") from None
    if device.type != "cuda":
        return device
    device = torch.device("cuda", device.index or 0)  # torch.cuda.set_device asks for a number
    if device.index >= torch.cuda.device_count():
        raise InputError(f"device {name} must be there, got {torch.cuda.device_count()} GPUs; see 'hashengine doctor'")
    return device


def describe_machine(device: torch.device | None = None) -> dict[str, Any]:
    """Where and with what a number was measured; of a GPU too, if that is the ``device``."""
    simd_level = "none"
    if _native.available():
        from hashengine import _C

        simd_level = _C.simd_level()
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "cpu": _cpu_name(),
        "simd_level": simd_level,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "hashengine": hashengine.__version__,
        "threads": torch.get_num_threads(),
    } | (_describe_gpu(device) if device is not None and device.type == "cuda" else {})


def append_results(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def _describe_gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", f"--id={device.index or 0}"]
    driver = subprocess.run(query, capture_output=True, text=True) if shutil.which("nvidia-smi") else None
    return {
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "driver": driver.stdout.strip() if driver else "unknown",
        "cuda": torch.version.cuda,
    }


def _commit() -> str:
    if shutil.which("git") is None:
        return "unknown"
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    family = f" family {fields['cpu family']} model {fields['model']}" if "cpu family" in fields else ""
    return fields.get("model name", platform.processor()) + family
