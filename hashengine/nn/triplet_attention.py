"""Triplet attention as a layer."""

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from hashengine._validation import check_integer
from hashengine.errors import invalid
from hashengine.nn._layer import Layer
from hashengine.ops._plain import needs_plain_torch
from hashengine.ops.triplet_attention import triplet_attention, triplet_attention_inference
from hashengine.ops.triplet_attention_update import triplet_attention_update
from hashengine.ops.triplet_gate import triplet_gate
from hashengine.ops.triplet_pool import triplet_pool

# The prefixes of the keys in the state dicts of the two official modules: those of one on the left, those of the other
# on the right. The layer uses those on the right.
_OFFICIAL_PREFIXES = {
    "ChannelGateH.spatial.": "cw.conv.",
    "ChannelGateW.spatial.": "hc.conv.",
    "SpatialGate.spatial.": "hw.conv.",
}


class _Gate(nn.Module):
    """The parameters of one branch, under the official names: `conv.conv.weight` and `conv.bn.*`."""

    def __init__(self, kernel_size: int, device: torch.device | str | None, dtype: torch.dtype | None):
        super().__init__()
        self.conv = nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False, device=device, dtype=dtype),
                bn=nn.BatchNorm2d(1, eps=1e-5, momentum=0.01, device=device, dtype=dtype),
            )
        )


class TripletAttention(Layer):
    """Cross-dimension attention, `hashengine.ops.triplet_attention`: [N, C, H, W] to the same shape and dtype.

    In Misra et al., "Rotate to Attend", WACV 2021, it is the last op of a residual branch, before the addition. With
    its initial parameters, it multiplies its input by about 1/2. A residual branch tolerates that; for a plain network,
    see `PlainTripletAttention`.

    The state dicts of both official modules can be loaded (keys `cw`, `hc`, `hw`, or `ChannelGateH`, `ChannelGateW`,
    `SpatialGate`). Each BatchNorm is an `nn.BatchNorm2d`. The layer runs one fused op; in training, another op then
    updates the running statistics. If a part of the layer has been changed, for example by `convert_sync_batchnorm`, a
    hook or a parametrisation, the layer runs pooling, convolution, BatchNorm and gate as separate ops instead.

    Args:
        channels: ignored, because the parameters do not depend on it; accepted for factories that call
            `layer(channels)`.
        no_spatial: leave out the branch over (H, W).
        kernel_size: kernel size of the convolutions, odd.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Raises:
        InputError: `kernel_size` is not a positive odd integer.
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
        kernel_size = check_integer("TripletAttention", "kernel_size", kernel_size, 1)
        if kernel_size % 2 == 0:
            raise invalid("TripletAttention", "kernel_size", "odd", kernel_size)
        self.no_spatial = no_spatial
        for name in ("cw", "hc") if no_spatial else ("cw", "hc", "hw"):
            self.add_module(name, _Gate(kernel_size, device, dtype))
        self.register_load_state_dict_pre_hook(_rename_official_keys)

    @property
    def _gates(self) -> list[nn.Sequential]:
        modules: dict[str, Any] = self._modules
        names = ("cw", "hc") if self.no_spatial else ("cw", "hc", "hw")
        return [modules[name]._modules["conv"] for name in names]

    def forward(self, x: Tensor) -> Tensor:
        """Apply the attention to `x` [N, C, H, W]; the result has the same shape and dtype."""
        gates = self._gates
        # _modules, _parameters and _buffers are read directly, because attribute lookups in nn.Module are slow compared
        # with the op on small maps.
        convolutions: list[Any] = [gate._modules["conv"] for gate in gates]
        norms: list[Any] = [gate._modules["bn"] for gate in gates]
        if not _can_fuse(gates, convolutions, norms):
            return triplet_gate(x, *(gate(pool) for gate, pool in zip(gates, triplet_pool(x), strict=False)))
        training, eps = norms[0].training, norms[0].eps
        conv_weight = [conv._parameters["weight"] for conv in convolutions]
        bn_weight = [bn._parameters["weight"] for bn in norms]
        bn_bias = [bn._parameters["bias"] for bn in norms]
        running_mean = [bn._buffers["running_mean"] for bn in norms]
        running_var = [bn._buffers["running_var"] for bn in norms]
        if not training and (needs_plain_torch() or not _needs_gradient(x, conv_weight, bn_weight, bn_bias)):
            return triplet_attention_inference(x, conv_weight, bn_weight, bn_bias, running_mean, running_var, eps)
        y, mean, var = triplet_attention(x, conv_weight, bn_weight, bn_bias, running_mean, running_var, training, eps)
        if training:
            n, c, h, w = x.shape
            counts = [n * c * w, n * h * c, n * h * w][: len(norms)]
            steps = [bn._buffers["num_batches_tracked"] for bn in norms]
            triplet_attention_update(mean, var, running_mean, running_var, steps, counts, norms[0].momentum)
        return y

    def extra_repr(self) -> str:
        """The arguments that `repr` shows."""
        return f"no_spatial={self.no_spatial}"


def _can_fuse(gates: list[nn.Sequential], convolutions: list[Any], norms: list[Any]) -> bool:
    """Whether the modules compute exactly what the fused op does, with the same settings in all branches."""
    if any(type(conv) is not nn.Conv2d for conv in convolutions) or any(type(bn) is not nn.BatchNorm2d for bn in norms):
        return False  # converted, parametrised or replaced
    if not all(_is_fusible(conv, convolutions[0].kernel_size[0]) for conv in convolutions):
        return False
    if any(_has_hooks(module) for modules in (gates, convolutions, norms) for module in modules):
        return False
    if not all(bn.affine and bn.track_running_stats for bn in norms):
        return False
    return len({(bn.training, bn.eps, bn.momentum) for bn in norms}) == 1


def _is_fusible(conv: nn.Conv2d, size: int) -> bool:
    """Whether `conv` computes a map of the same size from the two pooled ones, with a square kernel of odd `size`."""
    return (
        size % 2 == 1
        and (conv.in_channels, conv.out_channels, conv.kernel_size) == (2, 1, (size, size))
        and (conv.padding, conv.padding_mode) == ((size // 2, size // 2), "zeros")
        and (conv.stride, conv.dilation) == ((1, 1), (1, 1))
        and conv._parameters["bias"] is None
    )


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _needs_gradient(x: Tensor, *parameters: list[Tensor]) -> bool:
    if not torch.is_grad_enabled():
        return False
    return x.requires_grad or any(parameter.requires_grad for tensors in parameters for parameter in tensors)


def _rename_official_keys(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    for official, ours in _OFFICIAL_PREFIXES.items():
        for key in [key for key in state_dict if key.startswith(prefix + official)]:
            state_dict[prefix + ours + key.removeprefix(prefix + official)] = state_dict.pop(key)
