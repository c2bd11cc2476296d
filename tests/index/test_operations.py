"""Every operation of a HammingIndex, in any order, against a list of codes; and searches beside a writer."""

import copy
import os
import pickle
import tempfile
import threading
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hashengine import HammingIndex, InputError
from tests.helpers.hamming_levels import native_levels
from tests.index.test_index import assert_same_index, codes_of, index_of

BITS = 16


def distances_of(queries: np.ndarray, codes: np.ndarray) -> np.ndarray:
    return np.unpackbits(queries[:, None] ^ codes, axis=-1).sum(-1, dtype=np.int64)


def array(result: np.ndarray | torch.Tensor) -> np.ndarray:
    return result.cpu().numpy() if isinstance(result, torch.Tensor) else result


def few_codes(count: int, seed: int) -> np.ndarray:
    """Codes of few values, so that most distances are ties."""
    return np.random.default_rng(seed).choice(np.array([0, 1, 3, 128, 255], np.uint8), (count, BITS // 8))


class Operations(RuleBasedStateMachine):
    """`codes` and `ids` are what the index must hold, in insertion order."""

    placements = [{}]  # of the index, as the constructor takes them

    @initialize(own_ids=st.booleans(), level=st.sampled_from(native_levels() or [None]), place=st.integers(0, 9))
    def start(self, own_ids, level, place):
        self.environment = mock.patch.dict(os.environ, {} if level is None else {"HASHENGINE_SIMD_LEVEL": level})
        self.environment.start()
        self.own_ids, self.next_id = own_ids, 0
        self.index = HammingIndex(BITS, **self.placement(place))
        self.codes, self.ids = np.zeros((0, BITS // 8), np.uint8), np.zeros(0, np.int64)
        self.folder = tempfile.TemporaryDirectory()

    @staticmethod
    def as_tensor(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values)

    def placement(self, number: int) -> dict:
        return self.placements[number % len(self.placements)]

    def teardown(self):
        if hasattr(self, "folder"):
            self.folder.cleanup()
            self.environment.stop()

    @rule(count=st.integers(0, 12), seed=st.integers(0, 99))
    def add(self, count, seed):
        codes = few_codes(count, seed)
        if self.own_ids:  # of a few, so that ids of removed codes come again
            ids = np.random.default_rng(seed).permutation(np.setdiff1d(np.arange(60) * 3, self.ids))[:count]
            codes = codes[: len(ids)]
            self.index.add(codes, ids)
        else:
            ids = np.arange(self.next_id, self.next_id + count)
            self.next_id += count
            self.index.add(self.as_tensor(codes))
        self.codes, self.ids = np.concatenate([self.codes, codes]), np.concatenate([self.ids, ids])

    def some_ids(self, seed) -> np.ndarray:
        rng = np.random.default_rng(seed)
        return rng.permutation(self.ids)[: rng.integers(0, 1 + len(self.ids))]

    @rule(seed=st.integers(0, 99))
    def remove(self, seed):
        ids = self.some_ids(seed)
        self.index.remove(ids)
        keep = ~np.isin(self.ids, ids)
        self.codes, self.ids = self.codes[keep], self.ids[keep]

    @rule(seed=st.integers(0, 99))
    def update(self, seed):
        ids = self.some_ids(seed)
        codes = few_codes(len(ids), seed + 1)
        self.index.update(self.as_tensor(ids), codes)
        for id, code in zip(ids, codes, strict=True):
            self.codes[self.ids == id] = code

    @rule()
    def compact(self):
        self.index.compact()

    @rule(load=st.sampled_from(["", "read", "mmap"]), folder=st.sampled_from(["a", "b"]), place=st.integers(0, 9))
    def save(self, load, folder, place):
        path = Path(self.folder.name, folder)
        self.index.save(path)
        if load:
            self.index = HammingIndex.load(path, mmap=load == "mmap", **self.placement(place))

    @rule(seed=st.integers(0, 99))
    def reconstruct(self, seed):
        ids = self.some_ids(seed)
        expected = [self.codes[self.ids == id][0] for id in ids]
        np.testing.assert_array_equal(self.index.reconstruct(ids), np.array(expected, np.uint8).reshape(-1, BITS // 8))

    @rule(seed=st.integers(0, 99))
    def unknown_ids_change_nothing(self, seed):
        ids = np.concatenate([self.some_ids(seed), [1000 + seed]])
        for call in (
            lambda: self.index.remove(ids),
            lambda: self.index.update(ids, few_codes(len(ids), seed)),
            lambda: self.index.reconstruct(ids),
        ):
            with pytest.raises(InputError, match=rf"ids must be those of codes in the index, got {1000 + seed}"):
                call()

    @precondition(lambda self: len(self.ids))
    @rule(
        seed=st.integers(0, 99),
        kind=st.sampled_from(["none", "mask", "bitmap", "masks", "bitmaps"]),
        as_torch=st.booleans(),
    )
    def look(self, seed, kind, as_torch):
        rng = np.random.default_rng(seed)
        queries, count = few_codes(3, seed), len(self.ids)
        masks = rng.random((3, count)) < rng.choice([0.1, 0.6])
        masks = {"none": masks | True, "mask": masks[:1].repeat(3, 0), "bitmap": masks[:1].repeat(3, 0)}.get(
            kind, masks
        )
        filter = None if kind == "none" else masks if kind.endswith("s") else masks[0]
        if kind.startswith("bitmap"):
            filter = np.packbits(filter, axis=-1, bitorder="little")
            filter[..., -1] |= 0xFF << (count % 8 or 8) & 0xFF  # what lies behind the last code is not read
        convert = self.as_tensor if as_torch else np.asarray
        filter = None if filter is None else convert(filter)
        distances = np.where(masks, distances_of(queries, self.codes), BITS + 1)
        order = np.argsort(distances, axis=1, kind="stable")
        nearest = np.take_along_axis(distances, order, 1)
        ids = np.where(nearest > BITS, -1, self.ids[order])

        k = int(rng.integers(1, count + 1))
        found = list(map(array, self.index.search(convert(queries), k, filter=filter)))
        np.testing.assert_array_equal(found[0], nearest[:, :k])
        np.testing.assert_array_equal(found[1], ids[:, :k])

        radius, most = int(rng.integers(0, BITS + 1)), rng.choice([None, 1, 5])
        found = self.index.range_search(convert(queries), radius, filter=filter, max_results=most)
        found = list(map(array, found))
        within = [(nearest[q] <= radius).nonzero()[0][:most] for q in range(3)]
        np.testing.assert_array_equal(found[0], np.cumsum([0, *map(len, within)]))
        np.testing.assert_array_equal(found[1], np.concatenate([nearest[q][w] for q, w in enumerate(within)]))
        np.testing.assert_array_equal(found[2], np.concatenate([ids[q][w] for q, w in enumerate(within)]))

        labels = rng.integers(0, 3, 3), rng.integers(0, 3, count)
        relevant = labels[0][:, None] == labels[1]
        if seed % 2:
            labels = rng.random((3, 4)) < 0.3, (rng.random((count, 4)) < 0.3).astype(np.int32)
            relevant = (labels[0].astype(int) @ labels[1].T) > 0

        def histogram(chosen) -> list:
            return [np.bincount(distances[q][chosen[q]], minlength=BITS + 2)[: BITS + 1] for q in range(3)]

        np.testing.assert_array_equal(array(self.index.count(convert(queries), filter=filter)), histogram(masks))
        counts = self.index.count(convert(queries), filter=filter, labels=tuple(map(convert, labels)))
        counts = list(map(array, counts))
        np.testing.assert_array_equal(counts[0], histogram(masks))
        np.testing.assert_array_equal(counts[1], histogram(masks & relevant))

    @invariant()
    def holds_what_it_must(self):
        if hasattr(self, "folder"):
            assert len(self.index) == len(self.ids)
            np.testing.assert_array_equal(self.index.ids(), self.ids)
            np.testing.assert_array_equal(array(self.index.codes), self.codes)


Operations.TestCase.settings = settings(
    max_examples=250, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
TestOperations = Operations.TestCase


def test_ids_stay_after_removal_and_compaction(tmp_path):
    index = index_of(10)
    index.remove(np.array([3, 9]))
    index.compact()
    index.save(tmp_path)
    index = HammingIndex.load(tmp_path)
    index.add(codes_of(2, seed=3))
    assert index.ids().tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 10, 11]
    index.remove(index.ids())
    index.compact()
    assert len(index) == len(index.codes) == 0
    index.add(codes_of(1))
    assert index.ids().tolist() == [12]


def test_an_updated_code_keeps_its_place():
    index = index_of(5)
    index.update(np.array([1]), codes_of(5)[4:])
    assert index.search(codes_of(5)[4:], 2)[1].tolist() == [[1, 4]]


def test_a_copy_and_a_pickle_are_the_same_index():
    index = index_of(ids=True)
    index.remove(np.array([20]))
    for other in (copy.deepcopy(index), pickle.loads(pickle.dumps(index))):
        assert_same_index(other, index)
        other.add(codes_of(1), np.array([20]))
        other.update(np.array([490]), codes_of(1, seed=7))
        assert len(index) == 49 and (index.reconstruct(np.array([490])) == codes_of(1)).all()


def test_an_index_with_nothing_in_it():
    index, queries = HammingIndex(64), codes_of(2)
    lims, distances, ids = index.range_search(queries, 64)
    assert lims.tolist() == [0, 0, 0] and len(distances) == len(ids) == 0
    assert index.count(queries).sum() == 0
    index.remove(np.zeros(0, np.int64))
    index.compact()
    assert index.ids().tolist() == []


def test_a_million_ids_one_batch_after_another():
    """Half a second of look-ups at most; a scan of all ids for each batch would take minutes."""
    ids = np.random.default_rng(0).permutation(1 << 20)
    index = HammingIndex(8)
    codes = (ids & 255).astype(np.uint8)[:, None]
    for start in range(0, len(ids), 1 << 10):
        index.add(codes[start : start + (1 << 10)], ids[start : start + (1 << 10)])
    wanted = np.arange(0, 1 << 20, 7)
    np.testing.assert_array_equal(index.reconstruct(wanted)[:, 0], wanted & 255)
    with pytest.raises(InputError, match="got 5, which the index holds already"):
        index.add(codes[:1], np.array([5]))


@pytest.mark.parametrize("mapped", [False, True])
def test_searches_beside_a_writer_see_one_state_each(tmp_path, mapped):
    index = HammingIndex(16)
    index.add(MARKS)
    if mapped:
        index.save(tmp_path)
        index = HammingIndex.load(tmp_path, mmap=True)
    query = np.zeros((1, 2), np.uint8)

    def count():
        assert index.count(query).sum() % 5 == len(MARKS) % 5

    check_states_beside_a_writer(index, query, steps=400, also=count)


MARKS = np.array([[255, 0]] * 64, np.uint8)  # the first codes of an index that check_states_beside_a_writer takes


def check_states_beside_a_writer(
    index: HammingIndex, query: np.ndarray | torch.Tensor, *, steps: int, also=lambda: None, within=nullcontext
) -> None:
    """Every state holds the codes 0 .. n-1 once and, at distance 8, marks that an update writes all at once.

    ``query``: of zeros. Each of three threads searches, and calls ``also``, within a context that ``within`` makes.
    """
    stop, failures = threading.Event(), []

    def read():
        with within():
            while not stop.is_set():
                try:
                    _, distances, ids = map(array, index.range_search(query, 16))
                    first = distances[ids < 64]
                    assert len(first) == 64 and (first == first[0]).all(), "half an update"
                    rest = np.sort(ids[ids >= 64])
                    assert len(rest) % 5 == 0 and (np.diff(rest) == 1).all(), "half a batch"
                    also()
                except BaseException as error:
                    failures.append(error)
                    return

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    rng = np.random.default_rng(0)
    first = last = 64
    for step in range(steps):
        index.add(rng.integers(0, 256, (5, 2), dtype=np.uint8))
        last += 5
        index.update(np.arange(64), MARKS ^ np.uint8(255 if step % 2 else 0) if step % 3 else MARKS & 15)
        if step % 2:
            index.remove(np.arange(first, first + 5))
            first += 5
        if step % 20 == 0:
            index.compact()
    stop.set()
    for reader in readers:
        reader.join()
    assert not failures, failures[0]
    assert index.ids().tolist() == [*range(64), *range(first, last)]
