"""Bit orders, and FAISS both ways."""

import sys

import numpy as np
import pytest
import torch

from hashengine import HammingIndex, InputError
from hashengine.index import from_faiss, read_codes, reverse_bits, to_faiss, write_codes
from tests.index.test_index import assert_same_index, codes_of, index_of

ORDERS = ["msb_first", "lsb_first"]


def in_order(codes, bit_order):
    """What numpy.packbits makes of the codes' bits in that order."""
    bits = np.unpackbits(codes, axis=1)
    return np.packbits(bits, axis=1, bitorder="big" if bit_order == "msb_first" else "little")


def assert_same_results(index, oracle, bit_order):
    queries = codes_of(9, index.bits, seed=5)
    distances, ids = index.search(queries, len(index))
    oracle_distances, oracle_ids = oracle.search(in_order(queries, bit_order), len(index))
    np.testing.assert_array_equal(distances, oracle_distances)
    np.testing.assert_array_equal(ids, oracle_ids)


@pytest.fixture
def faiss():
    return pytest.importorskip("faiss")


@pytest.mark.parametrize("library", [np.asarray, torch.from_numpy])
def test_reverse_bits(library):
    codes = np.arange(256, dtype=np.uint8).reshape(4, 64)
    reversed = reverse_bits(library(codes))
    assert isinstance(reversed, type(library(codes)))
    np.testing.assert_array_equal(reversed, in_order(codes, "lsb_first"))
    np.testing.assert_array_equal(reverse_bits(reversed), codes)
    with pytest.raises(TypeError, match="uint8, got"):
        reverse_bits(library(codes.astype(np.int64)))


@pytest.mark.parametrize("bit_order", ["big", "MSB", None])
def test_a_bit_order_is_one_of_two(faiss, tmp_path, bit_order):
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
        read_codes(tmp_path / "a.npy")  # never assumed


@pytest.mark.parametrize("bit_order", ORDERS)
@pytest.mark.parametrize("bits", [8, 72, 256])
def test_flat_both_ways(faiss, bits, bit_order, tmp_path):
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
    index.add(codes)  # positions go on


@pytest.mark.parametrize("bit_order", ORDERS)
@pytest.mark.parametrize("kind", ["IndexBinaryIDMap", "IndexBinaryIDMap2"])
def test_id_maps_both_ways(faiss, kind, bit_order, tmp_path):
    codes, ids = codes_of(300), np.random.default_rng(1).permutation(1 << 20)[:300]
    oracle = getattr(faiss, kind)(faiss.IndexBinaryFlat(64))
    oracle.add_with_ids(in_order(codes, bit_order), ids)
    index = from_faiss(oracle, bit_order=bit_order)
    np.testing.assert_array_equal(index.ids(), ids)
    np.testing.assert_array_equal(index.codes, codes)

    faiss.write_index_binary(to_faiss(index, bit_order=bit_order), str(tmp_path / "index"))
    back = faiss.read_index_binary(str(tmp_path / "index"))
    assert type(back) is faiss.IndexBinaryIDMap2
    np.testing.assert_array_equal(back.reconstruct(int(ids[7])), in_order(codes, bit_order)[7])
    assert_same_index(from_faiss(back, bit_order=bit_order), index)


def test_removed_codes_stay_behind_and_ids_stay_what_they_are(faiss):
    index = index_of(count=200)
    index.remove(torch.arange(0, 200, 3))
    converted = to_faiss(index, bit_order="msb_first")
    assert type(converted) is faiss.IndexBinaryIDMap2
    np.testing.assert_array_equal(faiss.vector_to_array(converted.id_map), index.ids())
    assert_same_index(from_faiss(converted, bit_order="msb_first"), index)


def test_positions_are_told_by_the_ids_and_not_by_how_they_came(faiss):
    index = HammingIndex(64)
    index.add(codes_of(50), np.arange(50))
    assert type(to_faiss(index, bit_order="msb_first")) is faiss.IndexBinaryFlat


@pytest.mark.parametrize("ids", [False, True])
def test_a_converted_index_lives_on_its_own(faiss, ids):
    index = index_of(ids=ids)
    oracle = to_faiss(index, bit_order="msb_first")
    codes = index.codes.clone()
    index.update(index.ids(), np.zeros((50, 8), np.uint8))
    del index
    np.testing.assert_array_equal(from_faiss(oracle, bit_order="msb_first").codes, codes)
    assert oracle.search(codes[:5].numpy(), 1)[0].max() == 0


def test_empty_indexes(faiss):
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


def test_without_faiss_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(InputError, match=r"hashengine\[bench\]"):
        to_faiss(HammingIndex(64), bit_order="msb_first")
