"""Small ResNets from blocks of torchvision or timm, small VGGs from layers of torchvision, and images for them."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

from tests.helpers.official import randomise

BLOCKS = [(library, block) for library in ("torchvision", "timm") for block in ("BasicBlock", "Bottleneck")]


def small_resnet(library: str = "torchvision", block: str = "BasicBlock", depth: int = 2, **options) -> nn.Module:
    """A network of two stages, each of `depth` blocks: [N, 3, H, W] to [N, 5]. `options` are passed to the blocks."""
    classes = pytest.importorskip(f"{library}.models.resnet")
    make = getattr(classes, block)
    torch.manual_seed(0)

    def stage(inputs: int, planes: int) -> nn.Module:
        outputs = planes * make.expansion
        downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, 2, bias=False), nn.BatchNorm2d(outputs))
        more = (make(outputs, planes, **options) for _ in range(depth - 1))
        return nn.Sequential(make(inputs, planes, 2, downsample, **options), *more)

    layers = OrderedDict(
        conv1=nn.Conv2d(3, 8, 3, padding=1),
        layer1=stage(8, 4),
        layer2=stage(4 * make.expansion, 8),
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        fc=nn.Linear(8 * make.expansion, 5),
    )
    return randomise(nn.Sequential(layers))


def small_vgg(normed: bool = False) -> nn.Module:
    """A network of two stages, each of two convolutions, built by torchvision: [N, 3, H, W] to [N, 5]."""
    vgg = pytest.importorskip("torchvision.models.vgg")
    torch.manual_seed(0)
    features = vgg.make_layers([8, 8, "M", 16, 16, "M"], batch_norm=normed)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)]
    return randomise(nn.Sequential(OrderedDict(features=features, classifier=nn.Sequential(*head))))


def images(size: int = 16, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Normal random images [2, 3, size, size]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, size, size, generator=generator, dtype=torch.float64).to(dtype)
