"""Converts images of every mode of Pillow to 8-bit grey or RGB, and their colours to sRGB."""

from __future__ import annotations

import io
import warnings
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from hashengine.errors import invalid

_PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}  # and the modes with the same bands that Pillow can convert
# For each colour space of a profile: the mode of its pixels, and the modes that Pillow converts to it without loss.
_SPACES = {
    "GRAY": ("L", ("1", "L")),
    "RGB": ("RGB", ("1", "L", "P", "RGB", "RGBX", "YCbCr", "HSV")),
    "CMYK": ("CMYK", ("CMYK",)),
    "Lab": ("LAB", ("LAB",)),
}


def to_8_bits(image: Image.Image, mode: str, where: str, *, is_16_bit: bool = False) -> Image.Image:
    """An image of any mode of Pillow in `mode`: "RGB" (sRGB) or "L" (grey).

    - Grey of 16 bits, in a mode that begins with "I;16", keeps its upper 8 bits.
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
        is_16_bit: whether mode "I" means grey of 16 bits, as in PNG and PPM files.

    Raises:
        InputError: a pixel is out of range.
    """
    profile = image.info.get("icc_profile")
    image = _as_bytes(image, where, is_16_bit)
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


def _as_bytes(image: Image.Image, where: str, is_16_bit: bool) -> Image.Image:
    """An image of 16 or 32 bits per pixel as mode "L", or "LA" if it has transparent pixels; others unchanged."""
    if image.mode == "F" or (image.mode == "I" and not is_16_bit):
        kind, white = ("floating-point", 1) if image.mode == "F" else ("32-bit integer", 255)
        values = np.asarray(image)
        low, high = values.min(), values.max()
        if not (low >= 0 and high <= white):
            actual = "NaN" if np.isnan(low) else f"{low:g} to {high:g}"
            advice = "scale them, or save the image with 8 or 16 bits per pixel"
            raise invalid(where, f"{kind} pixels", f"0 (black) to {white} (white)", actual, advice)
        return Image.fromarray(np.rint(values * (255 / white)).astype(np.uint8))
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    grey = Image.fromarray((values.clip(0, 65535) >> 8).astype(np.uint8))
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
