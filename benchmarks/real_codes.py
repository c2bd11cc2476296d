"""Codes of Fashion-MNIST's and CIFAR-10's images, learned by a small network of this project's own training."""

import io
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from benchmarks.codes import rare_bits
from hashengine import InputError
from hashengine.models import HashNet
from training.config import FitConfig
from training.data import Batches, LabelledImages
from training.loop import train

ARCHIVES = {"fashion-mnist": "fashion-mnist.tar.xz", "cifar10": "cifar10-jpeg.tar.xz"}
BUILD = Path("build/real-codes")
HALVINGS = 6  # of the probability with which a bit of a copy is flipped: 1/64

_NETWORK = {"attention": "none", "widths": (16, 32, 64), "batch_size": 128, "epochs": 3}  # about a minute on two cores


class LearnedCodes(NamedTuple):
    """Of the training images, which are searched, and of the test images, with their classes."""

    database: np.ndarray
    labels: np.ndarray
    queries: np.ndarray
    query_labels: np.ndarray


def learned(name: str, bits: int, folder: Path) -> LearnedCodes:
    """The codes of a data set's images, from the build folder or, the first time, from training.

    Args:
        name: of ARCHIVES. folder: where the archive is.
    """
    file = BUILD / f"{name}-{bits}.npz"
    if file.exists():
        with np.load(file) as arrays:
            return LearnedCodes(**arrays)
    archive = folder / ARCHIVES[name]
    if not archive.exists():
        raise InputError(f"data {name} needs {archive}; give its folder with --images")
    train_images, test_images = (_read_fashion_mnist if name == "fashion-mnist" else _read_cifar10)(archive)
    codes = _learn(train_images, test_images, bits)
    BUILD.mkdir(parents=True, exist_ok=True)
    np.savez(file, **codes._asdict())
    return codes


def tile(codes: np.ndarray, labels: np.ndarray, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """``count`` of them with their labels: first as they are, then again and again, each bit flipped in one of 64."""
    source = np.arange(count) % len(codes)
    tiled = codes[source]
    copies = tiled[len(codes) :]
    copies ^= rare_bits(copies.shape, HALVINGS, rng)
    return tiled, labels[source]


def _learn(images: LabelledImages, test_images: LabelledImages, bits: int) -> LearnedCodes:
    config = FitConfig(images=Path(), output=Path(), bits=bits, **_NETWORK)  # of folders none: all is in memory
    size = images.images.shape[-1]
    batches = Batches(images, config.batch_size, config.shift_for(size), config.flip, config.seed, torch.device("cpu"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = HashNet(config.network(images.classes, images.images.shape[1], size, *images.statistics()))
    train(model.train(), batches, config.epochs, config)
    return LearnedCodes(
        model.encode(images.images).numpy(),
        images.labels.numpy(),
        model.encode(test_images.images).numpy(),
        test_images.labels.numpy(),
    )


def _read_fashion_mnist(archive: Path) -> list[LabelledImages]:
    """The training and the test images; IDX files: 16 bytes, then pixels, and 8 bytes, then labels."""
    with tarfile.open(archive) as tar:
        content = {Path(member.name).name: tar.extractfile(member).read() for member in tar if member.isfile()}

    def values(name: str, header: int) -> torch.Tensor:
        return torch.from_numpy(np.frombuffer(content[name], np.uint8, offset=header).copy())

    classes = tuple("T-shirt Trouser Pullover Dress Coat Sandal Shirt Sneaker Bag Boot".split())
    return [
        LabelledImages(
            values(f"{part}-images-idx3-ubyte", 16).reshape(-1, 1, 28, 28),
            values(f"{part}-labels-idx1-ubyte", 8).long(),
            classes,
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
            torch.from_numpy(np.stack([pixels for _, pixels in pictures])).permute(0, 3, 1, 2).contiguous(),
            torch.tensor([classes.index(label) for label, _ in pictures]),
            classes,
        )
        for pictures in found.values()
    ]
