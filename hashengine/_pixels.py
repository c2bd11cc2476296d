"""Converts images of every mode of Pillow to 8-bit grey or RGB, and their colours to sRGB."""

from __future__ import annotations

import io
import warnings
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile

from hashengine.errors import invalid

_PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}  # and the modes with the same bands that Pillow can convert
# For each colour space of a profile: the mode of its pixels, and the modes that Pillow converts to it without loss.
_SPACES = {
    "GRAY": ("L", ("1", "L")),
    "RGB": ("RGB", ("1", "L", "P", "RGB", "RGBX", "YCbCr", "HSV")),
    "CMYK": ("CMYK", ("CMYK",)),
    "Lab": ("LAB", ("LAB",)),
}


_PHOTOMETRIC, _BITS_PER_SAMPLE, _SAMPLE_FORMAT, _PLANES = 262, 258, 339, 284  # tags of TIFF files
_SCALES = {"L;2": 85, "L;4": 17}  # the raw modes of PNG files whose grey levels Pillow scales to 0 to 255


class Encoding(NamedTuple):
    """What a file says of its pixels beside Pillow's mode.

    Attributes:
        is_16_bit: whether mode "I" means grey of 16 bits.
        grey_bits: the number of bits that hold the grey levels in a mode that begins with "I;16".
        is_negative: whether 0 is white, in a mode of more than 8 bits. Pillow inverts the others.
    """

    is_16_bit: bool = False
    grey_bits: int = 16
    is_negative: bool = False


def encoding_of(image: Image.Image, where: str) -> Encoding:
    """The encoding of an image that `PIL.Image.open` returned, before or after its pixels are loaded.

    Raises:
        InputError: it is a TIFF file of a kind that Pillow decodes to other pixels; the error names `where`.
    """
    if not isinstance(image, TiffImageFile):
        return Encoding(is_16_bit=image.format in ("PNG", "PPM"))
    tags = image.tag_v2
    bits, formats = tags.get(_BITS_PER_SAMPLE, (1,)), tags.get(_SAMPLE_FORMAT, (1,))
    is_compressed = image.info.get("compression", "raw") != "raw"
    kind = None
    if tags.get(_PLANES, 1) == 2 and len(bits) > 1:
        if not is_compressed and set(bits) != {8}:
            kind = f"uncompressed ones of {bits[0]} bits in separate planes"
        elif image.mode in ("LA", "La"):
            kind = "grey and transparency in separate planes"
    if image.mode in ("F", "I") and tags.prefix == b"MM" and is_compressed:
        kind = "compressed ones of 32 bits, most significant byte first"
    if 2 in formats and 8 in bits:
        kind = "signed ones of 8 bits"
    if kind is not None:
        raise invalid(where, "pixels", "those of a TIFF file that Pillow decodes", kind, "save the image as PNG")
    is_deep = image.mode == "F" or image.mode.startswith("I")
    return Encoding(grey_bits=12 if bits == (12,) else 16, is_negative=is_deep and tags.get(_PHOTOMETRIC) == 0)


def scale_transparent_grey(image: Image.Image) -> None:
    """Scale the transparent grey level of a PNG image as Pillow scales its pixels. Call it before they are loaded."""
    transparent = image.info.get("transparency")
    if isinstance(transparent, int) and isinstance(image, PngImageFile) and image.tile:
        image.info["transparency"] = transparent * _SCALES.get(str(image.tile[0][3]), 1)


def to_8_bits(image: Image.Image, mode: str, where: str, encoding: Encoding | None = None) -> Image.Image:
    """An image of any mode of Pillow in `mode`: "RGB" (sRGB) or "L" (grey).

    - Grey of 12 or 16 bits, in a mode that begins with "I;16", keeps its upper 8 bits.
    - Floating-point pixels (mode "F") must be 0 to 1, and 32-bit integers (mode "I") 0 to 255. The smallest value is
      black and the largest is white. A file does not say which value is white. Therefore an image with a pixel out of
      this range, such as NaN, is refused.
    - Transparent parts become white.
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
    image = _as_bytes(image, where, encoding_of(image, where) if encoding is None else encoding)
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
    """An image of 16 or 32 bits per pixel as mode "L", or "LA" if it has transparent pixels; others unchanged."""
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
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), _SPACES[space][0], "RGB")
    if space == "RGB":
        steps = np.arange(0, 256, 51, dtype=np.uint8)
        colours = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(len(steps), -1, 3)
        converted = np.asarray(transform.apply(Image.fromarray(colours)))
        if np.abs(converted.astype(int) - colours).max() <= 1:
            return space, None
    return space, transform
