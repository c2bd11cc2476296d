"""A small residual network (He et al., CVPR 2016) for small images, with optional attention in every block."""

from __future__ import annotations

from torch import Tensor, nn

from hashengine.nn import SimAM, TripletAttention


class ResidualBlock(nn.Module):
    """A residual block: conv - BN - ReLU - conv - BN, plus the shortcut, then ReLU.

    It maps [N, inputs, H, W] to [N, outputs, H / stride, W / stride], rounded up. Attention goes where its authors put
    it: SimAM between the second convolution and its BN (Yang et al., ICML 2021), triplet attention at the end of the
    residual branch (Misra et al., WACV 2021).
    """

    def __init__(self, inputs: int, outputs: int, stride: int, attention: str):
        super().__init__()
        branch: list[nn.Module] = [
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        ]
        if attention == "simam":
            branch.insert(4, SimAM(outputs))  # before the second BN
        elif attention == "triplet":
            branch.append(TripletAttention(outputs))
        self.branch = nn.Sequential(*branch)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Add the residual branch and the shortcut, and apply the activation."""
        return self.activation(self.branch(x) + self.shortcut(x))


class SmallResNet(nn.Sequential):
    """A stem, one residual block per stage, and global average pooling: [N, channels, H, W] -> [N, features]."""

    def __init__(self, channels: int, widths: tuple[int, ...], stem_stride: int, attention: str):
        stem = nn.Sequential(
            nn.Conv2d(channels, widths[0], 3, stem_stride, 1, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(inplace=True),
        )
        inputs = (widths[0], *widths)
        stages = [
            ResidualBlock(inputs[i], width, stride=1 if i == 0 else 2, attention=attention)
            for i, width in enumerate(widths)
        ]
        super().__init__(stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.features = widths[-1]
