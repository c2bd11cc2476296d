"""The measured ops. Each has an eager module, a fused module, and a floor: the bytes that a call must move at least."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.kernels import eager
from benchmarks.kernels.shapes import Model
from hashengine import nn as fused
from hashengine import ops

FORWARD = "forward"  # in eval mode, without an autograd graph
FORWARD_BACKWARD = "forward+backward"  # in training mode, with the gradients of x and of all parameters

_IMAGE_MODELS = (Model.resnet18, Model.resnet50, Model.vgg16, Model.cifar)
_CACHE_LINE_BYTES = 64  # in channels_last, each element of a plane usually is in another cache line


class OpModule(nn.Module):
    """A function of hashengine.ops as a module."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        super().__init__()
        self.function, self.arguments = function, arguments

    def forward(self, x: Tensor) -> Any:
        return self.function(x, *self.arguments)


class FusedGate(eager.TripletGate):
    """hashengine.ops.triplet_gate on the maps of the eager module."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.triplet_gate(x, self.cw, self.hc, self.hw)


@dataclass(frozen=True)
class Op:
    """An op and how it is measured.

    Attributes:
        eager: makes the eager module for an x.
        fused: makes the fused module for an x.
        floor: computes the floor of a call in bytes. Its arguments: x, the pass, the bytes that fit on chip.
        models: the networks whose layer shapes are measured.
        passes: the passes that are measured.
    """

    eager: Callable[[Tensor], nn.Module]
    fused: Callable[[Tensor], nn.Module]
    floor: Callable[[Tensor, str, int], float]
    models: tuple[Model, ...] = _IMAGE_MODELS
    passes: tuple[str, ...] = (FORWARD, FORWARD_BACKWARD)


def _simam_floor(x: Tensor, direction: str, on_chip: int) -> float:
    """Forward: read x, write y. Backward: read x and dy, write dx.

    If a plane does not fit on chip, the forward and the backward each read their inputs twice.
    """
    plane = x.shape[2] * x.shape[3] * (x.element_size() if x.is_contiguous() else _CACHE_LINE_BYTES)
    forward, backward = (2, 3) if plane <= on_chip else (3, 5)
    return x.nbytes * (forward if direction == FORWARD else forward + backward)


def _triplet_floor(x: Tensor, direction: str, on_chip: int) -> float:
    """Forward: read x, write y; if a sample does not fit on chip, read x twice.

    Forward and backward: the forward reads x twice and writes y and the maps. The backward reads x and the maps once,
    reads dy twice, and writes dx.
    """
    if direction == FORWARD:
        return x.nbytes * (2 if x[:1].nbytes <= on_chip else 3)
    bytes_per_map_element = 4 * (2 + 1 + 1)  # 4 bytes each: maximum, mean, index of the maximum, response
    return x.nbytes * 7 + 2 * bytes_per_map_element * _map_numel(x)


def _map_numel(x: Tensor) -> int:
    """The number of elements of the three maps together, with one channel each."""
    n, c, h, w = x.shape
    return n * (c * w + h * c + h * w)


def _pool_floor(x: Tensor, direction: str, on_chip: int) -> float:
    """Forward: read x, write the maps and the indices of the maxima. Backward: read indices and gradients, write dx."""
    maps = _map_numel(x) * (2 * x.element_size() + 4)
    return x.nbytes * (1 if direction == FORWARD else 2) + maps * (1 if direction == FORWARD else 2)


def _gate_floor(x: Tensor, direction: str, on_chip: int) -> float:
    """Forward: read x and the maps, write y. Backward: read x, the maps and dy, write dx and the maps' gradients."""
    return x.nbytes * (2 if direction == FORWARD else 5) + _map_numel(x) * 4 * (1 if direction == FORWARD else 3)


OPS = {
    "simam": Op(lambda x: eager.SimAM(), lambda x: fused.SimAM(), _simam_floor),
    "triplet_attention": Op(lambda x: eager.TripletAttention(), lambda x: fused.TripletAttention(), _triplet_floor),
    "greedy_sign": Op(
        lambda u: eager.GreedySign(),
        lambda u: fused.GreedyHash(),
        lambda u, direction, on_chip: u.nbytes * (2 if direction == FORWARD else 5),
        models=(Model.head,),
    ),
    "pack_bits": Op(
        lambda u: eager.PackBits(),
        lambda u: OpModule(ops.pack_bits),
        lambda u, direction, on_chip: u.nbytes + u.numel() / 8,
        models=(Model.head,),
        passes=(FORWARD,),
    ),
    "triplet_pool": Op(lambda x: eager.TripletPool(), lambda x: OpModule(ops.triplet_pool), _pool_floor),
    "triplet_gate": Op(lambda x: eager.TripletGate(*x.shape), lambda x: FusedGate(*x.shape), _gate_floor),
}
# Without triplet_pool and triplet_gate: TripletAttention calls them only if a part of it was changed, for example by
# SyncBatchNorm or a hook.
DEFAULT_OPS = ("simam", "triplet_attention", "greedy_sign", "pack_bits")


def build(op: Op, x: Tensor) -> dict[str, nn.Module]:
    """The eager and the fused module on x's device, with the same parameters and buffers."""
    torch.manual_seed(0)
    modules = {"eager": op.eager(x).to(x.device), "fused": op.fused(x).to(x.device)}
    modules["fused"].load_state_dict(modules["eager"].state_dict())
    return modules


def make_call(module: nn.Module, x: Tensor, direction: str) -> Callable[[], list[Tensor]]:
    """A function that runs one pass. It returns the outputs and, after a backward, also the gradients."""
    training = direction == FORWARD_BACKWARD
    module.train(training).requires_grad_(training)
    if not training:
        return lambda: _as_list(module(x))
    leaf = x.detach().requires_grad_()
    inputs = [leaf, *module.parameters()]
    grads = [_gradient_like(y, x.dtype) for y in _as_list(module(leaf))]

    def forward_backward() -> list[Tensor]:
        outputs = _as_list(module(leaf))
        return [*outputs, *torch.autograd.grad(outputs, inputs, grads)]

    return forward_backward


def _gradient_like(y: Tensor, dtype: torch.dtype) -> Tensor:
    """Random numbers in the dtype of y. They are rounded to `dtype` first, so they are the same for all dtypes of y."""
    generator = torch.Generator(y.device).manual_seed(2)
    numbers = torch.randn(y.shape, generator=generator, device=y.device).to(dtype)
    return torch.empty_like(y).copy_(numbers)


def _as_list(outputs: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return list(outputs) if isinstance(outputs, tuple) else [outputs]
