"""Greedy hash: a classifier on the sign of the activations, with a straight-through gradient.

Su, Zhang, Han and Tian, "Greedy Hash: Towards Fast Optimization for Accurate Hash Coding in CNN", NeurIPS 2018.

- Head: a linear layer.
- Loss: `cross_entropy(W b, targets) + alpha * mean(||u| - 1|^3)` with the activations u and the code `b = sign(u)`. The
  classifier W has no bias. It sees only the bits; therefore training drives images of one class to one code. The
  backward treats the sign as the identity: it passes the gradient of b on to u. The penalty keeps u near b.
- Defaults: `alpha` 0.1 is the value in the authors' code for CIFAR-10; it has 1 for ImageNet-100.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hashengine._config import Config, Number
from hashengine._validation import dtype_name
from hashengine.errors import invalid
from hashengine.methods.base import Batch, HashingMethod
from hashengine.ops import greedy_sign

_IGNORED = torch.iinfo(torch.int64).min  # no target is ignored; by default, torch ignores the target -100


class GreedyHashOptions(Config):
    """The options of greedy hash."""

    alpha: Annotated[
        Number, Field(ge=0, allow_inf_nan=False, description="weight of the quantisation penalty mean(||u| - 1|^3)")
    ] = 0.1


class GreedyHashMethod(HashingMethod):
    """Greedy hash; its own parameters are those of the classifier."""

    name = "greedy_hash"
    Options = GreedyHashOptions
    options: GreedyHashOptions

    def add_parameters(self, bits: int, classes: int) -> None:
        """Register the classifier on the bits."""
        bits, classes = self.check_sizes(bits=bits, classes=classes)
        self.classifier = nn.Linear(bits, classes, bias=False)

    def loss(self, batch: Batch, step: int, epoch: int) -> dict[str, Tensor]:
        """The classification loss of the code and the quantisation penalty of the activations.

        Raises:
            InputError: the activations are not floating-point [N, bits] with N at least 1; the targets are not int64
                [N], such as multi-hot ones, or on the CPU, a target is no class.
        """
        targets = self._checked_targets(batch)
        b, penalty = greedy_sign(batch.activations, self.options.alpha)
        try:
            classification = cross_entropy(self.classifier(b), targets, ignore_index=_IGNORED)
        except IndexError:
            actual = f"{int(targets.min())} to {int(targets.max())}"
            raise invalid(self.name, "targets", f"0 to {self.classifier.out_features - 1}", actual) from None
        return {"classification": classification, "penalty": penalty}

    def measures(self, batch: Batch) -> dict[str, Tensor]:
        """The classifier's accuracy.

        Raises:
            InputError: the activations are not floating-point [N, bits] with N at least 1, or the targets are not
                int64 [N].
        """
        targets = self._checked_targets(batch)
        predicted = self.classifier(self.binarise(batch.activations)).argmax(1)
        return {"accuracy": (predicted == targets).to(torch.float32).mean()}

    def _checked_targets(self, batch: Batch) -> Tensor:
        if not hasattr(self, "classifier"):
            raise invalid(self.name, "the method", "one with a classifier", "one without", "call add_parameters first")
        self.check_activations(batch)
        bits = self.classifier.in_features
        if batch.activations.shape[1] != bits:
            raise invalid(self.name, "activations", f"[N, {bits}]", list(batch.activations.shape))
        targets, shape = batch.targets, batch.activations.shape[:1]
        is_tensor = isinstance(targets, Tensor)
        if not is_tensor or targets.dtype != torch.int64 or targets.shape != shape:
            found = f"{dtype_name(targets)} {list(targets.shape)}" if is_tensor else type(targets).__name__
            raise invalid(self.name, "targets", f"one class per image, a tensor of int64 {list(shape)}", found)
        return targets
