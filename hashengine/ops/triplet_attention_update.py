"""The update of the running statistics of triplet attention's BatchNorms, in one call for all branches."""

import torch
from torch import Tensor

from hashengine._validation import dtype_name
from hashengine.errors import invalid
from hashengine.ops._check import check_like, check_number, wide_dtype
from hashengine.ops._library import define_op
from hashengine.ops._plain import needs_plain_torch, untraced


def triplet_attention_update(
    mean: Tensor,
    var: Tensor,
    running_mean: list[Tensor],
    running_var: list[Tensor],
    num_batches_tracked: list[Tensor],
    counts: list[int],
    momentum: float | None,
) -> None:
    """Move running statistics towards those of a batch, in place, as `nn.BatchNorm2d` does in training.

    This is an op of its own because `triplet_attention` has an autograd formula, which an op that mutates its arguments
    cannot have.

    Args:
        mean: [branches], float32 or float64, from `triplet_attention`.
        var: [branches], like `mean`; this variance divides by the number of values.
        running_mean: for each branch, a tensor with one value.
        running_var: for each branch, a tensor with one value; this variance divides by the number of values minus 1.
        num_batches_tracked: for each branch, an int64 scalar; it is incremented by 1.
        counts: for each branch, the number of values from which its mean and variance were computed; at least 2.
        momentum: weight of this batch, a finite number of 0 or more; None for the cumulative average.

    Raises:
        ValueError: `mean` or `var` has a wrong dtype, shape or device, a list does not have one entry per branch, a
            tensor in a list does not hold one value on the device of `mean`, a count is below 2, or the momentum is
            out of range.
    """
    # torch.export keeps no decomposition of an op that mutates its arguments, so an exporter to ONNX would not know it.
    op = _reference if needs_plain_torch() or torch.compiler.is_exporting() else _update
    op(mean, var, running_mean, running_var, num_batches_tracked, counts, momentum)


def _reference(
    mean: Tensor,
    var: Tensor,
    running_mean: list[Tensor],
    running_var: list[Tensor],
    num_batches_tracked: list[Tensor],
    counts: list[int],
    momentum: float | None,
) -> None:
    _check(mean, var, running_mean, running_var, num_batches_tracked, counts, momentum)
    for i, count in enumerate(counts):
        num_batches_tracked[i].add_(1)
        weight = 1.0 / num_batches_tracked[i].to(mean.dtype) if momentum is None else momentum
        batch = (mean[i], var[i] * (count / (count - 1)))
        for running, value in zip((running_mean[i], running_var[i]), batch, strict=True):
            running.copy_(running + weight * (value - running))


@untraced
def _check(
    mean: Tensor,
    var: Tensor,
    running_mean: list[Tensor],
    running_var: list[Tensor],
    num_batches_tracked: list[Tensor],
    counts: list[int],
    momentum: float | None,
) -> None:
    where, branches = "triplet_attention_update", mean.numel()
    if mean.dim() != 1 or not 1 <= branches <= 3 or mean.dtype != wide_dtype(mean):
        actual = f"{dtype_name(mean)} {list(mean.shape)}"
        raise invalid(where, "mean", "float32 or float64 with 1 to 3 values, one per branch", actual)
    check_like(where, "var", var, mean.shape, mean.dtype, mean)
    lists = {"running_mean": running_mean, "running_var": running_var, "num_batches_tracked": num_batches_tracked}
    lengths = {name: len(tensors) for name, tensors in lists.items()} | {"counts": len(counts)}
    for name, length in lengths.items():
        if length != branches:
            raise invalid(where, name, f"a list of one entry per branch ({branches})", length)
    for name, tensors in lists.items():
        for i, tensor in enumerate(tensors):
            if tensor.numel() != 1 or tensor.device != mean.device:
                actual = f"{list(tensor.shape)} on {tensor.device}"
                raise invalid(where, f"{name}[{i}]", f"one value on {mean.device}", actual)
    if any(count < 2 for count in counts):
        raise invalid(where, "counts", "at least 2 (one value has no variance)", list(counts))
    if momentum is not None:
        check_number(where, "momentum", momentum, least=0)


_update = define_op(
    "triplet_attention_update(Tensor mean, Tensor var, Tensor(a!)[] running_mean, Tensor(b!)[] running_var, "
    "Tensor(c!)[] num_batches_tracked, SymInt[] counts, float? momentum) -> ()",
    reference=_reference,
    fake=_check,
)
