"""Formats of other programs: bit orders, `.npy`, `.u8bin`, HDF5 and FAISS; and damaged files."""

import io
import struct
import sys
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hashengine import HammingIndex, InputError
from hashengine.index import from_faiss, read_ann_benchmarks, read_codes, reverse_bits, to_faiss, write_codes
from hashengine.index.formats import BIT_ORDERS, SUFFIXES
from tests.helpers.indexes import assert_same_index, codes_of, index_of


def in_order(codes, bit_order):
    """The codes in `bit_order`, converted by numpy."""
    bits = np.unpackbits(codes, axis=1)
    return np.packbits(bits, axis=1, bitorder="big" if bit_order == "msb_first" else "little")


@pytest.fixture
def faiss():
    return pytest.importorskip("faiss")


@pytest.mark.parametrize("library", [np.asarray, torch.from_numpy])
def test_reverse_bits_equals_numpy_and_is_its_own_inverse(library):
    codes = np.arange(256, dtype=np.uint8).reshape(4, 64)
    turned = reverse_bits(library(codes))
    assert isinstance(turned, type(library(codes)))
    np.testing.assert_array_equal(turned, in_order(codes, "lsb_first"))
    np.testing.assert_array_equal(reverse_bits(turned), codes)
    with pytest.raises(InputError, match="reverse_bits: codes must be uint8, got int64"):
        reverse_bits(library(codes.astype(np.int64)))


@pytest.mark.parametrize("bit_order", ["big", "MSB", None])
def test_unknown_and_missing_bit_orders_are_refused(faiss, tmp_path, bit_order):
    write_codes(tmp_path / "a.npy", codes_of(3), bit_order="msb_first")
    for call in (
        lambda: from_faiss(faiss.IndexBinaryFlat(64), bit_order=bit_order),
        lambda: to_faiss(HammingIndex(64), bit_order=bit_order),
        lambda: read_codes(tmp_path / "a.npy", bit_order=bit_order),
        lambda: write_codes(tmp_path / "b.npy", codes_of(3), bit_order=bit_order),
    ):
        with pytest.raises(InputError, match="bit_order must be 'msb_first' or 'lsb_first', got"):
            call()
    with pytest.raises(TypeError, match="bit_order"):
        read_codes(tmp_path / "a.npy")  # the bit order has no default


@pytest.mark.parametrize("bit_order", BIT_ORDERS)
@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (37, 5), (1000, 128)])
def test_a_written_file_is_read_back(tmp_path, suffix, shape, bit_order):
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
def test_changes_of_mapped_codes_do_not_change_the_file(tmp_path, suffix):
    path = tmp_path / f"codes{suffix}"
    for count in (0, 100):
        write_codes(path, codes_of(count), bit_order="msb_first")
        contents = path.read_bytes()
        codes = read_codes(path, bit_order="msb_first", mmap=True)
        np.testing.assert_array_equal(codes, codes_of(count))
        codes[:] = 0
        assert path.read_bytes() == contents
    assert isinstance(codes, np.memmap)
    with pytest.raises(InputError, match="bit_order must be 'msb_first' to map the codes, got 'lsb_first'"):
        read_codes(path, bit_order="lsb_first", mmap=True)


def test_codes_that_are_not_contiguous_are_written(tmp_path):
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


def test_wrong_codes_and_paths_cannot_be_written(tmp_path):
    with pytest.raises(InputError, match=r"a name that ends in .npy or .u8bin, got 'codes.bin'"):
        write_codes(tmp_path / "codes.bin", codes_of(3), bit_order="msb_first")
    with pytest.raises(InputError, match="codes must be uint8, got float64"):
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
        (".npy", npy_of_shape(1 << 60, 8), "the file is damaged"),
        (".npy", npy_of_shape(-1, -8), "must be a file of uint8"),
        (".npy", npy_of_shape(1 << 60, 0), "must be a file of uint8"),
        (".npy", npy(codes_of(3))[:-1], "the file is damaged"),
        (".npy", npy(codes_of(3)) + b"x", "the file is damaged"),
        (".u8bin", b"", "got 0"),
        (".u8bin", b"\1\0\0\0\1\0\0", "got 7"),
        (".u8bin", struct.pack("<II", 5, 0), r"got \[5, 0\]"),
        (".u8bin", struct.pack("<II", 0xFFFFFFFF, 0xFFFFFFFF), "the file is damaged"),
        (".u8bin", struct.pack("<II", 2, 8) + bytes(15), "the file is damaged"),
        (".u8bin", struct.pack("<II", 2, 8) + bytes(17), "the file is damaged"),
        (".u8bin", struct.pack(">II", 2, 8) + bytes(16), "the file is damaged"),
    ],
)
@pytest.mark.parametrize("mmap", [False, True])
def test_a_damaged_file_raises_an_error_of_one_line(tmp_path, suffix, contents, message, mmap):
    path = tmp_path / f"codes{suffix}"
    path.write_bytes(contents)
    with pytest.raises(InputError, match=message) as caught:
        read_codes(path, bit_order="msb_first", mmap=mmap)
    assert "\n" not in str(caught.value) and path.name in str(caught.value)


@pytest.mark.parametrize("path", ["codes\0.npy", "", b"codes.npy", None])
def test_values_that_are_no_paths_are_refused(path):
    for where, call in (("read_codes", read_codes), ("write_codes", partial(write_codes, codes=codes_of(3)))):
        with pytest.raises(InputError, match=f"^{where}: path must be a path"):
            call(path, bit_order="msb_first")


def test_paths_that_are_not_files_are_refused(tmp_path):
    (tmp_path / "folder.npy").mkdir()
    for name in ("folder.npy", "missing.u8bin"):
        with pytest.raises(InputError, match="path must be a file"):
            read_codes(tmp_path / name, bit_order="msb_first")
    with pytest.raises(InputError, match="ends in"):
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
def test_any_contents_give_codes_or_an_input_error(folder, suffix, contents, mmap):
    path = folder / f"codes{suffix}"
    path.write_bytes(contents)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python and numpy warn about odd headers
        try:
            codes = read_codes(path, bit_order="msb_first", mmap=mmap)
        except InputError as error:
            assert "\n" not in str(error)
        else:
            assert codes.dtype == np.uint8 and codes.ndim == 2
            assert contents.endswith(codes.tobytes())


def hdf5(path, **changed):
    """Write a data set in the format of ann-benchmarks. Return its parts as they are before `changed` is applied.

    `changed` replaces parts of the written file by others; a part that is None is left out.
    """
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
def test_a_data_set_of_ann_benchmarks_is_read(tmp_path, dtype, monkeypatch):
    monkeypatch.setattr("hashengine.index.formats.HDF5_BLOCK_ROWS", 64)
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
        ({"distance": "angular"}, "distance of .* must be 'hamming', got 'angular'"),
        ({"distance": None}, "distance of .* must be 'hamming', got None"),
        ({"distance": ["hamming", "euclidean"]}, "b.hdf5"),
        ({"train": None}, "train in .* must be a matrix of bool or integers or unsigned integers, got none"),
        ({"train": np.zeros((9, 48))}, "got float64"),
        ({"train": np.full((9, 48), 2)}, "zeros and ones"),
        ({"train": np.zeros((9, 50), bool)}, "multiple of 8 values per row, got 50"),
        ({"train": np.zeros((9, 40), bool)}, "one width"),
        ({"test": np.zeros(48, bool)}, r"got bool \[48\]"),
        ({"neighbors": np.zeros((3, 10), int)}, "one row per query"),
        ({"distances": "words"}, "distances in .* must be a matrix"),
    ],
)
def test_hdf5_with_wrong_contents_raises_an_error_of_one_line(tmp_path, changed, message):
    hdf5(tmp_path / "b.hdf5", **changed)
    with pytest.raises(InputError, match=message) as caught:
        read_ann_benchmarks(tmp_path / "b.hdf5")
    assert "\n" not in str(caught.value)


def test_truncated_hdf5_missing_hdf5_and_missing_h5py_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.hdf5"
    hdf5(path)
    contents = path.read_bytes()
    for end in (0, 10, 600, len(contents) - 500):
        path.write_bytes(contents[:end])
        with pytest.raises(InputError, match=r"a\.hdf5"):
            read_ann_benchmarks(path)
    with pytest.raises(InputError, match="path must be a file, got"):
        read_ann_benchmarks(tmp_path / "missing.hdf5")
    for no_path in (None, 5, b"a.hdf5", "", "a\0b"):
        with pytest.raises(InputError, match="^read_ann_benchmarks: path must be a path"):
            read_ann_benchmarks(no_path)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(InputError, match=r"hashengine\[hdf5\]"):
        read_ann_benchmarks(path)


def assert_same_results(index, oracle, bit_order):
    queries = codes_of(9, index.bits, seed=5)
    distances, ids = index.search(queries, len(index))
    oracle_distances, oracle_ids = oracle.search(in_order(queries, bit_order), len(index))
    np.testing.assert_array_equal(distances, oracle_distances)
    np.testing.assert_array_equal(ids, oracle_ids)


@pytest.mark.parametrize("bit_order", BIT_ORDERS)
@pytest.mark.parametrize("bits", [8, 72, 256])
def test_flat_faiss_indexes_are_converted_in_both_directions(faiss, bits, bit_order, tmp_path):
    codes = codes_of(300, bits)
    oracle = faiss.IndexBinaryFlat(bits)
    oracle.add(in_order(codes, bit_order))
    index = from_faiss(oracle, bit_order=bit_order)
    np.testing.assert_array_equal(index.codes, codes)
    assert_same_results(index, oracle, bit_order)

    faiss.write_index_binary(to_faiss(index, bit_order=bit_order), str(tmp_path / "index"))
    back = faiss.read_index_binary(str(tmp_path / "index"))
    assert type(back) is faiss.IndexBinaryFlat
    assert_same_results(index, back, bit_order)
    assert_same_index(from_faiss(back, bit_order=bit_order), index)
    index.add(codes)  # raises no error without ids: the new codes get the next ids


@pytest.mark.parametrize("bit_order", BIT_ORDERS)
@pytest.mark.parametrize("kind", ["IndexBinaryIDMap", "IndexBinaryIDMap2"])
def test_faiss_id_maps_are_converted_in_both_directions(faiss, kind, bit_order, tmp_path):
    codes, ids = codes_of(300), np.random.default_rng(1).permutation(1 << 20)[:300]
    oracle = getattr(faiss, kind)(faiss.IndexBinaryFlat(64))
    oracle.add_with_ids(in_order(codes, bit_order), ids)
    index = from_faiss(oracle, bit_order=bit_order)
    np.testing.assert_array_equal(index.ids, ids)
    np.testing.assert_array_equal(index.codes, codes)

    faiss.write_index_binary(to_faiss(index, bit_order=bit_order), str(tmp_path / "index"))
    back = faiss.read_index_binary(str(tmp_path / "index"))
    assert type(back) is faiss.IndexBinaryIDMap2
    np.testing.assert_array_equal(back.reconstruct(int(ids[7])), in_order(codes, bit_order)[7])
    assert_same_index(from_faiss(back, bit_order=bit_order), index)


def test_conversion_drops_removed_codes_and_keeps_ids(faiss):
    index = index_of(count=200)
    index.remove(torch.arange(0, 200, 3))
    converted = to_faiss(index, bit_order="msb_first")
    assert type(converted) is faiss.IndexBinaryIDMap2
    np.testing.assert_array_equal(faiss.vector_to_array(converted.id_map), index.ids)
    assert_same_index(from_faiss(converted, bit_order="msb_first"), index)


def test_ids_that_are_positions_make_a_flat_faiss_index(faiss):
    index = HammingIndex(64)
    index.add(codes_of(50), np.arange(50))
    assert type(to_faiss(index, bit_order="msb_first")) is faiss.IndexBinaryFlat


@pytest.mark.parametrize("ids", [False, True])
def test_a_converted_index_is_independent_of_the_original(faiss, ids):
    index = index_of(ids=ids)
    oracle = to_faiss(index, bit_order="msb_first")
    codes = index.codes.clone()
    index.update(index.ids, np.zeros((50, 8), np.uint8))
    del index
    np.testing.assert_array_equal(from_faiss(oracle, bit_order="msb_first").codes, codes)
    assert oracle.search(codes[:5].numpy(), 1)[0].max() == 0


def test_empty_faiss_indexes_are_converted(faiss):
    assert to_faiss(HammingIndex(64), bit_order="msb_first").ntotal == 0
    assert len(from_faiss(faiss.IndexBinaryFlat(64), bit_order="lsb_first")) == 0
    assert len(from_faiss(faiss.IndexBinaryIDMap2(faiss.IndexBinaryFlat(64)), bit_order="lsb_first")) == 0


def test_other_faiss_indexes_are_refused(faiss):
    hnsw = faiss.IndexBinaryHNSW(64)
    for other, kind in (
        (hnsw, "IndexBinaryHNSW"),
        (faiss.IndexBinaryIDMap2(hnsw), "IndexBinaryIDMap2 over IndexBinaryHNSW"),
        (faiss.IndexFlatL2(64), "IndexFlatL2"),
        (None, "NoneType"),
    ):
        with pytest.raises(InputError, match=f"IndexBinaryFlat, .* got {kind}; [^\n]*$"):
            from_faiss(other, bit_order="msb_first")
    twice = faiss.IndexBinaryIDMap2(faiss.IndexBinaryFlat(64))
    twice.add_with_ids(codes_of(2), np.array([7, 7]))
    with pytest.raises(InputError, match="ids must be unique, got 7"):
        from_faiss(twice, bit_order="msb_first")


def test_a_missing_faiss_is_reported_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(InputError, match=r"hashengine\[bench\]"):
        to_faiss(HammingIndex(64), bit_order="msb_first")
