"""`kernels`: attention and the ops that make codes, against eager torch, torch.compile and a copy of the tensor."""

import copy
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor
from tqdm import tqdm

from benchmarks.harness import (
    Row,
    WrongAnswer,
    append_rows,
    console_width,
    describe_machine,
    fail_if_any,
    set_threads,
    within_minutes,
)
from benchmarks.kernels import report
from benchmarks.kernels.inputs import Dtype, Layout, make_input
from benchmarks.kernels.ops import FORWARD_BACKWARD, OPS, Op, build, make_call
from benchmarks.kernels.shapes import Model, Workload, workloads
from benchmarks.memory_use import peak_bytes
from benchmarks.tables import Columns, by, rich_table
from benchmarks.timing import Clock, capture_graph, keep_freed_memory, make_clock, median_ratio, time_calls
from hashengine._validation import check_device
from hashengine.errors import invalid
from tests.helpers.numerics import inaccuracy

# On the CPU, each call of an op gets newly mapped pages for an output of at least this size. The copy with which such a
# call is compared therefore also allocates its output in each call.
CLONE_BYTES = 32 << 20
# At most this many elements are verified, because the float64 module and its autograd graph need several hundred bytes
# per element (estimated).
VERIFIED_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 26}
# Over few elements, the largest error of the eager op depends on chance. Inputs of at most half this many elements are
# therefore drawn two to eight times.
DRAWN_ELEMENTS = 1 << 20

_CAPTION = (
    "All values are those of the fused op. copies: its time divided by the time of copying its input. % of floor: 100 "
    "x (the time to move the op's least traffic at a copy's rate) / (the op's time). x eager, x compile: its speed-up "
    "over eager torch and over torch.compile. MB: the peak of the memory that a call allocates, results included"
)
_MEANS_CAPTION = (
    "Geometric means of the speed-ups over the layer shapes of each network. Speed-ups with a warm cache are used, or "
    "those with a cold cache if a tensor is more than twice as large as the cache"
)


class Measurement(NamedTuple):
    """One op, and the shape, dtype and layout of its input."""

    op: str
    workload: Workload
    dtype: Dtype
    layout: Layout


def copy_call(x: Tensor) -> Callable[[], Tensor]:
    """A call that copies the tensor. On the CPU, it allocates its output if the tensor has at least `CLONE_BYTES`."""
    if x.device.type == "cpu" and x.nbytes >= CLONE_BYTES:
        return x.clone
    out = torch.empty_like(x)
    return lambda: out.copy_(x)


def verify(name: str, op: Op, x: Tensor, direction: str) -> int:
    """Check that the fused op is as accurate as `tests.helpers.numerics.inaccuracy` requires; integers must be equal.

    Returns:
        The number of samples that were verified: all of x's batch, or fewer if float64 would need too much memory.

    Raises:
        WrongAnswer: the fused op is less accurate, or its integers differ from those of the eager op.
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
    # For each module (fused, eager, exact), its results; each is concatenated over the draws.
    results = [
        [torch.cat([y.flatten() for y in result]) for result in zip(*of_module, strict=True)]
        for of_module in zip(*draws, strict=True)
    ]
    for i, (fused, eager, exact) in enumerate(zip(*results, strict=True)):
        if fused.is_floating_point():
            problem = inaccuracy(fused, eager, exact)
        else:
            problem = None if torch.equal(fused, eager) else "integers differ"
        if problem:
            raise WrongAnswer(
                f"{name}: result {i} of {direction} on {x.dtype} {list(x.shape)} must be as accurate as eager's before "
                f"it is timed, got {problem}"
            )
    return batch


def _results(module: torch.nn.Module, x: Tensor, direction: str) -> list[Tensor]:
    """A call's outputs, the gradient of x, and one vector with the gradients of all parameters.

    All parameter gradients are compared as one vector, because some parameters have only one element. The eager op's
    error in such a gradient is mostly chance.
    """
    results = make_call(module, x, direction)()
    count = len(list(module.parameters())) if direction == FORWARD_BACKWARD else 0
    others, parameter_grads = results[: len(results) - count], results[len(results) - count :]
    return [*others, torch.cat([grad.flatten() for grad in parameter_grads])] if parameter_grads else others


def make_systems(
    op: Op, x: Tensor, direction: str, *, compiled: bool, cuda_graphs: bool
) -> dict[str, Callable[[], Any]]:
    """The calls to time: a copy of x, the eager and the fused op, and the compiled eager op if `compiled`."""
    modules = build(op, x)
    if compiled:
        torch.compiler.reset()  # without it, torch stops compiling a function after a few shapes
        modules["compile"] = torch.compile(copy.deepcopy(modules["eager"]), dynamic=False, fullgraph=True)
    calls = {"copy": copy_call(x)} | {name: make_call(module, x, direction) for name, module in modules.items()}
    return {name: capture_graph(call) for name, call in calls.items()} if cuda_graphs else calls


def summarise(times: dict[str, list[list[float]]], floor_bytes: float, x: Tensor) -> Row:
    """Quantiles of each system's seconds per call, and ratios of systems. A ratio is the median over the rounds."""
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
        "floor_bytes": floor_bytes,
        "percent_of_floor": {name: 100 * floor_bytes / (2 * x.nbytes) / ratio for name, ratio in copies.items()},
        "speedup": {name: median_ratio(medians[name], medians["fused"]) for name in medians if name != "fused"},
    }


def measure(
    measurement: Measurement,
    clock: Clock,
    device: torch.device,
    *,
    compiled: bool,
    cuda_graphs: bool,
    seconds: float,
) -> list[Row]:
    """Verify and time one op on one tensor: for each pass, one row with a warm cache and one with a cold cache.

    There is no row with a warm cache if the tensor is more than twice as large as the cache.
    """
    name, workload, dtype, layout = measurement
    op, rows = OPS[name], []
    x = make_input(workload.shape, dtype, layout, device)
    for direction in op.passes:
        verified = verify(name, op, x, direction)
        systems = make_systems(op, x, direction, compiled=compiled, cuda_graphs=cuda_graphs)
        floor_bytes = op.floor(x, direction, clock.on_chip_bytes)
        caches = ("warm", "cold") if x.nbytes <= 2 * clock.cache_bytes else ("cold",)
        for cache in caches:
            times = time_calls(systems, clock, cold=cache == "cold", seconds=seconds)
            rows.append(
                {"op": name, "pass": direction, "shape": list(workload.shape), "models": workload.models}
                | {"dtype": dtype.value, "layout": layout.value, "cache": cache, "verified_batch": verified}
                | summarise(times, floor_bytes, x)
            )
        peaks = {system: peak_bytes(call, device) for system, call in systems.items() if not cuda_graphs}
        for row in rows[-len(caches) :]:
            row["peak_bytes"] = peaks
    return rows


def plan(
    ops: Sequence[str],
    dtypes: Sequence[Dtype],
    layouts: Sequence[Layout],
    *,
    models: Sequence[Model] | None,
    batches: Sequence[int] | None,
    shape: tuple[int, ...] | None,
    gpu: bool,
    quick: bool,
) -> list[Measurement]:
    """The measurements in order. The ops take turns, and the measurements of each op begin with its largest batches."""
    per_op = [
        [
            Measurement(name, workload, dtype, layout)
            for workload in _workloads(OPS[name], models, batches, shape, gpu=gpu, quick=quick)
            for dtype in dtypes
            for layout in (layouts if len(workload.shape) == 4 else layouts[:1])
        ]
        for name in ops
    ]
    return [each for turn in itertools.zip_longest(*per_op) for each in turn if each is not None]


def _workloads(
    op: Op,
    models: Sequence[Model] | None,
    batches: Sequence[int] | None,
    shape: tuple[int, ...] | None,
    *,
    gpu: bool,
    quick: bool,
) -> list[Workload]:
    if shape is not None:
        return [Workload(shape)]
    chosen = [model for model in op.models if models is None or model in models]
    found = workloads(chosen, batches, gpu=gpu)
    if quick:
        return sorted(found, key=lambda workload: math.prod(workload.shape))[:1]
    return sorted(found, key=lambda workload: -workload.shape[0])


def run(
    *,
    ops: Sequence[str],
    models: Sequence[Model] | None,
    batches: Sequence[int] | None,
    shape: tuple[int, ...] | None,
    dtypes: Sequence[Dtype],
    layouts: Sequence[Layout],
    device: str,
    threads: int | None,
    quick: bool,
    compiled: bool,
    cuda_graphs: bool,
    seconds: float,
    minutes: float,
    output: Path | None,
) -> list[Row]:
    """Verify and measure, then print the tables; returns the rows.

    Rows are appended to `output` as soon as they are measured. After `minutes` minutes, no measurement is started.

    Raises:
        SystemExit: at the end, if results were wrong.
    """
    torch_device = check_device("kernels", device)
    on_gpu = torch_device.type == "cuda"
    if cuda_graphs and not on_gpu:
        raise invalid("kernels", "device", "cuda with --cuda-graphs", device)
    set_threads(threads)
    machine = describe_machine(torch_device) | {"benchmark": "kernels", "cuda_graphs": cuda_graphs}
    clock = make_clock(torch_device)
    if not on_gpu:
        keep_freed_memory()
    planned = plan(ops, dtypes, layouts, models=models, batches=batches, shape=shape, gpu=on_gpu, quick=quick)
    if not planned:
        names = ", ".join(model.value for model in models or [])
        raise invalid("kernels", "model", f"a network that contains one of {', '.join(ops)}", names)
    console = Console(width=console_width(160))
    console.print(f"{report.machine_line(machine)}; each op is verified before it is timed")
    rows, wrong = [], []
    progress = tqdm(within_minutes(minutes, planned), total=len(planned), unit="case", disable=None, leave=False)
    for measurement in progress:
        try:
            measured = measure(
                measurement, clock, torch_device, compiled=compiled, cuda_graphs=cuda_graphs, seconds=seconds
            )
        except WrongAnswer as error:
            wrong.append(str(error))
            continue
        measured = [machine | row for row in measured]
        rows += measured
        if output is not None:
            append_rows(output, measured)
    rows.sort(key=lambda row: ops.index(row["op"]))
    console.print(rich_table(_COLUMNS, rows, _CAPTION))
    if any(row["models"] for row in rows):
        means = [{"key": key, "speedup": speedup} for key, speedup in report.geometric_means(rows).items()]
        console.print(rich_table(_MEANS_COLUMNS, means, _MEANS_CAPTION))
    fail_if_any(wrong, len(planned))
    return rows


def _microseconds(row: Row) -> str:
    p20, p50, p80 = (f"{1e6 * row['seconds']['fused'][quantile]:,.0f}" for quantile in ("p20", "p50", "p80"))
    return f"{p50} ({p20}-{p80})"


def _speedup(row: Row, system: str) -> str:
    return f"{row['speedup'][system]:.2f}" if system in row["speedup"] else "-"


_SPEEDUP_COLUMNS: Columns = {
    "x eager": lambda row: _speedup(row, "eager"),
    "x compile": lambda row: _speedup(row, "compile"),
}
_COLUMNS: Columns = {
    "op": lambda row: row["op"],
    "pass": lambda row: row["pass"],
    "shape": lambda row: by(row["shape"], "x"),
    "type": report.dtype_and_layout,
    "cache": lambda row: row["cache"],
    "µs p50 (p20-p80)": _microseconds,
    "copies": lambda row: f"{row['copies']['fused']:.2f}",
    "% of floor": lambda row: f"{row['percent_of_floor']['fused']:.0f}",
    **_SPEEDUP_COLUMNS,
    "MB": lambda row: f"{row['peak_bytes']['fused'] / 1e6:,.1f}" if row["peak_bytes"] else "-",
}
_MEANS_COLUMNS: Columns = {
    "op": lambda row: row["key"][0],
    "pass": lambda row: row["key"][1],
    "type": lambda row: row["key"][2],
    "model x batch": lambda row: row["key"][3],
    **_SPEEDUP_COLUMNS,
}
