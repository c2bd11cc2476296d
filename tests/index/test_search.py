"""Searches in parts, with progress, with fewer threads, and with Ctrl-C in between."""

import os
import signal
import threading

import numpy as np
import pytest
import torch

from hashengine import HammingIndex, InputError, ops
from hashengine.index import _search


@pytest.fixture
def index() -> HammingIndex:
    index = HammingIndex(64)
    index.add(np.random.default_rng(0).integers(0, 256, (500, 8), dtype=np.uint8))
    return index


@pytest.fixture
def in_parts(monkeypatch):
    monkeypatch.setattr(_search, "_PAIRS", 1)
    monkeypatch.setattr(_search, "_BLOCK", 7)


def searches(index: HammingIndex, queries: np.ndarray, **options) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    shared, own = rng.random(500) < 0.5, rng.random((len(queries), 500)) < 0.5
    labels = rng.integers(0, 3, len(queries)), rng.integers(0, 3, 500)
    return [
        *index.search(queries, 9, **options),
        *index.search(queries, 9, filter=own, **options),
        *index.range_search(queries, 24, filter=shared, **options),
        *index.range_search(queries, 24, max_results=2, **options),
        index.count(queries, **options),
        *index.count(queries, labels=labels, filter=own, **options),
    ]


@pytest.mark.parametrize("count", [0, 1, 7, 20])
def test_parts_change_no_answer(index, monkeypatch, count):
    queries = index.codes[:count].numpy()
    whole = searches(index, queries)
    monkeypatch.setattr(_search, "_PAIRS", 1)
    monkeypatch.setattr(_search, "_BLOCK", 7)
    for mine, other in zip(searches(index, queries), whole, strict=True):
        np.testing.assert_array_equal(mine, other)
        assert mine.dtype == other.dtype


def test_progress_counts_queries(index, in_parts):
    told = []
    index.search(index.codes[:20], 3, progress=lambda *done: told.append(done))
    index.count(index.codes[:20], progress=lambda *done: told.append(done))
    assert told == 2 * [(7, 20), (14, 20), (20, 20)]


@pytest.mark.parametrize("num_threads", [1, 2, 99])
def test_threads_change_no_answer(index, num_threads):
    queries = index.codes[:40].numpy()
    for mine, other in zip(searches(index, queries, num_threads=num_threads), searches(index, queries), strict=True):
        np.testing.assert_array_equal(mine, other)


def test_ctrl_c_stops_a_search_between_its_parts(index, in_parts):
    done = []

    def interrupt(count: int, total: int) -> None:
        done.append(count)
        if len(done) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            index.search(index.codes, 5, progress=interrupt)
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(done) == 2
    writer = threading.Thread(target=index.update, args=(torch.tensor([0]), index.codes[1:2].clone()))
    writer.start()
    writer.join(10)
    assert not writer.is_alive()  # the search that was stopped holds no lock


def test_threads_must_be_a_number(index):
    for bad in (0, -1, True, 1.5):
        with pytest.raises(InputError, match="num_threads must be at least 1, got"):
            index.search(index.codes, 1, num_threads=bad)
    with pytest.raises(ValueError, match="num_threads must be at least 1, or 0 for all, got -1"):
        ops.hamming_topk(index.codes, index.codes, 1, num_threads=-1)
