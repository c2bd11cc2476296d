"""The official attention modules in a network, made to run the fused ops."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hashengine.nn._hosts import refuse_wrapped
from hashengine.nn.simam import SimAM
from hashengine.nn.triplet_attention import TripletAttention

# What the two official triplet modules call their three gates, and the convolution and BatchNorm in each.
_NAMINGS = ((("cw", "hc", "hw"), "conv"), (("ChannelGateH", "ChannelGateW", "SpatialGate"), "spatial"))

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class FusedSimAM(SimAM):
    """An official SimAM module, now running the fused op; lambda is still its ``e_lambda``."""

    @property
    def lam(self) -> float:
        return self.e_lambda


class FusedTripletAttention(TripletAttention):
    """An official triplet attention, now running the fused op on its own parameters, under their own names."""

    @property
    def _gates(self) -> list[nn.Sequential]:
        return _official_gates(self)


@dataclass(frozen=True)
class FuseReport:
    """What `fuse` did: qualified names of what now runs fused, and of what it left alone, with the reason."""

    fused: tuple[str, ...]
    left: dict[str, str]

    def __str__(self) -> str:
        lines = [f"fused {len(self.fused)} modules:", *(f"  {name or 'the model itself'}" for name in self.fused)]
        if not self.fused:
            lines = ["fused nothing: no module with the structure of the official SimAM or triplet attention"]
        return "\n".join(lines + [f"left {name or 'the model itself'} alone: {why}" for name, why in self.left.items()])


def fuse(model: nn.Module) -> FuseReport:
    """Make the official SimAM and triplet attention modules inside `model` run the fused ops.

    They are known by structure, not by import: copies of the official files in other projects count too. SimAM is a
    module with ``e_lambda`` and no parameters; triplet attention has the gates ``cw``, ``hc``, ``hw`` or
    ``ChannelGateH``, ``ChannelGateW``, ``SpatialGate``, or all but the last. Each candidate first proves itself: a copy
    in float64 with random parameters must give the fused op's outputs, gradients and running statistics, in training
    and in eval mode. One that computes something else is left alone.

    A module stays the object that it is, with its parameters, state dict (the same keys), hooks, mode, device and
    dtype; its class changes. What changes in its results is rounding, and planes of 1 x 1, on which the official SimAM
    divides by zero.

    Args:
        model: changed in place. Fuse before ``torch.compile`` and before DDP wraps it.

    Returns:
        The report of what was fused and what was left, and why.

    Raises:
        TypeError: `model` is no module.
        ValueError: `model` is compiled or wrapped.
    """
    refuse_wrapped("fuse", model)
    fused, left = [], {}
    for name, module in list(model.named_modules()):
        if not _is_candidate(module):
            continue
        reason = _structural_difference(module) or _numerical_difference(module)
        if reason:
            left[name] = reason
        else:
            _swap(module)
            fused.append(name)
    return FuseReport(tuple(fused), left)


def _is_candidate(module: nn.Module) -> bool:
    if isinstance(module, (SimAM, TripletAttention)):
        return False
    return hasattr(module, "e_lambda") or _naming(module) is not None


def _naming(module: nn.Module) -> tuple[tuple[str, ...], str] | None:
    """The names of the gates that `module` has, and of the part of each that convolves."""
    children = dict(module.named_children())
    for gates, part in _NAMINGS:
        if gates[0] in children and gates[1] in children:
            return tuple(gate for gate in gates if gate in children), part
    return None


def _official_gates(module: nn.Module) -> list[nn.Module]:
    gates, part = _naming(module)
    return [getattr(getattr(module, gate), part) for gate in gates]


def _structural_difference(module: nn.Module) -> str | None:
    if "forward" in vars(module) or isinstance(module, torch.jit.ScriptModule):
        return "its forward is not that of its class"
    inner = [child for child in module.modules() if child is not module]
    if any(getattr(child, hooks) for child in inner for hooks in _HOOKS):
        return "a module inside it has hooks, which would no longer run"
    if _naming(module) is None:
        if not isinstance(module.e_lambda, (int, float)) or not module.e_lambda > 0:
            return f"e_lambda must be a number above 0, got {module.e_lambda!r}"
        return "SimAM has no parameters, and this does" if module.state_dict() else None
    gates, part = _naming(module)
    for gate in gates:
        reason = _gate_difference(getattr(getattr(module, gate), part, None))
        if reason:
            return f"{gate}.{part} {reason}"
    kernel_sizes = {gate.conv.kernel_size for gate in _official_gates(module)}
    if len(kernel_sizes) > 1:
        return f"the gates' kernels differ in size: {sorted(kernel_sizes)}"
    expected = sum(len(gate.state_dict()) for gate in _official_gates(module))
    return None if len(module.state_dict()) == expected else "it has more parameters than its gates"


def _gate_difference(gate: nn.Module | None) -> str | None:
    children = list(gate.named_children()) if gate is not None else []
    if [name for name, _ in children] != ["conv", "bn"]:
        return f"must be conv and bn, got {[name for name, _ in children]}"
    (_, conv), (_, norm) = children
    size = conv.kernel_size[0] if isinstance(conv, nn.Conv2d) else 0
    like = nn.Conv2d(2, 1, size, padding=size // 2, bias=False, device="meta") if size % 2 else None
    if type(conv) is not nn.Conv2d or like is None or repr(conv) != repr(like):
        return f"must convolve 2 channels to 1, odd kernel, same size, no bias, got {conv}"
    if type(norm) not in (nn.BatchNorm2d, nn.SyncBatchNorm) or norm.num_features != 1:
        return f"must normalise by BatchNorm2d(1), got {norm}"
    return None


def _swap(module: nn.Module) -> None:
    if _naming(module) is None:
        module.__class__ = FusedSimAM
        return
    for gate in _official_gates(module):
        gate.__class__ = nn.Sequential  # of conv and bn, as it was
    module.no_spatial = len(_official_gates(module)) == 2
    module.__class__ = FusedTripletAttention


def _numerical_difference(module: nn.Module) -> str | None:
    """Whether a copy computes something else than its fused self; on the CPU, without a trace in random state."""
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad(), torch.device("cpu"):
            torch.manual_seed(0)
            theirs = _random_copy(module)
            ours = copy.deepcopy(theirs)
            _swap(ours)
            for training in (True, False):
                results = [_results(layer.train(training)) for layer in (theirs, ours)]
                if not all(_close(*pair) for pair in zip(*results, strict=True)):
                    return "it computes something else"
    except Exception as error:
        return f"it could not be tried: {type(error).__name__}: {error}".splitlines()[0]
    return None


def _random_copy(module: nn.Module) -> nn.Module:
    """`module` without its hooks, in float64 on the CPU, with parameters and statistics that hide no difference."""
    twin = copy.deepcopy(module).to_empty(device="cpu").double()
    for hooks in _HOOKS:
        getattr(twin, hooks).clear()
    for part in twin.modules():
        if isinstance(part, nn.SyncBatchNorm):
            part.__class__ = nn.BatchNorm2d  # alike but for the processes, which are not to be asked here
    for name, tensor in twin.state_dict().items():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5) if name.endswith("running_var") else tensor.normal_()
        else:
            tensor.zero_()
    return twin


def _results(layer: nn.Module) -> list[Tensor]:
    """Output, gradients and buffers for planes of many scales, in sizes that tell the axes apart."""
    generator = torch.Generator().manual_seed(1)
    x, grad = torch.randn(2, 2, 4, 5, 7, generator=generator, dtype=torch.float64)
    x = (x * torch.logspace(-3, 1, 4, dtype=x.dtype).view(4, 1, 1) + 0.1).requires_grad_()
    y = layer(x)
    gradients = torch.autograd.grad(y, [x, *layer.parameters()], grad)
    return [y.detach(), *gradients, *(buffer.clone() for buffer in layer.buffers())]


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, rtol=1e-9, atol=1e-9)
