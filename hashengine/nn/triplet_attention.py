"""Triplet attention as a layer."""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from hashengine.ops import triplet_attention, triplet_gate, triplet_pool

# The names that the two official modules give to the same three gates.
_OFFICIAL_NAMES = {
    "ChannelGateH.spatial.": "cw.conv.",
    "ChannelGateW.spatial.": "hc.conv.",
    "SpatialGate.spatial.": "hw.conv.",
}


class _Gate(nn.Module):
    """The parameters of one branch, under the official names: ``conv.conv.weight`` and ``conv.bn.*``."""

    def __init__(self, kernel_size: int):
        super().__init__()
        self.conv = nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False),
                bn=nn.BatchNorm2d(1, eps=1e-5, momentum=0.01),
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
    """

    def __init__(self, channels: int | None = None, *, no_spatial: bool = False, kernel_size: int = 7):
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"TripletAttention: kernel_size must be odd and positive, got {kernel_size}")
        self.no_spatial = no_spatial
        self.cw = _Gate(kernel_size)
        self.hc = _Gate(kernel_size)
        if not no_spatial:
            self.hw = _Gate(kernel_size)
        self.register_load_state_dict_pre_hook(_rename_official_keys)

    @property
    def _gates(self) -> list[nn.Sequential]:
        gates = [self.cw, self.hc] if self.no_spatial else [self.cw, self.hc, self.hw]
        return [gate.conv for gate in gates]

    def forward(self, x: Tensor) -> Tensor:
        norms = [gate.bn for gate in self._gates]
        if all(_is_plain(norm) for norm in norms) and len({(norm.training, norm.eps) for norm in norms}) == 1:
            return self._fused(x, norms)
        return triplet_gate(x, *(gate(pool) for gate, pool in zip(self._gates, triplet_pool(x), strict=False)))

    def _fused(self, x: Tensor, norms: list[nn.BatchNorm2d]) -> Tensor:
        training = norms[0].training
        y, mean, var = triplet_attention(
            x,
            [gate.conv.weight for gate in self._gates],
            [norm.weight for norm in norms],
            [norm.bias for norm in norms],
            [norm.running_mean for norm in norms],
            [norm.running_var for norm in norms],
            training,
            norms[0].eps,
        )
        if training:
            n, c, h, w = x.shape
            for norm, mean_, var_, count in zip(norms, mean, var, (n * c * w, n * h * c, n * h * w), strict=False):
                _update_running_statistics(norm, mean_, var_ * (count / (count - 1)))
        return y

    def extra_repr(self) -> str:
        return f"no_spatial={self.no_spatial}"


def _is_plain(norm: nn.Module) -> bool:
    return type(norm) is nn.BatchNorm2d and norm.affine and norm.track_running_stats and not norm._forward_hooks


@torch.no_grad()
def _update_running_statistics(norm: nn.BatchNorm2d, mean: Tensor, unbiased_var: Tensor) -> None:
    norm.num_batches_tracked.add_(1)
    momentum = norm.momentum
    if momentum is None:  # BatchNorm's cumulative average
        momentum = 1.0 / norm.num_batches_tracked.to(mean.dtype)
    norm.running_mean.copy_(norm.running_mean + momentum * (mean - norm.running_mean))
    norm.running_var.copy_(norm.running_var + momentum * (unbiased_var - norm.running_var))


def _rename_official_keys(module: nn.Module, state_dict: dict, prefix: str, *_) -> None:
    for theirs, ours in _OFFICIAL_NAMES.items():
        for key in [key for key in state_dict if key.startswith(prefix + theirs)]:
            state_dict[prefix + ours + key.removeprefix(prefix + theirs)] = state_dict.pop(key)
