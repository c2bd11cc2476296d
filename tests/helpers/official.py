"""Attention modules with the structure and the arithmetic of the official ones, written from the papers."""

from functools import partial

import torch
from torch import Tensor, nn


class Pool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x.max(1, keepdim=True).values, x.mean(1, keepdim=True)), 1)


class Convolution(nn.Module):
    def __init__(self, kernel_size: int):
        super().__init__()
        self.conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)
        self.bn = nn.BatchNorm2d(1, eps=1e-5, momentum=0.01)
        self.relu = None

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class Gate(nn.Module):
    def __init__(self, part: str, kernel_size: int = 7):
        super().__init__()
        self.compress = Pool()
        self.add_module(part, Convolution(kernel_size))
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid_(getattr(self, self.part)(self.compress(x)))


class OfficialTriplet(nn.Module):
    """Triplet attention like one of the two official implementations, which differ in the names of their parts."""

    NAMES = {"short": ("cw", "hc", "hw", "conv"), "long": ("ChannelGateH", "ChannelGateW", "SpatialGate", "spatial")}

    def __init__(self, channels: int | None = None, naming: str = "short", no_spatial: bool = False, **options):
        super().__init__()
        *names, part = self.NAMES[naming]
        self.names = names[:2] if no_spatial else names
        self.no_spatial = no_spatial
        for name in self.names:
            self.add_module(name, Gate(part, **options))

    def forward(self, x: Tensor) -> Tensor:
        gates = [getattr(self, name) for name in self.names]
        branches = [gate(x.transpose(1, axis)).transpose(1, axis) for gate, axis in zip(gates, (2, 3, 1), strict=False)]
        return sum(branches) / len(branches)


class OfficialSimAM(nn.Module):
    def __init__(self, channels: int | None = None, e_lambda: float = 1e-4):
        super().__init__()
        self.activation = nn.Sigmoid()
        self.e_lambda = e_lambda

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[2] * x.shape[3] - 1
        d = (x - x.mean((2, 3), keepdim=True)).pow(2)
        return x * self.activation(d / (4 * (d.sum((2, 3), keepdim=True) / n + self.e_lambda)) + 0.5)


LONG_TRIPLET = partial(OfficialTriplet, naming="long")


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Randomise BatchNorms in place: weights and variances in [0.5, 1.5), biases and means in [-0.5, 0.5)."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for name, tensor in module.state_dict().items():
                if tensor.is_floating_point():
                    offset = 0.5 if name in ("weight", "running_var") else -0.5
                    tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + offset)
    return model
