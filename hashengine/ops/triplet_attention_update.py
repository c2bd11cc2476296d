"""What triplet attention's BatchNorms remember of a batch, in one call for all branches."""

from torch import Tensor

from hashengine.ops._library import define_op


def triplet_attention_update(
    mean: Tensor,
    var: Tensor,
    running_mean: list[Tensor],
    running_var: list[Tensor],
    num_batches_tracked: list[Tensor],
    counts: list[int],
    momentum: float | None,
) -> None:
    """Move the running statistics towards a batch's, in place, as ``nn.BatchNorm2d`` does in training.

    An op of its own: one that mutates cannot carry an autograd formula, and :func:`triplet_attention` has one.

    Args:
        mean, var: [branches], from :func:`triplet_attention`; the variance divides by the number of values.
        running_mean, running_var: [1] each, a branch; the variance divides by the number of values less one.
        num_batches_tracked: int64 scalars, a branch; counts this batch.
        counts: number of values that a branch's statistics were taken over, at least 2.
        momentum: weight of this batch; None for the cumulative average.

    Raises:
        ValueError: the lists are not as long as ``mean``, or a count is below 2, or the
            momentum is negative.
    """
    _update(mean, var, running_mean, running_var, num_batches_tracked, counts, momentum)


def _reference(mean, var, running_mean, running_var, num_batches_tracked, counts, momentum):
    _check(mean, var, running_mean, running_var, num_batches_tracked, counts, momentum)
    for i, count in enumerate(counts):
        num_batches_tracked[i].add_(1)
        weight = 1.0 / num_batches_tracked[i].to(mean.dtype) if momentum is None else momentum
        batch = (mean[i], var[i] * (count / (count - 1)))
        for running, value in zip((running_mean[i], running_var[i]), batch, strict=True):
            running.copy_(running + weight * (value - running))


def _check(mean, var, running_mean, running_var, num_batches_tracked, counts, momentum):
    op, branches = "triplet_attention_update", mean.numel()
    lists = {"running_mean": running_mean, "running_var": running_var, "num_batches_tracked": num_batches_tracked}
    for name, values in {"var": var, **lists, "counts": counts}.items():
        if len(values) != branches:
            raise ValueError(f"{op}: {name} must have one entry a branch ({branches}, as mean has), got {len(values)}")
    for name, tensors in lists.items():
        for i, tensor in enumerate(tensors):
            if tensor.numel() != 1 or tensor.device != mean.device:
                raise ValueError(
                    f"{op}: {name}[{i}] must hold one value on {mean.device}, "
                    f"got {list(tensor.shape)} on {tensor.device}"
                )
    if momentum is not None and not momentum >= 0:
        raise ValueError(f"{op}: momentum must not be negative, got {momentum}")
    if any(count < 2 for count in counts):
        raise ValueError(f"{op}: counts must be at least 2 (one value has no variance), got {list(counts)}")


_update = define_op(
    "triplet_attention_update(Tensor mean, Tensor var, Tensor(a!)[] running_mean, Tensor(b!)[] running_var, "
    "Tensor(c!)[] num_batches_tracked, int[] counts, float? momentum) -> ()",
    reference=_reference,
    fake=_check,
)
