"""Iterative quantisation (ITQ): principal components, rotated towards the corners of the hypercube. Unsupervised.

Gong and Lazebnik, "Iterative Quantization: A Procrustean Approach to Learning Binary Codes", CVPR 2011.

- Head: a linear layer that computes the activations `u = (x - mean) P R` of features x.
- Closed form: P [dim, bits] has the principal directions of the features as its columns, and `V = (x - mean) P`. R
  [bits, bits] is an orthogonal matrix with a small quantisation error `||sign(V R) - V R||^2`. R starts at random. Each
  iteration has two steps, and neither can increase the error. The first sets `B = sign(V R)`. The second sets R to the
  orthogonal matrix with the smallest `||B - V R||` (the Procrustes problem): `R = W U^T`, from the singular value
  decomposition `B^T V = U S W^T`.
- Defaults: 50 iterations, the usual number, and seed 0.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from hashengine._config import Config, Integer, Seed
from hashengine._validation import FLOATING, check_array, check_integer
from hashengine.errors import invalid
from hashengine.methods.base import HashingMethod


class ItqOptions(Config):
    """The options of ITQ."""

    iterations: Annotated[
        Integer, Field(ge=0, le=1_000_000, description="number of iterations that improve the rotation")
    ] = 50
    rotation_seed: Annotated[Seed, Field(description="seed of the initial random rotation")] = 0


class ItqMethod(HashingMethod):
    """ITQ; its only parameters are those of the head that `fit` returns.

    Attributes:
        errors: after `fit`, the mean squared quantisation error per bit before the first iteration and after each one.
    """

    name = "itq"
    Options = ItqOptions
    options: ItqOptions
    has_closed_form = True

    errors: list[float]

    @torch.no_grad()
    def fit(self, features: Tensor, bits: int) -> nn.Module:
        """The linear head that projects features to rotated principal components, computed from `features` [N, dim].

        The computation is in float64 on the features' device. The head has the features' dtype.

        Raises:
            InputError: the features are no floating-point tensor of at least 2 rows, are not finite or are so large
                that sums of their squares are not, or `bits` is below 1 or exceeds the rank that the centred features
                can have.
        """
        if not isinstance(features, Tensor):
            raise invalid(self.name, "features", "a torch tensor", type(features).__name__)
        check_array(self.name, "features", features, FLOATING)
        if features.dim() != 2 or len(features) < 2 or features.shape[1] == 0:
            raise invalid(self.name, "features", "[N, dim] with at least 2 rows", list(features.shape))
        count, dim = features.shape
        meaning = f"the rank of {count} centred features of dimension {dim}"
        bits = check_integer(self.name, "bits", bits, 1, min(count - 1, dim), meaning)
        if not bool(torch.isfinite(features).all()):
            raise invalid(self.name, "features", "finite", "NaN or infinity")
        wide = features.double()
        mean = wide.mean(0)
        centred = wide - mean
        covariance = centred.T @ centred
        if not bool(torch.isfinite(covariance).all()):
            raise invalid(self.name, "features", "finite, with finite sums of squares", "larger ones", "divide them")
        directions = torch.linalg.eigh(covariance).eigenvectors[:, -bits:]  # those of the largest eigenvalues
        components = centred @ directions

        generator = torch.Generator().manual_seed(self.options.rotation_seed)
        start = torch.linalg.qr(torch.randn(bits, bits, generator=generator, dtype=torch.float64, device="cpu")).Q
        rotation = start.to(features.device)
        self.errors = [_error(components @ rotation)]
        for _ in range(self.options.iterations):
            rotation = _procrustes(components, _sign(components @ rotation))
            self.errors.append(_error(components @ rotation))

        # skip_init leaves out the random initialisation, which would change the caller's random state.
        head = nn.utils.skip_init(nn.Linear, dim, bits, device=features.device, dtype=features.dtype)
        projection = directions @ rotation
        head.weight.copy_(projection.T)
        head.bias.copy_(-(mean @ projection))
        return head

    def figures(self) -> dict[str, float]:
        """The quantisation errors of the initial random rotation and of the rotation that `fit` found.

        Raises:
            InputError: `fit` was not called.
        """
        if not hasattr(self, "errors"):
            raise invalid(self.name, "the method", "fitted", "one that is not", "call fit first")
        return {"error_of_random_rotation": self.errors[0], "error": self.errors[-1]}


def _sign(x: Tensor) -> Tensor:
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


def _error(rotated: Tensor) -> float:
    """The mean squared distance per bit between the rotated components and their signs."""
    return float((_sign(rotated) - rotated).square().mean())


def _procrustes(components: Tensor, codes: Tensor) -> Tensor:
    """The orthogonal R that minimises `||codes - components R||`."""
    u, _, vh = torch.linalg.svd(codes.T @ components)
    return (u @ vh).T
