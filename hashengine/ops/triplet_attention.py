"""Triplet attention: Misra, Nalamada, Arasanipalai and Hou, "Rotate to Attend", WACV 2021.

For each of the pairs of axes (C, W), (H, C) and (H, W): pool the remaining axis into [max; mean], convolve 2 -> 1
without bias, BatchNorm, sigmoid, multiply into x; y is the mean of the branches (equation 2).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hashengine.ops._branches import BRANCHES, map_shape, max_and_mean, sum_over, unpool
from hashengine.ops._check import check_activations, check_device, check_feature_map, check_gradient, wide_dtype
from hashengine.ops._library import define_op
from hashengine.ops.triplet_gate import mean_gate


def triplet_attention(
    x: Tensor,
    conv_weight: list[Tensor],
    bn_weight: list[Tensor],
    bn_bias: list[Tensor],
    running_mean: list[Tensor],
    running_var: list[Tensor],
    training: bool,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """Triplet attention as a function: it updates no buffer, and returns what an update needs.

    The lists hold one entry a branch, in the order cw, hc, hw; without the last the mean is over two branches.

    Args:
        x: feature map [N, C, H, W], float64, float32, float16 or bfloat16, any strides; C, H and W at least 1.
        conv_weight: [1, 2, K, K] each, K odd; parameters may be of another floating-point type than ``x``.
        bn_weight, bn_bias, running_mean, running_var: [1] each.
        training: normalise by the batch's statistics; else by the running ones.
        eps: BatchNorm's.

    Returns:
        ``y`` like ``x`` in shape, dtype and layout; ``mean`` and ``var`` [branches], the statistics that were used (the
        variance divides by the number of values), float64 for float64, else float32. Only ``y`` has a gradient.

    Raises:
        TypeError: a tensor is not floating point.
        ValueError: a shape or a device does not fit, a list is not two or three long, or ``training`` with one value a
            branch.
    """
    return _triplet_attention(x, conv_weight, bn_weight, bn_bias, running_mean, running_var, training, eps)[:3]


def triplet_attention_inference(
    x: Tensor,
    conv_weight: list[Tensor],
    bn_weight: list[Tensor],
    bn_bias: list[Tensor],
    running_mean: list[Tensor],
    running_var: list[Tensor],
    eps: float = 1e-5,
) -> Tensor:
    """The ``y`` of :func:`triplet_attention` with ``training=False``, without the maps that a gradient would need.

    Arguments and errors as there; the result has no gradient, and asking for one raises RuntimeError.
    """
    return _triplet_attention_inference(x, conv_weight, bn_weight, bn_bias, running_mean, running_var, eps)


def _reference(x, conv_weight, bn_weight, bn_bias, running_mean, running_var, training, eps):
    _check(x, conv_weight, bn_weight, bn_bias, running_mean, running_var, training)
    wide = wide_dtype(x)
    x_wide = x.to(wide)
    gates, means, variances, pools, indices, responses = [], [], [], [], [], []
    for i, branch in _branches(conv_weight):
        pool, index = max_and_mean(x_wide, branch)
        response = F.conv2d(pool, conv_weight[i].to(wide), padding=conv_weight[i].shape[-1] // 2).squeeze(1)
        mean = response.mean() if training else running_mean[i].to(wide).squeeze()
        var = response.var(correction=0) if training else running_var[i].to(wide).squeeze()
        normal = (response - mean) * torch.rsqrt(var + eps)
        gates.append(torch.sigmoid(normal * bn_weight[i].to(wide) + bn_bias[i].to(wide)))
        means.append(mean)
        variances.append(var)
        pools.append(pool.flatten())
        indices.append(index.int().flatten())
        responses.append(response.flatten())
    y = torch.empty_like(x).copy_(x * mean_gate(gates))
    return y, torch.stack(means), torch.stack(variances), torch.cat(pools), torch.cat(indices), torch.cat(responses)


def _inference_reference(x, conv_weight, bn_weight, bn_bias, running_mean, running_var, eps):
    return _reference(x, conv_weight, bn_weight, bn_bias, running_mean, running_var, False, eps)[0]


def _fake(x, conv_weight, bn_weight, bn_bias, running_mean, running_var, training, eps):
    _check(x, conv_weight, bn_weight, bn_bias, running_mean, running_var, training)
    wide = wide_dtype(x)
    branches = len(conv_weight)
    size = sum(_map_numel(x, branch) for _, branch in _branches(conv_weight))
    return (
        torch.empty_like(x),
        x.new_empty(branches, dtype=wide),
        x.new_empty(branches, dtype=wide),
        x.new_empty(2 * size, dtype=wide),
        x.new_empty(size, dtype=torch.int32),
        x.new_empty(size, dtype=wide),
    )


def _inference_fake(x, conv_weight, bn_weight, bn_bias, running_mean, running_var, eps):
    _check(x, conv_weight, bn_weight, bn_bias, running_mean, running_var, False)
    return torch.empty_like(x)


def _branches(conv_weight: list[Tensor]) -> list[tuple[int, str]]:
    return list(enumerate(BRANCHES[: len(conv_weight)]))


def _map_numel(x: Tensor, branch: str) -> int:
    n, rows, columns = map_shape(x, branch)
    return n * rows * columns


def _check(x, conv_weight, bn_weight, bn_bias, running_mean, running_var, training) -> None:
    op = "triplet_attention"
    check_feature_map(op, x)
    if 0 in x.shape[1:]:
        raise ValueError(f"{op}: x must have at least one channel, row and column, got {list(x.shape)}")
    parameters = {
        "conv_weight": conv_weight,
        "bn_weight": bn_weight,
        "bn_bias": bn_bias,
        "running_mean": running_mean,
        "running_var": running_var,
    }
    for name, tensors in parameters.items():
        if len(tensors) not in (2, 3) or len(tensors) != len(conv_weight):
            raise ValueError(f"{op}: {name} must hold 2 or 3 tensors, as many as conv_weight, got {len(tensors)}")
        for i, tensor in enumerate(tensors):
            check_activations(op, tensor, f"{name}[{i}]")
            check_device(op, tensor, x, f"{name}[{i}]")
            if name != "conv_weight" and tuple(tensor.shape) != (1,):
                raise ValueError(f"{op}: {name}[{i}] must be [1], got {list(tensor.shape)}")
    for i, weight in enumerate(conv_weight):
        if weight.dim() != 4 or tuple(weight.shape[:2]) != (1, 2) or weight.shape[2] != weight.shape[3]:
            raise ValueError(f"{op}: conv_weight[{i}] must be [1, 2, K, K], got {list(weight.shape)}")
        if weight.shape[2] % 2 == 0:
            raise ValueError(f"{op}: conv_weight[{i}] must have an odd kernel size, got {weight.shape[2]}")
    for _, branch in _branches(conv_weight):
        if training and _map_numel(x, branch) == 1:
            raise ValueError(
                f"{op}: training needs more than one value a branch for BatchNorm, got x {list(x.shape)} with one in "
                f"branch {branch}; use eval mode or a larger batch"
            )


def _backward_reference(grad_y, x, conv_weight, bn_weight, bn_bias, mean, var, pooled, index, response, training, eps):
    check_gradient("triplet_attention_backward", grad_y, x)
    wide = wide_dtype(x)
    sizes = [_map_numel(x, branch) for _, branch in _branches(conv_weight)]
    pools, indices, responses = pooled.split([2 * s for s in sizes]), index.split(sizes), response.split(sizes)
    grad_y = grad_y.to(wide)
    product = grad_y * x.to(wide) / len(conv_weight)
    gates, grad_x, grad_conv, grad_weight, grad_bias = [], [], [], [], []
    for i, branch in _branches(conv_weight):
        n, rows, columns = map_shape(x, branch)
        rstd = torch.rsqrt(var[i] + eps)
        normal = (responses[i].view(n, rows, columns) - mean[i]) * rstd
        gate = torch.sigmoid(normal * bn_weight[i].to(wide) + bn_bias[i].to(wide))
        grad_affine = sum_over(product, branch) * gate * (1 - gate)
        grad_bias.append(grad_affine.sum())
        grad_weight.append((grad_affine * normal).sum())
        grad_normal = grad_affine
        if training:  # the batch's own mean and variance depend on every response
            grad_normal = grad_affine - (grad_bias[i] + normal * grad_weight[i]) / normal.numel()
        grad_response = grad_normal * (bn_weight[i].to(wide) * rstd)
        weight = conv_weight[i].to(wide)
        grad_pool, grad_kernel, _ = torch.ops.aten.convolution_backward(
            grad_response.unsqueeze(1), pools[i].view(n, 2, rows, columns), weight, None,
            [1, 1], [weight.shape[2] // 2] * 2, [1, 1], False, [0, 0], 1, [True, True, False],
        )  # fmt: skip
        gates.append(gate)
        grad_conv.append(grad_kernel.squeeze(0))
        grad_x.append(unpool(grad_pool, indices[i].view(n, rows, columns), x, branch))
    grad_x = torch.empty_like(x).copy_(grad_y * mean_gate(gates) + sum(grad_x))
    return grad_x, torch.stack(grad_conv), torch.stack(grad_weight), torch.stack(grad_bias)


def _backward_fake(grad_y, x, conv_weight, bn_weight, bn_bias, mean, var, pooled, index, response, training, eps):
    branches = len(conv_weight)
    return (
        torch.empty_like(x),
        mean.new_empty((branches, *conv_weight[0].shape[1:])),
        mean.new_empty(branches),
        mean.new_empty(branches),
    )


def _setup_context(ctx, inputs, output) -> None:
    x, conv_weight, bn_weight, bn_bias, _, _, ctx.training, ctx.eps = inputs
    ctx.branches = len(conv_weight)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, *conv_weight, *bn_weight, *bn_bias, *output[1:])


def _backward(ctx, grad_y, *_):
    none = [None] * ctx.branches
    if grad_y is None:
        return None, none, none, none, none, none, None, None
    x, *saved = ctx.saved_tensors
    branches = ctx.branches
    conv_weight, bn_weight, bn_bias = (saved[i * branches : (i + 1) * branches] for i in range(3))
    grad_x, grad_conv, grad_weight, grad_bias = _triplet_attention_backward(
        grad_y, x, conv_weight, bn_weight, bn_bias, *saved[3 * branches :], ctx.training, ctx.eps
    )

    def per_branch(gradient: Tensor, parameters: list[Tensor]) -> list[Tensor]:
        return [g.view(p.shape).to(p.dtype) for g, p in zip(gradient.unbind(), parameters, strict=True)]

    return (
        grad_x,
        per_branch(grad_conv, conv_weight),
        per_branch(grad_weight, bn_weight),
        per_branch(grad_bias, bn_bias),
        none,
        none,
        None,
        None,
    )


_triplet_attention_backward = define_op(
    "triplet_attention_backward(Tensor grad_y, Tensor x, Tensor[] conv_weight, Tensor[] bn_weight, Tensor[] bn_bias, "
    "Tensor mean, Tensor var, Tensor pooled, Tensor index, Tensor response, bool training, float eps)"
    " -> (Tensor grad_x, Tensor grad_conv_weight, Tensor grad_bn_weight, Tensor grad_bn_bias)",
    reference=_backward_reference,
    fake=_backward_fake,
)
_triplet_attention = define_op(
    "triplet_attention(Tensor x, Tensor[] conv_weight, Tensor[] bn_weight, Tensor[] bn_bias, Tensor[] running_mean, "
    "Tensor[] running_var, bool training, float eps)"
    " -> (Tensor y, Tensor mean, Tensor var, Tensor pooled, Tensor index, Tensor response)",
    reference=_reference,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
_triplet_attention_inference = define_op(
    "triplet_attention_inference(Tensor x, Tensor[] conv_weight, Tensor[] bn_weight, Tensor[] bn_bias, "
    "Tensor[] running_mean, Tensor[] running_var, float eps) -> Tensor",
    reference=_inference_reference,
    fake=_inference_fake,
)
