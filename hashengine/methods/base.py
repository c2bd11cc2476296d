"""What a hashing method is: the loss, the head and the defaults that turn a network's features into good codes.

A method is one file in this folder, with the method's name. Its docstring names the paper and describes the head,
the loss or the closed form, and the source of the defaults. It defines a subclass of `HashingMethod`, which is
registered under its name.

For N images, the network that a method trains computes features [N, dim]; the method's head computes activations
[N, bits] from them. For every method, bit i of a code is set if activation i >= 0.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from hashengine._config import Config
from hashengine.ops import greedy_sign


class View(NamedTuple):
    """The network's outputs for a batch of images under one augmentation.

    Attributes:
        activations: [N, bits], the output of the head.
        features: [N, dim], the output of the backbone.
    """

    activations: Tensor
    features: Tensor


class Batch(NamedTuple):
    """What a loss is computed from.

    Attributes:
        activations: [N, bits], the output of the head.
        features: [N, dim], the output of the backbone.
        targets: int64 [N], the class of each image; or bool [N, classes], multi-hot.
        second: the outputs for the same images under another augmentation, if the method has `views = 2`.
    """

    activations: Tensor
    features: Tensor
    targets: Tensor
    second: View | None = None


class HashingMethod(nn.Module):
    """A hashing method: its options, its head, its loss, and the parameters that belong to the loss.

    The order of use is: construct it, let the network build `head`, call `add_parameters`, then either minimise `loss`
    over the parameters of network and method together, or call `fit` for a method with a closed form.

    Attributes:
        name: the method's name in options, which is also the name of its file.
        Options: the class of its options, a `Config` whose fields have descriptions and defaults.
        views: the number of augmentations of each image that `loss` needs, 1 or 2.
        has_closed_form: true if the head is computed by `fit`; false if the network is trained by `loss`.
    """

    name: ClassVar[str]
    Options: ClassVar[type[Config]]
    views: ClassVar[int] = 1
    has_closed_form: ClassVar[bool] = False

    _registry: ClassVar[dict[str, type[HashingMethod]]] = {}

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        HashingMethod._registry[cls.name] = cls

    @classmethod
    def registered(cls, name: str) -> type[HashingMethod]:
        """The class with this name, among those whose files are imported."""
        return cls._registry[name]

    def __init__(self, **options: Any):
        super().__init__()
        self.options = self.Options.checked(self.name, **options)

    def head(self, dim: int, bits: int) -> nn.Module:
        """The hash layer, features [N, dim] -> activations [N, bits]; a linear layer unless the paper has another."""
        return nn.Linear(dim, bits)

    def add_parameters(self, bits: int, classes: int) -> None:
        """Register the parameters of the loss, such as a classifier or proxies. The default registers none.

        Called once, after the network is built, so that the network's initial weights do not depend on the method's.
        """

    def loss(self, batch: Batch, step: int, epoch: int) -> dict[str, Tensor]:
        """The terms of the loss, by name: scalars whose sum is minimised.

        Args:
            batch: the outputs of the network and the targets.
            step: optimizer steps so far, from 0.
            epoch: the current epoch, from 1.
        """
        raise NotImplementedError(f"{self.name} has no loss: it has a closed form, see fit")

    def fit(self, features: Tensor, bits: int) -> nn.Module:
        """The closed form: the head that is optimal for `features` [N, dim].

        Raises:
            InputError: the features do not determine `bits` bits.
        """
        raise NotImplementedError(f"{self.name} has no closed form: it is trained by its loss")

    def binarise(self, u: Tensor) -> Tensor:
        """The code of activations `u` as -1 and +1, in the shape and dtype of `u`; the gradient is straight-through."""
        return greedy_sign(u, 0.0)[0]

    def measures(self, batch: Batch) -> dict[str, Tensor]:
        """Scalars to report in addition to the loss, such as an accuracy; computed without gradients."""
        return {}

    def figures(self) -> dict[str, float]:
        """Numbers that describe the closed form after `fit`, such as its error."""
        return {}
