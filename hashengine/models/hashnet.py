"""`HashNet`, a backbone and a hash layer, with every step from an image to its packed code."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from typing_extensions import Self

from hashengine import methods, ops
from hashengine._torch_defaults import own_random_numbers, torch_defaults
from hashengine._validation import check_integer, check_path, dtype_name
from hashengine.errors import invalid
from hashengine.images import image_tensor
from hashengine.models import checkpoint, memory_format
from hashengine.models.config import HashNetConfig
from hashengine.models.resnet import SmallResNet
from hashengine.ops._plain import untraced

MakeHead = Callable[[int, int], nn.Module]


class HashOutput(NamedTuple):
    """What `HashNet` computes for N images.

    Attributes:
        activations: [N, bits], the output of the hash layer; bit i of a code is set if `activations[:, i] >= 0`.
        features: [N, dim], the output of the backbone.
    """

    activations: Tensor
    features: Tensor


class HashNet(nn.Module):
    """A network that hashes images to `config.bits` bits: a backbone with optional attention, then a hash layer.

    A `hashengine.methods.HashingMethod` makes the hash layer and defines how the network is trained.

    The weights of the convolutions are in the memory layout that `memory_format.training_format` chooses for the
    network's device: channels_last, or contiguous if training in channels_last is known to be unsafe there. Each
    `.to(...)` brings the weights into the layout for the device.

    Args:
        config: what the network consists of.
        head: makes the hash layer; called with the number of features and the number of bits.

    Raises:
        InputError: an argument is of another kind.

    Attributes:
        trained_by: the method that trained the network, in the form in which it is saved; None before training.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: HashNetConfig, head: MakeHead = nn.Linear):
        super().__init__()
        if not isinstance(config, HashNetConfig):
            raise invalid("HashNet", "config", "a HashNetConfig", type(config).__name__)
        if not callable(head):
            raise invalid("HashNet", "head", "a function that makes the hash layer", type(head).__name__)
        self.config = config
        self.trained_by: checkpoint.MethodState | None = None
        self.backbone = SmallResNet(config.channels, config.widths, config.stem_stride, config.attention)
        self.hash_layer = head(self.backbone.features, config.bits)
        if not isinstance(self.hash_layer, nn.Module):
            raise invalid("HashNet", "head", "a function that returns an nn.Module", type(self.hash_layer).__name__)
        if any(is_lazy(tensor) for tensor in (*self.hash_layer.parameters(), *self.hash_layer.buffers())):
            expected = "a function that returns a module whose parameters have shapes"
            actual = "a lazy module such as nn.LazyLinear"
            raise invalid("HashNet", "head", expected, actual, "use its first argument, the number of features")
        self._set_mean_and_std(next(self.backbone.parameters()))
        self._arrange_weights()
        self.register_load_state_dict_post_hook(_set_mean_and_std_of)

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        return self.mean.device

    def forward(self, images: Tensor) -> HashOutput:
        """Compute the activations and features of images, uint8 [N, channels, image_size, image_size].

        `preprocess` makes such images.

        Raises:
            InputError: the images have another type or shape.
        """
        self._check_images("HashNet", images)
        x = (images.to(self.mean.dtype) / 255 - self.mean) / self.std
        features = self.backbone(self._arrange_input(x))
        return HashOutput(self.hash_layer(features), features)

    def preprocess(self, image: Image.Image) -> Tensor:
        """Convert a PIL image of any size and mode to uint8 [channels, image_size, image_size]."""
        return image_tensor(image, self.config.image_size, self.config.channels)

    @torch.inference_mode()
    def encode(self, images: Tensor, batch_size: int = 512) -> Tensor:
        """Hash images to packed codes.

        Runs in evaluation mode on the network's device and restores the mode of each module afterwards. If several
        threads use the network, call `eval` before: the modes are those of all threads.

        Args:
            images: uint8 [N, channels, image_size, image_size].
            batch_size: the number of images per call of the network.

        Returns:
            uint8 [N, bits / 8] on the device of `images`, packed as by `hashengine.ops.pack_bits`.

        Raises:
            InputError: `images` have another type or shape, `batch_size` is below 1, the hash layer gives another shape
                than [N, bits], the activations of a batch are not finite, or the images or the network are on the
                device "meta".
        """
        self._check_images("HashNet.encode", images)
        self._check_has_values("HashNet.encode")
        if images.is_meta:
            raise invalid("HashNet.encode", "images", "on a device with memory", "images on the device 'meta'")
        batch_size = check_integer("HashNet.encode", "batch_size", batch_size, 1)
        with torch.inference_mode(False):  # otherwise the caller could not change the codes
            codes = torch.empty(len(images), self.config.bits // 8, dtype=torch.uint8, device=images.device)
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            for start in range(0, len(images), batch_size):
                batch = slice(start, start + batch_size)
                u = self(images[batch].to(self.device)).activations
                expected = [len(images[batch]), self.config.bits]
                if list(u.shape) != expected:
                    raise invalid("HashNet.encode", "the output of the hash layer", str(expected), list(u.shape))
                if not torch.isfinite(u).all():
                    raise invalid(
                        "HashNet.encode",
                        "activations",
                        "finite",
                        f"NaN or infinity for images {start} to {start + len(u) - 1}",
                        "the weights are damaged: train the model again",
                    )
                codes[batch] = ops.pack_bits(u).to(codes.device)
        finally:
            for module, training in modes:
                module.training = training
        return codes

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write config.json and model.safetensors into `folder`.

        If a file cannot be written, for example because the disk is full, an earlier save in `folder` stays intact. A
        crash may leave one file of the earlier save and one of the new save; `from_pretrained` refuses such a folder.

        Raises:
            InputError: the network is on the device "meta" or sharded, or `from_pretrained` would make another one. It
                knows `config` and the weights. Other changes, such as of an attribute of a layer, are noticed only if
                they change the `repr` of the network.
        """
        self._check_has_values("HashNet.save_pretrained")
        self._check_can_be_made_again()
        checkpoint.save(
            check_path("HashNet.save_pretrained", "folder", folder),
            checkpoint.Model(self.config, self.state_dict(), self.trained_by),
        )

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> Self:
        """The model that `save_pretrained` wrote into `folder`, in float32 on the CPU, in evaluation mode.

        Raises:
            InputError: a file is missing, truncated or foreign, or the two files are from different saves; the message
                names the file.
        """
        config, weights, trained_by = checkpoint.load(check_path("HashNet.from_pretrained", "folder", folder))
        head = _head_of(trained_by, str(Path(folder, checkpoint.CONFIG_FILE)))
        # A network without values comes first: config.json may describe one that no memory can hold. A subclass may
        # have other weights, and read values when it is made.
        with torch_defaults(), torch.device("meta"):
            described = HashNet(config, head)
        try:
            described.load_state_dict(weights, strict=cls is HashNet, assign=True)
            with torch_defaults(), own_random_numbers(0):
                model = cls(config, head)
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise checkpoint.describe_mismatch(Path(folder), error) from None
        model.trained_by = trained_by
        return model.eval()

    def to_empty(self, *, device: torch.device | str | int | None, recurse: bool = True) -> Self:
        """Move the tensors to a device without their values, which `load_state_dict` can then set."""
        super().to_empty(device=device, recurse=recurse)
        self._set_mean_and_std(self.mean)
        return self

    def _check_can_be_made_again(self) -> None:
        """Require the network that `from_pretrained` makes: config.json describes no other."""
        where, advice = "HashNet.save_pretrained", "save its state_dict with torch.save"
        for name, tensor in self.state_dict().items():
            if hasattr(tensor, "full_tensor"):  # a DTensor, whose module is not imported before it is used
                full = "torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True"
                raise invalid(where, f"the weight {name!r}", "whole", "a part of a sharded one", f"save that of {full}")
        head = _head_of(self.trained_by, where)
        with torch_defaults(), torch.device("meta"):
            made = HashNet(self.config, head)
        # A subclass may have another backbone.
        for part in ("hash_layer", "backbone") if type(self) is HashNet else ("hash_layer",):
            described, found = getattr(made, part), getattr(self, part)
            texts = [f"{type(module).__qualname__}\n{module!r}" for module in (described, found)]
            if texts[0] != texts[1]:
                raise invalid(where, "the " + part.replace("_", " "), *_first_difference(*texts), advice)
            expected, actual = ({k: v.shape for k, v in p.state_dict().items()} for p in (described, found))
            if other := sorted(expected.items() ^ actual.items()):
                what = f"the weights of the {part.replace('_', ' ')}"
                remedy = "remove what was added, for example with torch.nn.utils.prune.remove"
                raise invalid(where, what, "those of a new one", f"another {other[0][0]!r}", remedy)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Convert the tensors and restore the layout. torch calls this for every `.to`, `.cuda`, `.half` and so on."""
        dtype, had_values = self.mean.dtype, not self.mean.is_meta
        super()._apply(fn, recurse)
        # The values are lost in `to_empty` of a module that contains the network, and rounded in another dtype.
        if not self.mean.is_meta and (self.mean.dtype != dtype or not had_values):
            self._set_mean_and_std(self.mean)
        self._arrange_weights()
        return self

    def _set_mean_and_std(self, like: Tensor) -> None:
        """Set the buffers, in the dtype of `like` and on its device. config.json stores them, so they are not saved."""
        with torch.inference_mode(False):
            for name in ("mean", "std"):
                values = torch.tensor(getattr(self.config, name), dtype=like.dtype, device=like.device)
                self.register_buffer(name, values.reshape(1, -1, 1, 1), persistent=False)

    def _arrange_weights(self) -> None:
        layout = memory_format.training_format(self.device)
        self._is_channels_last = layout == torch.channels_last
        # Unlike Tensor.contiguous, Tensor.to also sets the strides of dimensions of size 1. torch chooses the layout of
        # a convolution by these strides.
        super()._apply(lambda tensor: tensor.to(memory_format=layout) if tensor.dim() == 4 else tensor)

    def _arrange_input(self, x: Tensor) -> Tensor:
        """`x` in the layout for the convolutions, which use channels_last if `x` or their weights are in it."""
        if self._is_channels_last or torch._C._is_tracing():  # a trace must not depend on the mode of autograd
            return x
        layout = torch.contiguous_format if torch.is_grad_enabled() else torch.channels_last
        return x.to(memory_format=layout)

    def _check_has_values(self, where: str) -> None:
        if any(tensor.is_meta for tensor in (*self.parameters(), *self.buffers())):
            raise invalid(where, "the network", "on a device with memory", "one on the device 'meta'")

    @untraced
    def _check_images(self, where: str, images: Any) -> None:
        shape = (self.config.channels, self.config.image_size, self.config.image_size)
        if not isinstance(images, Tensor):
            raise invalid(where, "images", "a torch tensor", type(images).__name__)
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1:] != shape:
            expected = f"uint8 [N, {', '.join(map(str, shape))}], as HashNet.preprocess makes them"
            raise invalid(where, "images", expected, f"{dtype_name(images)} {list(images.shape)}")


def _first_difference(expected: str, actual: str) -> tuple[str, str]:
    """The first lines in which two texts differ, without the blanks at their ends."""
    lines = zip_longest(expected.splitlines(), actual.splitlines(), fillvalue="")
    return next((first.strip(), second.strip()) for first, second in lines if first != second)


def _head_of(trained_by: checkpoint.MethodState | None, where: str) -> MakeHead:
    """What makes the hash layer of a network that the method trained; `where` is for an error."""
    if trained_by is None:
        return nn.Linear
    return methods.find(trained_by.name, where)(**trained_by.options).head


def _set_mean_and_std_of(network: HashNet, _: Any) -> None:
    """Give the buffers the dtype and the device of the parameters, which `load_state_dict(assign=True)` may change."""
    like = next(network.backbone.parameters(), None)  # None in FSDP1
    if like is not None and (like.device, like.dtype) != (network.mean.device, network.mean.dtype):
        network._set_mean_and_std(like)
