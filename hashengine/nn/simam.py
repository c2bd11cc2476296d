"""SimAM as a layer."""

from torch import Tensor, nn

from hashengine.ops import simam


class SimAM(nn.Module):
    """Parameter-free attention, :func:`hashengine.ops.simam`: [N, C, H, W] to the same shape and dtype.

    The authors put it after the 3 x 3 convolution of a residual block, before its BatchNorm.

    Args:
        channels: taken and ignored, so that factories which build ``layer(channels)`` can call it.
        lam: the paper's lambda, above 0: 1e-4 for CIFAR, 0.1 for ImageNet.
        device, dtype: taken and ignored too, as there are no parameters; timm passes them.
    """

    def __init__(self, channels: int | None = None, *, lam: float = 1e-4, device=None, dtype=None):
        super().__init__()
        if not lam > 0:
            raise ValueError(f"SimAM: lam must be above 0, got {lam}")
        self.lam = lam

    def forward(self, x: Tensor) -> Tensor:
        return simam(x, self.lam)

    def extra_repr(self) -> str:
        return f"lam={self.lam}"
