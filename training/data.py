"""A folder of class folders as one tensor in memory, and batches of it, shifted and flipped at random."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from hashengine.errors import InputError
from hashengine.images import image_tensor, label_of, list_images, read_image

LARGEST_AUTOMATIC_SIZE = 64


class LabelledImages(NamedTuple):
    """images: uint8 [N, C, S, S]; labels: int64 [N], indices into `classes`."""

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel, of pixels scaled to 0..1; exact, from the pixels' histogram."""
        levels = torch.arange(256, dtype=torch.float64) / 255
        mean, std = [], []
        for channel in self.images.unbind(1):
            share = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
            mean.append(float(share @ levels))
            std.append(max(float(share @ (levels - mean[-1]) ** 2) ** 0.5, 1 / 255))  # images may be of one colour
        return tuple(mean), tuple(std)


def list_classes(folder: Path) -> dict[str, list[Path]]:
    """The images of each class in a folder of class folders, classes and images sorted.

    Raises:
        InputError: an image lies beside the class folders, a class folder holds none, or there are fewer than two.
    """
    images: dict[str, list[Path]] = {}
    for path in list_images(folder):
        images.setdefault(label_of(path, folder), []).append(path)
    if "" in images:
        raise InputError(f"images: expected every image in a class folder, got {str(images[''][0])!r}: move it to one")
    for subfolder in sorted(folder.iterdir()):
        if subfolder.is_dir() and not subfolder.name.startswith(".") and subfolder.name not in images:
            raise InputError(f"images: expected an image in every class folder, got none in {str(subfolder)!r}")
    if len(images) < 2:
        raise InputError(f"images: expected at least two class folders in {str(folder)!r}, got only {min(images)!r}")
    return dict(sorted(images.items()))


def load(folder: Path, image_size: int | None = None) -> LabelledImages:
    """Read a folder of class folders into memory.

    The first image of each class tells what they are like: grey images stay so, and without an `image_size` small ones
    keep their size, while larger ones are scaled to 64 pixels.
    """
    by_class = list_classes(folder)
    first = [read_header(paths[0]) for paths in by_class.values()]
    channels = 1 if all(mode in ("1", "L") or mode.startswith("I") for mode, _ in first) else 3
    size = image_size or min(LARGEST_AUTOMATIC_SIZE, max(8, *(min(size) for _, size in first)))

    paths = [path for paths in by_class.values() for path in paths]
    labels = torch.repeat_interleave(torch.tensor([len(paths) for paths in by_class.values()]))
    images = torch.empty(len(paths), channels, size, size, dtype=torch.uint8)

    def read(index: int) -> None:
        images[index] = image_tensor(read_image(paths[index], "L" if channels == 1 else "RGB"), size, channels)

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding releases the interpreter's lock
        for _ in tqdm(
            pool.map(read, range(len(paths))), "reading images", len(paths), unit="img", leave=False, disable=None
        ):
            pass
    return LabelledImages(images, labels, tuple(by_class))


def read_header(path: Path) -> tuple[str, tuple[int, int]]:
    """Mode and size of an image file, without decoding it."""
    try:
        with Image.open(path) as image:
            return image.mode, image.size
    except Exception:
        read_image(path)  # says what is wrong, in one line
        raise


class Batches:
    """Endless epochs of random batches, augmented; the same seed gives the same batches on every device.

    An epoch leaves out the last, incomplete batch: its gradient would be noisier, and batch statistics of one image
    do not exist. Iterating gives `(images uint8 [batch, C, S, S], labels int64 [batch])`.
    """

    def __init__(self, data: LabelledImages, batch_size: int, shift: int, flip: bool, seed: int, device: torch.device):
        self.images, self.labels = data.images.to(device), data.labels.to(device)
        self.batch_size = min(batch_size, len(data.labels))
        self.shift, self.flip = shift, flip
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.labels) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.labels), generator=self.generator)
        for chosen in order[: len(self) * self.batch_size].split(self.batch_size):
            yield self._augmented(chosen), self.labels[chosen.to(self.labels.device)]

    def _augmented(self, chosen: Tensor) -> Tensor:
        """One gather picks the images, moves and mirrors them; pixels that enter repeat the border."""
        channels, size = self.images.shape[1:3]
        pixel = torch.arange(size)
        rows, columns = (
            (pixel + torch.randint(-self.shift, self.shift + 1, (len(chosen), 1), generator=self.generator)).clamp_(
                0, size - 1
            )
            for _ in range(2)
        )
        if self.flip:
            mirrored = torch.rand(len(chosen), 1, generator=self.generator) < 0.5
            columns = torch.where(mirrored, columns.flip(1), columns)
        device = self.images.device
        return self.images[
            chosen.to(device)[:, None, None, None],
            torch.arange(channels, device=device)[:, None, None],
            rows.to(device)[:, None, :, None],
            columns.to(device)[:, None, None, :],
        ]
