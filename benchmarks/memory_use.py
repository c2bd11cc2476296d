"""How much memory a call needs in addition to the memory that is allocated before it."""

import ctypes
import gc
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Peak of the bytes that torch allocates on `device` during the call, results included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated(device) - before
    return _peak_of(_cpu_allocations(call))


def _cpu_allocations(call: Callable[[], Any]) -> list[int]:
    """Bytes of each allocation on the CPU and, as negative numbers, of each release, in order."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    del result
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    events = [event for event in events if event["name"] == "[memory]" and event["args"]["Device Type"] == 0]
    return [event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["ts"])]


def _peak_of(allocations: list[int]) -> int:
    held = peak = 0
    for size in allocations:
        held += size
        peak = max(peak, held)
    return peak


def extra_resident_bytes(call: Callable[[], Any], rounds: int = 3) -> int | None:
    """Peak of the process's resident bytes during the call, minus the resident bytes before it and the returned arrays.

    The largest of `rounds` measurements: pages that leave memory during a call, such as pages of a mapped file that the
    system takes back, hide memory that the call needs.

    None if /proc does not report them, as on systems other than Linux.
    """
    try:
        return max(_extra_resident_bytes_of_one_call(call) for _ in range(rounds))
    except OSError:
        return None


def _extra_resident_bytes_of_one_call(call: Callable[[], Any]) -> int:
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)  # returns freed blocks to the system; otherwise blocks that the call reuses would not count
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the current size
    before = _status_bytes("VmRSS")
    result = call()
    peak = _status_bytes("VmHWM")
    returned = sum(array.nbytes for array in result) if isinstance(result, tuple) else 0
    return max(0, peak - before - returned)


def _status_bytes(field: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])
