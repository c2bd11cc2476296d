"""The hash network: backbone, hash layer, greedy sign, classifier; and its way from an image to packed bits."""

import os
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from hashengine import ops
from hashengine.errors import InputError
from hashengine.images import image_tensor
from hashengine.models import checkpoint
from hashengine.models.config import HashNetConfig
from hashengine.models.resnet import SmallResNet
from hashengine.nn import GreedyHash


class HashOutput(NamedTuple):
    """What `HashNet` computes for N images.

    Attributes:
        u: [N, bits], the hash layer's activations; bit i of a code is set where `u[:, i] >= 0`.
        b: [N, bits], their greedy sign, -1 or +1; gradients pass straight through to `u`.
        penalty: scalar, the quantisation penalty of `u`, already weighted by `alpha`.
        logits: [N, classes], the classifier on `b`.
    """

    u: Tensor
    b: Tensor
    penalty: Tensor
    logits: Tensor


class HashNet(nn.Module):
    """A network that hashes images to `config.bits` bits, by GreedyHash (Su et al., NeurIPS 2018).

    Its training loss is `cross_entropy(out.logits, labels) + out.penalty`: the classifier sees the bits alone, so that
    images of one class are driven to one code.
    """

    def __init__(self, config: HashNetConfig):
        super().__init__()
        self.config = config
        self.backbone = SmallResNet(config.channels, config.widths, config.stem_stride, config.attention)
        self.hash_layer = nn.Linear(self.backbone.features, config.bits)
        self.greedy_hash = GreedyHash(config.alpha)
        self.classifier = nn.Linear(config.bits, len(config.classes), bias=False)
        for name in ("mean", "std"):  # not persistent: they are in the config, once
            self.register_buffer(name, torch.tensor(getattr(config, name)).reshape(1, -1, 1, 1), persistent=False)
        self.to(memory_format=torch.channels_last)  # the faster layout for these convolutions, by a quarter on CPUs

    @property
    def device(self) -> torch.device:
        return self.mean.device

    def hash_activations(self, images: Tensor) -> Tensor:
        """uint8 images [N, channels, image_size, image_size] -> the hash layer's activations u [N, bits]."""
        self._check_images(images)
        x = (images.to(self.mean.dtype) / 255 - self.mean) / self.std
        return self.hash_layer(self.backbone(x))

    def forward(self, images: Tensor) -> HashOutput:
        """Hash uint8 images [N, channels, image_size, image_size], as `preprocess` makes them."""
        u = self.hash_activations(images)
        b, penalty = self.greedy_hash(u)
        return HashOutput(u, b, penalty, self.classifier(b))

    def preprocess(self, image: Image.Image) -> Tensor:
        """A PIL image of any size and mode -> uint8 [channels, image_size, image_size], by `images.image_tensor`."""
        return image_tensor(image, self.config.image_size, self.config.channels)

    @torch.inference_mode()
    def encode(self, images: Tensor, batch_size: int = 512) -> Tensor:
        """Hash uint8 images [N, channels, image_size, image_size] to packed codes, uint8 [N, bits/8] on their device.

        Runs in evaluation mode, on the model's device, `batch_size` images at a time; the mode is put back afterwards.

        Raises:
            InputError: `images` have another type or shape, or a batch's activations are not finite.
        """
        self._check_images(images)
        codes = torch.empty(len(images), self.config.bits // 8, dtype=torch.uint8, device=images.device)
        was_training = self.training
        self.eval()
        try:
            for start in range(0, len(images), batch_size):
                batch = slice(start, start + batch_size)
                u = self.hash_activations(images[batch].to(self.device))
                if not torch.isfinite(u).all():
                    raise InputError(
                        "images: expected finite activations, got NaN or infinity from the hash layer "
                        f"for images {start} to {start + len(u) - 1}: the weights are damaged, train the model anew"
                    )
                codes[batch] = ops.pack_bits(u).to(codes.device)
        finally:
            self.train(was_training)
        return codes

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write config.json and model.safetensors into `folder`; a failure leaves an earlier save whole."""
        checkpoint.save(Path(folder), self.config, self.state_dict())

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike) -> "HashNet":
        """The model that `save_pretrained` wrote into `folder`, on the CPU, in evaluation mode.

        Raises:
            InputError: a file is missing, truncated, foreign or of another save; the message names it.
        """
        config, weights = checkpoint.load(Path(folder))
        model = cls(config)
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{Path(folder, checkpoint.WEIGHTS_FILE)}: does not fit config.json: {reason}") from None
        return model.eval()

    def _check_images(self, images: Tensor) -> None:
        expected = (self.config.channels, self.config.image_size, self.config.image_size)
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1:] != expected:
            raise InputError(
                f"images: expected uint8 [N, {', '.join(map(str, expected))}], "
                f"got {str(images.dtype).removeprefix('torch.')} {list(images.shape)}: see HashNet.preprocess"
            )
