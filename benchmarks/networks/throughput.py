"""`model`: images per second and peak memory of whole networks with attention in every block."""

import copy
import enum
import itertools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

from benchmarks.harness import (
    Row,
    append_rows,
    console_width,
    describe_machine,
    set_threads,
    within_minutes,
)
from benchmarks.kernels import eager
from benchmarks.kernels.inputs import Dtype, Layout
from benchmarks.kernels.report import machine_line
from benchmarks.memory_use import peak_bytes
from benchmarks.networks.report import COLUMNS
from benchmarks.tables import by, rich_table
from benchmarks.timing import Clock, make_clock, median_ratio, time_calls
from hashengine import nn as fused
from hashengine._validation import check_device
from hashengine.errors import invalid, missing_package
from tests.helpers.numerics import inaccuracy

CLASSES = 1000
PLAIN = "without attention"


class Attention(str, enum.Enum):
    """The attention layer that is attached to every block."""

    none = "none"
    simam = "simam"
    triplet = "triplet"


class Mode(str, enum.Enum):
    """The kind of step that is timed: an optimiser step (`training`) or a forward pass (`inference`)."""

    training = "training"
    inference = "inference"


_LAYERS = {
    Attention.simam: (fused.SimAM, eager.SimAM),
    Attention.triplet: (fused.TripletAttention, eager.TripletAttention),
}


def make_models(name: str, attention: Attention, *, compiled: bool) -> dict[str, nn.Module]:
    """The network without attention and, unless `attention` is `none`, with eager and with fused attention.

    If `compiled`, there is also a compiled copy of each. Parameters of the same name have the same values in all of
    them, and the attention layers are in the same places.
    """
    try:
        import torchvision
    except ImportError:
        raise missing_package("model", "torchvision", "train") from None
    if name not in torchvision.models.list_models(torchvision.models):
        raise invalid("model", "name", "one of torchvision.models.list_models()", name)
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
    """A copy of the model in which eager layers with the same parameters replace the fused ones."""
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
    """Check that the outputs of the fused network are as accurate as `tests.helpers.numerics.inaccuracy` requires.

    Raises:
        SystemExit: they are less accurate.
    """
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
    """A function that makes one optimiser step or one forward pass; bfloat16 is used through autocast."""
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
    *,
    names: Sequence[str],
    attentions: Sequence[Attention],
    modes: Sequence[Mode],
    batch: int,
    size: int,
    dtype: Dtype,
    layout: Layout,
    device: str,
    threads: int | None,
    steps: int,
    compiled: bool,
    minutes: float,
    output: Path | None,
) -> list[Row]:
    """Verify and measure each network with each attention in each mode; returns all rows.

    Each measurement prints a table and appends its rows to `output`. After `minutes` minutes, no
    measurement is started.
    """
    torch_device = check_device("model", device)
    if dtype is Dtype.float16:
        raise invalid("model", "dtype", "float32 or bfloat16 (by autocast)", dtype.value)
    set_threads(threads)
    memory_format = torch.channels_last if layout is Layout.channels_last else torch.contiguous_format
    images = torch.randn(batch, 3, size, size, device=torch_device).contiguous(memory_format=memory_format)
    clock = make_clock(torch_device)
    machine = describe_machine(torch_device) | {"benchmark": "model"}
    console = Console(width=console_width(120))
    console.print(machine_line(machine))
    rows, models, current = [], {}, None
    for name, attention, mode in within_minutes(minutes, list(itertools.product(names, attentions, modes))):
        if current != (name, attention):
            models.clear()  # frees the previous network's memory before the next network is allocated
            on_cpu = make_models(name, attention, compiled=compiled)
            models |= {system: model.to(torch_device, memory_format=memory_format) for system, model in on_cpu.items()}
            verify(models, images[:2])
            current = name, attention
        measured = _measure(models, images, mode, dtype, clock, steps)
        console.print(f"{name}, {attention.value}, {by(images.shape)}, {dtype.value}, {layout.value}: {mode.value}")
        console.print(rich_table(COLUMNS, measured))
        common = machine | {"model": name, "attention": attention.value, "layout": layout.value}
        measured = [common | row for row in measured]
        if output is not None:
            append_rows(output, measured)
        rows += measured
    return rows


def _measure(
    models: dict[str, nn.Module], images: Tensor, mode: Mode, dtype: Dtype, clock: Clock, steps: int
) -> list[Row]:
    """One row per model, without the fields that the rows share.

    `of_plain` is the model's rate divided by the rate of the network without attention.
    """
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
