"""The ops in plain torch, written step by step, and random parameters for them.

The functions named `eager_*` compute in the dtype of their input. A result in float64 counts as exact; a result in the
dtype under test is that of eager torch. `tests.helpers.numerics` compares a kernel with both.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def eager_energy(x: Tensor, lam: float) -> Tensor:
    """SimAM's inverse energy of x [N, C, H, W] by its authors' formula. For planes of one element, n is 1 and not 0."""
    n = max(x.shape[2] * x.shape[3] - 1, 1)
    d = (x - x.mean((2, 3), keepdim=True)).pow(2)
    return d / (4 * (d.sum((2, 3), keepdim=True) / n + lam)) + 0.5


def eager_simam(x: Tensor, lam: float) -> Tensor:
    return x * torch.sigmoid(eager_energy(x, lam))


def eager_pool(x: Tensor, axis: int) -> Tensor:
    """Maximum and mean over `axis`, which is first swapped with axis 1, as in the official triplet attention."""
    x = x.transpose(1, axis)
    return torch.cat((x.max(1, keepdim=True).values, x.mean(1, keepdim=True)), 1)


def eager_triplet(x: Tensor, parameters: list[list[Tensor]], training: bool, eps: float = 1e-5) -> Tensor:
    """The forward pass of the official triplet attention, branch by branch.

    `parameters` are lists as in `triplet_parameters`; the running statistics in them are not changed.
    """
    branches = []
    for axis, weight, gamma, beta, mean, var in zip((2, 3, 1), *parameters, strict=False):
        response = F.conv2d(eager_pool(x, axis), weight.to(x.dtype), padding=weight.shape[-1] // 2)
        gate = torch.sigmoid(F.batch_norm(response, mean.clone(), var.clone(), gamma, beta, training, eps=eps))
        branches.append((x.transpose(1, axis) * gate).transpose(1, axis))
    return sum(branches) / len(branches)


def triplet_parameters(branches: int, dtype: torch.dtype = torch.float64, kernel_size: int = 7) -> list[list[Tensor]]:
    """Lists with one tensor per branch: conv_weight, bn_weight, bn_bias, running_mean, running_var."""
    generator = torch.Generator().manual_seed(1)

    def tensors(*shape: int, low: float) -> list[Tensor]:
        return [(torch.rand(*shape, generator=generator, dtype=torch.float64) + low).to(dtype) for _ in range(branches)]

    weight = tensors(1, 2, kernel_size, kernel_size, low=-0.5)
    return [weight, tensors(1, low=0.5), tensors(1, low=-0.5), tensors(1, low=-0.5), tensors(1, low=0.5)]


def gate_maps(x: Tensor, branches: int = 3) -> list[Tensor | None]:
    """Random map_cw, map_hc and map_hw for triplet_gate of `x`; map_hw is None if there are two branches."""
    n, c, h, w = x.shape
    generator = torch.Generator().manual_seed(2)
    shapes = [(n, 1, c, w), (n, 1, h, c), (n, 1, h, w)]
    maps = [torch.randn(shape, generator=generator, dtype=torch.float64).to(x.dtype) for shape in shapes]
    return [*maps[:branches], *[None] * (3 - branches)]


def eager_greedy_sign(u: Tensor, alpha: float, grad_b: Tensor, grad_penalty: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """b, the penalty and grad_u of the op greedy_sign, for the upstream gradients `grad_b` and `grad_penalty`."""
    b = torch.where(u >= 0, 1.0, -1.0).to(u.dtype)
    excess = u.abs() - 1
    penalty = alpha * excess.abs().pow(3).mean()
    slope = excess.square() * excess.sign() * u.sign()
    return b, penalty, grad_b + grad_penalty * alpha * 3 / u.numel() * slope


def special_values(dtype: torch.dtype) -> Tensor:
    """Zeros, ones, tiny and large values and infinities, each with both signs: edge cases of signs and penalties."""
    return torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-7, -1e-7, 200.0, -200.0, torch.inf, -torch.inf]).to(dtype)
