"""Codes that a small network learns from the images of Fashion-MNIST or CIFAR-10, trained by hashengine itself."""

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.search.synthetic_codes import Codes
from hashengine.errors import invalid
from hashengine.training import FitConfig
from hashengine.training.data import Batches, LabelledImages
from hashengine.training.loop import build, train

ARCHIVES = {"fashion-mnist": "fashion-mnist.tar.xz", "cifar10": "cifar10-jpeg.tar.xz"}
CACHE = Path("build/real-codes")

_IMAGES_HEADER_BYTES, _LABELS_HEADER_BYTES = 16, 8  # in files of the IDX format
_FASHION_CLASSES = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Boot")
# The network is small and the epochs are few, so that training is short.
_OPTIONS: dict[str, Any] = {"attention": "none", "widths": (16, 32, 64), "batch_size": 128, "epochs": 3}


def is_available(name: str, bits: int, images: Path | None) -> bool:
    """Whether `load` can be called: either a folder is given, or the codes are in the cache."""
    return images is not None or _cache_file(name, bits).exists()


def load(name: str, bits: int, images: Path | None) -> Codes:
    """The codes of a data set: the training images are the database, the test images the queries.

    The first call trains a network and stores its codes in `CACHE`; later calls read them.

    Args:
        name: a key of `ARCHIVES`.
        bits: the length of a code.
        images: the folder of the archive; not needed if the codes are in the cache.
    """
    file = _cache_file(name, bits)
    if file.exists():
        with np.load(file) as arrays:
            return Codes(**arrays)
    archive = (images or Path()) / ARCHIVES[name]
    if not archive.exists():
        raise invalid("hamming", "images", f"a folder with {archive.name}, for {name}", repr(str(images)))
    train_images, test_images = (_read_fashion_mnist if name == "fashion-mnist" else _read_cifar10)(archive)
    codes = _learn(train_images, test_images, bits)
    CACHE.mkdir(parents=True, exist_ok=True)
    np.savez(file, **codes._asdict())
    return codes


def _cache_file(name: str, bits: int) -> Path:
    return CACHE / f"{name}-{bits}.npz"


def _learn(images: LabelledImages, test_images: LabelledImages, bits: int) -> Codes:
    config = FitConfig(images=Path(), output=Path(), bits=bits, **_OPTIONS)  # no folders: all data is in memory
    network, method = build(config, images)
    shift = config.shift_for(images.images.shape[-1])
    batches = Batches(images, config.batch_size, shift, config.flip, config.seed, torch.device("cpu"))
    train(network.train(), method, batches, config.epochs_for(len(images.labels)), config)
    return Codes(
        database=network.encode(images.images).numpy(),
        queries=network.encode(test_images.images).numpy(),
        labels=images.labels.numpy(),
        query_labels=test_images.labels.numpy(),
    )


def _read_fashion_mnist(archive: Path) -> list[LabelledImages]:
    """The training and the test images, from IDX files."""
    with tarfile.open(archive) as tar:
        content = {Path(member.name).name: tar.extractfile(member).read() for member in tar if member.isfile()}

    def values(name: str, header_bytes: int) -> torch.Tensor:
        return torch.from_numpy(np.frombuffer(content[name], np.uint8, offset=header_bytes).copy())

    return [
        LabelledImages(
            values(f"{part}-images-idx3-ubyte", _IMAGES_HEADER_BYTES).reshape(-1, 1, 28, 28),
            values(f"{part}-labels-idx1-ubyte", _LABELS_HEADER_BYTES).long(),
            _FASHION_CLASSES,
        )
        for part in ("train", "t10k")
    ]


def _read_cifar10(archive: Path) -> list[LabelledImages]:
    """The training and the test images, from <part>/<class>/<image>.jpg."""
    found: dict[str, list[tuple[str, np.ndarray]]] = {"train": [], "test": []}
    with tarfile.open(archive) as tar:
        for member in tar:
            path = Path(member.name)
            if path.suffix == ".jpg":
                pixels = np.asarray(Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGB"))
                found[path.parts[-3]].append((path.parts[-2], pixels))
    classes = tuple(sorted({label for label, _ in found["train"]}))
    return [
        LabelledImages(
            torch.from_numpy(np.stack([pixels for _, pixels in images])).permute(0, 3, 1, 2).contiguous(),
            torch.tensor([classes.index(label) for label, _ in images]),
            classes,
        )
        for images in found.values()
    ]
