"""Estimation of the running statistics of BatchNorms from new batches."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from hashengine.errors import invalid
from hashengine.nn._insertion import check_model


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Tensor | Sequence[Tensor]]) -> int:
    """Estimate the running statistics of the BatchNorms in `model` again, from batches of inputs of `model`.

    Attention changes the activations of a pretrained network (SimAM's gate scales them by 0.62 to 1). They no longer
    match the running statistics of the BatchNorms. A few dozen training batches usually suffice to estimate these
    statistics again. The weights do not change.

    The new statistics are the average over the batches, with equal weights; the old ones do not contribute. Only the
    BatchNorms run in training mode, so dropout stays off. Modes and momenta are restored. The old statistics are
    restored after an error, and in BatchNorms that no batch reached, such as those of an auxiliary classifier.

    Args:
        model: changed in place; it may be compiled. Call `recalibrate` before DDP or FSDP wrap it, because a wrapped
            model sees only one process's share of the batches.
        batches: inputs of `model`, or tuples or lists that start with an input, as a DataLoader yields them. The inputs
            are moved to the device of the BatchNorms.

    Returns:
        The number of batches.

    Raises:
        InputError: no BatchNorm of `model` has running statistics, a buffer of `model` has no values, `model` is or
            contains a module that is wrapped or scripted, `batches` is one tensor, there is no batch, a batch is
            neither a tensor of at least one input nor a tuple or list that starts with one, or a statistic became
            infinite or NaN.
    """
    check_model("recalibrate", model, may_be_compiled=True)
    if not hasattr(batches, "__iter__") and not hasattr(batches, "__getitem__"):
        raise invalid("recalibrate", "batches", "an iterable of batches", type(batches).__name__)
    if isinstance(batches, Tensor):
        expected = "an iterable of batches, such as a list"
        raise invalid("recalibrate", "batches", expected, f"a tensor {list(batches.shape)}", "pass [batches] for one")
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and _has_statistics(module)]
    if not norms:
        expected = "a network with a BatchNorm that tracks running statistics"
        raise invalid("recalibrate", "model", expected, f"a {type(model).__name__} with none")
    for name, buffer in model.named_buffers():
        if is_lazy(buffer) or buffer.is_meta:
            kind = "that is not initialised yet" if is_lazy(buffer) else "on the meta device"
            raise invalid("recalibrate", "model", "a network with values", f"a buffer {name!r} {kind}")
    modes = [(module, module.training) for module in model.modules()]
    momenta = [(norm, norm.momentum) for norm in norms]
    statistics = {norm: [(buffer, buffer.clone()) for buffer in norm.buffers(recurse=False)] for norm in norms}
    device = statistics[norms[0]][0][0].device
    unreached = norms  # those whose old statistics are restored
    count = 0
    try:
        model.eval()
        for norm in norms:
            norm.train()
            norm.momentum = None  # the cumulative average
            norm.reset_running_stats()
        for count, batch in enumerate(batches, start=1):
            model(_input(batch, count - 1).to(device, non_blocking=True))
        if count == 0:
            raise invalid("recalibrate", "batches", "at least one batch", "none")
        reached = [norm for norm in norms if norm.num_batches_tracked != 0]
        if not all(bool(torch.isfinite(buffer).all()) for norm in reached for buffer in norm.buffers(recurse=False)):
            expected = "ones whose statistics are finite in the dtype of the network"
            raise invalid("recalibrate", "batches", expected, "statistics with NaN or infinity")
        unreached = [norm for norm in norms if norm.num_batches_tracked == 0]
    finally:
        for norm in unreached:
            for buffer, old in statistics[norm]:
                buffer.copy_(old)
        for module, training in modes:
            module.training = training
        for norm, momentum in momenta:
            norm.momentum = momentum
    return count


def _has_statistics(norm: _BatchNorm) -> bool:
    buffers = (norm.running_mean, norm.running_var, norm.num_batches_tracked)
    return norm.track_running_stats and all(buffer is not None for buffer in buffers)


def _input(batch: Any, position: int) -> Tensor:
    first = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(first, Tensor):
        expected = "tensors, or tuples or lists that start with a tensor"
        raise invalid("recalibrate", "batches", expected, f"{type(batch).__name__} at position {position}")
    if first.dim() and not len(first):
        actual = f"{list(first.shape)} at position {position}"
        raise invalid("recalibrate", "batches", "of at least one input", actual, "leave out empty batches")
    return first
