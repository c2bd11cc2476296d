"""Triplet attention as a layer."""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from hashengine.ops import (
    triplet_attention,
    triplet_attention_inference,
    triplet_attention_update,
    triplet_gate,
    triplet_pool,
)

# The names that the two official modules give to the same three gates.
_OFFICIAL_NAMES = {
    "ChannelGateH.spatial.": "cw.conv.",
    "ChannelGateW.spatial.": "hc.conv.",
    "SpatialGate.spatial.": "hw.conv.",
}


class _Gate(nn.Module):
    """The parameters of one branch, under the official names: ``conv.conv.weight`` and ``conv.bn.*``."""

    def __init__(self, kernel_size: int, **placement):
        super().__init__()
        self.conv = nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False, **placement),
                bn=nn.BatchNorm2d(1, eps=1e-5, momentum=0.01, **placement),
            )
        )


class TripletAttention(nn.Module):
    """Cross-dimension attention, :func:`hashengine.ops.triplet_attention`: [N, C, H, W] to the same shape and dtype.

    Misra et al., "Rotate to Attend", WACV 2021: the last op of a residual branch, before the addition. At
    initialisation it halves its input, which a residual branch absorbs and a plain network feels.

    State dicts of both official modules load (keys ``cw``/``hc``/``hw`` and ``ChannelGateH``/``ChannelGateW``/
    ``SpatialGate``). Each BatchNorm is a plain ``nn.BatchNorm2d``; once ``convert_sync_batchnorm`` or a hook has
    changed them, the layer runs pooling, convolution, the module, and the gate one after another.

    Args:
        channels: taken and ignored, so that factories which build ``layer(channels)`` can call it: the layer has 300
            parameters for any number of channels.
        no_spatial: leave out the branch over (H, W).
        kernel_size: of the branches' convolution, odd.
        device, dtype: of the parameters.
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
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"TripletAttention: kernel_size must be odd and positive, got {kernel_size}")
        self.no_spatial = no_spatial
        for name in ("cw", "hc") if no_spatial else ("cw", "hc", "hw"):
            self.add_module(name, _Gate(kernel_size, device=device, dtype=dtype))
        self.register_load_state_dict_pre_hook(_rename_official_keys)

    @property
    def _gates(self) -> list[nn.Sequential]:
        names = ("cw", "hc") if self.no_spatial else ("cw", "hc", "hw")
        return [self._modules[name]._modules["conv"] for name in names]

    def forward(self, x: Tensor) -> Tensor:
        gates = self._gates
        # By _modules and the like: an attribute of a module takes a microsecond to find, small maps not many of them.
        convolutions = [gate._modules["conv"] for gate in gates]
        norms = [gate._modules["bn"] for gate in gates]
        if not _are_plain(gates, convolutions, norms):
            return triplet_gate(x, *(gate(pool) for gate, pool in zip(gates, triplet_pool(x), strict=False)))
        training, eps = norms[0].training, norms[0].eps
        learned = [
            [conv._parameters["weight"] for conv in convolutions],
            [bn._parameters["weight"] for bn in norms],
            [bn._parameters["bias"] for bn in norms],
        ]
        running = [bn._buffers["running_mean"] for bn in norms], [bn._buffers["running_var"] for bn in norms]
        if not training and not _need_gradient(x, *learned):
            return triplet_attention_inference(x, *learned, *running, eps)
        y, mean, var = triplet_attention(x, *learned, *running, training, eps)
        if training:
            n, c, h, w = x.shape
            counts = [n * c * w, n * h * c, n * h * w][: len(norms)]
            steps = [bn._buffers["num_batches_tracked"] for bn in norms]
            triplet_attention_update(mean, var, *running, steps, counts, norms[0].momentum)
        return y

    def extra_repr(self) -> str:
        return f"no_spatial={self.no_spatial}"


def _are_plain(gates: list[nn.Sequential], convolutions: list[nn.Module], norms: list[nn.Module]) -> bool:
    """Whether the modules do nothing but what the fused op does, all branches alike."""
    if any(type(conv) is not nn.Conv2d for conv in convolutions) or any(type(bn) is not nn.BatchNorm2d for bn in norms):
        return False  # converted, parametrised or swapped
    if any(_has_hooks(module) for modules in (gates, convolutions, norms) for module in modules):
        return False
    if not all(bn.affine and bn.track_running_stats for bn in norms):
        return False
    return len({(bn.training, bn.eps, bn.momentum) for bn in norms}) == 1


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _need_gradient(x: Tensor, *learned: list[Tensor]) -> bool:
    if not torch.is_grad_enabled():
        return False
    return x.requires_grad or any(parameter.requires_grad for parameters in learned for parameter in parameters)


def _rename_official_keys(module: nn.Module, state_dict: dict, prefix: str, *_) -> None:
    for theirs, ours in _OFFICIAL_NAMES.items():
        for key in [key for key in state_dict if key.startswith(prefix + theirs)]:
            state_dict[prefix + ours + key.removeprefix(prefix + theirs)] = state_dict.pop(key)
