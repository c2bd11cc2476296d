"""Finding and reading image files: the one place where the library meets pictures that users bring."""

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from hashengine.errors import InputError

IMAGE_SUFFIXES = frozenset(
    {".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"}
)


def list_images(folder: str | os.PathLike) -> list[Path]:
    """All image files under `folder`, at any depth, sorted by path; told apart by their suffix, not by their content.

    Names that begin with a dot are skipped, folders included. Links to files are listed; links to folders are not
    followed, so that a loop of links cannot trap the walk.

    Raises:
        InputError: `folder` is missing, is no folder, cannot be read, or holds no image.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(
            f"folder: expected a folder of images, got {str(folder)!r}, which is "
            + ("a file" if folder.exists() else "missing")
        )

    def refuse(error: OSError) -> None:
        raise InputError(f"folder: cannot read {error.filename!r}: {error.strerror}")

    images = []
    for parent, subfolders, names in os.walk(folder, onerror=refuse):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        images += [
            Path(parent, name)
            for name in names
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES
        ]
    if not images:
        raise InputError(
            f"folder: expected images under {str(folder)!r}, found no file named like one "
            f"({', '.join(sorted(IMAGE_SUFFIXES))})"
        )
    return sorted(images)


def read_image(path: str | os.PathLike, mode: str = "RGB") -> Image.Image:
    """The image in the file `path`, fully decoded, turned upright as its EXIF data say, in `mode` "RGB" or "L" (grey).

    Transparent parts become white, 16-bit grey keeps its upper 8 bits, an animation gives its first frame. Safe to call
    from several threads.

    Raises:
        InputError: the file is missing, truncated, no image, or declares more pixels than Pillow's limit against
            decompression bombs (2 * `PIL.Image.MAX_IMAGE_PIXELS`); the message names the file.
    """
    if mode not in ("RGB", "L"):
        raise InputError(f"mode: expected 'RGB' or 'L', got {mode!r}")
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):  # 16-bit grey, which convert() would clip to white instead of scaling
                upright = Image.fromarray((np.asarray(upright).clip(0, 65535) >> 8).astype(np.uint8))
            if upright.has_transparency_data:
                upright = upright.convert("RGBA")
                upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
            return upright.convert(mode)
    except Exception as error:  # on damaged bytes decoders raise what they please: OSError, SyntaxError, ...
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise InputError(f"cannot read image {os.fspath(path)!r}: {reason}") from error


def image_tensor(image: Image.Image, size: int, channels: int) -> torch.Tensor:
    """A PIL image of any size and mode -> uint8 [channels, size, size], grey where `channels` is 1, RGB where it is 3.

    An image of another shape is scaled until its shorter side fits, then cropped around its centre.
    """
    image = image.convert("L" if channels == 1 else "RGB")
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    pixels = np.array(image).reshape(size, size, channels)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def label_of(path: str | os.PathLike, root: str | os.PathLike) -> str:
    """The class of the image `path` in `root`, a folder of class folders: the first folder below `root`.

    An image that lies directly in `root` has no class: the empty string.

    Raises:
        InputError: `path` does not lie under `root`.
    """
    try:
        parts = Path(path).relative_to(root).parts
    except ValueError:
        raise InputError(f"path: expected a file under {os.fspath(root)!r}, got {os.fspath(path)!r}") from None
    return parts[0] if len(parts) > 1 else ""
