"""Hooks on parts of triplet attention run as in the official modules, before and after `fuse`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from hashengine.nn import PlainTripletAttention, TripletAttention, fuse
from tests.helpers.layouts import feature_map
from tests.helpers.official import OfficialTriplet, randomise

GATES = ("cw", "hc", "hw")
PARTS = (*GATES, *(f"{gate}{part}" for gate in GATES for part in (".conv", ".conv.conv", ".conv.bn")))
DOUBLE = torch.float64


def pair(kind: str, training: bool = False) -> tuple[nn.Module, nn.Module, dict[str, str]]:
    """An official module, a layer with the same parameters, and the names in both of the parts in `PARTS`."""
    naming = "long" if kind == "fused long" else "short"
    official = randomise(OfficialTriplet(naming=naming)).double().train(training)
    if kind == "own":
        layer: nn.Module = TripletAttention().double().train(training)
        layer.load_state_dict(official.state_dict())
    else:
        layer = copy.deepcopy(official)
        assert fuse(layer).fused == ("",)
    *gates, part = OfficialTriplet.NAMES[naming]
    own = dict(zip(GATES, gates, strict=True))
    names = {name: ".".join([own[name[:2]], *([part] if "." in name else []), *name.split(".")[2:]]) for name in PARTS}
    return official, layer, names


def seen_by_hook(model: nn.Module, part: str, register: Callable[[nn.Module, list], Any]) -> list[Tensor]:
    """The tensors that a hook on `part` gets in a forward and a backward, and the results of both."""
    seen: list[Any] = []
    handle = register(model.get_submodule(part), seen)
    x = feature_map("contiguous", DOUBLE).requires_grad_()
    y = model(x)
    grad = torch.autograd.grad(y.square().sum(), [x, *model.parameters()])
    handle.remove()
    assert seen
    return [tensor.detach() for tensor in [*seen, y, *grad, *model.buffers()] if tensor is not None]


def copies(*tensors: Tensor) -> list[Tensor]:
    """Copies, because the official module overwrites some of its tensors."""
    return [tensor.detach().clone() for tensor in tensors]


def observe(module: nn.Module, seen: list) -> Any:
    return module.register_forward_hook(lambda _, arguments, y: seen.extend(copies(*arguments, y)))


def observe_with_kwargs(module: nn.Module, seen: list) -> Any:
    return module.register_forward_hook(
        lambda _, args, kwargs, y: seen.extend(copies(*args, *kwargs.values(), y)), with_kwargs=True
    )


def replace_input(module: nn.Module, seen: list) -> Any:
    def double(_: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
        seen.extend(copies(*arguments))
        return (arguments[0] * 2,)

    return module.register_forward_pre_hook(double)


def replace_output(module: nn.Module, seen: list) -> Any:
    def halve(_: nn.Module, arguments: tuple[Tensor], y: Tensor) -> Tensor:
        seen.extend(copies(y))
        return y / 2

    return module.register_forward_hook(halve)


def observe_gradient(module: nn.Module, seen: list) -> Any:
    return module.register_full_backward_hook(lambda _, grad_x, grad_y: seen.extend([*grad_x, *grad_y]))


def observe_incoming_gradient(module: nn.Module, seen: list) -> Any:
    return module.register_full_backward_pre_hook(lambda _, grad_y: seen.extend(grad_y))


HOOKS = (observe, observe_with_kwargs, replace_input, replace_output, observe_gradient, observe_incoming_gradient)


@pytest.mark.parametrize("register", HOOKS)
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kind", ["own", "fused short", "fused long"])
def test_a_hook_on_a_part_gets_and_does_the_same_as_in_the_official_module(kind, part, register, monkeypatch):
    if "gradient" in register.__name__:  # torch refuses a backward hook on a tensor that sigmoid_ overwrites
        monkeypatch.setattr(torch, "sigmoid_", torch.sigmoid)
    for training in (False, True):
        official, layer, names = pair(kind, training)
        found, expected = (seen_by_hook(model, names[part], register) for model in (layer, official))
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ["fused short", "fused long"])
def test_a_hook_on_the_pooling_of_a_fused_module_runs(kind):
    official, layer, names = pair(kind)
    part = f"{names['hc']}.compress"
    torch.testing.assert_close(seen_by_hook(layer, part, observe), seen_by_hook(official, part, observe))


def test_hooks_of_the_layer_without_the_spatial_branch_and_of_the_plain_layer_run():
    official = randomise(OfficialTriplet(no_spatial=True)).double()
    layer = TripletAttention(no_spatial=True).double()
    layer.load_state_dict(official.state_dict())
    for part in GATES[:2]:
        torch.testing.assert_close(seen_by_hook(layer, part, observe), seen_by_hook(official, part, observe))
    plain = PlainTripletAttention().double()
    x = feature_map("contiguous", DOUBLE)
    expected = plain(x)
    plain.hw.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(plain(x), expected)


def test_the_layer_runs_the_fused_op_again_after_the_hook_is_removed(monkeypatch):
    layer = TripletAttention()
    calls = []
    layer.cw.register_forward_hook(lambda *_: calls.append("cw")).remove()
    layer(feature_map("contiguous"))
    assert calls == []
    monkeypatch.setattr(TripletAttention, "_through_gates", None)  # the fused op does not call it
    assert layer(feature_map("contiguous")).shape == (3, 4, 5, 6)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_hook_changes_neither_the_layout_nor_the_dtype(dtype, layout):
    layer = TripletAttention().to(dtype).eval()
    x = feature_map(layout, dtype)
    expected = layer(x)
    layer.hc.register_forward_hook(lambda *_: None)
    y = layer(x)
    assert (y.dtype, y.stride()) == (expected.dtype, expected.stride())
    if dtype == torch.float32:
        torch.testing.assert_close(y, expected)


def test_a_global_hook_sees_the_layer_but_not_its_parts():
    layer = nn.Sequential(TripletAttention())
    seen = []
    with register_module_forward_hook(lambda module, *_: seen.append(type(module))):
        layer(feature_map("contiguous"))
    assert seen == [TripletAttention, nn.Sequential]


class Double(nn.Module):
    def __init__(self, gate: nn.Module):
        super().__init__()
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.gate(x)


def wrap(layer: nn.Module) -> None:
    layer.hc = Double(layer.hc)


def patch(layer: nn.Module) -> None:
    gate = layer.hc
    original = gate.forward
    gate.forward = lambda x: 2 * original(x)


def append(layer: nn.Module) -> None:
    layer.hc.conv.add_module("relu", nn.ReLU())


def replace(layer: nn.Module) -> None:
    layer.hc.conv = nn.Conv2d(2, 1, 3, padding=1, dtype=DOUBLE)


def patch_norm(layer: nn.Module) -> None:
    layer.hc.conv.bn.forward = lambda x: x + 1


@pytest.mark.parametrize("change", [wrap, patch, append, replace, patch_norm])
def test_a_part_that_was_wrapped_patched_or_replaced_is_used(change):
    """The fused op would ignore it."""
    layer = TripletAttention().double().eval()
    expected_gates = [copy.deepcopy(gate) for gate in (layer.cw, layer.hc, layer.hw)]
    torch.manual_seed(0)
    change(layer)
    x = feature_map("contiguous", DOUBLE)
    expected_gates[1] = layer.hc
    axes = (2, 3, 1)
    products = [gate(x.transpose(1, a)).transpose(1, a) for gate, a in zip(expected_gates, axes, strict=True)]
    torch.testing.assert_close(layer(x), sum(products) / 3)
