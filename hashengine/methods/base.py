"""The interface of a hashing method, which consists of a head, a loss or a closed form, and defaults.

The head is the hash layer: it computes the activations from the features of the network. The head is trained with the
network by minimising the loss, or the closed form computes it from the features of all training images.

Training draws the batches and the augmentations from a generator of its own. What a method draws during the training,
as dropout does, comes from torch's generator of the process. If a method draws numbers, two runs with the same
configuration give the same weights only if the caller also seeds this generator.

A method is a subclass of `HashingMethod`, which is registered under its attribute `name`. One of hashengine is a file
in this folder, with the method's name. The file's docstring names the paper and describes the head, the loss or the
closed form, and the source of the defaults.

For N images, the features are [N, dim] and the activations [N, bits]. Bit i of a code is set if activation i >= 0.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from hashengine import methods
from hashengine._config import Config
from hashengine._validation import FLOATING, check_array, check_integer
from hashengine.errors import invalid
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
    """The input of a loss.

    Attributes:
        activations: [N, bits], the output of the head.
        features: [N, dim], the output of the backbone.
        targets: int64 [N], the class of each image; or bool [N, classes], multi-hot.
        second: the network's outputs for the same images under another augmentation; None unless the method has
            `views = 2`.
    """

    activations: Tensor
    features: Tensor
    targets: Tensor
    second: View | None = None


class HashingMethod(nn.Module):
    """A hashing method: its options, its head, its loss, and the parameters that belong to the loss.

    It is used in this order: construct the method, build the network with its `head`, and call `add_parameters`. Then
    minimise `loss` over the parameters of the network and the method together; for a method with a closed form, call
    `fit` instead.

    Attributes:
        name: the method's name in options and saved models. In hashengine, it is also the name of its file.
        Options: the class of its options, a `Config` whose fields have descriptions and defaults; by default, there are
            none.
        views: the number of augmentations of each image that `loss` needs, 1 or 2.
        registry: the classes in memory, by name.
        has_closed_form: true if the head is computed by `fit`; false if the network is trained by `loss`.
    """

    name: ClassVar[str]
    Options: ClassVar[type[Config]] = Config
    views: ClassVar[int] = 1
    has_closed_form: ClassVar[bool] = False

    registry: ClassVar[dict[str, type[HashingMethod]]] = {}

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        if "name" in vars(cls):  # a class that inherits the name is not that method
            if cls.name in methods.own_names() and cls.__module__ != f"{methods.__name__}.{cls.name}":
                raise invalid(cls.__qualname__, "name", "none of a method of hashengine", repr(cls.name))
            HashingMethod.registry[cls.name] = cls

    def __init__(self, **options: Any):
        super().__init__()
        self.options = self.Options.checked(self.name, **options)

    def head(self, dim: int, bits: int) -> nn.Module:
        """Make the hash layer, features [N, dim] -> activations [N, bits]. The default is a linear layer.

        `HashNet.from_pretrained` also calls it with "meta" as the default device, where tensors have no values.

        Raises:
            InputError: a size is not a positive integer.
        """
        dim, bits = self.check_sizes(dim=dim, bits=bits)
        return nn.Linear(dim, bits)

    def check_sizes(self, **sizes: Any) -> tuple[int, ...]:
        """The sizes as integers.

        Raises:
            InputError: a size is not a positive integer.
        """
        return tuple(check_integer(self.name, name, value, 1) for name, value in sizes.items())

    def check_activations(self, batch: Batch) -> None:
        """Require activations [N, bits] of a floating dtype, of at least one image, in both views.

        Raises:
            InputError: they are something else.
        """
        for view in (batch, batch.second) if batch.second is not None else (batch,):
            u = view.activations
            if not isinstance(u, Tensor):
                raise invalid(self.name, "activations", "a torch tensor", type(u).__name__)
            check_array(self.name, "activations", u, FLOATING, may_be_meta=True)
            if u.dim() != 2 or 0 in u.shape:
                raise invalid(self.name, "activations", "[N, bits] with N and bits at least 1", list(u.shape))

    def add_parameters(self, bits: int, classes: int) -> None:
        """Register the parameters of the loss, such as a classifier or proxies. The default registers none.

        Called once, after the network is built, so that drawing these parameters at random does not change the
        network's initial weights.

        Raises:
            InputError: a size is not a positive integer.
        """

    def loss(self, batch: Batch, step: int, epoch: int) -> dict[str, Tensor]:
        """The terms of the loss, by name: scalars whose sum is minimised.

        Args:
            batch: the outputs of the network and the targets.
            step: the number of optimizer steps before this one.
            epoch: the number of the current epoch, counted from 1.
        """
        raise NotImplementedError(f"{self.name} has no loss: it has a closed form, see fit")

    def fit(self, features: Tensor, bits: int) -> nn.Module:
        """The closed form: the head that is computed from `features` [N, dim].

        Raises:
            InputError: a head with `bits` bits cannot be computed from the features.
        """
        raise NotImplementedError(f"{self.name} has no closed form: it is trained by its loss")

    def binarise(self, u: Tensor) -> Tensor:
        """The code of activations `u` as -1 and +1, in the shape and dtype of `u`.

        The gradient of the code is passed on to `u` unchanged (straight-through).
        """
        return greedy_sign(u, 0.0)[0]

    def measures(self, batch: Batch) -> dict[str, Tensor]:
        """Scalars to report in addition to the loss, such as an accuracy; computed without gradients."""
        return {}

    def figures(self) -> dict[str, float]:
        """Numbers that describe the closed form after `fit`, such as its error."""
        return {}
