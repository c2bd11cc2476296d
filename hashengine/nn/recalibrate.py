"""BatchNorm's running statistics, estimated anew."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Tensor | Sequence[Tensor]]) -> int:
    """Estimate the running statistics of every BatchNorm in `model` anew, from the batches that it will see.

    A pretrained network into which attention came still normalises by the statistics of its old activations; SimAM's
    gate, for one, scales them by 0.62 to 1. A few dozen training batches mend that; weights are not touched.

    Afterwards the statistics are the plain average over the batches, all weighted alike: none of the old ones is left.
    Nothing but the BatchNorms runs in training mode meanwhile, so that dropout stays off. Modes and momenta are put
    back, and the old statistics too where an error ends the estimate.

    Args:
        model: changed in place.
        batches: inputs of `model`, or tuples that start with one, as a DataLoader gives them; moved to its device.

    Returns:
        The number of batches.

    Raises:
        TypeError: a batch is something else.
        ValueError: no BatchNorm of `model` keeps running statistics, or there is no batch.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    if not norms:
        raise ValueError(
            "recalibrate: model must have a BatchNorm that keeps running statistics, "
            f"got {type(model).__name__} with none: there is nothing to recalibrate"
        )
    modes = [(module, module.training) for module in model.modules()]
    momenta = [(norm, norm.momentum) for norm in norms]
    statistics = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers(recurse=False)]
    device = norms[0].running_mean.device
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
            raise ValueError("recalibrate: batches must hold at least one batch, got none")
    except BaseException:
        for buffer, old in statistics:
            buffer.copy_(old)
        raise
    finally:
        for module, training in modes:
            module.training = training
        for norm, momentum in momenta:
            norm.momentum = momentum
    return count


def _input(batch: Tensor | Sequence[Tensor], position: int) -> Tensor:
    first = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(first, Tensor):
        raise TypeError(
            "recalibrate: batches must hold tensors or tuples that start with one, "
            f"got {type(batch).__name__} at {position}"
        )
    return first
