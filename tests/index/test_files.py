"""Codes in the files of others, both ways, and files that are damaged."""

import io
import struct
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hashengine import HammingIndex, InputError
from hashengine.index import read_ann_benchmarks, read_codes, write_codes
from tests.index.test_index import codes_of
from tests.index.test_interchange import ORDERS, in_order

SUFFIXES = [".npy", ".u8bin"]


@pytest.mark.parametrize("bit_order", ORDERS)
@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (37, 5), (1000, 128)])
def test_files_both_ways(tmp_path, suffix, shape, bit_order):
    codes, path = codes_of(shape[0], 8 * shape[1]), tmp_path / f"codes{suffix}"
    write_codes(path, torch.from_numpy(codes), bit_order=bit_order)
    np.testing.assert_array_equal(read_codes(path, bit_order=bit_order), codes)
    stored = in_order(codes, bit_order)
    if suffix == ".npy":
        np.testing.assert_array_equal(np.load(path), stored)
    else:
        assert path.read_bytes() == struct.pack("<II", *shape) + stored.tobytes()
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_mapped_file_is_never_written_to(tmp_path, suffix):
    path = tmp_path / f"codes{suffix}"
    for count in (0, 100):
        write_codes(path, codes_of(count), bit_order="msb_first")
        contents = path.read_bytes()
        codes = read_codes(path, bit_order="msb_first", mmap=True)
        np.testing.assert_array_equal(codes, codes_of(count))
        codes[:] = 0
        assert path.read_bytes() == contents
    assert isinstance(codes, np.memmap)
    with pytest.raises(InputError, match="mmap needs codes that are 'msb_first'"):
        read_codes(path, bit_order="lsb_first", mmap=True)


def test_codes_that_are_not_contiguous(tmp_path):
    codes = codes_of(40)
    for view in (codes[::-2], codes[:, ::2], np.asfortranarray(codes), torch.from_numpy(codes)[:, 1:5]):
        for suffix in SUFFIXES:
            write_codes(tmp_path / f"a{suffix}", view, bit_order="msb_first")
            np.testing.assert_array_equal(read_codes(tmp_path / f"a{suffix}", bit_order="msb_first"), view)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_failed_write_leaves_the_old_file(tmp_path, suffix, monkeypatch):
    path = tmp_path / f"codes{suffix}"
    write_codes(path, codes_of(10), bit_order="msb_first")

    def fail(file):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_codes(path, codes_of(20, seed=1), bit_order="msb_first")
    np.testing.assert_array_equal(read_codes(path, bit_order="msb_first"), codes_of(10))
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written(tmp_path):
    with pytest.raises(InputError, match=r"must end in .npy or .u8bin, got 'codes.bin'"):
        write_codes(tmp_path / "codes.bin", codes_of(3), bit_order="msb_first")
    with pytest.raises(TypeError, match="uint8, got"):
        write_codes(tmp_path / "codes.npy", np.zeros((3, 8)), bit_order="msb_first")
    for shape in ((8,), (2, 3, 8), (3, 0)):
        with pytest.raises(InputError, match=r"codes must be \[rows, bits / 8\]"):
            write_codes(tmp_path / "codes.npy", np.zeros(shape, np.uint8), bit_order="msb_first")


def npy(array=None, header=None):
    file = io.BytesIO()
    if header is None:
        np.save(file, array)
    else:
        np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue()


def npy_of_shape(*shape):
    return npy(header={"descr": "|u1", "fortran_order": False, "shape": shape})


@pytest.mark.parametrize(
    ("suffix", "contents", "message"),
    [
        (".npy", b"", "version 1 or 2"),
        (".npy", b"PK\x03\x04 not a zip", "version 1 or 2"),
        (".npy", npy(np.zeros((3, 8), np.float32)), "got float32"),
        (".npy", npy(np.zeros((3, 8), np.int8)), "got int8"),
        (".npy", npy(np.zeros(8, np.uint8)), r"got uint8 \[8\]"),
        (".npy", npy(np.asfortranarray(codes_of(3))), "Fortran order"),
        (".npy", npy(np.array([[object()]])), "got object"),
        (".npy", npy_of_shape(1 << 60, 8), "is damaged"),
        (".npy", npy_of_shape(-1, -8), "must hold uint8"),
        (".npy", npy_of_shape(1 << 60, 0), "must hold uint8"),
        (".npy", npy(codes_of(3))[:-1], "is damaged"),
        (".npy", npy(codes_of(3)) + b"x", "is damaged"),
        (".u8bin", b"", "got 0"),
        (".u8bin", b"\1\0\0\0\1\0\0", "got 7"),
        (".u8bin", struct.pack("<II", 5, 0), r"got \[5, 0\]"),
        (".u8bin", struct.pack("<II", 0xFFFFFFFF, 0xFFFFFFFF), "is damaged"),
        (".u8bin", struct.pack("<II", 2, 8) + bytes(15), "is damaged"),
        (".u8bin", struct.pack("<II", 2, 8) + bytes(17), "is damaged"),
        (".u8bin", struct.pack(">II", 2, 8) + bytes(16), "is damaged"),
    ],
)
@pytest.mark.parametrize("mmap", [False, True])
def test_damaged_files_are_refused_in_one_line(tmp_path, suffix, contents, message, mmap):
    path = tmp_path / f"codes{suffix}"
    path.write_bytes(contents)
    with pytest.raises(InputError, match=message) as caught:
        read_codes(path, bit_order="msb_first", mmap=mmap)
    assert "\n" not in str(caught.value) and path.name in str(caught.value)


def test_what_is_not_a_file_is_refused(tmp_path):
    (tmp_path / "folder.npy").mkdir()
    for name in ("folder.npy", "missing.u8bin"):
        with pytest.raises(InputError, match="path must be a file"):
            read_codes(tmp_path / name, bit_order="msb_first")
    with pytest.raises(InputError, match="must end in"):
        read_codes(tmp_path / "codes.hdf5", bit_order="msb_first")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


HEADER = "{'descr': '|u1', 'fortran_order': False, 'shape': (2, 8), }"


def npy_with(header: bytes) -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(16)


@settings(max_examples=300, deadline=None)
@given(
    suffix=st.sampled_from(SUFFIXES),
    contents=st.binary(max_size=64)
    | st.builds(
        npy_with, st.binary(max_size=40) | st.text("{}()'[],: \n\\#u18descrshape-L0b", max_size=80).map(str.encode)
    )
    | st.builds(
        lambda at, byte: npy_with(HEADER[:at].encode() + byte + HEADER[at + 1 :].encode()),
        st.integers(0, len(HEADER)),
        st.binary(max_size=2),
    )
    | st.builds(lambda end: npy_with(HEADER.encode())[:end], st.integers(0, 90))
    | st.builds(
        lambda count, width, size: struct.pack("<II", count, width) + bytes(size),
        st.integers(0, 9) | st.integers(0, 0xFFFFFFFF),
        st.integers(0, 9) | st.integers(0, 0xFFFFFFFF),
        st.integers(0, 99),
    ),
    mmap=st.booleans(),
)
@example(suffix=".npy", contents=npy_with(b"(" * 5000), mmap=False)
def test_whatever_a_file_holds_it_is_codes_or_an_input_error(folder, suffix, contents, mmap):
    path = folder / f"codes{suffix}"
    path.write_bytes(contents)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python's and numpy's, of odd headers
        try:
            codes = read_codes(path, bit_order="msb_first", mmap=mmap)
        except InputError as error:
            assert "\n" not in str(error)
        else:
            assert codes.dtype == np.uint8 and codes.ndim == 2
            assert contents.endswith(codes.tobytes())


def hdf5(path, **changed):
    """A data set as ann-benchmarks writes it; with None, a part is missing."""
    h5py = pytest.importorskip("h5py")
    rng = np.random.default_rng(0)
    train, test = rng.random((200, 48)) < 0.5, rng.random((7, 48)) < 0.5
    distances = (train[None] ^ test[:, None]).mean(2)
    neighbors = distances.argsort(axis=1, kind="stable")[:, :10].astype(np.int32)
    parts = {"train": train, "test": test, "neighbors": neighbors, "distance": "hamming"}
    parts["distances"] = np.take_along_axis(distances, neighbors, 1).astype(np.float32)
    with h5py.File(path, "w") as file:
        for name, value in (parts | changed).items():
            if value is not None:
                (file.attrs if name == "distance" else file)[name] = value
    return parts


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64])
def test_ann_benchmarks(tmp_path, dtype, monkeypatch):
    monkeypatch.setattr("hashengine.index.files._BLOCK_ROWS", 64)
    parts = hdf5(tmp_path / "a.hdf5")
    path = tmp_path / "b.hdf5"
    hdf5(path, train=parts["train"].astype(dtype), test=parts["test"].astype(dtype), distance=b"hamming")
    train, test, neighbors, distances = read_ann_benchmarks(path)
    np.testing.assert_array_equal(train, np.packbits(parts["train"], axis=1))
    np.testing.assert_array_equal(test, np.packbits(parts["test"], axis=1))
    assert neighbors.dtype == np.int64 and distances.dtype == np.float32
    index = HammingIndex(48)
    index.add(train)
    found, ids = index.search(test, 10)
    np.testing.assert_array_equal(ids, neighbors)
    np.testing.assert_allclose(found / 48, distances, rtol=1e-6)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"distance": "angular"}, "distance must be 'hamming', got 'angular'"),
        ({"distance": None}, "distance must be 'hamming', got None"),
        ({"distance": ["hamming", "euclidean"]}, "b.hdf5"),
        ({"train": None}, "train must be a matrix of bool or integers or unsigned integers, got none"),
        ({"train": np.zeros((9, 48))}, "got float64"),
        ({"train": np.full((9, 48), 2)}, "zeros and ones"),
        ({"train": np.zeros((9, 50), bool)}, "multiple of 8 values a row, got 50"),
        ({"train": np.zeros((9, 40), bool)}, "one width"),
        ({"test": np.zeros(48, bool)}, r"got bool \[48\]"),
        ({"neighbors": np.zeros((3, 10), int)}, "a row a query"),
        ({"distances": "words"}, "distances must be a matrix"),
    ],
)
def test_other_hdf5_is_refused(tmp_path, changed, message):
    hdf5(tmp_path / "b.hdf5", **changed)
    with pytest.raises(InputError, match=message) as caught:
        read_ann_benchmarks(tmp_path / "b.hdf5")
    assert "\n" not in str(caught.value)


def test_damaged_hdf5_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.hdf5"
    hdf5(path)
    contents = path.read_bytes()
    for end in (0, 10, 600, len(contents) - 500):
        path.write_bytes(contents[:end])
        with pytest.raises(InputError, match=r"a\.hdf5"):
            read_ann_benchmarks(path)
    with pytest.raises(InputError, match="where there is none"):
        read_ann_benchmarks(tmp_path / "missing.hdf5")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(InputError, match=r"hashengine\[hdf5\]"):
        read_ann_benchmarks(path)
