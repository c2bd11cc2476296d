"""Finding and reading image files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

from hashengine.errors import InputError, invalid

if TYPE_CHECKING:
    from torch import Tensor

IMAGE_SUFFIXES = frozenset(
    {".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"}
)


def list_images(folder: str | os.PathLike[str], where: str = "list_images") -> list[Path]:
    """All image files under `folder`, at any depth, sorted by path. The suffix of a name decides, not the content.

    Files and folders whose names begin with a dot are skipped. Links to files are listed; links to folders are not
    followed, because they can form a loop.

    Raises:
        InputError: `folder` is missing, is not a folder, cannot be read, or holds no image; the error names `where`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        problem = "which is a file" if folder.exists() else "which is missing"
        raise invalid(where, "folder", "a folder of images", f"{str(folder)!r}, {problem}")

    def refuse(error: OSError) -> None:
        raise invalid(where, "folder", "readable", f"{error.filename!r}: {error.strerror}")

    images = []
    for parent, subfolders, names in os.walk(folder, onerror=refuse):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        images += [
            Path(parent, name)
            for name in names
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES
        ]
    if not images:
        expected = f"a folder with images ({', '.join(sorted(IMAGE_SUFFIXES))})"
        raise invalid(where, "folder", expected, f"{str(folder)!r}, which holds none")
    return sorted(images)


def read_image(path: str | os.PathLike[str], mode: str = "RGB") -> Image.Image:
    """The image in the file `path`, decoded, turned upright by its EXIF orientation, in `mode` "RGB" or "L" (grey).

    Transparent parts become white, 16-bit grey keeps its upper 8 bits, and an animation gives its first frame. Several
    threads may call this function at the same time.

    Raises:
        InputError: `mode` is unknown; or the file is missing, truncated, not an image, or larger than Pillow's limit
            against decompression bombs, 2 * `PIL.Image.MAX_IMAGE_PIXELS` pixels. The message then names the file.
    """
    if mode not in ("RGB", "L"):
        raise invalid("read_image", "mode", "'RGB' or 'L'", repr(mode))
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):  # 16-bit grey: convert() clips it to white instead of scaling it
                upright = Image.fromarray((np.asarray(upright).clip(0, 65535) >> 8).astype(np.uint8))
            if upright.has_transparency_data:
                upright = upright.convert("RGBA")
                upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
            return upright.convert(mode)
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError and others on damaged files
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise InputError(f"{os.fspath(path)}: the file must be a readable image, got {reason}") from error


def image_tensor(image: Image.Image, size: int, channels: int) -> Tensor:
    """A PIL image of any size and mode as uint8 [channels, size, size]: grey for 1 channel, RGB for 3.

    An image of another size is scaled until its shorter side is `size` pixels, then cropped around its centre.
    """
    import torch

    image = image.convert("L" if channels == 1 else "RGB")
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    pixels = np.array(image).reshape(size, size, channels)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def label_of(path: str | os.PathLike[str], root: str | os.PathLike[str]) -> str:
    """The class of the image `path`: the first folder below `root` on its path; "" if the image is directly in `root`.

    Raises:
        InputError: `path` is not under `root`.
    """
    try:
        parts = Path(path).relative_to(root).parts
    except ValueError:
        raise invalid("label_of", "path", f"a file under {os.fspath(root)!r}", repr(os.fspath(path))) from None
    return parts[0] if len(parts) > 1 else ""
