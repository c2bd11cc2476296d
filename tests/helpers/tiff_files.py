"""Writes TIFF files of kinds that Pillow reads but does not write, by the specification TIFF 6.0."""

import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np

_SHORT, _LONG = 3, 4
_FORMATS = {_SHORT: "H", _LONG: "I"}


def write_tiff(
    path: Path,
    pixels: np.ndarray,
    *,
    photometric: int = 1,
    planes: int = 1,
    extra_samples: int | None = None,
    deflate: bool = False,
    sample_format: int = 1,
    big_endian: bool = False,
    twelve_bits: bool = False,
    tags: Mapping[int, Sequence[int]] = MappingProxyType({}),
) -> None:
    """Write [H, W] or [H, W, C] pixels in one strip, or in one strip for each plane.

    Args:
        path: the file.
        pixels: the samples. With `twelve_bits`, each must be below 4,096.
        photometric: PhotometricInterpretation: 0 white is zero, 1 black is zero, 2 RGB, 5 CMYK.
        planes: PlanarConfiguration: 1 the samples of a pixel follow each other, 2 each sample has a plane.
        extra_samples: ExtraSamples: 1 premultiplied alpha, 2 alpha.
        deflate: whether the strips are compressed with zlib.
        sample_format: SampleFormat: 1 unsigned, 2 signed, 3 floating-point.
        big_endian: the order of the bytes.
        twelve_bits: whether the samples are packed in 12 bits each.
        tags: further tags, or other values for tags above. Each value has 16 bits.
    """
    order = ">" if big_endian else "<"
    height, width = pixels.shape[:2]
    pixels = pixels.reshape(height, width, -1)
    samples = pixels.shape[2]
    strips = []
    for plane in [pixels] if planes == 1 else np.split(pixels, samples, 2):
        data = _packed(plane) if twelve_bits else plane.astype(plane.dtype.newbyteorder(order)).tobytes()
        strips.append(zlib.compress(data) if deflate else data)
    all_tags = {
        256: (_LONG, [width]),
        257: (_LONG, [height]),
        258: (_SHORT, [12 if twelve_bits else 8 * pixels.itemsize] * samples),
        259: (_SHORT, [8 if deflate else 1]),
        262: (_SHORT, [photometric]),
        273: (_LONG, [0] * len(strips)),
        277: (_SHORT, [samples]),
        278: (_LONG, [height]),
        279: (_LONG, list(map(len, strips))),
        284: (_SHORT, [planes]),
        339: (_SHORT, [sample_format] * samples),
    }
    if extra_samples is not None:
        all_tags[338] = (_SHORT, [extra_samples])
    all_tags |= {tag: (_SHORT, list(values)) for tag, values in tags.items()}
    first = len(_directory(all_tags, order))
    all_tags[273] = (_LONG, [first + sum(map(len, strips[:strip])) for strip in range(len(strips))])
    path.write_bytes(_directory(all_tags, order) + b"".join(strips))


def _directory(tags: dict[int, tuple[int, list[int]]], order: str) -> bytes:
    """The header, the table of tags, and the values that do not fit into the table."""
    start = (b"MM\0*" if order == ">" else b"II*\0") + struct.pack(order + "IH", 8, len(tags))
    table, values = b"", b""
    end = len(start) + 12 * len(tags) + 4
    for tag, (kind, numbers) in sorted(tags.items()):
        content = struct.pack(f"{order}{len(numbers)}{_FORMATS[kind]}", *numbers)
        if len(content) > 4:
            values += content
            content = struct.pack(order + "I", end + len(values) - len(content))
        table += struct.pack(order + "HHI", tag, kind, len(numbers)) + content.ljust(4, b"\0")
    return start + table + bytes(4) + values


def _packed(plane: np.ndarray) -> bytes:
    """Samples of 12 bits; each row begins with a whole byte."""
    rows = plane.reshape(len(plane), -1).astype(">u2").view(np.uint8).reshape(len(plane), -1, 2)
    bits = np.unpackbits(rows, axis=2)[:, :, 4:].reshape(len(plane), -1)
    return np.packbits(bits, axis=1).tobytes()
