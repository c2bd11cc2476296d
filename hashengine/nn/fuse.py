"""`fuse` makes the official attention modules in a network run the fused ops; `unfuse` undoes it."""

from __future__ import annotations

import copy
import importlib
import inspect
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hashengine.errors import invalid
from hashengine.nn._insertion import check_model
from hashengine.nn.simam import SimAM
from hashengine.nn.triplet_attention import TripletAttention

# For each of the two official triplet modules: the names of its three gates, and the name of the submodule of a gate
# that contains convolution and BatchNorm.
_NAMINGS = ((("cw", "hc", "hw"), "conv"), (("ChannelGateH", "ChannelGateW", "SpatialGate"), "spatial"))

_MARK = "_official_class"  # the attribute of a module whose class `fuse` has changed

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class FusedSimAM(SimAM):
    """An official SimAM module that runs the fused op. The attribute `e_lambda` still contains lambda."""

    e_lambda: float

    @property
    def lam(self) -> float:  # type: ignore[override]
        """The paper's lambda."""
        return self.e_lambda


class FusedTripletAttention(TripletAttention):
    """An official triplet attention that runs the fused op on its own parameters, whose names do not change."""

    @property
    def no_spatial(self) -> bool:  # type: ignore[override]
        """Whether the branch over (H, W) is missing."""
        return len(self._gates) == 2

    @property
    def _gates(self) -> list[nn.Sequential]:
        return _official_gates(self)


@dataclass(frozen=True)
class _OfficialClass:
    """The class that a fused module had. A pickle contains its name, so that it can be read without the official code.

    Attributes:
        module: the Python module that defines the class.
        name: the qualified name of the class in `module`.
        value: the class; None in an unpickled object if the class could not be imported.
    """

    module: str
    name: str
    value: type[nn.Module] | None

    @classmethod
    def of(cls, module: nn.Module) -> _OfficialClass:
        value = type(module)
        return cls(value.__module__, value.__qualname__, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> _OfficialClass:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _find_class, (self.module, self.name)


def _find_class(module: str, name: str) -> _OfficialClass:
    try:
        value = operator.attrgetter(name)(importlib.import_module(module))
    except (ImportError, AttributeError):
        value = None
    return _OfficialClass(module, name, value)


@dataclass(frozen=True)
class FuseReport:
    """What `fuse` did; meant to be printed.

    Attributes:
        fused: qualified names of the modules that run the fused ops.
        left: qualified names of the modules that were not changed, each with the reason.
    """

    fused: tuple[str, ...]
    left: dict[str, str]

    def __str__(self) -> str:
        lines = [f"fused {len(self.fused)} modules:", *(f"  {name or 'the model itself'}" for name in self.fused)]
        if not self.fused:
            lines = ["fused nothing: no module is an official SimAM or triplet attention that can be fused"]
        return "\n".join(lines + [f"left {name or 'the model itself'} alone: {why}" for name, why in self.left.items()])


def fuse(model: nn.Module) -> FuseReport:
    """Make the official SimAM and triplet attention modules inside `model` run the fused ops.

    Modules are recognised by structure, not by class, so copies of the official files in other projects are found, too.
    A SimAM is a module that has `e_lambda` and no parameters. A triplet attention has the gates `cw`, `hc` and `hw`, or
    `ChannelGateH`, `ChannelGateW` and `SpatialGate`; the last gate may be missing. Before a candidate is fused, it is
    tested: a copy in float64 with random parameters must give the same outputs, gradients and running statistics as the
    fused op, in training and in eval mode. A module that gives other results is left unchanged, and so is one whose
    forward takes anything but `x`.

    Fusing changes the class of a module. The object, its parameters, state dict (with the same keys), hooks, mode,
    device and dtype stay the same. Results differ by rounding only, except for planes of 1 x 1, on which the official
    SimAM divides by zero.

    `unfuse` gives the modules their official classes back. Call it before you replace a part of a module, such as the
    pooling of a gate or the sigmoid of a SimAM, which a fused module does not run, and before you call a method that
    the official class has.

    Args:
        model: changed in place. Call `fuse` before `torch.compile` and before DDP wraps the model.

    Returns:
        The report of the modules that were fused, and of those that were not, each with the reason.

    Raises:
        InputError: `model` is not a module, or is compiled or wrapped.
    """
    check_model("fuse", model)
    fused: list[str] = []
    left: dict[str, str] = {}
    for name, module in list(model.named_modules()):
        if not _is_candidate(module):
            continue
        reason = _structural_difference(module) or _numerical_difference(module)
        if reason:
            left[name] = reason
        else:
            _change_class(module)
            fused.append(name)
    return FuseReport(tuple(fused), left)


def unfuse(model: nn.Module) -> tuple[str, ...]:
    """Undo `fuse`: give every fused module inside `model` its official class back.

    As with `fuse`, the objects, their parameters, state dict, hooks, mode, device and dtype stay the same.

    Args:
        model: changed in place. Call `unfuse` before `torch.compile` and before DDP wraps the model.

    Returns:
        The qualified names of the modules that ran the fused ops.

    Raises:
        InputError: `model` is not a module, contains no fused module, or is compiled or wrapped; or it was pickled, and
            the official class of a module cannot be imported. The model is then unchanged.
    """
    check_model("unfuse", model)
    marked = [(name, module, vars(module)[_MARK]) for name, module in model.named_modules() if _MARK in vars(module)]
    if not marked:
        raise invalid("unfuse", "model", "a network with fused modules", f"a {type(model).__name__} with none")
    for name, _, official in marked:
        if official.value is None:
            actual = f"{official.module}.{official.name}"
            raise invalid("unfuse", name or "model", "of an official class that can be imported", actual)
    fused = tuple(name for name, module, _ in marked if isinstance(module, (FusedSimAM, FusedTripletAttention)))
    for _, module, official in marked:
        module.__class__ = official.value
        delattr(module, _MARK)
    return fused


def _is_candidate(module: nn.Module) -> bool:
    if isinstance(module, (SimAM, TripletAttention)):
        return False
    return hasattr(module, "e_lambda") or bool(_gate_paths(module))


def _gate_paths(module: nn.Module) -> list[str]:
    """The paths of the submodules with convolution and BatchNorm in a triplet attention; empty for other modules."""
    children = {name: child for name, child in module._modules.items() if child is not None}  # a gate may be shared
    for gates, part in _NAMINGS:
        if gates[0] in children and gates[1] in children:
            return [f"{gate}.{part}" for gate in gates if gate in children]
    return []


def _official_gates(module: nn.Module) -> list[Any]:
    return [module.get_submodule(path) for path in _gate_paths(module)]


def _structural_difference(module: Any) -> str | None:
    if "forward" in vars(module) or isinstance(module, torch.jit.ScriptModule):
        return "its forward is not that of its class"
    arguments = list(inspect.signature(module.forward).parameters)
    if len(arguments) != 1:
        return "its forward takes more arguments than x"
    if arguments != ["x"]:
        return f"the argument of its forward is {arguments[0]}, not x, and a caller may give it by this name"
    inner = [child for child in module.modules() if child is not module]
    if any(getattr(child, hooks) for child in inner for hooks in _HOOKS):
        return "a module inside it has hooks, which would no longer run"
    paths = _gate_paths(module)
    if not paths:
        if not isinstance(module.e_lambda, (int, float)) or not module.e_lambda > 0:
            return f"e_lambda must be a number above 0, got {module.e_lambda!r}"
        return "a SimAM has no parameters, but this module does" if module.state_dict() else None
    for path in paths:
        gate, part = path.split(".")
        reason = _gate_difference(getattr(getattr(module, gate), part, None))
        if reason:
            return f"{path} {reason}"
    gates = _official_gates(module)
    kernel_sizes = {gate.conv.kernel_size for gate in gates}
    if len(kernel_sizes) > 1:
        return f"the kernel sizes of its gates differ: {sorted(kernel_sizes)}"
    expected = sum(len(gate.state_dict()) for gate in gates)
    return None if len(module.state_dict()) == expected else "it has more parameters than its gates"


def _gate_difference(gate: nn.Module | None) -> str | None:
    children = list(gate.named_children()) if gate is not None else []
    if [name for name, _ in children] != ["conv", "bn"]:
        return f"must consist of conv and bn, got {[name for name, _ in children]}"
    (_, conv), (_, norm) = children
    size = conv.kernel_size[0] if isinstance(conv, nn.Conv2d) else 0
    like = nn.Conv2d(2, 1, size, padding=size // 2, bias=False, device="meta") if size % 2 else None
    if type(conv) is not nn.Conv2d or like is None or repr(conv) != repr(like):
        return f"must convolve 2 channels to 1, with odd kernel size, same output size and no bias, got {conv}"
    if type(norm) not in (nn.BatchNorm2d, nn.SyncBatchNorm) or getattr(norm, "num_features", None) != 1:
        return f"must normalise by BatchNorm2d(1), got {norm}"
    return None


def _change_class(module: nn.Module) -> None:
    gates = _official_gates(module)
    for gate in dict.fromkeys(gates):
        _mark_and_change_class(gate, nn.Sequential)  # its children are conv and bn, as _gate_difference has checked
    _mark_and_change_class(module, FusedTripletAttention if gates else FusedSimAM)


def _mark_and_change_class(module: Any, to: type[nn.Module]) -> None:
    setattr(module, _MARK, _OfficialClass.of(module))
    module.__class__ = to


def _numerical_difference(module: nn.Module) -> str | None:
    """Compare a copy of `module` with a fused copy. Returns the reason not to fuse it, or None.

    The comparison runs on the CPU and draws from a generator of its own.
    """
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"):
            official = _random_copy(module)
            fused = copy.deepcopy(official)
            _change_class(fused)
            for training in (True, False):
                results = [_results(layer.train(training)) for layer in (official, fused)]
                if not all(_close(*pair) for pair in zip(*results, strict=True)):
                    return "it computes something else"
    except Exception as error:
        return f"it could not be tried: {type(error).__name__}: {error}".splitlines()[0]
    return None


def _random_copy(module: nn.Module) -> nn.Module:
    """A copy of `module` without its hooks, in float64 on the CPU, with random parameters that require gradients.

    The statistics are random, too. Initial values could hide a difference: a BatchNorm of weight 0, for example, makes
    every gate constant.
    """
    twin = copy.deepcopy(module).to_empty(device="cpu").double().requires_grad_()
    for hooks in _HOOKS:
        getattr(twin, hooks).clear()
    for part in twin.modules():
        if isinstance(part, nn.SyncBatchNorm):  # the same computation, without communication between processes
            part.__class__ = nn.BatchNorm2d  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(0)
    for name, tensor in twin.state_dict().items():
        if tensor.is_floating_point():
            bounds = (0.5, 1.5) if name.endswith("running_var") else None
            tensor.uniform_(*bounds, generator=generator) if bounds else tensor.normal_(generator=generator)
        else:
            tensor.zero_()
    return twin


def _results(layer: nn.Module) -> list[Tensor]:
    """Output, gradients and buffers for an input whose channels differ in scale and whose axes differ in size."""
    generator = torch.Generator().manual_seed(1)
    x, grad = torch.randn(2, 2, 4, 5, 7, generator=generator, dtype=torch.float64)
    x = (x * torch.logspace(-3, 1, 4, dtype=x.dtype).view(4, 1, 1) + 0.1).requires_grad_()
    y = layer(x)
    gradients = torch.autograd.grad(y, [x, *layer.parameters()], grad)
    return [y.detach(), *gradients, *(buffer.clone() for buffer in layer.buffers())]


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, rtol=1e-9, atol=1e-9)
