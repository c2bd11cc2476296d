"""Finding and reading image files."""

from __future__ import annotations

import contextlib
import os
import stat
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from hashengine._defaults import IMAGE_SUFFIXES, is_part
from hashengine._file_warnings import is_damage, named_warnings
from hashengine._pixels import correct_colours, encoding_of, to_8_bits
from hashengine._validation import as_integer, check_integer, check_path
from hashengine.errors import InputError, brief, invalid, shown, unusable

if TYPE_CHECKING:
    from torch import Tensor

# Formats that Pillow identifies, but that contain no image of pixels. It would run another program to draw EPS.
_WITHOUT_PIXELS = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")
# Images that Pillow does not identify, or not all of them: their formats, and the bytes from a position on that mark
# them.
_UNKNOWN_TO_PILLOW = (
    *(("HEIC", 4, b"ftyp" + brand) for brand in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1")),
    *(("AVIF", 4, b"ftyp" + brand) for brand in (b"avif", b"avis")),
    ("CR3", 4, b"ftypcrx "),
    ("JPEG XL", 0, b"\xff\x0a"),
    ("JPEG XL", 0, b"\0\0\0\x0cJXL "),
    *(("TIFF", 0, mark) for mark in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
    ("PSD", 0, b"8BPS"),
    ("PAM", 0, b"P7\n"),
    ("PFM", 0, b"PF\n"),
    ("OpenEXR", 0, b"v/1\x01"),
    ("Radiance HDR", 0, b"#?RADIANCE"),
    ("JPEG XR", 0, b"II\xbc\x01"),
    ("RAF", 0, b"FUJIFILMCCD-RAW"),
    *(("ORF", 0, mark) for mark in (b"IIRO", b"IIRS", b"MMOR")),
    ("RW2", 0, b"IIU\0"),
    ("XCF", 0, b"gimp xcf"),
)
_OF_MANY_KINDS = ("PSD", "TIFF")  # Pillow decodes some of their kinds
_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


class Unopened(NamedTuple):
    """A file or folder that cannot be read, with the reason."""

    path: Path
    reason: str


class FoundImages(NamedTuple):
    """What a folder contains, at any depth. Each list is sorted by path.

    Attributes:
        images: the image files. Reading one of them may still fail.
        others: files that are no images, and links to folders.
        unopened: files and folders that cannot be read, and what is never opened: pipes, sockets and devices.
    """

    images: list[Path]
    others: list[Path]
    unopened: list[Unopened]

    def describe_others(self, folder: str | os.PathLike[str]) -> str:
        """One line for a person: how many files in `folder` are no images."""
        count = len(self.others)
        files, are = ("file", "is no image") if count == 1 else ("files", "are no images")
        return f"skipped: {count} {files} in {os.fspath(folder)} {are}"


def find_images(folder: str | os.PathLike[str], where: str = "find_images") -> FoundImages:
    """Find the image files under `folder`, at any depth.

    A file whose name has one of `IMAGE_SUFFIXES` is taken for an image. The content of any other file decides whether
    it is one. Files and folders whose names begin with a dot are skipped. Links to files are followed. Links to folders
    are not followed, because they can form a loop.

    Raises:
        InputError: `folder` is no path, is missing, is not a folder, cannot be read, or holds no image; the error names
            `where`.
    """
    folder = check_path(where, "folder", folder)
    if not folder.is_dir():
        problem = f"which is {_kind(folder) or 'a file'}" if folder.exists() else "which is missing"
        raise invalid(where, "folder", "a folder of images", f"{str(folder)!r}, {problem}")
    found = FoundImages([], [], [])
    folders = [folder]
    while folders:
        parent = folders.pop()
        try:
            with os.scandir(parent) as listed:
                entries = [entry for entry in listed if not entry.name.startswith(".")]
        except OSError as error:
            if parent == folder:
                raise unusable(where, "folder", repr(str(folder)), error.strerror) from None
            found.unopened.append(Unopened(parent, str(error.strerror)))
            continue
        for entry in entries:
            path = Path(parent, entry.name)
            if entry.is_dir(follow_symlinks=False):
                folders.append(path)
            else:
                _classify(path, entry.is_file(follow_symlinks=False), found)
    if not found.images:
        actual = f"{str(folder)!r}, which holds none"
        if found.others or found.unopened:
            actual += f" among {len(found.others) + len(found.unopened)} files"
        raise invalid(where, "folder", "a folder with images", actual)
    return FoundImages(sorted(found.images), sorted(found.others), sorted(found.unopened))


def list_images(
    folder: str | os.PathLike[str], where: str = "list_images", warn: Callable[[str], None] | None = None
) -> list[Path]:
    """The image files under `folder`, as `find_images` finds them, if everything there can be opened.

    Args:
        folder: the folder.
        where: the function or command to name in an error.
        warn: called with one line if there are files that are no images.

    Raises:
        InputError: a file or a folder cannot be opened, or for the reasons of `find_images`.
    """
    found = find_images(folder, where)
    for path, reason in found.unopened:
        what = "folder" if os.path.isdir(path) else "file"
        raise InputError(f"{path}: the {what} must be readable, got {reason}")
    if warn is not None and found.others:
        warn(found.describe_others(folder))
    return found.images


def _classify(path: Path, is_regular: bool, found: FoundImages) -> None:
    """Append a path to a list of `found`. `is_regular`: it is known to be a file, not a link or a pipe."""
    try:
        kind = "" if is_regular else _kind(path)
        if kind == "a folder":  # behind a link
            found.others.append(path)
        elif kind:
            found.unopened.append(Unopened(path, kind))
        elif is_image(path):
            found.images.append(path)
        else:
            found.others.append(path)
    except OSError as error:  # such as a missing permission, or a link to a missing file
        found.unopened.append(Unopened(path, str(error.strerror)))


def _kind(path: Path) -> str:
    """What `path` is: "" for a file that can be opened without side effects, otherwise words such as "a socket"."""
    return _KINDS.get(stat.S_IFMT(os.stat(path).st_mode), "")


def is_image(path: Path) -> bool:
    """Whether `find_images` takes the file `path` for an image, even if only another program can decode it.

    Raises:
        OSError: the file cannot be opened.
    """
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return True
    with open(path, "rb") as file:
        if _unknown_format(file.read(16)):
            return True
        try:
            with named_warnings(str(path)) as warned, Image.open(file) as image:
                warned.clear()  # reading the image issues these warnings again
                return image.format not in _WITHOUT_PIXELS
        except Image.DecompressionBombError:  # an image that is too large; reading it gives the reason
            return True
        except Exception:  # decoders raise OSError, SyntaxError, ValueError and others
            return False


def _unknown_format(start: bytes) -> str:
    """The format of an image that Pillow may not know, by the first bytes of the file; "" for any other file."""
    return next((name for name, position, mark in _UNKNOWN_TO_PILLOW if start[position:].startswith(mark)), "")


def _is_decodable(start: bytes, known: str) -> bool:
    """Whether Pillow, or a plugin of it, decodes a file of the format `known` with these first bytes."""
    Image.init()
    for name, (_, accept) in Image.OPEN.items():
        if name == "AVIF" != known:  # Pillow's decoder of AVIF also looks at files of HEIC
            continue
        with contextlib.suppress(Exception):  # a function of a plugin
            if accept is not None and accept(start) is True:  # a text says what is missing to decode it
                return True
    return False


def _joined(reasons: list[str]) -> str:
    """The first three reasons in one line, and the number of the others."""
    shown, more = reasons[:3], len(reasons) - 3
    return "; ".join([*map(brief, shown), *([f"and {more} more"] if more > 0 else [])])


def _why_unidentified(start: bytes, warned: list[str]) -> str:
    """Why Pillow does not identify a file with these first bytes, by the warnings or the format."""
    known, reason, advice = _unknown_format(start), _joined(warned), "; convert it to JPEG or PNG"
    if not known:
        return reason or "another content"
    if known in _OF_MANY_KINDS:
        return reason or f"{known} that is damaged or of a kind that this Pillow cannot decode{advice}"
    if _is_decodable(start, known):
        return reason or f"a damaged {known}"
    return (reason or f"{known}, which this Pillow cannot decode") + advice


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Image.Image]:
    """Open an image file. Any exception while it is opened and in the block becomes an `InputError` with its name."""
    name = os.fspath(path)
    with named_warnings(name) as warned:
        try:
            if kind := _kind(Path(path)):
                raise InputError(f"{name}: the file must be a readable image, got {kind}")
            # Pillow maps uncompressed TIFF files that it opens by name, and scrambles those that it must turn.
            with open(path, "rb") as file, Image.open(file) as image:
                if image.format in _WITHOUT_PIXELS:
                    raise InputError(f"{name}: the file must be an image of pixels, got {image.format}")
                yield image
                if damage := list(filter(is_damage, warned)):  # Pillow may not raise an error
                    raise InputError(f"{name}: the file must be a readable image, got {_joined(damage)}")
        except InputError:
            raise
        except UnidentifiedImageError:
            with open(path, "rb") as file:
                start = file.read(16)
            reason = _why_unidentified(start, list(warned))
            raise InputError(f"{name}: the file must be a readable image, got {reason}") from None
        except Exception as error:  # decoders raise OSError, SyntaxError, ValueError and others on damaged files
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            reason = _joined([reason, *warned])
            raise InputError(f"{name}: the file must be a readable image, got {reason}") from error


def read_image(path: str | os.PathLike[str], mode: str = "RGB") -> Image.Image:
    """The image in the file `path`, decoded, turned upright by its EXIF orientation, in `mode` "RGB" or "L" (grey).

    The colours are those of sRGB; `hashengine._pixels.to_8_bits` describes how each mode of Pillow is converted. An
    animation gives its first frame. A warning of a decoder is issued with the name of the file. Several threads may
    call this function at the same time.

    A damaged file is refused where its format shows the damage: PNG by its checksums, others if their compressed data
    cannot be decoded. Zeros in the middle of a JPEG or WebP file, for example, can give other pixels without an error.

    Raises:
        InputError: `path` is no path, or `mode` is unknown; or the file is missing, truncated, not an image, a pipe or
            a device, has pixels out of range or of a kind that Pillow decodes to others, or has more pixels than
            Pillow's limit against decompression bombs, 2 * `PIL.Image.MAX_IMAGE_PIXELS`. The message then names the
            file.
    """
    if mode not in ("RGB", "L"):
        raise invalid("read_image", "mode", "'RGB' or 'L'", repr(mode))
    path = check_path("read_image", "path", path)
    name = os.fspath(path)
    with _opened(path) as image:
        if image.format == "PNG":
            with open(path, "rb") as file, Image.open(file) as checked:
                checked.verify()  # of the checksums; loading the pixels does not compare them
        correct_colours(image)
        encoding = encoding_of(image, name)
        return to_8_bits(_upright(image), mode, name, encoding)


def check_replaced_file(where: str, output: Path) -> None:
    """Require that the file at the end of all links of `output`, which would be replaced, may be lost.

    Raises:
        InputError: it is an image, or a part of codes, an index, a network or a split; the error names `where`.
    """
    target = Path(os.path.realpath(output))
    if target.is_file() and is_image(target):
        raise invalid(where, "output", "a file that is no image", f"{str(output)!r}, which would be replaced")
    if target.is_file() and is_part(target):
        expected, actual = "a file that is no part of codes, an index, a network or a split", repr(str(output))
        raise invalid(where, "output", expected, f"{actual}, which would be replaced", "choose another path")


def _upright(image: Image.Image) -> Image.Image:
    """The image, turned by its EXIF orientation. A damaged EXIF block is ignored with a warning."""
    image.load()  # so that an error below is not one of the pixels
    try:
        return ImageOps.exif_transpose(image)
    except Exception as error:  # Pillow raises SyntaxError and others
        warnings.warn(f"the EXIF orientation is ignored: {error}", stacklevel=2)
        return image


def read_header(path: str | os.PathLike[str]) -> tuple[str, tuple[int, int]]:
    """Pillow's mode and the size (width, height) of an image file, without decoding the pixels.

    Raises:
        InputError: `path` is no path, or the file is not an image, as for `read_image`.
    """
    with _opened(check_path("read_header", "path", path)) as image:
        return image.mode, image.size


def image_tensor(image: Image.Image, size: int, channels: int) -> Tensor:
    """A PIL image of any size and mode as uint8 [channels, size, size]: grey for 1 channel, RGB for 3.

    The mode is converted as by `read_image`. An image of another size is scaled until its shorter side is `size`
    pixels, then cropped around its centre.

    Raises:
        InputError: an argument is of another kind or out of range, the image has no pixels, or a pixel is out of range.
    """
    import torch

    if not isinstance(image, Image.Image):
        raise invalid("preprocess", "image", "a PIL image", type(image).__name__, "read_image opens a file")
    if 0 in image.size:
        raise invalid("preprocess", "image", "of at least one pixel", f"{image.width} x {image.height}")
    size = check_integer("preprocess", "size", size, 1)
    if as_integer(channels) not in (1, 3):
        raise invalid("preprocess", "channels", "1 or 3", shown(channels))
    correct_colours(image)
    image = to_8_bits(image, "L" if channels == 1 else "RGB", "preprocess")
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    pixels = np.array(image).reshape(size, size, channels)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def label_of(path: str | os.PathLike[str], root: str | os.PathLike[str]) -> str:
    """The class of the image `path`: the first folder below `root` on its path; "" if the image is directly in `root`.

    Raises:
        InputError: `path` is not under `root`, or one of them is no path.
    """
    path, root = check_path("label_of", "path", path), check_path("label_of", "root", root)
    try:
        parts = path.relative_to(root).parts
    except ValueError:
        raise invalid("label_of", "path", f"a file under {os.fspath(root)!r}", repr(os.fspath(path))) from None
    return parts[0] if len(parts) > 1 else ""
