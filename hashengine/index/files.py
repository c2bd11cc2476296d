"""Codes in the files of others: .npy, .u8bin and ann-benchmarks' HDF5."""

from __future__ import annotations

import io
import os
import secrets
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from hashengine.errors import InputError
from hashengine.index._arguments import Array, checked_codes
from hashengine.index.bit_order import OWN, checked_order, converted

if TYPE_CHECKING:
    import h5py

_U8BIN_HEADER = struct.Struct("<II")  # rows, bytes a row
_NPY_HEADER_BYTES = 1 << 14  # more than numpy takes
_SUFFIXES = (".npy", ".u8bin")
_BLOCK_ROWS = 1 << 16
_KINDS = {"b": "bool", "f": "floats", "i": "integers", "u": "unsigned integers"}


def read_codes(path: str | os.PathLike, *, bit_order: str, mmap: bool = False) -> np.ndarray:
    """Read codes from a file; its size is checked against its header before anything is allocated or mapped.

    Args:
        path: ``.npy`` of uint8 [N, bits / 8] in C order, or big-ann-benchmarks' ``.u8bin``: N and bits / 8 as
            little-endian uint32, then the rows.
        bit_order: "msb_first" or "lsb_first", of the codes in the file, which does not tell.
        mmap: map the codes instead of reading them, for "msb_first" only. The file is never written to through the map.

    Returns:
        uint8 [N, bits / 8], "msb_first".

    Raises:
        InputError: no such file, another kind of file, a damaged one, or one of other contents.
    """
    path = _checked_path(path, "read_codes")
    if checked_order(bit_order) != OWN and mmap:
        raise InputError(
            f"read_codes: mmap needs codes that are 'msb_first', got {bit_order!r}; "
            "read them without and keep them with write_codes"
        )
    if not path.is_file():
        raise InputError(f"read_codes: path must be a file, got {path}, where there is none")
    with open(path, "rb") as file:
        count, width = (_npy_shape if path.suffix == ".npy" else _u8bin_shape)(file)
        start, size = file.tell(), os.fstat(file.fileno()).st_size
        if size != start + count * width:
            raise InputError(
                f"read_codes: {path} is damaged: it must hold {start + count * width} bytes for [{count}, {width}], "
                f"got {size}"
            )
        if mmap and count:
            return np.memmap(file, np.uint8, mode="c", offset=start, shape=(count, width))
        codes = np.fromfile(file, np.uint8, count * width)
    if len(codes) != count * width:
        raise InputError(f"read_codes: {path} ended early; it was changed while it was read")
    return converted(codes.reshape(count, width), bit_order)


def write_codes(path: str | os.PathLike, codes: Array, *, bit_order: str) -> None:
    """Write codes to a file, which takes the place of an older one once it is complete.

    Args:
        path: ``.npy`` or ``.u8bin``, as for :func:`read_codes`.
        codes: uint8 [N, bits / 8], "msb_first", torch on any device or numpy.
        bit_order: "msb_first" or "lsb_first", that the codes in the file shall have.

    Raises:
        TypeError: a wrong dtype.
        InputError: a wrong shape, or another kind of file.
        OSError: a folder that is not there or cannot be written to, or a disk that is full.
    """
    path = _checked_path(path, "write_codes")
    rows = np.ascontiguousarray(converted(checked_codes(codes, "codes").cpu().numpy(), bit_order))
    if path.suffix == ".u8bin" and len(rows) >= 1 << 32:
        raise InputError(f"write_codes: .u8bin must hold fewer than {1 << 32} codes, got {len(rows)}; write .npy")
    with _replacing(path) as file:
        if path.suffix == ".npy":
            np.save(file, rows, allow_pickle=False)
        else:
            file.write(_U8BIN_HEADER.pack(*rows.shape))
            rows.tofile(file)


def read_ann_benchmarks(path: str | os.PathLike) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Read a Hamming data set of ann-benchmarks, HDF5 with a value a bit; needs the extra ``hdf5``.

    HDF5's own library parses the file, and some damaged ones crash it: read only files from a source that you trust.

    Returns:
        ``train`` uint8 [N, bits / 8] and ``test`` uint8 [Q, bits / 8], "msb_first": a row's first value in the most
        significant bit; ``neighbors`` int64 [Q, k], positions in ``train``; and ``distances`` float32 [Q, k], as the
        file has them: in ann-benchmarks' own, the fraction of bits that differ.

    Raises:
        InputError: no h5py, no such file, another kind of file, a damaged one, or one of other contents.
    """
    try:
        import h5py
    except ImportError:
        raise InputError("read_ann_benchmarks needs h5py: pip install 'hashengine[hdf5]'") from None
    path = Path(path)
    if not path.is_file():
        raise InputError(f"read_ann_benchmarks: path must be a file, got {path}, where there is none")
    try:
        with h5py.File(path, "r") as file:
            distance = file.attrs.get("distance")
            if distance not in ("hamming", b"hamming"):
                raise InputError(f"attribute distance must be 'hamming', got {distance!r}")
            train, test = _packed(file, "train"), _packed(file, "test")
            neighbors = _dataset(file, "neighbors", "iu")[:].astype(np.int64)
            distances = _dataset(file, "distances", "fiu")[:].astype(np.float32)
    except (
        OSError,
        RuntimeError,
        KeyError,
        TypeError,
        ValueError,
    ) as error:  # of h5py in damaged files, and InputError
        raise InputError(f"read_ann_benchmarks: {path}: {' '.join(str(error).split())}") from None
    if train.shape[1] != test.shape[1] or not len(test) == len(neighbors) == len(distances):
        shapes = [list(array.shape) for array in (train, test, neighbors, distances)]
        raise InputError(
            f"read_ann_benchmarks: {path}: train and test must have one width, test, neighbors and distances a row a "
            f"query, got {shapes}"
        )
    return train, test, neighbors, distances


def _checked_path(path: str | os.PathLike, function: str) -> Path:
    path = Path(path)
    if path.suffix not in _SUFFIXES:
        raise InputError(f"{function}: path must end in .npy or .u8bin, got {path.name!r}")
    return path


def _npy_shape(file: BinaryIO) -> tuple[int, int]:
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    beginning = io.BytesIO(file.read(_NPY_HEADER_BYTES))  # of a file, numpy reads as much as the header claims to have
    try:
        shape, fortran_order, dtype = read_header[np.lib.format.read_magic(beginning)](beginning)
        if any(size.bit_length() > 63 for size in shape):
            raise ValueError("its shape is beyond 64 bits")
    except Exception as error:  # numpy evaluates the header, and a damaged one gives whatever that meets
        raise InputError(
            f"read_codes: {file.name} must be an .npy file of version 1 or 2, got another ({_brief(error)})"
        ) from None
    file.seek(beginning.tell())
    is_shape = len(shape) == 2 and shape[0] >= 0 and shape[1] > 0
    if dtype != np.uint8 or fortran_order or not is_shape:
        got = _brief(f"{dtype} {list(shape)} in {'Fortran' if fortran_order else 'C'} order")
        raise InputError(f"read_codes: {file.name} must hold uint8 [N, bits / 8] in C order, got {got}")
    return int(shape[0]), int(shape[1])


def _brief(text: object) -> str:
    """One line; what a damaged file says may be as long as the file."""
    line = " ".join(str(text).split())
    return line if len(line) <= 200 else f"{line[:200]}..."


def _u8bin_shape(file: BinaryIO) -> tuple[int, int]:
    header = file.read(_U8BIN_HEADER.size)
    if len(header) < _U8BIN_HEADER.size:
        raise InputError(f"read_codes: {file.name} is damaged: it must begin with 8 bytes of shape, got {len(header)}")
    count, width = _U8BIN_HEADER.unpack(header)
    if width == 0:
        raise InputError(f"read_codes: {file.name} must hold rows of a byte or more, got [{count}, 0]")
    return count, width


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of ``path`` once it is complete."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _dataset(file: h5py.File, name: str, kinds: str) -> h5py.Dataset:
    """A matrix of one of the numpy ``kinds`` of dtype."""
    data = file.get(name)
    shape, dtype = getattr(data, "shape", ()), getattr(data, "dtype", None)
    if dtype is None or dtype.kind not in kinds or len(shape) != 2:
        got = "none" if dtype is None else f"{dtype} {list(shape)}"
        raise InputError(f"{name} must be a matrix of {' or '.join(map(_KINDS.get, kinds))}, got {got}")
    return data


def _packed(file: h5py.File, name: str) -> np.ndarray:
    data = _dataset(file, name, "biu")
    count, bits = data.shape
    if bits == 0 or bits % 8:
        raise InputError(f"{name} must have a positive multiple of 8 values a row, got {bits}")
    codes = np.empty((count, bits // 8), np.uint8)
    for first in range(0, count, _BLOCK_ROWS):  # a value takes a byte or more, eight times as much as its bit
        values = data[first : first + _BLOCK_ROWS]
        if values.dtype != bool and not ((values == 0) | (values == 1)).all():
            raise InputError(
                f"{name} must be zeros and ones, a value a bit, got other values; are they packed already?"
            )
        codes[first : first + _BLOCK_ROWS] = np.packbits(values != 0, axis=1)
    return codes
