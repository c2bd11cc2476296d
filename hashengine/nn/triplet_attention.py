"""Triplet attention as a layer."""

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from hashengine._validation import check_flag, check_integer
from hashengine.errors import invalid
from hashengine.nn._arguments import check_channels, check_factory_arguments
from hashengine.nn._layer import Layer
from hashengine.ops._branches import BRANCHES, add, max_and_mean
from hashengine.ops._check import wide_dtype
from hashengine.ops._plain import in_dtype_and_layout_of, needs_plain_torch
from hashengine.ops.triplet_attention import triplet_attention, triplet_attention_inference
from hashengine.ops.triplet_attention_update import triplet_attention_update
from hashengine.ops.triplet_gate import triplet_gate
from hashengine.ops.triplet_pool import triplet_pool

# torch.fx records calls of these functions instead of tracing them.
torch.fx.wrap("triplet_pool")
torch.fx.wrap("triplet_gate")

# The prefixes of the keys in the state dicts of the two official modules: those of one on the left, those of the other
# on the right. The layer uses those on the right.
_OFFICIAL_PREFIXES = {
    "ChannelGateH.spatial.": "cw.conv.",
    "ChannelGateW.spatial.": "hc.conv.",
    "SpatialGate.spatial.": "hw.conv.",
}

_GATE_NAMES = ("cw", "hc", "hw", "ChannelGateH", "ChannelGateW", "SpatialGate")  # in the order of the branches

# For each branch: the axis of x that the official modules swap with the channels, so that the gate pools it as axis 1.
_SWAPPED_AXIS = {"cw": 2, "hc": 3, "hw": 1}


class _Gate(nn.Module):
    """One branch, with the names of the official gate: `conv.conv.weight` and `conv.bn.*`.

    `TripletAttention` uses the parts of the gate. It calls the gate itself only if somebody observes the call.
    """

    def __init__(self, kernel_size: int, device: torch.device | str | None, dtype: torch.dtype | None):
        super().__init__()
        self.conv = nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False, device=device, dtype=dtype),
                bn=nn.BatchNorm2d(1, eps=1e-5, momentum=0.01, device=device, dtype=dtype),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """Multiply `x` [N, pooled axis, rows, columns] by the gate that is computed from its axis 1."""
        pool, _ = max_and_mean(x.to(wide_dtype(x)), "hw")
        return x * torch.sigmoid(self.conv(pool.to(x.dtype)))


class TripletAttention(Layer):
    """Cross-dimension attention, `hashengine.ops.triplet_attention`: [N, C, H, W] to the same shape and dtype.

    In Misra et al., "Rotate to Attend", WACV 2021, it is the last op of a residual branch, before the addition. With
    its initial parameters, it multiplies its input by about 1/2. A residual branch tolerates that; for a plain network,
    see `PlainTripletAttention`.

    The state dicts of both official modules can be loaded (keys `cw`, `hc`, `hw`, or `ChannelGateH`, `ChannelGateW`,
    `SpatialGate`). Each BatchNorm is an `nn.BatchNorm2d`. The layer runs one fused op; in training, another op then
    updates the running statistics. If a part of the layer has been changed, for example by `convert_sync_batchnorm`, a
    hook or a parametrisation, the layer runs pooling, convolution, BatchNorm and gate as separate ops instead.

    Hooks on `cw`, `hc` and `hw` and on the modules inside them run as in the official module. A hook on one of the
    three gets x with the pooled axis and the channels swapped, and the product of this tensor with the gate. Global
    hooks (`torch.nn.modules.module.register_module_forward_hook`) see the layer but not the modules inside it.

    Args:
        channels: a positive integer or None. It has no effect, because the parameters do not depend on it; accepted for
            factories that call `layer(channels)`.
        no_spatial: leave out the branch over (H, W).
        kernel_size: kernel size of the convolutions, odd.
        device: device of the parameters.
        dtype: floating dtype of the parameters.

    Raises:
        InputError: an argument is of another kind, or `kernel_size` is not positive and odd.
    """

    def __init__(
        self,
        channels: int | None = None,
        *,
        no_spatial: bool = False,
        kernel_size: int = 7,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        where = type(self).__name__
        advice = f"no_spatial is a keyword: {where}(no_spatial={channels})" if isinstance(channels, bool) else ""
        check_channels(where, channels, advice)
        check_factory_arguments(where, device, dtype)
        kernel_size = check_integer(where, "kernel_size", kernel_size, 1)
        if kernel_size % 2 == 0:
            raise invalid(where, "kernel_size", "odd", kernel_size)
        self.no_spatial = check_flag(where, "no_spatial", no_spatial)
        for name in ("cw", "hc") if no_spatial else ("cw", "hc", "hw"):
            self.add_module(name, _Gate(kernel_size, device, dtype))
        self.register_load_state_dict_pre_hook(_rename_official_keys)

    @property
    def _gates(self) -> list[nn.Sequential] | None:
        """Convolution and BatchNorm of each branch; None if the module of a branch has been replaced or wrapped."""
        modules: dict[str, Any] = self._modules
        gates: list[Any] = []
        for name in ("cw", "hc") if self.no_spatial else ("cw", "hc", "hw"):
            branch = modules[name]
            if type(branch) is not _Gate:
                return None
            gates.append(branch._modules["conv"])
        return gates

    def forward(self, x: Tensor) -> Tensor:
        """Apply the attention to `x` [N, C, H, W]; the result has the same shape and dtype."""
        gates = self._gates
        if gates is None or _is_call_observed(self, gates):
            return self._through_gates(x)
        # _modules, _parameters and _buffers are read directly, because attribute lookups in nn.Module are slow compared
        # with the op on small maps.
        convolutions: list[Any] = [gate._modules.get("conv") for gate in gates]
        norms: list[Any] = [gate._modules.get("bn") for gate in gates]
        # Under a transform, the BatchNorms update their running statistics, which torch keeps out of the graph.
        can_fuse = not _is_traced_by_fx(x) and _can_fuse(gates, convolutions, norms)
        if not can_fuse or (norms[0].training and needs_plain_torch()):
            pools = triplet_pool(x)
            return triplet_gate(x, *(gate(pools[i]) for i, gate in enumerate(gates)))
        training, eps = norms[0].training, norms[0].eps
        conv_weight = [_parameter(conv, "weight") for conv in convolutions]
        bn_weight, bn_bias, running_mean, running_var = [], [], [], []
        for bn in norms:  # one loop, because four comprehensions take longer
            buffers = bn._buffers
            bn_weight.append(_parameter(bn, "weight"))
            bn_bias.append(_parameter(bn, "bias"))
            running_mean.append(buffers["running_mean"])
            running_var.append(buffers["running_var"])
        if not training and (needs_plain_torch() or not _needs_gradient(x, conv_weight, bn_weight, bn_bias)):
            return triplet_attention_inference(x, conv_weight, bn_weight, bn_bias, running_mean, running_var, eps)
        y, mean, var = triplet_attention(x, conv_weight, bn_weight, bn_bias, running_mean, running_var, training, eps)
        if training:
            n, c, h, w = x.shape
            counts = [n * c * w, n * h * c, n * h * w][: len(norms)]
            steps = [bn._buffers["num_batches_tracked"] for bn in norms]
            triplet_attention_update(mean, var, running_mean, running_var, steps, counts, norms[0].momentum)
        return y

    def _through_gates(self, x: Tensor) -> Tensor:
        """Call the module of each branch, as the official modules do."""
        gates: list[Any] = [self._modules[name] for name in _GATE_NAMES if name in self._modules]
        products = []
        for gate, branch in zip(gates, BRANCHES, strict=False):
            axis = _SWAPPED_AXIS[branch]
            products.append(gate(x.transpose(1, axis)).transpose(1, axis))
        mean = add(products) / len(products)
        return mean.to(x.dtype) if _is_traced_by_fx(x) else in_dtype_and_layout_of(x, mean)

    def extra_repr(self) -> str:
        """The arguments that `repr` shows."""
        return f"no_spatial={self.no_spatial}"


def _can_fuse(gates: list[nn.Sequential], convolutions: list[Any], norms: list[Any]) -> bool:
    """Whether the modules compute exactly what the fused op does, with the same settings in all branches.

    A convolution must compute a map of the same size from the two pooled ones, with a square kernel of odd size.
    """
    for gate, conv, bn in zip(gates, convolutions, norms, strict=True):
        if type(conv) is not nn.Conv2d or type(bn) is not nn.BatchNorm2d:
            return False  # converted, parametrised or replaced
        if type(gate) is not nn.Sequential or len(gate._modules) != 2:
            return False  # replaced, or with a third layer
        first, kernel = norms[0], convolutions[0].kernel_size
        if (conv.in_channels, conv.out_channels, conv.kernel_size) != (2, 1, kernel) or kernel[0] != kernel[1]:
            return False
        if kernel[0] % 2 == 0 or conv.padding != (kernel[0] // 2, kernel[0] // 2) or conv.padding_mode != "zeros":
            return False
        if conv.stride != (1, 1) or conv.dilation != (1, 1) or _parameter(conv, "bias") is not None:
            return False
        if _parameter(conv, "weight") is None:
            return False
        if not (bn.affine and bn.track_running_stats) or _lacks_a_part(bn):
            return False
        if bn.training != first.training or bn.eps != first.eps or bn.momentum != first.momentum:
            return False
    return not _are_observed((*gates, *convolutions, *norms))


def _is_traced_by_fx(x: Any) -> bool:
    return isinstance(x, torch.fx.Proxy)


def _parameter(module: nn.Module, name: str) -> Any:
    """A parameter of a module; None if it is missing.

    It is a plain attribute, without an entry in `_parameters`, in a replica that `nn.DataParallel` makes, in FSDP1, and
    where another network computes it.
    """
    parameter = module._parameters.get(name)
    return module.__dict__.get(name) if parameter is None else parameter


def _lacks_a_part(bn: nn.BatchNorm2d) -> bool:
    if _parameter(bn, "weight") is None or _parameter(bn, "bias") is None:
        return True
    parts: Any = bn._buffers.values()
    return any(part is None for part in parts)


def _is_call_observed(layer: nn.Module, gates: list[nn.Sequential]) -> bool:
    """Whether somebody observes the call of a branch's module or, in an official module, of the pooling inside it."""
    branches: Any = layer._modules.values()
    if _are_observed(branches):
        return True
    for branch in branches:
        if len(branch._modules) > 1 and _are_observed(part for part in branch._modules.values() if part not in gates):
            return True
    return False


def _are_observed(modules: Iterable[Any]) -> bool:
    """Whether one of the modules has a hook, or a forward other than that of its class."""
    for module in modules:
        if (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or "forward" in module.__dict__
        ):
            return True
    return False


def _needs_gradient(x: Tensor, *parameters: list[Tensor]) -> bool:
    """Whether a backward is to be expected. It is right in any case, but may have to compute the forward again."""
    if not torch.is_grad_enabled():
        return False
    return x.requires_grad or any(parameter.requires_grad for tensors in parameters for parameter in tensors)


def _rename_official_keys(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    for official, ours in _OFFICIAL_PREFIXES.items():
        for key in [key for key in state_dict if key.startswith(prefix + official)]:
            state_dict[prefix + ours + key.removeprefix(prefix + official)] = state_dict.pop(key)
