"""Triplet attention: Misra, Nalamada, Arasanipalai and Hou, "Rotate to Attend", WACV 2021.

There is one branch for each pair of axes (C, W), (H, C) and (H, W). A branch pools the remaining axis into [max; mean],
convolves these 2 channels to 1 without bias, applies BatchNorm and sigmoid, and multiplies x by the result. y is the
mean of these products (equation 2).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hashengine._validation import check_constant
from hashengine.errors import invalid
from hashengine.ops._branches import BRANCHES, add, map_numel, map_shape, max_and_mean, sum_over, unpool
from hashengine.ops._check import (
    check_feature_map,
    check_floating,
    check_gradient,
    check_like,
    check_number,
    check_same_device,
    wide_dtype,
)
from hashengine.ops._library import define_op
from hashengine.ops._plain import in_dtype_and_layout_of, needs_plain_torch, untraced, without_autocast
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
    """Triplet attention as a pure function. It returns the statistics that it used, and updates no running statistics.

    The lists contain one tensor per branch, in the order cw, hc, hw. Without hw, y is the mean of two branches.

    Args:
        x: feature map [N, C, H, W], float64, float32, float16 or bfloat16, any strides; C, H and W at least 1.
        conv_weight: tensors [1, 2, K, K], with K odd and the same for all branches. This and the other parameters may
            have a floating-point dtype other than that of `x`.
        bn_weight: tensors [1].
        bn_bias: tensors [1].
        running_mean: tensors [1], used if not `training`.
        running_var: tensors [1], used if not `training`.
        training: normalise by the statistics of the batch instead of the running ones.
        eps: the eps of BatchNorm, a finite number of 0 or more, in `training` above 0.

    Returns:
        `y` with the shape, dtype and layout of `x`; `mean` and `var` [branches], the statistics that were used, float64
        if `x` is float64, otherwise float32. In `training`, `var` divides by the number of values. Only `y` has a
        gradient.

    Raises:
        ValueError: a dtype, a shape or a device is wrong, a list does not have two or three tensors, a branch has fewer
            than two values in `training`, or `eps` is out of range.
    """
    check_constant("triplet_attention", "eps", eps)
    op = _reference if needs_plain_torch() else _triplet_attention
    y, mean, var, *_ = op(x, conv_weight, bn_weight, bn_bias, running_mean, running_var, training, eps)
    return y, mean, var


def triplet_attention_inference(
    x: Tensor,
    conv_weight: list[Tensor],
    bn_weight: list[Tensor],
    bn_bias: list[Tensor],
    running_mean: list[Tensor],
    running_var: list[Tensor],
    eps: float = 1e-5,
) -> Tensor:
    """The `y` of `triplet_attention` with `training=False`, without what a backward would need.

    A backward computes that from the arguments, so it takes longer than a backward through `triplet_attention`.

    Args:
        x: feature map [N, C, H, W]; this and the other arguments are as for `triplet_attention`.
        conv_weight: tensors [1, 2, K, K].
        bn_weight: tensors [1].
        bn_bias: tensors [1].
        running_mean: tensors [1].
        running_var: tensors [1].
        eps: the eps of BatchNorm.

    Returns:
        `y` with the shape, dtype and layout of `x`.

    Raises:
        ValueError: as for `triplet_attention`.
    """
    op = _inference_reference if needs_plain_torch() else _triplet_attention_inference
    return op(x, conv_weight, bn_weight, bn_bias, running_mean, running_var, eps)


def _reference(
    x: Tensor,
    conv_weight: list[Tensor],
    bn_weight: list[Tensor],
    bn_bias: list[Tensor],
    running_mean: list[Tensor],
    running_var: list[Tensor],
    training: bool,
    eps: float,
) -> tuple[Tensor, ...]:
    _check_forward("triplet_attention", x, conv_weight, bn_weight, bn_bias, running_mean, running_var, training, eps)
    return _forward(x, conv_weight, bn_weight, bn_bias, running_mean, running_var, training, eps)


def _forward(
    x: Tensor,
    conv_weight: list[Tensor],
    bn_weight: list[Tensor],
    bn_bias: list[Tensor],
    running_mean: list[Tensor],
    running_var: list[Tensor],
    training: bool,
    eps: float,
) -> tuple[Tensor, ...]:
    wide = wide_dtype(x)
    x_wide = x.to(wide)
    gates, means, variances, pools, indices, responses = [], [], [], [], [], []
    for i, branch in _branches(conv_weight):
        pool, index = max_and_mean(x_wide, branch)
        with without_autocast(x):
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
    y = in_dtype_and_layout_of(x, x * mean_gate(gates))
    statistics = [torch.stack(values).detach() for values in (means, variances)]
    return y, *statistics, torch.cat(pools), torch.cat(indices), torch.cat(responses)


def _inference_reference(
    x: Tensor,
    conv_weight: list[Tensor],
    bn_weight: list[Tensor],
    bn_bias: list[Tensor],
    running_mean: list[Tensor],
    running_var: list[Tensor],
    eps: float,
) -> Tensor:
    where = "triplet_attention_inference"
    _check_forward(where, x, conv_weight, bn_weight, bn_bias, running_mean, running_var, False, eps)
    return _forward(x, conv_weight, bn_weight, bn_bias, running_mean, running_var, False, eps)[0]


def _fake(
    x: Tensor,
    conv_weight: list[Tensor],
    bn_weight: list[Tensor],
    bn_bias: list[Tensor],
    running_mean: list[Tensor],
    running_var: list[Tensor],
    training: bool,
    eps: float,
) -> tuple[Tensor, ...]:
    _check_forward("triplet_attention", x, conv_weight, bn_weight, bn_bias, running_mean, running_var, training, eps)
    wide = wide_dtype(x)
    branches = len(conv_weight)
    numel = _maps_numel(x, conv_weight)
    return (
        torch.empty_like(x),
        x.new_empty(branches, dtype=wide),
        x.new_empty(branches, dtype=wide),
        x.new_empty(2 * numel, dtype=wide),
        x.new_empty(numel, dtype=torch.int32),
        x.new_empty(numel, dtype=wide),
    )


def _inference_fake(
    x: Tensor,
    conv_weight: list[Tensor],
    bn_weight: list[Tensor],
    bn_bias: list[Tensor],
    running_mean: list[Tensor],
    running_var: list[Tensor],
    eps: float,
) -> Tensor:
    where = "triplet_attention_inference"
    _check_forward(where, x, conv_weight, bn_weight, bn_bias, running_mean, running_var, False, eps)
    return torch.empty_like(x)


def _branches(conv_weight: list[Tensor]) -> list[tuple[int, str]]:
    return list(enumerate(BRANCHES[: len(conv_weight)]))


def _maps_numel(x: Tensor, conv_weight: list[Tensor]) -> int:
    return sum(map_numel(x, branch) for _, branch in _branches(conv_weight))


def _flops(x: Tensor, conv_weight: list[Tensor], *_: Any, out_val: Any) -> int:
    """The operations of the convolutions alone: torch's counter ignores pooling, BatchNorm and gate."""
    return 2 * conv_weight[0].numel() * _maps_numel(x, conv_weight)


def _backward_flops(grad_y: Tensor, x: Tensor, conv_weight: list[Tensor], *_: Any, out_val: Any) -> int:
    """The gradients of a convolution take one such convolution for its input and one for its weight."""
    return 2 * _flops(x, conv_weight, out_val=out_val)


@untraced
def _check_forward(
    where: str,
    x: Tensor,
    conv_weight: list[Tensor],
    bn_weight: list[Tensor],
    bn_bias: list[Tensor],
    running_mean: list[Tensor],
    running_var: list[Tensor],
    training: bool,
    eps: float,
) -> None:
    _check_shape(where, x, conv_weight, training)
    _check_eps(where, eps, training)
    scalars = {"bn_weight": bn_weight, "bn_bias": bn_bias, "running_mean": running_mean, "running_var": running_var}
    for name, tensors in {"conv_weight": conv_weight, **scalars}.items():
        _check_parameter(where, name, tensors, len(conv_weight), x)
    for name, tensors in scalars.items():
        for i, tensor in enumerate(tensors):
            if tuple(tensor.shape) != (1,):
                raise invalid(where, f"{name}[{i}]", "[1]", list(tensor.shape))


def _check_shape(where: str, x: Tensor, conv_weight: list[Tensor], training: bool) -> None:
    """Check `x`, the branches, the kernels, and that in training each branch has enough values for statistics."""
    check_feature_map(where, x, not_empty=True)
    if len(conv_weight) not in (2, 3):
        raise invalid(where, "conv_weight", "2 or 3 tensors, one per branch", len(conv_weight))
    for i, weight in enumerate(conv_weight):
        name = f"conv_weight[{i}]"
        if weight.dim() != 4 or tuple(weight.shape[:2]) != (1, 2) or weight.shape[2] != weight.shape[3]:
            raise invalid(where, name, "[1, 2, K, K]", list(weight.shape))
        if weight.shape[2] % 2 == 0:
            raise invalid(where, name, "of odd kernel size", weight.shape[2])
        if weight.shape[2] != conv_weight[0].shape[2]:
            expected = f"of the kernel size of conv_weight[0], {conv_weight[0].shape[2]}"
            raise invalid(where, name, expected, weight.shape[2])
    for _, branch in _branches(conv_weight):
        if training and map_numel(x, branch) <= 1:
            expected = "[N, C, H, W] with more than one value per branch in training"
            actual = f"{list(x.shape)} with {map_numel(x, branch)} in branch {branch}"
            raise invalid(where, "x", expected, actual, "use eval mode or a larger batch")


def _check_eps(where: str, eps: float, training: bool) -> None:
    """Check what `nn.BatchNorm2d` requires of its eps."""
    if training:
        check_number(where, "eps", eps, above=0)
    else:
        check_number(where, "eps", eps, least=0)


def _check_parameter(where: str, name: str, tensors: list[Tensor], branches: int, x: Tensor) -> None:
    if len(tensors) != branches:
        raise invalid(where, name, f"{branches} tensors, as many as conv_weight", len(tensors))
    for i, tensor in enumerate(tensors):
        check_floating(where, f"{name}[{i}]", tensor)
        check_same_device(where, f"{name}[{i}]", tensor, x)


def _check_backward(
    grad_y: Tensor,
    x: Tensor,
    conv_weight: list[Tensor],
    bn_weight: list[Tensor],
    bn_bias: list[Tensor],
    mean: Tensor,
    var: Tensor,
    pooled: Tensor,
    index: Tensor,
    response: Tensor,
    training: bool,
    eps: float,
) -> None:
    where = "triplet_attention_backward"
    _check_shape(where, x, conv_weight, training)
    _check_eps(where, eps, training)
    for name, tensors in {"conv_weight": conv_weight, "bn_weight": bn_weight, "bn_bias": bn_bias}.items():
        _check_parameter(where, name, tensors, len(conv_weight), x)
    wide, branches, numel = wide_dtype(x), len(conv_weight), _maps_numel(x, conv_weight)
    check_gradient(where, "grad_y", grad_y, x)
    check_like(where, "mean", mean, (branches,), wide, x)
    check_like(where, "var", var, (branches,), wide, x)
    check_like(where, "pooled", pooled, (2 * numel,), wide, x)
    check_like(where, "index", index, (numel,), torch.int32, x)
    check_like(where, "response", response, (numel,), wide, x)


def _backward_reference(
    grad_y: Tensor,
    x: Tensor,
    conv_weight: list[Tensor],
    bn_weight: list[Tensor],
    bn_bias: list[Tensor],
    mean: Tensor,
    var: Tensor,
    pooled: Tensor,
    index: Tensor,
    response: Tensor,
    training: bool,
    eps: float,
) -> tuple[Tensor, ...]:
    _check_backward(grad_y, x, conv_weight, bn_weight, bn_bias, mean, var, pooled, index, response, training, eps)
    wide = wide_dtype(x)
    sizes = [map_numel(x, branch) for _, branch in _branches(conv_weight)]
    pools, indices, responses = pooled.split([2 * s for s in sizes]), index.split(sizes), response.split(sizes)
    grad_y = grad_y.to(wide)
    product = grad_y * x.to(wide) / len(conv_weight)
    gates, grad_x_parts, grad_conv, grad_weight, grad_bias = [], [], [], [], []
    for i, branch in _branches(conv_weight):
        n, rows, columns = map_shape(x, branch)
        rstd = torch.rsqrt(var[i] + eps)
        normal = (responses[i].view(n, rows, columns) - mean[i]) * rstd
        gate = torch.sigmoid(normal * bn_weight[i].to(wide) + bn_bias[i].to(wide))
        grad_affine = sum_over(product, branch) * gate * (1 - gate)
        grad_bias.append(grad_affine.sum())
        grad_weight.append((grad_affine * normal).sum())
        grad_normal = grad_affine
        if training:  # the mean and the variance of the batch depend on every response
            grad_normal = grad_affine - (grad_bias[i] + normal * grad_weight[i]) / normal.numel()
        grad_response = grad_normal * (bn_weight[i].to(wide) * rstd)
        weight = conv_weight[i].to(wide)
        grad_pool, grad_kernel, _ = torch.ops.aten.convolution_backward(
            grad_response.unsqueeze(1), pools[i].view(n, 2, rows, columns), weight, None,
            [1, 1], [weight.shape[2] // 2] * 2, [1, 1], False, [0, 0], 1, [True, True, False],
        )  # fmt: skip
        gates.append(gate)
        grad_conv.append(grad_kernel.squeeze(0))
        grad_x_parts.append(unpool(grad_pool, indices[i].view(n, rows, columns), x, branch))
    grad_x = in_dtype_and_layout_of(x, grad_y * mean_gate(gates) + add(grad_x_parts))
    return grad_x, torch.stack(grad_conv), torch.stack(grad_weight), torch.stack(grad_bias)


def _backward_fake(
    grad_y: Tensor,
    x: Tensor,
    conv_weight: list[Tensor],
    bn_weight: list[Tensor],
    bn_bias: list[Tensor],
    mean: Tensor,
    var: Tensor,
    pooled: Tensor,
    index: Tensor,
    response: Tensor,
    training: bool,
    eps: float,
) -> tuple[Tensor, ...]:
    _check_backward(grad_y, x, conv_weight, bn_weight, bn_bias, mean, var, pooled, index, response, training, eps)
    branches = len(conv_weight)
    return (
        torch.empty_like(x),
        mean.new_empty((branches, *conv_weight[0].shape[1:])),
        mean.new_empty(branches),
        mean.new_empty(branches),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, conv_weight, bn_weight, bn_bias, running_mean, running_var, ctx.training, ctx.eps = inputs
    _refuse_gradient_of_statistics("triplet_attention", running_mean, running_var)
    ctx.branches = len(conv_weight)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, *conv_weight, *bn_weight, *bn_bias, *output[1:])


def _backward(ctx: Any, grad_y: Tensor | None, *_: None) -> tuple[Any, ...]:
    if grad_y is None:
        return _no_gradients(ctx.branches, 2)
    x, *saved = ctx.saved_tensors
    lists = [saved[i * ctx.branches : (i + 1) * ctx.branches] for i in range(3)]
    return *_gradients(grad_y, x, lists, saved[3 * ctx.branches :], ctx.training, ctx.eps), None, None


def _refuse_gradient_of_statistics(where: str, running_mean: list[Tensor], running_var: list[Tensor]) -> None:
    if any(tensor.requires_grad for tensor in (*running_mean, *running_var)):
        raise invalid(where, "running statistics", "without a gradient", "some that require one", "detach them")


def _inference_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *lists, ctx.eps = inputs
    _refuse_gradient_of_statistics("triplet_attention_inference", *lists[3:])
    ctx.branches = len(lists[0])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, *(tensor for tensors in lists for tensor in tensors))


def _inference_backward(ctx: Any, grad_y: Tensor | None) -> tuple[Any, ...]:
    """Compute what the backward needs from the inputs, because the forward keeps nothing."""
    if grad_y is None:
        return _no_gradients(ctx.branches, 1)
    x, *saved = ctx.saved_tensors
    lists = [saved[i * ctx.branches : (i + 1) * ctx.branches] for i in range(5)]
    with torch.no_grad():
        _, *kept = _triplet_attention(x, *lists, False, ctx.eps)
    return *_gradients(grad_y, x, lists[:3], kept, False, ctx.eps), None


def _gradients(
    grad_y: Tensor, x: Tensor, parameters: list[list[Tensor]], kept: list[Tensor], training: bool, eps: float
) -> tuple[Any, ...]:
    """The gradients of x, of three lists of parameters and of two lists of running statistics."""
    grad_x, *stacked = _triplet_attention_backward(grad_y, x, *parameters, *kept, training, eps)

    def per_branch(gradient: Tensor, parameters: list[Tensor]) -> list[Tensor]:
        return [g.view(p.shape).to(p.dtype) for g, p in zip(gradient.unbind(), parameters, strict=True)]

    none = [None] * len(parameters[0])
    return grad_x, *map(per_branch, stacked, parameters), none, none


def _no_gradients(branches: int, options: int) -> tuple[Any, ...]:
    """None as the gradient of every argument: of x, of five lists with one tensor per branch, and of the options."""
    return None, *([[None] * branches] * 5), *([None] * options)


_triplet_attention_backward = define_op(
    "triplet_attention_backward(Tensor grad_y, Tensor x, Tensor[] conv_weight, Tensor[] bn_weight, Tensor[] bn_bias, "
    "Tensor mean, Tensor var, Tensor pooled, Tensor index, Tensor response, bool training, float eps)"
    " -> (Tensor grad_x, Tensor grad_conv_weight, Tensor grad_bn_weight, Tensor grad_bn_bias)",
    reference=_backward_reference,
    fake=_backward_fake,
    decomposition=_backward_reference,
    flops=_backward_flops,
)
_triplet_attention = define_op(
    "triplet_attention(Tensor x, Tensor[] conv_weight, Tensor[] bn_weight, Tensor[] bn_bias, Tensor[] running_mean, "
    "Tensor[] running_var, bool training, float eps)"
    " -> (Tensor y, Tensor mean, Tensor var, Tensor pooled, Tensor index, Tensor response)",
    reference=_reference,
    fake=_fake,
    decomposition=_reference,
    flops=_flops,
    setup_context=_setup_context,
    backward=_backward,
)
_triplet_attention_inference = define_op(
    "triplet_attention_inference(Tensor x, Tensor[] conv_weight, Tensor[] bn_weight, Tensor[] bn_bias, "
    "Tensor[] running_mean, Tensor[] running_var, float eps) -> Tensor",
    reference=_inference_reference,
    fake=_inference_fake,
    decomposition=_inference_reference,
    flops=_flops,
    setup_context=_inference_setup_context,
    backward=_inference_backward,
)
