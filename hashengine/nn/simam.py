"""SimAM as a layer."""

import torch
from torch import Tensor

from hashengine._validation import check_number
from hashengine.nn._layer import Layer
from hashengine.ops import simam


class SimAM(Layer):
    """Parameter-free attention, `hashengine.ops.simam`: [N, C, H, W] to the same shape and dtype.

    Its authors put it between the second convolution of a residual block and the BatchNorm that follows.

    Args:
        channels: ignored; accepted because `attach`, for example, calls `layer(channels)`.
        lam: the paper's lambda, above 0. The paper uses 1e-4 for CIFAR and 0.1 for ImageNet.
        device: ignored, because there are no parameters; accepted because timm passes it.
        dtype: ignored, like `device`.

    Raises:
        InputError: `lam` is not a number above 0.
    """

    def __init__(
        self,
        channels: int | None = None,
        *,
        lam: float = 1e-4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_number("SimAM", "lam", lam, above=0)
        self.lam = lam

    def forward(self, x: Tensor) -> Tensor:
        """Apply the attention to `x` [N, C, H, W]; the result has the same shape and dtype."""
        return simam(x, self.lam)

    def extra_repr(self) -> str:
        """The arguments that `repr` shows."""
        return f"lam={self.lam}"
