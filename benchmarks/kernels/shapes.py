"""The shapes of the feature maps in well-known networks, at the places where `attach` puts triplet attention.

SimAM is measured on the same shapes. In ResNet50, however, `attach` puts SimAM after the second convolution of a block,
where the shapes are those of ResNet18. The model `head` has the shapes of the activations of a hash layer instead.
"""

import enum
from dataclasses import dataclass, field


class Model(str, enum.Enum):
    """The networks; `cifar` is ResNet18 for 32 px images, `head` the activations of a hash layer."""

    resnet18 = "resnet18"
    resnet50 = "resnet50"
    vgg16 = "vgg16"
    cifar = "cifar"
    head = "head"


@dataclass(frozen=True)
class _Layers:
    features: tuple[tuple[int, ...], ...]  # shapes of one sample
    batches: tuple[int, ...]
    gpu_batches: tuple[int, ...] = ()  # on a GPU, these batches are measured too


_IMAGENET_BATCHES = {"batches": (1, 32), "gpu_batches": (128,)}
_LAYERS = {
    # For images of 224 px: the end of a residual branch in each stage, or the last convolution of each stage of VGG.
    Model.resnet18: _Layers(((64, 56, 56), (128, 28, 28), (256, 14, 14), (512, 7, 7)), **_IMAGENET_BATCHES),
    Model.resnet50: _Layers(((256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7)), **_IMAGENET_BATCHES),
    Model.vgg16: _Layers(
        ((64, 224, 224), (128, 112, 112), (256, 56, 56), (512, 28, 28), (512, 14, 14)), **_IMAGENET_BATCHES
    ),
    # For images of 32 px, with the stem that is usual for CIFAR.
    Model.cifar: _Layers(((64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)), (128,)),
    # The activations of one image, of a batch, and of a data set.
    Model.head: _Layers(((16,), (64,), (128,)), (1, 128, 65536)),
}


@dataclass
class Workload:
    """A shape, and the networks and batches in which it occurs: "resnet50 x 32" is ResNet50 with a batch of 32."""

    shape: tuple[int, ...]
    models: list[str] = field(default_factory=list)


def workloads(models: list[Model], batches: list[int] | None, *, gpu: bool) -> list[Workload]:
    """The shapes of the networks. A shape that several networks share is listed once.

    Args:
        models: the networks.
        batches: the batch sizes for all networks; None for each network's own.
        gpu: include the batches that are measured only on a GPU.
    """
    found: dict[tuple[int, ...], Workload] = {}
    for model in models:
        layers = _LAYERS[model]
        for batch in batches or [*layers.batches, *(layers.gpu_batches if gpu else ())]:
            for features in layers.features:
                shape = (batch, *features)
                found.setdefault(shape, Workload(shape)).models.append(f"{model.value} x {batch}")
    return list(found.values())
