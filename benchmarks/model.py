"""Whole networks with attention in every block: images a second, training and inference, and the memory they need."""

import copy
import enum
import itertools
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks import eager, report
from benchmarks.accuracy import inaccuracy
from benchmarks.harness import append_results, begun_within, describe_machine, find_device, median_ratio
from benchmarks.kernels import Dtype, Layout
from benchmarks.memory import peak_bytes
from benchmarks.timing import Clock, make_clock, time_calls
from hashengine import InputError
from hashengine import nn as fused

CLASSES = 1000
PLAIN = "without attention"


class Attention(str, enum.Enum):
    none = "none"
    simam = "simam"
    triplet = "triplet"


class Mode(str, enum.Enum):
    training = "training"
    inference = "inference"


_LAYERS = {
    Attention.simam: (fused.SimAM, eager.SimAM),
    Attention.triplet: (fused.TripletAttention, eager.TripletAttention),
}


def make_models(name: str, attention: Attention, *, compiled: bool) -> dict[str, nn.Module]:
    """The network without attention, then with it: eager, compiled, fused, and fused inside compiled code.

    All share the values of their parameters, and the attention layers lie in the same places.
    """
    try:
        import torchvision
    except ImportError:
        raise InputError("model needs torchvision: pip install 'hashengine[train]'") from None
    if name not in torchvision.models.list_models(torchvision.models):
        raise InputError(f"model must be one of torchvision.models.list_models(), got {name}")
    torch.manual_seed(0)
    plain = torchvision.models.get_model(name, weights=None, num_classes=CLASSES)
    models = {PLAIN: plain}
    if attention is not Attention.none:
        with_fused = copy.deepcopy(plain)
        fused.attach(with_fused, _LAYERS[attention][0])
        models |= {"eager": with_eager_attention(with_fused, attention), "fused": with_fused}
    if compiled:
        models |= {f"{system}, compiled": torch.compile(copy.deepcopy(model)) for system, model in models.items()}
    return models


def with_eager_attention(model: nn.Module, attention: Attention) -> nn.Module:
    """A copy whose fused layers are replaced by eager ones, parameters and places the same."""
    model = copy.deepcopy(model)
    fused_class, eager_class = _LAYERS[attention]
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is fused_class:
                replacement = eager_class()
                replacement.load_state_dict(child.state_dict())
                setattr(module, name, replacement)
    return model


def verify(models: dict[str, nn.Module], images: Tensor) -> None:
    """End the run where the fused network's outputs break the rule of accuracy."""
    if "fused" not in models:
        return
    exact = copy.deepcopy(models["eager"]).double()
    with torch.no_grad():
        outputs = [model.eval()(images) for model in (models["fused"], models["eager"])]
        problem = inaccuracy(*outputs, exact.eval()(images.double()))
    if problem:
        raise SystemExit(
            f"model: the fused network must be as accurate as the eager one before it is timed, got {problem}"
        )


def make_step(model: nn.Module, images: Tensor, mode: Mode, dtype: Dtype) -> Callable[[], None]:
    """One optimiser step, or one forward; bfloat16 by autocast."""
    autocast = torch.autocast(images.device.type, torch.bfloat16, enabled=dtype is Dtype.bfloat16)
    model.train(mode is Mode.training)
    if mode is Mode.inference:

        def infer() -> None:
            with torch.no_grad(), autocast:
                model(images)

        return infer
    labels = torch.randint(CLASSES, (len(images),), device=images.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def train() -> None:
        optimizer.zero_grad()
        with autocast:
            loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()

    return train


def run(
    *, names: list[str], attentions: list[Attention], modes: list[Mode], batch: int, size: int, dtype: Dtype,
    layout: Layout, device: str, threads: int | None, steps: int, compiled: bool, minutes: float, output: Path | None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Verify, measure, print a table and append to ``output`` mode by mode; returns the rows.

    After ``minutes`` no mode of a network is begun.
    """
    on = find_device(device)
    if dtype is Dtype.float16:
        raise InputError("dtype must be float32 or bfloat16 (by autocast), got float16")
    torch.set_num_threads(threads or os.cpu_count() or 1)
    memory_format = torch.channels_last if layout is Layout.channels_last else torch.contiguous_format
    images = torch.randn(batch, 3, size, size, device=on).contiguous(memory_format=memory_format)
    clock = make_clock(on)
    machine = describe_machine(on) | {"benchmark": "model"}
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(report.machine_line(machine))
    rows, models, made = [], {}, None
    for name, attention, mode in begun_within(minutes, list(itertools.product(names, attentions, modes))):
        if made != (name, attention):
            models.clear()  # the last network's memory, before the next one takes its own
            made_here = make_models(name, attention, compiled=compiled)
            models |= {system: model.to(on, memory_format=memory_format) for system, model in made_here.items()}
            verify(models, images[:2])
            made = name, attention
        of_mode = _measure(models, images, mode, dtype, clock, steps)
        shape = " x ".join(map(str, images.shape))
        console.print(f"{name}, {attention.value}, {shape}, {dtype.value}, {layout.value}: {mode.value}")
        console.print(_table(of_mode))
        what = machine | {"model": name, "attention": attention.value, "layout": layout.value}
        of_mode = [what | row for row in of_mode]
        if output is not None:
            append_results(output, of_mode)
        rows += of_mode
    return rows


def _measure(
    models: dict[str, nn.Module], images: Tensor, mode: Mode, dtype: Dtype, clock: Clock, steps: int
) -> list[dict[str, Any]]:
    """A row for each system."""
    calls = {system: make_step(model, images, mode, dtype) for system, model in models.items()}
    rounds = time_calls(calls, clock, cold=False, seconds=0.0, rounds=(steps, steps))
    seconds = {system: [statistics.median(burst) for burst in bursts] for system, bursts in rounds.items()}
    return [
        {
            "pass": mode.value, "system": system, "batch": len(images), "size": images.shape[2], "dtype": dtype.value,
            "seconds": times, "images_per_second": len(images) / statistics.median(times),
            "of_plain": median_ratio(seconds[PLAIN], times), "peak_bytes": peak_bytes(calls[system], images.device),
        }
        for system, times in seconds.items()
    ]  # fmt: skip


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table("system", "images/s", f"% of {PLAIN}", "MB at the peak")
    for row in rows:
        table.add_row(
            row["system"], f"{row['images_per_second']:,.1f}", f"{100 * row['of_plain']:.0f}",
            f"{row['peak_bytes'] / 1e6:,.0f}",
        )  # fmt: skip
    return table
