"""The attention and code ops beside eager torch, torch.compile, and a copy of the tensor."""

import copy
import enum
import itertools
import math
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from benchmarks import report
from benchmarks.accuracy import inaccuracy
from benchmarks.cases import FORWARD_BACKWARD, OPS, Op, build, make_call
from benchmarks.harness import append_results, begun_within, describe_machine, find_device, median_ratio
from benchmarks.memory import peak_bytes
from benchmarks.shapes import Model, Workload, workloads
from benchmarks.timing import Clock, capture_graph, keep_freed_memory, make_clock, time_calls
from hashengine import InputError

CLONE_BYTES = 32 << 20  # from here on a CPU's outputs are fresh pages, which the copy has to pay for, too
VERIFIED_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 26}  # float64 and its graph need some hundred bytes an element
DRAWN_ELEMENTS = (
    1 << 20
)  # over fewer than these, eager's largest error is a matter of luck: small inputs are drawn anew


class WrongResult(Exception):
    """A fused op that breaks the rule of accuracy, and is therefore not timed."""


class Dtype(str, enum.Enum):
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class Layout(str, enum.Enum):
    contiguous = "contiguous"
    channels_last = "channels_last"


def make_input(shape: tuple[int, ...], dtype: Dtype, layout: Layout, device: torch.device) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator(device).manual_seed(1), device=device).to(getattr(torch, dtype))
    return x.contiguous(memory_format=torch.channels_last) if layout is Layout.channels_last else x


def copy_call(x: Tensor) -> Callable[[], Tensor]:
    """Read and write the tensor once, in the kind of memory that an op's output lies in."""
    if x.device.type == "cpu" and x.nbytes >= CLONE_BYTES:
        return x.clone
    out = torch.empty_like(x)
    return lambda: out.copy_(x)


def verify(name: str, op: Op, x: Tensor, direction: str) -> int:
    """Raise WrongResult where the fused op breaks the rule of accuracy.

    Returns:
        The batch that was verified: fewer samples where float64 would not fit.
    """
    batch = max(1, min(len(x), VERIFIED_ELEMENTS[x.device.type] * len(x) // x.numel()))
    x = x[:batch]
    modules = build(op, x)
    modules["exact"] = copy.deepcopy(modules["eager"]).double()
    draws: list[list[list[Tensor]]] = []
    for seed in range(max(1, min(8, DRAWN_ELEMENTS // x.numel()))):
        drawn = x if seed == 0 else torch.empty_like(x).copy_(torch.randn(x.shape).to(x))
        inputs = {"fused": drawn, "eager": drawn, "exact": drawn.double()}
        draws.append([_results(modules[name], value, direction) for name, value in inputs.items()])
    results = [
        [torch.cat([y.flatten() for y in same]) for same in zip(*kind, strict=True)]
        for kind in zip(*draws, strict=True)
    ]
    for i, (fused, eager, want) in enumerate(zip(*results, strict=True)):
        if fused.is_floating_point():
            problem = inaccuracy(fused, eager, want)
        else:
            problem = None if torch.equal(fused, eager) else "integers differ"
        if problem:
            raise WrongResult(
                f"{name}: result {i} of {direction} on {x.dtype} {list(x.shape)} must be as accurate as eager's before "
                f"it is timed, got {problem}"
            )
    return batch


def _results(module: torch.nn.Module, x: Tensor, direction: str) -> list[Tensor]:
    """A call's results, the parameters' gradients as one vector: eager's error in a single number is luck."""
    results = make_call(module, x, direction)()
    count = len(list(module.parameters())) if direction == FORWARD_BACKWARD else 0
    own, parameters = results[: len(results) - count], results[len(results) - count :]
    return [*own, torch.cat([grad.flatten() for grad in parameters])] if parameters else own


def make_systems(
    op: Op, x: Tensor, direction: str, *, compiled: bool, cuda_graphs: bool
) -> dict[str, Callable[[], Any]]:
    modules = build(op, x)
    if compiled:
        torch.compiler.reset()  # each shape is compiled for itself, and there is a limit to how many one function gets
        modules["compile"] = torch.compile(copy.deepcopy(modules["eager"]), dynamic=False, fullgraph=True)
    calls = {"copy": copy_call(x)} | {name: make_call(module, x, direction) for name, module in modules.items()}
    return {name: capture_graph(call) for name, call in calls.items()} if cuda_graphs else calls


def summarise(times: dict[str, list[list[float]]], floor: float, x: Tensor) -> dict[str, Any]:
    """What is kept of the calls' seconds: quantiles, and ratios that are medians of the rounds' ratios."""
    medians = {name: [statistics.median(calls) for calls in rounds] for name, rounds in times.items()}
    seconds = {}
    for name, rounds in times.items():
        quantiles = torch.tensor([s for calls in rounds for s in calls], dtype=torch.float64).quantile(
            torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
        )
        seconds[name] = dict(zip(("p20", "p50", "p80"), quantiles.tolist(), strict=True))
    copies = {name: median_ratio(medians[name], medians["copy"]) for name in medians if name != "copy"}
    return {
        "rounds": len(medians["copy"]),
        "seconds": seconds,
        "copies": copies,
        "floor_bytes": floor,
        "percent_of_floor": {name: 100 * floor / (2 * x.nbytes) / taken for name, taken in copies.items()},
        "speedup": {name: median_ratio(medians[name], medians["fused"]) for name in medians if name != "fused"},
    }


def measure(
    name: str, workload: Workload, dtype: Dtype, layout: Layout, clock: Clock, device: torch.device,
    *, compiled: bool, cuda_graphs: bool, seconds: float,
) -> list[dict[str, Any]]:  # fmt: skip
    """A row for each pass and state of the cache."""
    op, rows = OPS[name], []
    x = make_input(workload.shape, dtype, layout, device)
    for direction in op.passes:
        verified = verify(name, op, x, direction)
        systems = make_systems(op, x, direction, compiled=compiled, cuda_graphs=cuda_graphs)
        floor = op.floor(x, direction, clock.on_chip_bytes)
        caches = ("warm", "cold") if x.nbytes <= 2 * clock.cache_bytes else ("cold",)  # larger ones are never warm
        for cache in caches:
            times = time_calls(systems, clock, cold=cache == "cold", seconds=seconds)
            rows.append(
                {"op": name, "pass": direction, "shape": list(workload.shape), "models": workload.models}
                | {"dtype": dtype.value, "layout": layout.value, "cache": cache, "verified_batch": verified}
                | summarise(times, floor, x)
            )
        peaks = {system: peak_bytes(call, device) for system, call in systems.items() if not cuda_graphs}
        for row in rows[-len(caches) :]:
            row["peak_bytes"] = peaks
    return rows


def run(
    *, ops: list[str], models: list[Model] | None, batches: list[int] | None, shape: tuple[int, ...] | None,
    dtypes: list[Dtype], layouts: list[Layout], device: str, threads: int | None, quick: bool, compiled: bool,
    cuda_graphs: bool, seconds: float, minutes: float, output: Path | None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Verify, measure, print the tables, append to ``output`` case by case; ends with what was wrong, or the rows.

    After ``minutes`` no case is begun. The ops take turns, each with its largest batches first.
    """
    on = find_device(device)
    if cuda_graphs and on.type != "cuda":
        raise InputError(f"cuda-graphs needs --device cuda, got {device}")
    torch.set_num_threads(threads or os.cpu_count() or 1)
    machine = describe_machine(on) | {"benchmark": "kernels", "cuda_graphs": cuda_graphs}
    clock = make_clock(on)
    if on.type == "cpu":
        keep_freed_memory()
    plans = [
        [
            (name, workload, dtype, layout)
            for workload in _workloads(OPS[name], models, batches, shape, gpu=on.type == "cuda", quick=quick)
            for dtype in dtypes
            for layout in (layouts if len(workload.shape) == 4 else layouts[:1])
        ]
        for name in ops
    ]
    plan = [case for turn in itertools.zip_longest(*plans) for case in turn if case is not None]
    if not plan:
        raise InputError(f"no op of {ops} is put into {[model.value for model in models or []]}; see --model")
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(f"{report.machine_line(machine)}; each answer verified against float64")
    rows, wrong = [], []
    for name, workload, dtype, layout in tqdm(
        begun_within(minutes, plan), total=len(plan), unit="case", disable=None, leave=False
    ):
        try:
            measured = measure(
                name, workload, dtype, layout, clock, on, compiled=compiled, cuda_graphs=cuda_graphs, seconds=seconds
            )
        except WrongResult as error:
            wrong.append(str(error))
            continue
        measured = [machine | row for row in measured]
        rows += measured
        if output is not None:
            append_results(output, measured)
    rows.sort(key=lambda row: ops.index(row["op"]))
    console.print(_table(rows))
    if any(row["models"] for row in rows):
        console.print(_geometric_table(rows))
    if wrong:
        raise SystemExit("\n".join(wrong))
    return rows


def _workloads(
    op: Op, models: list[Model] | None, batches: list[int] | None, shape: tuple[int, ...] | None, *, gpu: bool,
    quick: bool,
) -> list[Workload]:  # fmt: skip
    if shape is not None:
        return [Workload(shape)]
    chosen = [model for model in op.models if models is None or model in models]
    found = workloads(chosen, batches, gpu=gpu)
    if quick:
        return sorted(found, key=lambda workload: math.prod(workload.shape))[:1]
    return sorted(found, key=lambda workload: -workload.shape[0])


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(
        "op", "pass", "shape", "type", "cache", "µs p50 (p20-p80)", "copies", "% of floor", "x eager", "x compile", "MB"
    )  # fmt: skip
    table.caption = "of the fused op; copies: times the copying of x; MB: allocated at the peak, results included"
    for row in rows:
        p20, p50, p80 = (f"{1e6 * row['seconds']['fused'][quantile]:,.0f}" for quantile in ("p20", "p50", "p80"))
        peak = f"{row['peak_bytes']['fused'] / 1e6:,.1f}" if row["peak_bytes"] else "-"
        table.add_row(
            row["op"], row["pass"], "x".join(map(str, row["shape"])), report.kind(row), row["cache"],
            f"{p50} ({p20}-{p80})", f"{row['copies']['fused']:.2f}", f"{row['percent_of_floor']['fused']:.0f}",
            *_cells(row["speedup"]), peak,
        )  # fmt: skip
    return table


def _geometric_table(rows: list[dict[str, Any]]) -> Table:
    table = Table("op", "pass", "type", "model x batch", "x eager", "x compile")
    table.caption = "geometric means over the layer shapes, the cache as successive calls leave it"
    for key, means in report.geometric_means(rows).items():
        table.add_row(*key, *_cells(means))
    return table


def _cells(speedup: dict[str, float]) -> list[str]:
    return [f"{speedup[system]:.2f}" if system in speedup else "-" for system in ("eager", "compile")]
