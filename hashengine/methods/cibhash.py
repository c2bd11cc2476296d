"""CIBHash: two augmented views of an image should have the same code, and codes of other images should differ.

Qiu, Su, Ou, Yu and Chen, "Unsupervised Hashing with Contrastive Information Bottleneck", IJCAI 2021. Unsupervised.

- Head: linear, ReLU, linear; the result is u. In the paper's model, `p = sigmoid(u)` is the probability that a bit is
  set. The code is the more probable value, `b = sign(p - 0.5) = sign(u)`, with a straight-through gradient.
- Loss: a contrastive loss plus `bottleneck_weight` times the information bottleneck. The contrastive loss is that of
  SimCLR (NT-Xent) on the codes of the 2N views of N images, with cosine similarities divided by the temperature. The
  bottleneck is the Kullback-Leibler divergence between the Bernoulli distributions of an image's two views: the mean of
  both directions, summed over the bits and averaged over the images. As in the authors' code, each direction has a
  gradient for its first distribution only; the second is constant.
- Straight-through gradient: the backward treats the sign as the identity and differentiates the sigmoid. Therefore
  `d b / d u = d p / d u`, as in the authors' code, which applies the sign to p.
- Defaults from the authors' code: temperature 0.3, bottleneck weight 0.001, 1,024 hidden units. The authors train only
  the head, with Adam (learning rate 0.001, batch of 64), on features of a frozen VGG16.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, logsigmoid, normalize

from hashengine._config import Config, Integer, Number
from hashengine.errors import invalid
from hashengine.methods.base import Batch, HashingMethod
from hashengine.ops._plain import without_autocast


class CibHashOptions(Config):
    """The options of CIBHash."""

    temperature: Annotated[
        Number, Field(gt=0, allow_inf_nan=False, description="divides the cosine similarities of the contrastive loss")
    ] = 0.3
    bottleneck_weight: Annotated[
        Number, Field(ge=0, allow_inf_nan=False, description="weight of the divergence between the two views")
    ] = 0.001
    hidden: Annotated[Integer, Field(gt=0, le=65_536, description="hidden units of the head")] = 1024


class CibHashMethod(HashingMethod):
    """CIBHash; its only parameters are those of the head."""

    name = "cibhash"
    Options = CibHashOptions
    options: CibHashOptions
    views = 2

    def head(self, dim: int, bits: int) -> nn.Module:
        """Two linear layers with a ReLU between them."""
        dim, bits = self.check_sizes(dim=dim, bits=bits)
        return nn.Sequential(nn.Linear(dim, self.options.hidden), nn.ReLU(), nn.Linear(self.options.hidden, bits))

    def loss(self, batch: Batch, step: int, epoch: int) -> dict[str, Tensor]:
        """The contrastive loss of the codes and the weighted bottleneck, in float32, or in float64 for float64.

        Autocast does not apply to them.

        Raises:
            InputError: the batch has no second view or one of another shape, or has only one image, which cannot be
                compared with others; or activations are not floating-point [N, bits].
        """
        if batch.second is None:
            raise invalid(self.name, "batch", "two views of each image", "one")
        self.check_activations(batch)
        shapes = [list(view.activations.shape) for view in (batch, batch.second)]
        if shapes[0] != shapes[1]:
            raise invalid(self.name, "the second view", f"of the shape of the first, {shapes[0]}", shapes[1])
        if len(batch.activations) < 2:
            raise invalid(self.name, "batch", "at least 2 images", len(batch.activations))
        with without_autocast(batch.activations):
            first, second = (_at_least_float32(u) for u in (batch.activations, batch.second.activations))
            contrastive = _contrastive(self.binarise(first), self.binarise(second), self.options.temperature)
            bottleneck = (_divergence(first, second.detach()) + _divergence(second, first.detach())) / 2
        return {"contrastive": contrastive, "bottleneck": self.options.bottleneck_weight * bottleneck}

    def binarise(self, u: Tensor) -> Tensor:
        """The sign of u, with the gradient of sigmoid(u).

        It is not computed as sign(sigmoid(u) - 0.5). That would be wrong for tiny negative u, whose sigmoid rounds to
        0.5.
        """
        p = torch.sigmoid(u)
        return torch.where(u >= 0, 1.0, -1.0).to(u.dtype) + (p - p.detach())  # p - p is zero and has p's gradient


def _at_least_float32(u: Tensor) -> Tensor:
    return u.to(torch.promote_types(u.dtype, torch.float32))


def _contrastive(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """NT-Xent (Chen et al., SimCLR, ICML 2020) of the codes [N, bits] of the first and the second views of N images.

    For each of the 2N views, it is the cross-entropy of choosing the same image's other view among the 2N - 1 others.
    """
    count = len(first)
    codes = normalize(torch.cat((first, second)), dim=1)
    similarities = codes @ codes.T / temperature
    similarities = similarities.masked_fill(torch.eye(2 * count, dtype=torch.bool, device=codes.device), -torch.inf)
    partner = torch.arange(2 * count, device=codes.device).roll(count)
    return cross_entropy(similarities, partner)


def _divergence(u: Tensor, other: Tensor) -> Tensor:
    """KL(Bernoulli(sigmoid(u)) || Bernoulli(sigmoid(other))), summed over bits and averaged over images.

    Computed from logarithms of the sigmoid, which stay finite even if a probability rounds to 0 or 1.
    """
    set_bit = torch.sigmoid(u) * (logsigmoid(u) - logsigmoid(other))
    clear_bit = torch.sigmoid(-u) * (logsigmoid(-u) - logsigmoid(-other))
    return (set_bit + clear_bit).sum(1).mean()
