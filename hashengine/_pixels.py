"""Converts images of every mode of Pillow to 8-bit grey or RGB, and their colours to sRGB."""

from __future__ import annotations

import io
import warnings
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImagePalette
from PIL.GifImagePlugin import GifImageFile
from PIL.IcoImagePlugin import IcoImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PsdImagePlugin import PsdImageFile
from PIL.TiffImagePlugin import TiffImageFile

from hashengine.errors import invalid

_PSD_CHANNELS, _PSD_COLOURS = 12, 26  # places in the file: the number of channels, and the length of the colours
_PNG = b"\x89PNG\r\n\x1a\n"  # the first bytes of a PNG file
_PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}  # and the modes with the same bands that Pillow can convert
# For each colour space of a profile: the mode of its pixels, and the modes that Pillow converts to it without loss.
_SPACES = {
    "GRAY": ("L", ("1", "L")),
    "RGB": ("RGB", ("1", "L", "P", "RGB", "RGBX", "YCbCr", "HSV")),
    "CMYK": ("CMYK", ("CMYK",)),
    "Lab": ("LAB", ("LAB",)),
}


# Tags of TIFF files.
_BITS_PER_SAMPLE, _PHOTOMETRIC, _FILL_ORDER, _SAMPLES_PER_PIXEL, _PLANES = 258, 262, 266, 277, 284
_COLOUR_MAP, _SAMPLE_FORMAT, _SUBSAMPLING = 320, 339, 530
_WHITE_IS_ZERO, _YCBCR = 0, 6
_SCALES = {"L;2": 85, "L;4": 17}  # the raw modes of PNG files whose grey levels Pillow scales to 0 to 255


class Encoding(NamedTuple):
    """What a file says of its pixels beside Pillow's mode.

    Attributes:
        is_16_bit: whether mode "I" means grey of 16 bits.
        grey_bits: the number of bits that hold the grey levels in a mode that begins with "I;16".
        is_negative: whether 0 is white, and Pillow does not invert the pixels: some of 1 bit or of more than 8 bits.
        covered: the part of the image (left, upper, right, lower) that the file has pixels of; None for all of it.
        is_opaque: whether Pillow's alpha channel is something else in the file, such as padding.
    """

    is_16_bit: bool = False
    grey_bits: int = 16
    is_negative: bool = False
    covered: tuple[int, int, int, int] | None = None
    is_opaque: bool = False


def encoding_of(image: Image.Image, where: str) -> Encoding:
    """The encoding of an image that `PIL.Image.open` returned, before or after its pixels are loaded.

    Raises:
        InputError: it is a file of a kind that Pillow decodes to other pixels; the error names `where`.
    """
    expected, advice = "those that Pillow decodes", "save the image as PNG"
    if image.format == "FITS" and image.mode.startswith("I;16"):
        raise invalid(where, "pixels", expected, "those of 16 bits in a FITS file", advice)
    if image.format == "SUN" and _number_at(image, 12, 4) == 32:
        raise invalid(where, "pixels", expected, "those of 32 bits in a Sun raster file", advice)
    if isinstance(image, PsdImageFile) and image.tile and image.tile[0][0] == "packbits":
        if (_number_at(image, _PSD_CHANNELS, 2) or 0) > len(image.getbands()):
            raise invalid(where, "pixels", expected, "compressed ones with more channels in a PSD file", advice)
    if not isinstance(image, TiffImageFile):
        return Encoding(
            is_16_bit=image.format in ("PNG", "PPM"),
            is_negative=image.mode == "1" and image.format in ("PSD", "XBM"),  # a set bit is black
            covered=_covered_by_first_frame(image) if isinstance(image, GifImageFile) else None,
            is_opaque=image.mode == "RGBA"
            and any(
                has_none(image)
                for has_none in (_is_tga_without_alpha, _is_psd_without_transparency, _is_ico_without_alpha)
            ),
        )
    tags = image.tag_v2
    bits, formats = tags.get(_BITS_PER_SAMPLE, (1,)), tags.get(_SAMPLE_FORMAT, (1,))
    is_compressed = image.info.get("compression", "raw") != "raw"
    kind = None
    if tags.get(_PLANES, 1) == 2 and tags.get(_SAMPLES_PER_PIXEL, 1) > 1:
        if not is_compressed and (set(bits) != {8} or tags.get(_FILL_ORDER, 1) != 1):
            kind = f"uncompressed ones of {bits[0]} bits in separate planes"
        elif image.mode in ("LA", "La", "PA", "LAB"):
            kind = f"those of mode {image.mode} in separate planes"
    if image.mode in ("F", "I") and tags.prefix == b"MM" and is_compressed:
        kind = f"compressed ones of {bits[0]} bits, most significant byte first"
    if tags.get(_PHOTOMETRIC) == _YCBCR and not is_compressed and tags.get(_SUBSAMPLING, (2, 2)) != (1, 1):
        kind = "uncompressed YCbCr with subsampling"
    if 2 in formats and 8 in bits:
        kind = "signed ones of 8 bits"
    if kind is not None:
        raise invalid(where, "pixels", expected, f"{kind} in a TIFF file", advice)
    is_deep = image.mode == "F" or image.mode.startswith("I")
    return Encoding(
        grey_bits=12 if bits == (12,) else 16, is_negative=is_deep and tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO
    )


def _covered_by_first_frame(image: GifImageFile) -> tuple[int, int, int, int] | None:
    """The part of a GIF image that its first frame covers; None if that is all or the rest has a transparent colour."""
    extent: tuple[int, int, int, int] | None = image.dispose_extent
    if image.tell() > 0 or "transparency" in image.info or extent == (0, 0, *image.size):
        return None
    return extent


def _is_tga_without_alpha(image: Image.Image) -> bool:
    """Whether the header of a TGA file says that no bits of a pixel are alpha."""
    return image.format == "TGA" and (_number_at(image, 17, 1) or 0) & 15 == 0 and _number_at(image, 16, 1) == 32


def _is_psd_without_transparency(image: Image.Image) -> bool:
    """Whether the fourth channel of a PSD file is a saved selection: the number of layers is not negative."""
    if image.format != "PSD":
        return False
    start = _PSD_COLOURS
    for _ in range(2):  # the colours and the resources
        length = _number_at(image, start, 4)
        if length is None:
            return False
        start += 4 + length
    layers = _number_at(image, start + 8, 2) if _number_at(image, start, 4) else 0
    return layers is not None and layers < 1 << 15


def _is_ico_without_alpha(image: Image.Image) -> bool:
    """Whether the alpha of an ICO file is 0 in every pixel: the padding of writers that know no alpha. PNG has none."""
    if not isinstance(image, IcoImageFile) or image.getchannel("A").getextrema() != (0, 0):
        return False
    frame = image.ico.entry[image.ico.getentryindex(image.size)]
    return frame.bpp == 32 and _number_at(image, frame.offset, len(_PNG)) != int.from_bytes(_PNG, "big")


def _number_at(image: Image.Image, start: int, size: int) -> int | None:
    """The number at a place in the file of an image, most significant byte first; None if the file is closed."""
    file = getattr(image, "fp", None)
    if file is None or file.closed:
        return None
    position = file.tell()
    file.seek(start)
    read = file.read(size)
    file.seek(position)
    return int.from_bytes(read, "big") if len(read) == size else None


def correct_colours(image: Image.Image) -> None:
    """Correct colours that Pillow reads wrongly from a file. It has no effect once the pixels are loaded.

    - The transparent grey level of a PNG file with 2 or 4 bits per pixel is scaled to 8 bits, as the pixels are.
    - The transparent colour of a PNG file with 16 bits per channel keeps its upper 8 bits, as the pixels do.
    - Some writers store the colours of a TIFF palette in 8 bits instead of 16. They are taken as they are.
    - A GIF file of grey levels has no palette. Pillow keeps the one for all frames, which the first frame may replace.
    """
    if isinstance(image, PngImageFile) and image.tile:
        transparent, mode = image.info.get("transparency"), str(image.tile[0][3])
        if isinstance(transparent, int):
            image.info["transparency"] = transparent * _SCALES.get(mode, 1)
        elif isinstance(transparent, tuple) and mode == "RGB;16B":
            image.info["transparency"] = tuple(level >> 8 for level in transparent)
    elif isinstance(image, TiffImageFile) and image.mode in ("P", "PA") and image.tile:
        colours = image.tag_v2.get(_COLOUR_MAP, ())
        if colours and max(colours) < 256:
            image.palette = ImagePalette.raw("RGB;L", bytes(colours))
    elif isinstance(image, GifImageFile) and image.mode == "L" and image.tile:
        image.palette = None


def to_8_bits(image: Image.Image, mode: str, where: str, encoding: Encoding | None = None) -> Image.Image:
    """An image of any mode of Pillow in `mode`: "RGB" (sRGB) or "L" (grey).

    - Grey of 12 or 16 bits, in a mode that begins with "I;16", keeps its upper 8 bits.
    - Floating-point pixels (mode "F") must be 0 to 1, and 32-bit integers (mode "I") 0 to 255. The smallest value is
      black and the largest is white. A file does not say which value is white. Therefore an image with a pixel out of
      this range, such as NaN, is refused.
    - Transparent parts become white, and so do parts that the first frame of a GIF file does not cover.
    - An embedded ICC profile converts the colours to sRGB. A profile that is damaged, or that does not fit the mode, is
      ignored with a warning.
    - Without a profile, CMYK is converted by Pillow's formula, and LAB as CIE L*a*b* with the white D50.

    Args:
        image: the image, which is not changed.
        mode: "RGB" or "L".
        where: the file or the function to name in an error.
        encoding: what the file of the image says of its pixels; by default `encoding_of(image, where)`.

    Raises:
        InputError: a pixel is out of range.
    """
    profile = image.info.get("icc_profile")
    encoding = encoding_of(image, where) if encoding is None else encoding
    image = _as_bytes(image, where, encoding)
    if encoding.is_opaque:
        image = image.convert("RGB")
    if encoding.covered is not None:
        opaque_part = Image.new("L", image.size)
        opaque_part.paste(255, encoding.covered)
        image = image.copy()
        image.putalpha(opaque_part)
    if image.has_transparency_data:
        image = image.convert(_PREMULTIPLIED.get(image.mode, image.mode))
        rgba = image.convert("RGBA")
        colours = rgba.getchannel("R") if image.mode in ("1", "L", "LA") else rgba.convert("RGB")
        opaque = _to_srgb(colours, profile).convert("RGB")
        opaque.putalpha(rgba.getchannel("A"))
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), opaque)
    else:
        image = _to_srgb(image, profile)
    converted = image.convert(mode)
    converted.info.pop("icc_profile", None)  # it describes the colours before the conversion
    return converted


def _as_bytes(image: Image.Image, where: str, encoding: Encoding) -> Image.Image:
    """An image of 16 or 32 bits per pixel as mode "L", or "LA" if it has transparent pixels; others of 1 or 8 bits.

    An image of 1 bit per pixel whose 0 is white is inverted, as mode "L".
    """
    if image.mode == "1" and encoding.is_negative:
        return ImageChops.invert(image.convert("L"))
    if image.mode == "F" or (image.mode == "I" and not encoding.is_16_bit):
        kind, white = ("floating-point", 1) if image.mode == "F" else ("32-bit integer", 255)
        values = np.asarray(image)
        low, high = values.min(), values.max()
        if not (low >= 0 and high <= white):
            actual = "NaN" if np.isnan(low) else f"{low:g} to {high:g}"
            advice = "scale them, or save the image with 8 or 16 bits per pixel"
            raise invalid(where, f"{kind} pixels", f"0 (black) to {white} (white)", actual, advice)
        levels = np.rint(values * (255 / white)).astype(np.uint8)
        return Image.fromarray(~levels if encoding.is_negative else levels)
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    levels = (values.clip(0, (1 << encoding.grey_bits) - 1) >> encoding.grey_bits - 8).astype(np.uint8)
    grey = Image.fromarray(~levels if encoding.is_negative else levels)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """An opaque image with its colours converted to sRGB: mode "RGB", or unchanged if nothing has to be converted."""
    if profile:
        try:
            space, transform = _transform(profile)
            mode, fitting = _SPACES[space]
            if image.mode in fitting:
                return image if transform is None else transform.apply(image.convert(mode))
            reason = f"it is for {space}, and the image is {image.mode}"
        except Exception as error:  # LittleCMS may be missing, and damaged profiles raise OSError and others
            reason = str(error) or type(error).__name__
        warnings.warn(f"the colour profile is ignored: {reason}", stacklevel=2)
    return image.convert("RGB") if image.mode == "LAB" else image


@lru_cache(maxsize=16)
def _transform(profile: bytes) -> tuple[str, Any]:
    """The colour space of a profile, and the transform from it to sRGB; None if the colours are those of sRGB."""
    from PIL import ImageCms

    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    space = source.profile.xcolor_space.strip()
    # The optimised transform rounds the dark levels of a linear grey profile.
    flags = ImageCms.Flags.NOOPTIMIZE if space == "GRAY" else ImageCms.Flags.NONE
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), _SPACES[space][0], "RGB", flags=flags)
    if space == "RGB":
        steps = np.arange(0, 256, 51, dtype=np.uint8)
        colours = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(len(steps), -1, 3)
        converted = np.asarray(transform.apply(Image.fromarray(colours)))
        if np.abs(converted.astype(int) - colours).max() <= 1:
            return space, None
    return space, transform
