"""The ops under measurement: each eager and fused as modules over x, what one call is, and the least it must move."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks import eager
from benchmarks.shapes import Model
from hashengine import nn as fused
from hashengine import ops

FORWARD = "forward"  # in eval mode, without a graph
FORWARD_BACKWARD = "forward+backward"  # in training mode, gradients of x and of all parameters

_IMAGE_MODELS = (Model.resnet18, Model.resnet50, Model.vgg16, Model.cifar)
_SECTOR = 64  # bytes: a cache line; channels_last planes interleave, and no narrower slab of them can be read


class Call(nn.Module):
    """A function of hashengine.ops as a module."""

    def __init__(self, function: Callable, *arguments):
        super().__init__()
        self.function, self.arguments = function, arguments

    def forward(self, x: Tensor):
        return self.function(x, *self.arguments)


class FusedGate(eager.TripletGate):
    def forward(self, x: Tensor) -> Tensor:
        return ops.triplet_gate(x, self.cw, self.hc, self.hw)


@dataclass(frozen=True)
class Op:
    eager: Callable[[Tensor], nn.Module]  # both are built for an x
    fused: Callable[[Tensor], nn.Module]
    floor: Callable[[Tensor, str, int], float]  # bytes of (x, pass, bytes that fit on chip)
    models: tuple[Model, ...] = _IMAGE_MODELS
    passes: tuple[str, ...] = (FORWARD, FORWARD_BACKWARD)


def _simam_floor(x: Tensor, direction: str, on_chip: int) -> float:
    """Read x, write y; read x, dy, write dx. A second read of each where what shares a mean does not fit."""
    plane = x.shape[2] * x.shape[3] * (x.element_size() if x.is_contiguous() else _SECTOR)
    forward, backward = (2, 3) if plane <= on_chip else (3, 5)
    return x.nbytes * (forward if direction == FORWARD else forward + backward)


def _triplet_floor(x: Tensor, direction: str, on_chip: int) -> float:
    """Inference: read x, write y. Training: read x twice, write y; read x, dy, then dy, write dx; the maps twice."""
    if direction == FORWARD:
        return x.nbytes * (2 if x[:1].nbytes <= on_chip else 3)
    saved = 4 * (2 + 1 + 1)  # maximum and mean, index, response
    return x.nbytes * 7 + 2 * saved * _map_numel(x)


def _map_numel(x: Tensor) -> int:
    n, c, h, w = x.shape
    return n * (c * w + h * c + h * w)


def _pool_floor(x: Tensor, direction: str, on_chip: int) -> float:
    maps = _map_numel(x) * (2 * x.element_size() + 4)
    return x.nbytes * (1 if direction == FORWARD else 2) + maps * (1 if direction == FORWARD else 2)


def _gate_floor(x: Tensor, direction: str, on_chip: int) -> float:
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
        lambda u: Call(ops.pack_bits),
        lambda u, direction, on_chip: u.nbytes + u.numel() / 8,
        models=(Model.head,),
        passes=(FORWARD,),
    ),
    "triplet_pool": Op(lambda x: eager.TripletPool(), lambda x: Call(ops.triplet_pool), _pool_floor),
    "triplet_gate": Op(lambda x: eager.TripletGate(*x.shape), lambda x: FusedGate(*x.shape), _gate_floor),
}
DEFAULT_OPS = ("simam", "triplet_attention", "greedy_sign", "pack_bits")  # the other two serve SyncBatchNorm alone


def build(op: Op, x: Tensor) -> dict[str, nn.Module]:
    """Both modules on x's device, with the same parameters and buffers."""
    torch.manual_seed(0)
    modules = {"eager": op.eager(x).to(x.device), "fused": op.fused(x).to(x.device)}
    modules["fused"].load_state_dict(modules["eager"].state_dict())
    return modules


def make_call(module: nn.Module, x: Tensor, direction: str) -> Callable[[], list[Tensor]]:
    """Set the module up for one call: it gives the outputs, and the gradients of x and of all parameters."""
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
    """Normal numbers that are the same for every type of ``y``: those of ``dtype``."""
    generator = torch.Generator(y.device).manual_seed(2)
    numbers = torch.randn(y.shape, generator=generator, device=y.device).to(dtype)
    return torch.empty_like(y).copy_(numbers)


def _as_list(outputs: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return list(outputs) if isinstance(outputs, tuple) else [outputs]
