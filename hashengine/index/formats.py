"""Formats of other programs: bit orders, `.npy`, `.u8bin`, ann-benchmarks' HDF5, and FAISS indexes.

hashengine's own bit order is "msb_first", that of `numpy.packbits` and `hashengine.ops.pack_bits`: the first bit of a
code is the most significant bit of its first byte.
"""

from __future__ import annotations

import io
import os
import struct
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

import numpy as np

from hashengine._files import replace_file
from hashengine._validation import check_array, check_code_array, check_flag, check_path, is_tensor
from hashengine.errors import InputError, brief, invalid, missing_package

if TYPE_CHECKING:
    import faiss
    import h5py
    from torch import Tensor

    from hashengine._validation import Array
    from hashengine.index.hamming_index import HammingIndex

_ArrayT = TypeVar("_ArrayT", "Tensor", np.ndarray)

OWN_BIT_ORDER = "msb_first"
BIT_ORDERS = (OWN_BIT_ORDER, "lsb_first")
SUFFIXES = (".npy", ".u8bin")

_READ_HDF5 = "read_ann_benchmarks"  # the function that is named in error messages

_U8BIN_HEADER = struct.Struct("<II")  # rows, bytes per row
_NPY_HEADER_BYTES = 1 << 14  # longer headers are refused by numpy
HDF5_BLOCK_ROWS = 1 << 16  # rows that are read and packed at a time
_KIND_NAMES = {"b": "bool", "f": "floats", "i": "integers", "u": "unsigned integers"}  # by numpy's dtype.kind


# Bit orders.


def reverse_bits(codes: _ArrayT) -> _ArrayT:
    """Convert codes from one bit order to the other: bit i of every byte becomes bit 7 - i.

    Args:
        codes: uint8 of any shape, torch on any device or numpy.

    Returns:
        uint8 of the same shape in new memory, in the library and on the device of `codes`.

    Raises:
        InputError: another type or dtype.
    """
    check_array("reverse_bits", "codes", codes, ("uint8",))
    codes = codes >> 4 | codes << 4
    codes = (codes & 0xCC) >> 2 | (codes & 0x33) << 2
    return (codes & 0xAA) >> 1 | (codes & 0x55) << 1


def _check_bit_order(where: str, bit_order: str) -> str:
    if bit_order not in BIT_ORDERS:
        raise invalid(where, "bit_order", "'msb_first' or 'lsb_first'", repr(bit_order))
    return bit_order


def _convert(where: str, codes: _ArrayT, bit_order: str) -> _ArrayT:
    """`codes` from `bit_order` to hashengine's own bit order, or back."""
    return codes if _check_bit_order(where, bit_order) == OWN_BIT_ORDER else reverse_bits(codes)


# Files of codes.


def read_codes(path: str | os.PathLike[str], *, bit_order: str, mmap: bool = False) -> np.ndarray:
    """Read codes from a file, after checking its size against its header.

    Args:
        path: `.npy` of uint8 [N, bits / 8] in C order, or big-ann-benchmarks' `.u8bin`: N and bits / 8 as
            little-endian uint32, then the rows.
        bit_order: "msb_first" or "lsb_first": the bit order of the file. The file itself does not record it.
        mmap: map the codes instead of reading them, for "msb_first" only. Writes to the result never reach the file.
            While the result is in use, no other program may shorten the file: reading a lost page ends the process.

    Returns:
        uint8 [N, bits / 8], "msb_first".

    Raises:
        InputError: the file does not exist, is damaged, or is not a file of codes as above.
    """
    path, mmap = _check_path("read_codes", path), check_flag("read_codes", "mmap", mmap)
    if _check_bit_order("read_codes", bit_order) != OWN_BIT_ORDER and mmap:
        advice = "read them without mmap, and write them with write_codes to map them later"
        raise invalid("read_codes", "bit_order", "'msb_first' to map the codes", repr(bit_order), advice)
    if not path.is_file():
        raise invalid("read_codes", "path", "a file", path)
    with open(path, "rb") as file:
        count, width = (_npy_shape if path.suffix == ".npy" else _u8bin_shape)(file)
        start, size = file.tell(), os.fstat(file.fileno()).st_size
        if size != start + count * width:
            expected = f"a file of {start + count * width} bytes, for [{count}, {width}]"
            raise invalid("read_codes", str(path), expected, f"{size} bytes", "the file is damaged")
        if mmap and count:
            return np.memmap(file, np.uint8, mode="c", offset=start, shape=(count, width))
        codes = np.fromfile(file, np.uint8, count * width)
    if len(codes) != count * width:
        raise invalid("read_codes", str(path), "a file that does not change while it is read", "an early end")
    return _convert("read_codes", codes.reshape(count, width), bit_order)


def write_codes(path: str | os.PathLike[str], codes: Array, *, bit_order: str) -> None:
    """Write codes to a new file. When it is complete, it replaces an existing file of this name.

    Args:
        path: `.npy` or `.u8bin`, as for `read_codes`.
        codes: uint8 [N, bits / 8], "msb_first", torch on any device or numpy.
        bit_order: "msb_first" or "lsb_first": the bit order to write.

    Raises:
        InputError: a wrong dtype or shape, or another suffix.
        OSError: the folder does not exist or cannot be written to, or the disk is full.
    """
    path = _check_path("write_codes", path)
    check_code_array("write_codes", "codes", codes)
    host_codes = codes.cpu().numpy() if is_tensor(codes) else codes
    rows = np.ascontiguousarray(_convert("write_codes", host_codes, bit_order))
    if path.suffix == ".u8bin" and len(rows) >= 1 << 32:
        raise invalid("write_codes", "codes", f"fewer than {1 << 32} for .u8bin", len(rows), "write .npy")
    with replace_file(path) as file:
        if path.suffix == ".npy":
            np.save(file, rows, allow_pickle=False)
        else:
            file.write(_U8BIN_HEADER.pack(*rows.shape))
            file.write(rows.data.cast("B") if rows.size else b"")


def _check_path(where: str, path: str | os.PathLike[str]) -> Path:
    path = check_path(where, "path", path)
    if path.suffix not in SUFFIXES:
        raise invalid(where, "path", "a name that ends in .npy or .u8bin", repr(path.name))
    return path


def _npy_shape(file: BinaryIO) -> tuple[int, int]:
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    # numpy gets only the beginning of the file, because it reads as many bytes as the header claims to have.
    beginning = io.BytesIO(file.read(_NPY_HEADER_BYTES))
    try:
        shape, fortran_order, dtype = read_header[np.lib.format.read_magic(beginning)](beginning)
        if any(size.bit_length() > 63 for size in shape):
            raise ValueError("its shape is beyond 64 bits")
    except Exception as error:  # numpy parses the header as a Python literal; a damaged one can raise anything
        actual = f"another ({brief(error)})"
        raise invalid("read_codes", file.name, "an .npy file of version 1 or 2", actual) from None
    file.seek(beginning.tell())
    is_matrix = len(shape) == 2 and shape[0] >= 0 and shape[1] > 0
    if dtype != np.uint8 or fortran_order or not is_matrix:
        got = brief(f"{dtype} {list(shape)} in {'Fortran' if fortran_order else 'C'} order")
        raise invalid("read_codes", file.name, "a file of uint8 [N, bits / 8] in C order", got)
    return int(shape[0]), int(shape[1])


def _u8bin_shape(file: BinaryIO) -> tuple[int, int]:
    header = file.read(_U8BIN_HEADER.size)
    if len(header) < _U8BIN_HEADER.size:
        expected = "a file that begins with 8 bytes of shape"
        raise invalid("read_codes", file.name, expected, len(header), "the file is damaged")
    count, width = _U8BIN_HEADER.unpack(header)
    if width == 0:
        raise invalid("read_codes", file.name, "a file with rows of at least one byte", f"[{count}, 0]")
    return count, width


# ann-benchmarks' HDF5.


def read_ann_benchmarks(path: str | os.PathLike[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Read a Hamming data set of ann-benchmarks: HDF5 with one value per bit. This needs the extra `hdf5`.

    The HDF5 library parses the file, and some damaged files crash it: read only files from a source that you trust.

    Returns:
        `train` uint8 [N, bits / 8] and `test` uint8 [Q, bits / 8], "msb_first": the first value of a row becomes the
        most significant bit. `neighbors` int64 [Q, k] are positions in `train`. `distances` float32 [Q, k] are those of
        the file; in ann-benchmarks' own files, they are the fraction of bits that differ.

    Raises:
        InputError: h5py is missing, or the file does not exist, is damaged, or is not such a data set.
    """
    try:
        import h5py
    except ImportError:
        raise missing_package(_READ_HDF5, "h5py", "hdf5") from None
    path = check_path(_READ_HDF5, "path", path)
    if not path.is_file():
        raise invalid(_READ_HDF5, "path", "a file", path)
    try:
        with h5py.File(path, "r") as file:
            distance = file.attrs.get("distance")
            if distance not in ("hamming", b"hamming"):
                raise invalid(_READ_HDF5, f"the attribute distance of {path}", "'hamming'", repr(distance))
            train, test = _packed(file, "train"), _packed(file, "test")
            neighbors = _dataset(file, "neighbors", "iu")[:].astype(np.int64)
            distances = _dataset(file, "distances", "fiu")[:].astype(np.float32)
    except InputError:
        raise
    except (OSError, RuntimeError, KeyError, TypeError, ValueError) as error:  # from h5py
        expected = "an HDF5 file in the format of ann-benchmarks"
        raise invalid(_READ_HDF5, str(path), expected, f"another ({brief(error)})") from None
    if train.shape[1] != test.shape[1] or not len(test) == len(neighbors) == len(distances):
        shapes = [list(array.shape) for array in (train, test, neighbors, distances)]
        what = f"train, test, neighbors and distances in {path}"
        expected = "of one width (train, test), with one row per query (test, neighbors, distances)"
        raise invalid(_READ_HDF5, what, expected, shapes)
    return train, test, neighbors, distances


def _dataset(file: h5py.File, name: str, kinds: str) -> h5py.Dataset:
    """A matrix whose dtype is of one of numpy's `kinds`."""
    data = file.get(name)
    shape, dtype = getattr(data, "shape", ()), getattr(data, "dtype", None)
    if dtype is None or dtype.kind not in kinds or len(shape) != 2:
        expected = " or ".join(_KIND_NAMES[kind] for kind in kinds)
        got = "none" if dtype is None else f"{dtype} {list(shape)}"
        raise invalid(_READ_HDF5, f"{name} in {file.filename}", f"a matrix of {expected}", got)
    return data


def _packed(file: h5py.File, name: str) -> np.ndarray:
    data = _dataset(file, name, "biu")
    count, bits = data.shape
    if bits == 0 or bits % 8:
        expected = "a matrix with a positive multiple of 8 values per row"
        raise invalid(_READ_HDF5, f"{name} in {file.filename}", expected, bits)
    codes = np.empty((count, bits // 8), np.uint8)
    for first in range(0, count, HDF5_BLOCK_ROWS):  # by blocks, because values take 8 times the memory of codes or more
        values = data[first : first + HDF5_BLOCK_ROWS]
        if values.dtype != bool and not ((values == 0) | (values == 1)).all():
            expected, advice = "zeros and ones, one value per bit", "read packed codes with h5py"
            raise invalid(_READ_HDF5, f"{name} in {file.filename}", expected, "other values", advice)
        codes[first : first + HDF5_BLOCK_ROWS] = np.packbits(values != 0, axis=1)
    return codes


# FAISS.


def from_faiss(index: faiss.IndexBinary, *, bit_order: str) -> HammingIndex:
    """Convert a FAISS index to an index with the same codes in the same order.

    Args:
        index: an `IndexBinaryFlat`, whose ids are positions, or an `IndexBinaryIDMap` or `IndexBinaryIDMap2` over one,
            whose ids are kept. Codes and ids are copied.
        bit_order: "msb_first" or "lsb_first": the bit order of the codes in `index`. The queries of the result are
            "msb_first" in both cases.

    Raises:
        InputError: faiss is missing, another kind of index, an unknown bit order, or ids that are negative or not
            unique.
    """
    from hashengine.index.hamming_index import HammingIndex

    faiss = _import_faiss("from_faiss")
    is_map = isinstance(index, faiss.IndexBinaryIDMap)
    wrapper: Any = index  # `index` and `id_map` are attributes of ID maps only
    flat = faiss.downcast_IndexBinary(wrapper.index) if is_map else index
    if not isinstance(flat, faiss.IndexBinaryFlat):
        kind = f"{type(index).__name__} over {type(flat).__name__}" if is_map else type(index).__name__
        expected = "an IndexBinaryFlat, or an IndexBinaryIDMap or IndexBinaryIDMap2 over one"
        raise invalid("from_faiss", "index", expected, kind, "add its codes to one first")
    codes = faiss.vector_to_array(flat.xb).reshape(flat.ntotal, flat.code_size)
    result = HammingIndex(flat.d)
    result.add(_convert("from_faiss", codes, bit_order), faiss.vector_to_array(wrapper.id_map) if is_map else None)
    return result


def to_faiss(index: HammingIndex, *, bit_order: str) -> faiss.IndexBinaryFlat | faiss.IndexBinaryIDMap2:
    """Convert an index to a FAISS index with the same codes in the same order, without the removed ones.

    Args:
        index: the index; its codes and ids are copied.
        bit_order: "msb_first" or "lsb_first": the bit order of the result's codes and of its queries.

    Returns:
        An `IndexBinaryFlat` if the ids are 0 to N - 1 in this order, otherwise an `IndexBinaryIDMap2` over one.

    Raises:
        InputError: faiss is missing, or an unknown bit order.
    """
    faiss = _import_faiss("to_faiss")
    flat = faiss.IndexBinaryFlat(index.bits)
    with index._rows_lock.reader():
        snapshot = index._current("to_faiss")
        ids = snapshot.live_ids().numpy()
        codes = np.ascontiguousarray(_convert("to_faiss", snapshot.live_codes().cpu().numpy(), bit_order))
        if np.array_equal(ids, np.arange(len(ids))):
            flat.add(codes)
            return flat
        mapped = faiss.IndexBinaryIDMap2(flat)
        flat.this.disown()  # the ID map owns `flat` and frees it
        mapped.own_fields = True
        mapped.add_with_ids(codes, ids)
    return mapped


def _import_faiss(where: str) -> ModuleType:
    try:
        import faiss
    except ImportError:
        raise missing_package(where, "faiss", "bench") from None
    return faiss
