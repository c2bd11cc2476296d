"""What the fused ops are measured against: the same formulas as a model builder writes them, in plain torch.

Each is a module over x, as the fused one is, with the same parameters under the same names. Everything is computed in
x's own type, as the papers' authors do; parameters stay float32, as under autocast.
"""

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
    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential()
        self.conv.add_module("conv", nn.Conv2d(2, 1, 7, padding=3, bias=False))
        self.conv.add_module("bn", nn.BatchNorm2d(1, eps=1e-5, momentum=0.01))

    def forward(self, x: Tensor) -> Tensor:
        response = F.conv2d(z_pool(x), self.conv.conv.weight.to(x.dtype), padding=3)
        return x * torch.sigmoid(self.conv.bn(response))


class TripletAttention(nn.Module):
    """Misra et al., WACV 2021: each branch copies x so that the axis it pools comes second, and back."""

    def __init__(self):
        super().__init__()
        self.cw, self.hc, self.hw = _Branch(), _Branch(), _Branch()

    def forward(self, x: Tensor) -> Tensor:
        cw = self.cw(x.transpose(1, 2).contiguous()).transpose(1, 2).contiguous()
        hc = self.hc(x.transpose(1, 3).contiguous()).transpose(1, 3).contiguous()
        return (cw + hc + self.hw(x)) / 3


class TripletPool(nn.Module):
    """The three pooled maps alone."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return z_pool(x.transpose(1, 2)), z_pool(x.transpose(1, 3)), z_pool(x)


class TripletGate(nn.Module):
    """The three gates alone, of maps that are learned here so that they have a gradient."""

    def __init__(self, n: int, c: int, h: int, w: int):
        super().__init__()
        self.cw, self.hc, self.hw = (nn.Parameter(torch.randn(n, 1, *size)) for size in ((c, w), (h, c), (h, w)))

    def forward(self, x: Tensor) -> Tensor:
        cw, hc, hw = (torch.sigmoid(m.to(x.dtype)) for m in (self.cw, self.hc, self.hw))
        turned = (x.transpose(1, 2) * cw).transpose(1, 2) + (x.transpose(1, 3) * hc).transpose(1, 3)
        return (turned + x * hw) / 3


class _StraightThroughSign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u: Tensor) -> Tensor:
        return torch.where(u >= 0, 1.0, -1.0).to(u.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


class GreedySign(nn.Module):
    """Su et al., NeurIPS 2018: the code, and the penalty of the activations' distance from it."""

    def __init__(self, alpha: float = 0.1):
        super().__init__()
        self.alpha = alpha

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
        return _StraightThroughSign.apply(u), self.alpha * (u.abs() - 1).abs().pow(3).mean()


class PackBits(nn.Module):
    """Eight signs to a byte, the first in the most significant place."""

    def forward(self, u: Tensor) -> Tensor:
        bits = (u >= 0).unflatten(-1, (-1, 8)).to(torch.uint8)
        places = torch.arange(7, -1, -1, dtype=torch.uint8, device=u.device)
        return (bits << places).sum(-1, dtype=torch.uint8)


def hamming_topk(queries: Tensor, codes: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Bits counted through a table, ranked by (distance, position)."""
    ones = torch.tensor([byte.bit_count() for byte in range(256)], dtype=torch.uint8, device=codes.device)
    distances = ones[(queries.unsqueeze(1) ^ codes).int()].sum(-1)
    keys = distances * len(codes) + torch.arange(len(codes), device=codes.device)
    nearest = keys.topk(k, largest=False, sorted=True).values
    return (nearest // len(codes)).int(), nearest % len(codes)
