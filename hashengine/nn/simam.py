"""SimAM as a layer."""

import torch
from torch import Tensor

from hashengine._validation import check_number
from hashengine.nn._arguments import check_channels, check_factory_arguments
from hashengine.nn._layer import Layer
from hashengine.ops.simam import LEAST_LAM, simam


class SimAM(Layer):
    """Parameter-free attention, `hashengine.ops.simam`: [N, C, H, W] to the same shape and dtype.

    Its authors put it between the second convolution of a residual block and the BatchNorm that follows.

    Args:
        channels: a positive integer or None. It has no effect, and is accepted because `attach`, for example, calls
            `layer(channels)`.
        lam: the paper's lambda, a finite number of 1e-18 or more. The paper uses 1e-4 for CIFAR and 0.1 for ImageNet.
        device: a torch device or None. It has no effect, because there are no parameters; accepted because timm passes
            it.
        dtype: a floating torch dtype or None; it has no effect either.

    Raises:
        InputError: an argument is of another kind or out of range.
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
        where = type(self).__name__
        advice = f"lambda is a keyword: {where}(lam={channels})" if isinstance(channels, float) else ""
        check_channels(where, channels, advice)
        check_factory_arguments(where, device, dtype)
        self.lam = check_number(where, "lam", lam, least=LEAST_LAM)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the attention to `x` [N, C, H, W]; the result has the same shape and dtype."""
        return simam(x, self.lam)

    def extra_repr(self) -> str:
        """The arguments that `repr` shows."""
        return f"lam={self.lam}"
