"""The ops in plain torch, as users usually write them. The benchmarks compare the fused ops with these.

Each module has the same input and the same parameter names as the fused module. The arithmetic is in the dtype of x, as
in the papers' code. Parameters stay float32, as under autocast.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SimAM(nn.Module):
    """Yang et al., ICML 2021."""

    def __init__(self, lam: float = 1e-4):
        super().__init__()
        self.lam = lam

    def forward(self, x: Tensor) -> Tensor:
        n = max(x.shape[2] * x.shape[3] - 1, 1)
        d = (x - x.mean((2, 3), keepdim=True)).pow(2)
        v = d.sum((2, 3), keepdim=True) / n
        return x * torch.sigmoid(d / (4 * (v + self.lam)) + 0.5)


def z_pool(x: Tensor) -> Tensor:
    """Maximum and mean over the second axis."""
    return torch.cat((x.max(1, keepdim=True).values, x.mean(1, keepdim=True)), 1)


class _Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential()
        self.conv.add_module("conv", nn.Conv2d(2, 1, 7, padding=3, bias=False))
        self.conv.add_module("bn", nn.BatchNorm2d(1, eps=1e-5, momentum=0.01))

    def forward(self, x: Tensor) -> Tensor:
        response = F.conv2d(z_pool(x), self.conv.conv.weight.to(x.dtype), padding=3)
        return x * torch.sigmoid(self.conv.bn(response))


class TripletAttention(nn.Module):
    """Misra et al., WACV 2021. Two of the branches work on a transposed copy of x, because pooling is over axis 1."""

    def __init__(self) -> None:
        super().__init__()
        self.cw, self.hc, self.hw = _Branch(), _Branch(), _Branch()

    def forward(self, x: Tensor) -> Tensor:
        cw = self.cw(x.transpose(1, 2).contiguous()).transpose(1, 2).contiguous()
        hc = self.hc(x.transpose(1, 3).contiguous()).transpose(1, 3).contiguous()
        return (cw + hc + self.hw(x)) / 3


class TripletPool(nn.Module):
    """The first step of triplet attention alone: the three pooled maps."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return z_pool(x.transpose(1, 2)), z_pool(x.transpose(1, 3)), z_pool(x)


class TripletGate(nn.Module):
    """The last step of triplet attention alone: apply the gates. The maps are parameters, so they get gradients."""

    def __init__(self, n: int, c: int, h: int, w: int):
        super().__init__()
        self.cw, self.hc, self.hw = (nn.Parameter(torch.randn(n, 1, *size)) for size in ((c, w), (h, c), (h, w)))

    def forward(self, x: Tensor) -> Tensor:
        cw, hc, hw = (torch.sigmoid(m.to(x.dtype)) for m in (self.cw, self.hc, self.hw))
        transposed = (x.transpose(1, 2) * cw).transpose(1, 2) + (x.transpose(1, 3) * hc).transpose(1, 3)
        return (transposed + x * hw) / 3


class _StraightThroughSign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:
        return torch.where(u >= 0, 1.0, -1.0).to(u.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class GreedySign(nn.Module):
    """Su et al., NeurIPS 2018: the signs, and the penalty for the distance of the activations from the signs."""

    def __init__(self, alpha: float = 0.1):
        super().__init__()
        self.alpha = alpha

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
        return _StraightThroughSign.apply(u), self.alpha * (u.abs() - 1).abs().pow(3).mean()


class PackBits(nn.Module):
    """Eight signs per byte, the first in the most significant bit."""

    def forward(self, u: Tensor) -> Tensor:
        bits = (u >= 0).unflatten(-1, (-1, 8)).to(torch.uint8)
        shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=u.device)
        return (bits << shifts).sum(-1, dtype=torch.uint8)


def hamming_topk(queries: Tensor, codes: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest codes by (distance, position); the bits of each byte are counted with a table."""
    ones = torch.tensor([byte.bit_count() for byte in range(256)], dtype=torch.uint8, device=codes.device)
    distances = ones[(queries.unsqueeze(1) ^ codes).int()].sum(-1)
    keys = distances * len(codes) + torch.arange(len(codes), device=codes.device)
    nearest = keys.topk(k, largest=False, sorted=True).values
    return (nearest // len(codes)).int(), nearest % len(codes)
