"""Where an op's time goes, kernel by kernel, beside eager's; traces that Perfetto opens, ranges that Nsight shows."""

import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import eager
from benchmarks.cases import FORWARD, OPS, build, make_call
from benchmarks.harness import find_device
from benchmarks.kernels import Dtype, Layout, make_input
from hashengine import InputError, ops

HAMMING = "hamming_topk"
NAMES = (*OPS, HAMMING)
DEFAULT_SHAPES = {HAMMING: (100, 100_000, 64, 10), "greedy_sign": (1, 1, 65536, 64), "pack_bits": (1, 1, 65536, 64)}
_DEFAULT_SHAPE = (32, 64, 56, 56)
_SHOWN = 12  # kernels a system; the rest in one line

Kernel = tuple[str, float, float]  # name, calls and microseconds a step


def make_systems(
    op: str, shape: tuple[int, int, int, int], dtype: Dtype, layout: Layout, device: torch.device, forward_only: bool
) -> dict[str, Callable[[], Any]]:
    if op == HAMMING:
        queries, count, bits, k = shape
        if bits % 8 or not 1 <= k <= count:
            raise InputError(
                f"shape must be QUERIES CODES BITS K, bits a multiple of 8 and k at most codes, got {shape}"
            )
        generator = torch.Generator(device).manual_seed(1)
        batch, codes = (
            torch.randint(0, 256, (rows, bits // 8), dtype=torch.uint8, device=device, generator=generator)
            for rows in (queries, count)
        )
        return {
            "eager": lambda: eager.hamming_topk(batch, codes, k),
            "fused": lambda: ops.hamming_topk(batch, codes, k),
        }
    x = make_input(shape, dtype, layout, device)
    direction = FORWARD if forward_only else OPS[op].passes[-1]
    return {system: make_call(module, x, direction) for system, module in build(OPS[op], x).items()}


def profile_system(name: str, call: Callable[[], Any], steps: int, device: torch.device, trace: Path) -> list[Kernel]:
    """Profile ``steps`` calls after a warm-up, write the trace; returns the kernels, the longest first."""
    gpu = device.type == "cuda"
    call()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            with record_function(name), torch.cuda.nvtx.range(name) if gpu else nullcontext():
                call()
        if gpu:
            torch.cuda.synchronize()
    trace.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(trace))
    kernels = []
    for event in profiler.key_averages():
        if gpu and event.device_type != torch.autograd.DeviceType.CUDA:
            continue  # what the CPU did to launch them
        microseconds = event.self_device_time_total if gpu else event.self_cpu_time_total
        kernel = "(between the ops)" if event.key == name else event.key
        kernels.append((kernel, event.count / steps, microseconds / steps))
    return sorted(kernels, key=lambda kernel: -kernel[2])


def run(
    *, op: str, shape: tuple[int, int, int, int] | None, dtype: Dtype, layout: Layout, device: str, steps: int,
    forward_only: bool, output: Path,
) -> dict[str, list[Kernel]]:  # fmt: skip
    """Print each system's kernels and write its trace."""
    on = find_device(device)
    shape = shape or DEFAULT_SHAPES.get(op, _DEFAULT_SHAPE)
    console = Console(width=None if sys.stdout.isatty() else 120)
    found = {}
    for system, call in make_systems(op, shape, dtype, layout, on, forward_only).items():
        trace = output / f"{op}-{system}.json"
        kernels = found[system] = profile_system(f"{op} {system}", call, steps, on, trace)
        console.print(_table(f"{op} {' x '.join(map(str, shape))}, {system}", kernels))
        console.print(f"{trace}: open it at ui.perfetto.dev")
    totals = {system: sum(kernel[2] for kernel in kernels) for system, kernels in found.items()}
    console.print(f"eager / fused: {totals['eager'] / totals['fused']:.2f}, in the profiler, which costs time too")
    return found


def _table(title: str, kernels: list[Kernel]) -> Table:
    total = sum(microseconds for _, _, microseconds in kernels)
    table = Table("kernel", "calls a step", "µs a step", "%", title=title, title_justify="left")
    rest = kernels[_SHOWN:]
    lines = kernels[:_SHOWN]
    if rest:
        lines = [*lines, (f"({len(rest)} more)", sum(k[1] for k in rest), sum(k[2] for k in rest))]
    for name, calls, microseconds in [*lines, ("total", sum(k[1] for k in kernels), total)]:
        share = 100 * microseconds / total if total else 0.0
        table.add_row(name[:80], f"{calls:g}", f"{microseconds:,.1f}", f"{share:.1f}")
    return table
