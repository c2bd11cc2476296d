"""Functions that change a network refuse one that is, or contains, a wrapped, scripted or compiled module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import hashengine as he
from tests.helpers.networks import images, small_resnet

CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "attach": partial(he.nn.attach, layer="triplet"),
    "detach": he.nn.detach,
    "fuse": he.nn.fuse,
    "recalibrate": lambda model: he.nn.recalibrate(model, [images()]),
}


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


# How to wrap a module, the class that the error names, and what the model must be.
WRAPPERS: dict[str, tuple[Callable[[nn.Module], nn.Module], str, str]] = {
    "DDP": (nn.parallel.DistributedDataParallel, "a DistributedDataParallel", "unwrapped"),
    "DataParallel": (nn.DataParallel, "a DataParallel", "unwrapped"),
    "FSDP": (
        partial(FullyShardedDataParallel, device_id=torch.device("cpu")),
        "a FullyShardedDataParallel",
        "unwrapped",
    ),
    "FSDP2": (fully_shard, "a FSDPModule", "unwrapped"),
    "script": (torch.jit.script, "a ScriptModule", "without TorchScript"),
    "trace": (lambda module: torch.jit.trace(module, torch.randn(2, 8, 8, 8)), "a ScriptModule", "without TorchScript"),
    "compile": (partial(torch.compile, backend="eager"), "a compiled module", "uncompiled"),
    "compile in place": (compiled_in_place, "a compiled module", "uncompiled"),
}


@pytest.fixture(autouse=True, scope="module")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = Path(tmp_path_factory.mktemp("group"), "store")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def network() -> nn.Module:
    """A network with attention, so that there is something to detach."""
    model = small_resnet().eval()
    he.nn.attach(model, "simam", where="layer1")
    return model


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    ("wrapper", "change"),
    [(w, c) for w in WRAPPERS for c in CHANGES if (WRAPPERS[w][2], c) != ("uncompiled", "recalibrate")],
)
def test_a_wrapped_part_is_refused_in_one_line_that_names_it(wrapper: str, change: str) -> None:
    wrap, actual, expected = WRAPPERS[wrapper]
    model = network()
    model.layer2[0].conv2 = wrap(model.layer2[0].conv2)
    before = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(he.InputError) as caught:
        CHANGES[change](nn.ModuleDict({"backbone": model, "head": nn.Linear(5, 2)}))
    place = "backbone.layer2.0.conv2"
    assert str(caught.value).startswith(
        f"{change}: model must be {expected}, got {actual} at '{place}'; call {change} bef"
    )
    assert "\n" not in str(caught.value)
    assert [(name, type(module)) for name, module in model.named_modules()] == before


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("change", CHANGES)
def test_a_wrapped_model_is_refused(change: str) -> None:
    for wrap in (nn.DataParallel, nn.parallel.DistributedDataParallel):
        model = wrap(network())
        with pytest.raises(he.InputError) as caught:
            CHANGES[change](model)
        message = (
            f"{change}: model must be unwrapped, got a {wrap.__name__}; call {change} before {wrap.__name__} wraps"
        )
        assert str(caught.value).startswith(message)


@pytest.mark.parametrize("compiled", [partial(torch.compile, backend="aot_eager"), compiled_in_place])
def test_a_compiled_model_is_recalibrated_like_any_other(compiled: Callable[[nn.Module], nn.Module]) -> None:
    expected, model = network(), compiled(network())
    model(images())
    for one in (expected, model):
        assert he.nn.recalibrate(one, [images(seed=1), images(seed=2)]) == 2
    for actual, buffer in zip(model.buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(actual, buffer)
    torch.testing.assert_close(model(images()), expected(images()))
