"""An index over several devices, and one that streams its codes: the answers are those of an index on one.

No GPU is needed: the same device may be named more than once, and codes can be streamed to the CPU, too.
"""

import copy
import pickle
import threading

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import rule

from hashengine import HammingIndex
from hashengine.index import _codes, _parts, _search
from hashengine.index._codes import Share
from tests.index.test_index import index_of
from tests.index.test_operations import BITS, Operations, few_codes

PLACEMENTS = [
    {"device": ["cpu"] * devices, "streamed": streamed} for devices in (1, 2, 3) for streamed in (False, True)
]
QUIET = settings(deadline=None, suppress_health_check=list(HealthCheck))


def short(patch: pytest.MonkeyPatch, run: int = 8, chunk: int = 16, width: int = BITS // 8) -> None:
    """Runs and chunks of a few rows, so that each of a few dozen codes is near a border."""
    patch.setattr(_codes, "_RUN", run)
    patch.setattr(_codes, "_BLOCK_BYTES", 5 * width)
    patch.setattr(_parts, "_CHUNK_BYTES", chunk * width)
    patch.setattr(_parts, "_PENDING", 2)


@pytest.fixture(autouse=True)
def short_parts(monkeypatch):
    short(monkeypatch)


class OperationsOnDevices(Operations):
    placements = PLACEMENTS

    @rule(place=st.integers(0, 9))
    def move(self, place):
        self.index = self.index.to(**self.placement(place))

    @rule(pickled=st.booleans())
    def copied(self, pickled):
        self.index = pickle.loads(pickle.dumps(self.index)) if pickled else copy.deepcopy(self.index)


OperationsOnDevices.TestCase.settings = settings(QUIET, max_examples=120, stateful_step_count=30)
TestOperationsOnDevices = OperationsOnDevices.TestCase


def answers(index: HammingIndex, queries: np.ndarray, k: int, **options) -> list[np.ndarray]:
    lims = index.range_search(queries, BITS // 3, **options)
    fewest = index.range_search(queries, BITS // 3, max_results=3, **options)
    return [*index.search(queries, k, **options), *lims, *fewest, index.count(queries, **options)]


@settings(QUIET, max_examples=100)
@given(
    count=st.integers(1, 200),
    run=st.sampled_from([8, 24, 64]),
    chunk=st.sampled_from([1, 8, 40, 64]),
    devices=st.integers(1, 4),
    streamed=st.booleans(),
    filter=st.sampled_from(["none", "mask", "bitmaps"]),
    seed=st.integers(0, 99),
)
def test_cuts_change_no_answer(count, run, chunk, devices, streamed, filter, seed):
    rng = np.random.default_rng(seed)
    codes, ids = few_codes(count, seed), rng.permutation(1000)[:count]
    mask = None if filter == "none" else rng.random(count) < 0.5
    if filter == "bitmaps":
        mask = np.packbits(rng.random((5, count)) < 0.5, axis=1, bitorder="little")
    with pytest.MonkeyPatch.context() as patch:
        short(patch, run, chunk)
        plain, index = HammingIndex(BITS), HammingIndex(BITS, ["cpu"] * devices, streamed)
        for part in np.array_split(np.arange(count), 3):
            plain.add(codes[part], ids[part])
            index.add(codes[part], ids[part])
        k = int(rng.integers(1, count + 1))
        theirs = answers(plain, codes[:1].repeat(5, 0), k, filter=mask)
        for mine, other in zip(answers(index, codes[:1].repeat(5, 0), k, filter=mask), theirs, strict=True):
            np.testing.assert_array_equal(mine, other)
            assert mine.dtype == other.dtype


@QUIET
@given(rows=st.integers(0, 300), of=st.integers(1, 5), run=st.sampled_from([8, 16, 64]))
def test_shares_divide_the_rows(rows, of, run):
    bitmap = torch.from_numpy(np.packbits(np.arange(rows) % 3 == 0, bitorder="little")).expand(2, -1)
    numbers, seen = torch.arange(rows), []
    for place in range(of):
        share = Share(place, of, run)
        own = share.cut(numbers)
        assert len(own) == share.count(rows) and bool((own.diff() > 0).all())
        assert torch.equal(share.rows(torch.arange(len(own))), own)
        assert share.rows(torch.tensor([-1])).tolist() == [-1]
        bits = np.unpackbits(share.cut(bitmap, -1, 8).numpy(), axis=1, count=len(own), bitorder="little")
        assert (bits == (own % 3 == 0).numpy()).all()
        seen.append(own)
    assert torch.equal(torch.cat(seen).sort().values, numbers)


def test_devices_have_equal_shares_however_codes_come():
    index = HammingIndex(BITS, ["cpu"] * 3)
    for seed in range(100):
        index.add(few_codes(5, seed))
    assert sorted(map(len, index._state.codes.parts)) == [164, 168, 168]


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_blocks_of_queries_and_their_progress(monkeypatch, placement):
    plain, queries, told = HammingIndex(BITS), few_codes(20, 1), []
    plain.add(few_codes(50, 2))
    index = plain.to(**placement)
    expected = answers(plain, queries, 7)
    for name, value in (("_PAIRS", 1), ("_BLOCK", 6), ("_RESULTS", 42)):
        monkeypatch.setattr(_search, name, value)
    found = answers(index, queries, 7, progress=lambda *done: told.append(done))
    for mine, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(mine, other)
    assert told.count((20, 20)) == 4 and all(total == 20 for _, total in told)
    ends = [number for number, (done, _) in enumerate(told) if done == 20]
    for first, last in zip([0, *(end + 1 for end in ends)], ends, strict=False):
        assert told[first : last + 1] == sorted(told[first : last + 1])


def test_rerank_and_reconstruct_are_those_of_one_device():
    plain = index_of(100, bits=BITS, ids=True)
    activations = np.random.default_rng(0).standard_normal((4, BITS))
    ids = plain.search(np.packbits(activations > 0, axis=1), 20)[1]
    for placement in PLACEMENTS:
        index = plain.to(**placement)
        for mine, other in zip(index.rerank(activations, ids), plain.rerank(activations, ids), strict=True):
            np.testing.assert_array_equal(mine, other)
        np.testing.assert_array_equal(index.reconstruct(ids[0]), plain.reconstruct(ids[0]))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_ctrl_c_in_a_search_stops_every_device(placement):
    index = HammingIndex(BITS, **placement)
    index.add(few_codes(200, 0))

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    threads = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        index.search(few_codes(9, 1), 5, progress=interrupt)
    assert threading.active_count() == threads
    index.update(np.array([0]), few_codes(1, 3))  # no lock is held


def test_the_other_devices_of_an_interrupted_search_end_with_the_chunk_that_they_are_at(monkeypatch):
    index = HammingIndex(BITS, ["cpu", "cpu"], streamed=True)
    index.add(few_codes(16 * 100, 0))
    asked, interrupted, topk = [], threading.Event(), _search.hamming_topk

    def waiting(*args, **kwargs):
        asked.append(threading.current_thread())
        if len(asked) > 1 and asked[-1] is not threading.main_thread():
            interrupted.wait(10)
        return topk(*args, **kwargs)

    def interrupt(done: int, total: int) -> None:
        interrupted.set()
        raise KeyboardInterrupt

    monkeypatch.setattr(_search, "hamming_topk", waiting)
    with pytest.raises(KeyboardInterrupt):
        index.search(few_codes(1, 1), 5, progress=interrupt)
    assert len(asked) < 50  # of 100 chunks


def test_an_error_of_another_device_is_told(monkeypatch):
    index = HammingIndex(BITS, ["cpu", "cpu"])
    index.add(few_codes(200, 0))
    main, topk = threading.current_thread(), _search.hamming_topk

    def failing(*args, **kwargs):
        if threading.current_thread() is not main:
            raise RuntimeError("the other device")
        return topk(*args, **kwargs)

    monkeypatch.setattr(_search, "hamming_topk", failing)
    with pytest.raises(RuntimeError, match="the other device"):
        index.search(few_codes(1, 1), 5)
