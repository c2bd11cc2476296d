"""Two tests of a HammingIndex: random operations, compared with expected contents in numpy; searches during writes."""

from __future__ import annotations

import copy
import os
import pickle
import tempfile
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hashengine import HammingIndex, InputError
from hashengine.index import code_memory, execution, snapshot
from tests.helpers.hamming_levels import native_levels
from tests.helpers.indexes import as_numpy

BITS = 16
QUERIES = 3
FILTER_KINDS = ("none", "mask", "bitmap", "mask per query", "bitmap per query")
UNCHECKED = settings(deadline=None, suppress_health_check=list(HealthCheck))  # allows function-scoped fixtures

# Constructor arguments of indexes on one to three devices, streamed or not. No GPU is needed: the list of devices may
# name the CPU more than once, and codes can be streamed to the CPU.
PLACEMENTS: list[dict[str, Any]] = [
    {"device": ["cpu"] * devices, "streamed": streamed} for devices in (1, 2, 3) for streamed in (False, True)
]


def use_small_blocks(
    patch: pytest.MonkeyPatch,
    *,
    shard_block_rows: int = 8,
    chunk_rows: int = 16,
    transfer_rows: int = 5,
    bytes_per_code: int = BITS // 8,
) -> None:
    """Make shard blocks, transfers and streamed chunks so small that a few dozen codes fill several of each.

    No search is small enough for `execution.topk_in_one_call`, which uses none of them.
    """
    patch.setattr(execution, "MAX_PAIRS_IN_ONE_CALL", 0)
    patch.setattr(code_memory, "SHARD_BLOCK_ROWS", shard_block_rows)
    patch.setattr(code_memory, "TRANSFER_BYTES", transfer_rows * bytes_per_code)
    patch.setattr(execution, "STREAM_CHUNK_BYTES", chunk_rows * bytes_per_code)
    patch.setattr(execution, "MAX_UNMERGED_PARTS", 2)
    patch.setattr(snapshot, "GPU_MASK_ENTRIES", 64)


def few_codes(count: int, seed: int) -> np.ndarray:
    """Codes of 25 different values, so that most distances are ties."""
    return np.random.default_rng(seed).choice(np.array([0, 1, 3, 128, 255], np.uint8), (count, BITS // 8))


def distances_of(queries: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Distances by definition, int64 [queries, codes]."""
    return np.unpackbits(queries[:, None] ^ codes, axis=-1).sum(-1, dtype=np.int64)


class Operations(RuleBasedStateMachine):
    """Hypothesis calls the rules in random order; `codes` and `ids` are the expected contents, in insertion order."""

    placements: ClassVar[list[dict[str, Any]]] = [{}]  # the constructor arguments to choose from

    @initialize(own_ids=st.booleans(), level=st.sampled_from(native_levels() or [None]), place=st.integers(0, 9))
    def start(self, own_ids: bool, level: str | None, place: int) -> None:
        self.environment = mock.patch.dict(os.environ, {} if level is None else {"HASHENGINE_SIMD_LEVEL": level})
        self.environment.start()
        self.own_ids, self.next_id = own_ids, 0
        self.index = HammingIndex(BITS, **self.placement(place))
        self.codes, self.ids = np.zeros((0, BITS // 8), np.uint8), np.zeros(0, np.int64)
        self.folder = tempfile.TemporaryDirectory()

    @staticmethod
    def as_tensor(values: np.ndarray) -> torch.Tensor:
        """The values as a tensor argument of the index. Subclasses may put it on another device than the CPU."""
        return torch.from_numpy(values)

    def placement(self, number: int) -> dict[str, Any]:
        return self.placements[number % len(self.placements)]

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.folder.cleanup()
            self.environment.stop()

    @rule(count=st.integers(0, 12), seed=st.integers(0, 99))
    def add(self, count: int, seed: int) -> None:
        codes = few_codes(count, seed)
        if self.own_ids:  # from a small set, so that ids of removed codes are used again
            ids = np.random.default_rng(seed).permutation(np.setdiff1d(np.arange(60) * 3, self.ids))[:count]
            codes = codes[: len(ids)]
            self.index.add(codes, ids)
        else:
            ids = np.arange(self.next_id, self.next_id + count)
            self.next_id += count
            self.index.add(self.as_tensor(codes))
        self.codes, self.ids = np.concatenate([self.codes, codes]), np.concatenate([self.ids, ids])

    def some_ids(self, seed: int) -> np.ndarray:
        """Random ids of the index in random order; possibly none or all."""
        rng = np.random.default_rng(seed)
        return rng.permutation(self.ids)[: rng.integers(0, 1 + len(self.ids))]

    @rule(seed=st.integers(0, 99))
    def remove(self, seed: int) -> None:
        ids = self.some_ids(seed)
        self.index.remove(ids)
        kept = ~np.isin(self.ids, ids)
        self.codes, self.ids = self.codes[kept], self.ids[kept]

    @rule(seed=st.integers(0, 99))
    def update(self, seed: int) -> None:
        ids = self.some_ids(seed)
        codes = few_codes(len(ids), seed + 1)
        self.index.update(self.as_tensor(ids), codes)
        for id, code in zip(ids, codes, strict=True):
            self.codes[self.ids == id] = code

    @rule()
    def compact(self) -> None:
        self.index.compact()

    @rule(load=st.sampled_from(["", "read", "mmap"]), folder=st.sampled_from(["a", "b"]), place=st.integers(0, 9))
    def save_and_load(self, load: str, folder: str, place: int) -> None:
        path = Path(self.folder.name, folder)
        self.index.save(path)
        if load:
            self.index = HammingIndex.load(path, mmap=load == "mmap", **self.placement(place))

    @rule(seed=st.integers(0, 99))
    def reconstruct(self, seed: int) -> None:
        ids = self.some_ids(seed)
        expected = [self.codes[self.ids == id][0] for id in ids]
        np.testing.assert_array_equal(self.index.reconstruct(ids), np.array(expected, np.uint8).reshape(-1, BITS // 8))

    @rule(seed=st.integers(0, 99))
    def unknown_ids_change_nothing(self, seed: int) -> None:
        ids = np.concatenate([self.some_ids(seed), [1000 + seed]])
        for call in (
            lambda: self.index.remove(ids),
            lambda: self.index.update(ids, few_codes(len(ids), seed)),
            lambda: self.index.reconstruct(ids),
        ):
            with pytest.raises(InputError, match=rf"ids must be ids in the index, got {1000 + seed}"):
                call()

    def draw_filter(self, kind: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray | None]:
        """Which codes each query may find: a mask, bool [QUERIES, codes], and the same mask as a filter of `kind`."""
        count = len(self.ids)
        if kind == "none":
            return np.ones((QUERIES, count), bool), None
        masks = rng.random((QUERIES, count)) < rng.choice([0.1, 0.6])
        if not kind.endswith("per query"):
            masks[:] = masks[0]
        filter = masks if kind.endswith("per query") else masks[0]
        if kind.startswith("bitmap"):
            filter = np.packbits(filter, axis=-1, bitorder="little")
            # The bits after the last code are set. They must have no effect.
            filter[..., -1] |= 0xFF << (count % 8 or 8) & 0xFF
        return masks, filter

    def convert(self, values: np.ndarray | None, as_torch: bool) -> Any:
        return values if values is None or not as_torch else self.as_tensor(values)

    def ranking(self, queries: np.ndarray, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Distances and ids of all codes, ordered by (distance, row); BITS + 1 and -1 for excluded codes."""
        distances = np.where(masks, distances_of(queries, self.codes), BITS + 1)
        order = np.argsort(distances, axis=1, kind="stable")
        distances = np.take_along_axis(distances, order, 1)
        return distances, np.where(distances > BITS, -1, self.ids[order])

    @precondition(lambda self: len(self.ids))
    @rule(seed=st.integers(0, 99), kind=st.sampled_from(FILTER_KINDS), as_torch=st.booleans())
    def search_equals_the_ranking(self, seed: int, kind: str, as_torch: bool) -> None:
        rng, queries = np.random.default_rng(seed), few_codes(QUERIES, seed)
        masks, filter = self.draw_filter(kind, rng)
        k = int(rng.integers(1, len(self.ids) + 1))
        found = self.index.search(self.convert(queries, as_torch), k, filter=self.convert(filter, as_torch))
        for result, expected in zip(found, self.ranking(queries, masks), strict=True):
            np.testing.assert_array_equal(as_numpy(result), expected[:, :k])

    @precondition(lambda self: len(self.ids))
    @rule(
        seed=st.integers(0, 99),
        kind=st.sampled_from(FILTER_KINDS),
        as_torch=st.booleans(),
        max_results=st.sampled_from([None, 1, 5]),
    )
    def range_search_equals_the_ranking(self, seed: int, kind: str, as_torch: bool, max_results: int | None) -> None:
        rng, queries = np.random.default_rng(seed), few_codes(QUERIES, seed)
        masks, filter = self.draw_filter(kind, rng)
        radius = int(rng.integers(0, BITS + 1))
        lims, distances, ids = map(
            as_numpy,
            self.index.range_search(
                self.convert(queries, as_torch),
                radius,
                filter=self.convert(filter, as_torch),
                max_results=max_results,
            ),
        )
        ranked_distances, ranked_ids = self.ranking(queries, masks)
        within = [(row <= radius).nonzero()[0][:max_results] for row in ranked_distances]
        np.testing.assert_array_equal(lims, np.cumsum([0, *map(len, within)]))
        for result, ranked in ((distances, ranked_distances), (ids, ranked_ids)):
            expected = np.concatenate([row[places] for row, places in zip(ranked, within, strict=True)])
            np.testing.assert_array_equal(result, expected)

    @precondition(lambda self: len(self.ids))
    @rule(
        seed=st.integers(0, 99),
        kind=st.sampled_from(FILTER_KINDS),
        as_torch=st.booleans(),
        multi_hot=st.booleans(),
    )
    def count_equals_the_histogram(self, seed: int, kind: str, as_torch: bool, multi_hot: bool) -> None:
        rng, queries, count = np.random.default_rng(seed), few_codes(QUERIES, seed), len(self.ids)
        masks, filter = self.draw_filter(kind, rng)
        if multi_hot:
            labels = rng.random((QUERIES, 4)) < 0.3, (rng.random((count, 4)) < 0.3).astype(np.int32)
            relevant = (labels[0].astype(int) @ labels[1].T) > 0
        else:
            labels = rng.integers(0, 3, QUERIES), rng.integers(0, 3, count)
            relevant = labels[0][:, None] == labels[1]
        distances = distances_of(queries, self.codes)

        def histogram(chosen: np.ndarray) -> list[np.ndarray]:
            rows = zip(distances, chosen, strict=True)
            return [np.bincount(distances[chosen], minlength=BITS + 1) for distances, chosen in rows]

        options = {"filter": self.convert(filter, as_torch)}
        counts = self.index.count(self.convert(queries, as_torch), **options)
        np.testing.assert_array_equal(as_numpy(counts), histogram(masks))
        options["labels"] = tuple(self.convert(side, as_torch) for side in labels)
        counts, relevant_counts = self.index.count(self.convert(queries, as_torch), **options)
        np.testing.assert_array_equal(as_numpy(counts), histogram(masks))
        np.testing.assert_array_equal(as_numpy(relevant_counts), histogram(masks & relevant))

    @invariant()
    def holds_the_expected_codes(self) -> None:
        if hasattr(self, "folder"):
            assert len(self.index) == len(self.ids)
            np.testing.assert_array_equal(self.index.ids, self.ids)
            np.testing.assert_array_equal(as_numpy(self.index.codes), self.codes)


class OperationsOnDevices(Operations):
    """`Operations` with moves to other devices, copies and pickles."""

    placements = PLACEMENTS

    @rule(place=st.integers(0, 9))
    def move(self, place: int) -> None:
        self.index = self.index.to(**self.placement(place))

    @rule(pickled=st.booleans())
    def copy(self, pickled: bool) -> None:
        self.index = pickle.loads(pickle.dumps(self.index)) if pickled else copy.deepcopy(self.index)


MARKS = np.array([[255, 0]] * 64, np.uint8)  # the first contents of the index of check_states_beside_a_writer


def check_states_beside_a_writer(
    index: HammingIndex,
    query: np.ndarray | torch.Tensor,
    *,
    steps: int,
    also: Callable[[], None] = lambda: None,
    within: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """Check that each search during writes sees one state of the index: whole batches and whole updates.

    Three threads search. Meanwhile this thread adds and removes batches of five codes. After each added batch, it
    updates the first 64 codes, the marks, in a single call.

    Args:
        index: contains `MARKS` and nothing else.
        query: one code of zeros. In each state, all marks have the same distance from it.
        steps: the number of batches to add.
        also: another check; each searching thread calls it after each search.
        within: returns the context in which a thread searches.
    """
    stop, failures = threading.Event(), []

    def read() -> None:
        with within():
            while not stop.is_set():
                try:
                    _, distances, ids = map(as_numpy, index.range_search(query, 16))
                    marks = distances[ids < 64]
                    assert len(marks) == 64 and (marks == marks[0]).all(), "a search saw part of an update"
                    rest = np.sort(ids[ids >= 64])
                    assert len(rest) % 5 == 0 and (np.diff(rest) == 1).all(), "a search saw part of a batch"
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
    assert index.ids.tolist() == [*range(64), *range(first, last)]
