"""Reads a folder of class folders into one tensor, and makes random batches of shifted and mirrored images from it."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from hashengine import _progress
from hashengine._defaults import is_split
from hashengine._threads import thread_pool
from hashengine.errors import invalid
from hashengine.images import image_tensor, label_of, list_images, read_header, read_image

LARGEST_AUTOMATIC_SIZE = 64


class LabelledImages(NamedTuple):
    """N images in memory, with C channels and S pixels per side.

    Attributes:
        images: uint8 [N, C, S, S].
        labels: int64 [N], indices into `classes`.
        classes: the names of the classes.
        files_sha256: the `files_digest` of the image files; "" if the images come from elsewhere.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    files_sha256: str = ""

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel, for pixels scaled to 0..1, computed from a histogram in float64.

        The standard deviation is at least 1/255, so that it is not 0 even if all pixels are equal.
        """
        levels = torch.arange(256, dtype=torch.float64, device="cpu") / 255
        mean, std = [], []
        for channel in self.images.unbind(1):
            share = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
            mean.append(float(share @ levels))
            std.append(max(float(share @ (levels - mean[-1]) ** 2) ** 0.5, 1 / 255))
        return tuple(mean), tuple(std)


def list_classes(folder: Path, where: str = "fit") -> dict[str, list[Path]]:
    """The images of each class in a folder of class folders. Classes and images are sorted.

    Raises:
        InputError: an image is outside the class folders, a class folder has no image, there are fewer than two class
            folders, or `folder` is a split, whose two sides are no classes.
    """
    if is_split(folder):
        actual = f"{str(folder)!r}, which holds the sides of a split, 'database' and 'query'"
        raise invalid(where, "images", "in a folder of class folders", actual, "name one of its sides")
    images: dict[str, list[Path]] = {}
    for path in list_images(folder, where, _progress.note):
        images.setdefault(label_of(path, folder), []).append(path)
    if "" in images:
        raise invalid(where, "every image", "in a class folder", repr(str(images[""][0])), "move it to one")
    for subfolder in sorted(folder.iterdir()):
        if subfolder.name.startswith("."):
            continue
        if subfolder.is_symlink() and subfolder.is_dir() and subfolder.name not in images:
            expected = "a folder, because links to folders are not followed"
            raise invalid(where, "every class folder", expected, f"the link {str(subfolder)!r}")
        if subfolder.is_dir() and subfolder.name not in images:
            raise invalid(where, "every class folder", "non-empty", f"no image in {str(subfolder)!r}")
    if len(images) < 2:
        raise invalid(where, "images", "in at least two class folders", f"only {min(images)!r} in {str(folder)!r}")
    return dict(sorted(images.items()))


def files_digest(folder: Path, files: Iterable[Path]) -> str:
    """SHA-256 of the paths, relative to `folder`, and the sizes in bytes of `files`.

    It stays when the folder is moved or copied. It does not notice a file that another one of the same size has
    replaced.
    """
    lines = "\n".join(f"{path.relative_to(folder)} {path.stat().st_size}" for path in files)
    return hashlib.sha256(lines.encode(errors="surrogateescape")).hexdigest()


def load(folder: Path, image_size: int | None = None, where: str = "fit") -> LabelledImages:
    """Read a folder of class folders into memory.

    The first image of each class decides the format. The result has 1 channel if all of these images are grey,
    otherwise 3. If `image_size` is None, height and width are the longest among the shorter sides of these images, but
    at least 8 and at most 64 pixels.

    Args:
        folder: the folder of class folders.
        image_size: height and width of the result in pixels; by default chosen as above.
        where: the function or command to name in an error.

    Raises:
        InputError: an image cannot be read, or for the reasons of `list_classes`.
    """
    by_class = list_classes(folder, where)
    first = [read_header(paths[0]) for paths in by_class.values()]
    # Pillow's modes of grey images: "1" (black and white), "L", with alpha "LA" and "La", "F", "I", "I;16" and others.
    channels = 1 if all(mode in ("1", "L", "LA", "La", "F") or mode.startswith("I") for mode, _ in first) else 3
    size = image_size or min(LARGEST_AUTOMATIC_SIZE, max(8, *(min(size) for _, size in first)))
    digest = files_digest(folder, itertools.chain(*by_class.values()))
    return read_into_memory(by_class, channels, size)._replace(files_sha256=digest)


def read_into_memory(by_class: dict[str, list[Path]], channels: int, size: int) -> LabelledImages:
    """Read the images of each class as uint8 [N, channels, size, size], in the order of `by_class`."""
    paths = [path for paths in by_class.values() for path in paths]
    labels = torch.repeat_interleave(torch.tensor([len(paths) for paths in by_class.values()], device="cpu"))
    images = torch.empty(len(paths), channels, size, size, dtype=torch.uint8, device="cpu")

    def read(index: int) -> None:
        images[index] = image_tensor(read_image(paths[index], "L" if channels == 1 else "RGB"), size, channels)

    with thread_pool(os.cpu_count()) as pool:  # threads help, because decoding releases the interpreter's lock
        for _ in _progress.track(pool.map(read, range(len(paths))), "reading images", len(paths), "img"):
            pass
    return LabelledImages(images, labels, tuple(by_class))


class TrainingBatch(NamedTuple):
    """Augmented images and their labels.

    Attributes:
        views: for each augmentation, a tensor of the same images, uint8 [batch, C, S, S].
        labels: int64 [batch].
    """

    views: tuple[Tensor, ...]
    labels: Tensor


class Batches:
    """Random augmented batches. Each iteration over the object is one epoch.

    The same seed gives the same batches on every device. An incomplete last batch is left out, because its gradient
    would be noisier than that of a full batch, and because CIBHash cannot train on a batch of one image.

    Args:
        data: the images.
        batch_size: images per batch; limited to the number of images.
        shift: each image moves by up to this many pixels in each direction.
        flip: mirror each image with a probability of 1/2.
        seed: seed of the order and of the augmentation.
        device: the device of the images and the batches.
        views: the number of augmentations of each image in a batch.
    """

    def __init__(
        self,
        data: LabelledImages,
        batch_size: int,
        shift: int,
        flip: bool,
        seed: int,
        device: torch.device,
        views: int = 1,
    ):
        self.images, self.labels = data.images.to(device), data.labels.to(device)
        self.batch_size = min(batch_size, len(data.labels))
        self.shift, self.flip, self.views = shift, flip, views
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.labels) // self.batch_size

    def __iter__(self) -> Iterator[TrainingBatch]:
        order = torch.randperm(len(self.labels), generator=self.generator, device="cpu")
        for chosen in order[: len(self) * self.batch_size].split(self.batch_size):
            views = tuple(self._augmented(chosen) for _ in range(self.views))
            yield TrainingBatch(views, self.labels[chosen.to(self.labels.device)])

    def _augmented(self, chosen: Tensor) -> Tensor:
        """The chosen images, shifted and mirrored by one indexing operation. A shift repeats the border pixels."""
        channels, size = self.images.shape[1:3]
        pixel, bounds, shape = torch.arange(size, device="cpu"), (-self.shift, self.shift + 1), (len(chosen), 1)
        rows, columns = (
            (pixel + torch.randint(*bounds, shape, generator=self.generator, device="cpu")).clamp_(0, size - 1)
            for _ in range(2)
        )
        if self.flip:
            draws = torch.rand(shape, generator=self.generator, dtype=torch.float32, device="cpu")
            is_mirrored = draws < 0.5
            columns = torch.where(is_mirrored, columns.flip(1), columns)
        device = self.images.device
        return self.images[
            chosen.to(device)[:, None, None, None],
            torch.arange(channels, device=device)[:, None, None],
            rows.to(device)[:, None, :, None],
            columns.to(device)[:, None, None, :],
        ]
