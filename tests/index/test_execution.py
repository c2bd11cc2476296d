"""Searches: blocks of queries, several devices, streamed codes, progress, numbers of threads, and interruptions."""

import os
import signal
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hashengine import HammingIndex, InputError, ops
from hashengine.index import execution
from tests.helpers.index_operations import BITS, PLACEMENTS, UNCHECKED, few_codes, use_small_blocks
from tests.helpers.indexes import index_of


@pytest.fixture
def index() -> HammingIndex:
    index = HammingIndex(64)
    index.add(np.random.default_rng(0).integers(0, 256, (500, 8), dtype=np.uint8))
    return index


@pytest.fixture
def seven_queries_per_block(monkeypatch) -> None:
    monkeypatch.setattr(execution, "MAX_PAIRS_IN_ONE_CALL", 0)
    monkeypatch.setattr(execution, "CPU_PAIRS_PER_BLOCK", 1)
    monkeypatch.setattr(execution, "QUERIES_PER_KERNEL_BLOCK", 7)


@pytest.fixture
def small_blocks(monkeypatch) -> None:
    use_small_blocks(monkeypatch)


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
def test_blocks_of_queries_change_no_answer(index, monkeypatch, count):
    queries = index.codes[:count].numpy()
    whole = searches(index, queries)
    monkeypatch.setattr(execution, "MAX_PAIRS_IN_ONE_CALL", 0)
    monkeypatch.setattr(execution, "CPU_PAIRS_PER_BLOCK", 1)
    monkeypatch.setattr(execution, "QUERIES_PER_KERNEL_BLOCK", 7)
    for mine, other in zip(searches(index, queries), whole, strict=True):
        np.testing.assert_array_equal(mine, other)
        assert mine.dtype == other.dtype


def test_progress_counts_queries(index, seven_queries_per_block):
    reports = []
    index.search(index.codes[:20], 3, progress=lambda *done: reports.append(done))
    index.count(index.codes[:20], progress=lambda *done: reports.append(done))
    assert reports == 2 * [(7, 20), (14, 20), (20, 20)]


@pytest.mark.parametrize("num_threads", [1, 2, 99])
def test_the_number_of_threads_changes_no_answer(index, num_threads):
    queries = index.codes[:40].numpy()
    for mine, other in zip(searches(index, queries, num_threads=num_threads), searches(index, queries), strict=True):
        np.testing.assert_array_equal(mine, other)


def test_ctrl_c_stops_a_search_between_its_blocks(index, seven_queries_per_block):
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
    assert not writer.is_alive()  # the stopped search holds no lock


def test_threads_must_be_a_positive_integer(index):
    for bad in (0, -1, True, 1.5):
        with pytest.raises(InputError, match="search: num_threads must be (an integer from )?1 to 4096, got"):
            index.search(index.codes, 1, num_threads=bad)
    with pytest.raises(ValueError, match="num_threads must be at least 1, or 0 for all, got -1"):
        ops.hamming_topk(index.codes, index.codes, 1, num_threads=-1)


def answers(index: HammingIndex, queries: np.ndarray, k: int, **options) -> list[np.ndarray]:
    all_within = index.range_search(queries, BITS // 3, **options)
    three_within = index.range_search(queries, BITS // 3, max_results=3, **options)
    return [*index.search(queries, k, **options), *all_within, *three_within, index.count(queries, **options)]


@settings(UNCHECKED, max_examples=100)
@given(
    count=st.integers(1, 200),
    shard_block=st.sampled_from([8, 24, 64]),
    chunk=st.sampled_from([1, 8, 40, 64]),
    devices=st.integers(1, 4),
    streamed=st.booleans(),
    filter=st.sampled_from(["none", "mask", "bitmaps"]),
    seed=st.integers(0, 99),
)
def test_shards_and_chunks_change_no_answer(count, shard_block, chunk, devices, streamed, filter, seed):
    rng = np.random.default_rng(seed)
    codes, ids = few_codes(count, seed), rng.permutation(1000)[:count]
    mask = None if filter == "none" else rng.random(count) < 0.5
    if filter == "bitmaps":
        mask = np.packbits(rng.random((5, count)) < 0.5, axis=1, bitorder="little")
    with pytest.MonkeyPatch.context() as patch:
        use_small_blocks(patch, shard_block_rows=shard_block, chunk_rows=chunk)
        plain, index = HammingIndex(BITS), HammingIndex(BITS, ["cpu"] * devices, streamed)
        for part in np.array_split(np.arange(count), 3):
            plain.add(codes[part], ids[part])
            index.add(codes[part], ids[part])
        k = int(rng.integers(1, count + 1))
        theirs = answers(plain, codes[:1].repeat(5, 0), k, filter=mask)
        for mine, other in zip(answers(index, codes[:1].repeat(5, 0), k, filter=mask), theirs, strict=True):
            np.testing.assert_array_equal(mine, other)
            assert mine.dtype == other.dtype


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_progress_never_decreases_and_ends_at_the_number_of_queries(monkeypatch, placement):
    plain, queries, reports = HammingIndex(BITS), few_codes(20, 1), []
    plain.add(few_codes(50, 2))
    index = plain.to(**placement)
    expected = answers(plain, queries, 7)
    # Blocks of six queries; 42 results are those of six queries with k = 7.
    for name, value in (("CPU_PAIRS_PER_BLOCK", 1), ("QUERIES_PER_KERNEL_BLOCK", 6), ("RESULTS_PER_BLOCK", 42)):
        monkeypatch.setattr(execution, name, value)
    found = answers(index, queries, 7, progress=lambda *done: reports.append(done))
    for mine, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(mine, other)
    assert reports.count((20, 20)) == 4 and all(total == 20 for _, total in reports)
    ends = [number for number, (done, _) in enumerate(reports) if done == 20]
    for first, last in zip([0, *(end + 1 for end in ends)], ends, strict=False):
        assert reports[first : last + 1] == sorted(reports[first : last + 1])


@pytest.mark.usefixtures("small_blocks")
def test_rerank_and_reconstruct_are_the_same_on_several_devices():
    plain = index_of(100, bits=BITS, ids=True)
    activations = np.random.default_rng(0).standard_normal((4, BITS))
    ids = plain.search(np.packbits(activations > 0, axis=1), 20)[1]
    for placement in PLACEMENTS:
        index = plain.to(**placement)
        for mine, other in zip(index.rerank(activations, ids), plain.rerank(activations, ids), strict=True):
            np.testing.assert_array_equal(mine, other)
        np.testing.assert_array_equal(index.reconstruct(ids[0]), plain.reconstruct(ids[0]))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_an_interrupted_search_leaves_neither_a_thread_nor_a_lock(placement):
    index = HammingIndex(BITS, **placement)
    index.add(few_codes(200, 0))

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    threads = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        index.search(few_codes(9, 1), 5, progress=interrupt)
    assert threading.active_count() == threads
    index.update(np.array([0]), few_codes(1, 3))  # no lock is held


@pytest.mark.usefixtures("small_blocks")
def test_the_other_devices_of_an_interrupted_search_stop_early(monkeypatch):
    index = HammingIndex(BITS, ["cpu", "cpu"], streamed=True)
    index.add(few_codes(16 * 100, 0))
    callers, interrupted, topk = [], threading.Event(), execution.hamming_topk

    def waiting(*args, **kwargs):
        callers.append(threading.current_thread())
        if len(callers) > 1 and callers[-1] is not threading.main_thread():
            interrupted.wait(10)
        return topk(*args, **kwargs)

    def interrupt(done: int, total: int) -> None:
        interrupted.set()
        raise KeyboardInterrupt

    monkeypatch.setattr(execution, "hamming_topk", waiting)
    with pytest.raises(KeyboardInterrupt):
        index.search(few_codes(1, 1), 5, progress=interrupt)
    assert len(callers) < 50  # fewer than half of the 100 chunks were searched


@pytest.mark.usefixtures("small_blocks")
def test_an_error_on_a_second_device_is_raised(monkeypatch):
    index = HammingIndex(BITS, ["cpu", "cpu"])
    index.add(few_codes(200, 0))
    main, topk = threading.current_thread(), execution.hamming_topk

    def failing(*args, **kwargs):
        if threading.current_thread() is not main:
            raise RuntimeError("the other device")
        return topk(*args, **kwargs)

    monkeypatch.setattr(execution, "hamming_topk", failing)
    with pytest.raises(RuntimeError, match="the other device"):
        index.search(few_codes(1, 1), 5)
