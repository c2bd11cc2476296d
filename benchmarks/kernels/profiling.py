"""`profile`: the time of each kernel of an op, fused and eager, with traces for Perfetto and NVTX ranges for Nsight."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.harness import console_width
from benchmarks.kernels import eager
from benchmarks.kernels.inputs import Dtype, Layout, make_input
from benchmarks.kernels.ops import FORWARD, OPS, build, make_call
from benchmarks.tables import by
from hashengine import ops
from hashengine._validation import check_device
from hashengine.errors import invalid

HAMMING = "hamming_topk"
NAMES = (*OPS, HAMMING)
# N, C, H, W of x; for hamming_topk: queries, codes, bits, k.
DEFAULT_SHAPES = {HAMMING: (100, 100_000, 64, 10), "greedy_sign": (1, 1, 65536, 64), "pack_bits": (1, 1, 65536, 64)}

_DEFAULT_SHAPE = (32, 64, 56, 56)
_MAX_LINES = 12  # the table lists this many kernels per system; the others share one line

Shape = tuple[int, int, int, int]


class Kernel(NamedTuple):
    """A kernel or, on the CPU, an op: how often a step calls it, and the microseconds of these calls together."""

    name: str
    calls: float
    microseconds: float


def make_systems(
    op: str, shape: Shape, dtype: Dtype, layout: Layout, device: torch.device, forward_only: bool
) -> dict[str, Callable[[], Any]]:
    """The calls of the eager and of the fused op."""
    if op == HAMMING:
        queries, count, bits, k = shape
        if bits % 8 or not 1 <= k <= count:
            raise invalid("profile", "shape", "QUERIES CODES BITS K, BITS a multiple of 8 and K at most CODES", shape)
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
    """Profile `steps` calls after one warm-up call and write the trace; returns the kernels, the slowest first."""
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
            continue  # the CPU's work of launching the kernels
        microseconds = event.self_device_time_total if gpu else event.self_cpu_time_total
        kernel = "(between the ops)" if event.key == name else event.key  # the whole step, less the ops in it
        kernels.append(Kernel(kernel, event.count / steps, microseconds / steps))
    return sorted(kernels, key=lambda kernel: -kernel.microseconds)


def run(
    *,
    op: str,
    shape: Shape | None,
    dtype: Dtype,
    layout: Layout,
    device: str,
    steps: int,
    forward_only: bool,
    output: Path,
) -> dict[str, list[Kernel]]:
    """Print the kernels of each system and write its trace into the folder `output`."""
    torch_device = check_device("profile", device)
    shape = shape or DEFAULT_SHAPES.get(op, _DEFAULT_SHAPE)
    console = Console(width=console_width(120))
    kernels_of = {}
    for system, call in make_systems(op, shape, dtype, layout, torch_device, forward_only).items():
        trace = output / f"{op}-{system}.json"
        kernels_of[system] = profile_system(f"{op} {system}", call, steps, torch_device, trace)
        console.print(_table(f"{op} {by(shape)}, {system}", kernels_of[system]))
        console.print(f"{trace}: open it at ui.perfetto.dev")
    totals = {system: _sum("", kernels).microseconds for system, kernels in kernels_of.items()}
    console.print(f"eager / fused: {totals['eager'] / totals['fused']:.2f}; includes the profiler's overhead")
    return kernels_of


def _sum(name: str, kernels: list[Kernel]) -> Kernel:
    """The calls and the time of all these kernels, as one entry."""
    return Kernel(name, sum(kernel.calls for kernel in kernels), sum(kernel.microseconds for kernel in kernels))


def _table(title: str, kernels: list[Kernel]) -> Table:
    total = _sum("total", kernels)
    table = Table("kernel", "calls per step", "µs per step", "%", title=title, title_justify="left")
    listed, others = kernels[:_MAX_LINES], kernels[_MAX_LINES:]
    if others:
        listed = [*listed, _sum(f"({len(others)} more)", others)]
    for kernel in [*listed, total]:
        share = 100 * kernel.microseconds / total.microseconds if total.microseconds else 0.0
        table.add_row(kernel.name[:80], f"{kernel.calls:g}", f"{kernel.microseconds:,.1f}", f"{share:.1f}")
    return table
