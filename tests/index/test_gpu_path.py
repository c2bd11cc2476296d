"""What can be told of an index on a GPU without one: what its streams are told, and what a search looks at."""

import contextlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hashengine import HammingIndex
from hashengine.index import _codes, _filters, _parts, hamming_index
from tests.index.test_devices import QUIET, short_parts  # noqa: F401
from tests.index.test_operations import BITS, few_codes


@QUIET
@given(count=st.integers(0, 40), seed=st.integers(0, 99), is_mask=st.booleans(), queries=st.integers(0, 3))
def test_a_filter_is_combined_on_a_gpu_as_on_the_cpu(count, seed, is_mask, queries):
    rng = np.random.default_rng(seed)
    live_mask = rng.random(count) < 0.7
    live = np.packbits(live_mask, bitorder="little") if seed % 3 else None
    left = count if live is None else int(live_mask.sum())
    shape = (queries, left) if queries else (left,)
    filter = rng.random(shape) < 0.5 if is_mask else rng.integers(0, 256, (*shape[:-1], (left + 7) // 8), np.uint8)
    expected = _filters.combined(filter, live, count, left)
    if left == 0:
        expected = np.zeros_like(expected)
    live = None if live is None else torch.from_numpy(live)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_filters, "_ENTRIES", 2 * max(count, 1))
        np.testing.assert_array_equal(_filters.combined_on_gpu(torch.from_numpy(filter), live, count, left), expected)


def test_chunks_are_staged_in_two_slots_that_nothing_still_reads(monkeypatch):
    """What a GPU's streams are told, in order: a slot is filled when its last copy and its last search are over."""
    log = []

    class Stream:
        def __init__(self, name="copies"):
            self.name = name

        def wait_event(self, event):
            log.append(f"{self.name} wait {event.name}")

        def wait_stream(self, other):
            log.append(f"{self.name} wait {other.name}")

    class Event(SimpleNamespace):
        def record(self, stream):
            log.append(f"{stream.name} record {self.name}")

        def synchronize(self):
            log.append(f"host wait {self.name}")

    class Slot:
        def __init__(self, shape, device):
            self.staging, self.codes = torch.zeros(shape, dtype=torch.uint8), torch.zeros(shape, dtype=torch.uint8)
            number = sum(line == "slot" for line in log)
            log.append("slot")
            self.copied, self.searched = Event(name=f"copied {number}"), Event(name=f"searched {number}")

    monkeypatch.setattr(_parts, "_Slot", Slot)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("searches"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    codes = torch.from_numpy(few_codes(16 * 3 + 5, 0))
    index = HammingIndex(BITS, streamed=True)
    index.add(codes)
    (lane,) = _parts.lanes(index._state.codes, (torch.device("cpu"),), True)
    seen = []
    parts = _parts._staged(lane.codes, lane.shares, lane.device)
    for _, chunk in parts:
        log.append("search")
        seen.append(chunk.clone())
        if len(seen) == 3:
            break
    parts.close()
    assert torch.equal(torch.cat(seen), codes[:48])
    assert log[:3] == ["slot", "slot", "copies wait searches"] and log[-1] == "searches wait copies"

    def copy(slot: int) -> list[str]:
        return [f"host wait copied {slot}", f"copies wait searched {slot}", f"copies record copied {slot}"]

    def search(slot: int) -> list[str]:
        return [f"searches wait copied {slot}", "search", f"searches record searched {slot}"]

    assert log[3:-1] == [*copy(0), *copy(1), *search(0), *copy(0), *search(1), *copy(1), *search(0)[:2]]


class NothingOnTheCpu(TorchDispatchMode):
    """Fails where an op answers with a tensor on the CPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            assert not isinstance(value, torch.Tensor) or value.is_cuda, func
        return result


class InThisThread(contextlib.nullcontext):
    """An executor that leaves its calls in the thread whose tensors have no values."""

    def submit(self, call, *args):
        answer = call(*args)
        return SimpleNamespace(result=lambda: answer)

    def __enter__(self):
        return self


@pytest.mark.parametrize("gpus", [1, 2])
@pytest.mark.parametrize("own_ids", [False, True])
@pytest.mark.parametrize("removed", [0, 9])
@pytest.mark.parametrize("kind", ["none", "mask", "bitmaps"])
def test_a_search_on_a_gpu_stays_there_and_looks_at_no_value(monkeypatch, gpus, own_ids, removed, kind):
    """With tensors that have a device and no values: to look at one, to mix devices or to leave the GPU is an error."""
    index = HammingIndex(BITS)
    index.add(few_codes(100, 0), np.arange(100) if own_ids else None)
    index.remove(np.arange(removed))
    devices = tuple(torch.device("cuda", number) for number in range(gpus))
    width = (len(index) + 7) // 8
    monkeypatch.setattr(hamming_index, "keep", lambda tensors: None)
    monkeypatch.setattr(_parts, "_streams", lambda lanes: [])
    monkeypatch.setattr(_parts, "ThreadPoolExecutor", InThisThread)
    with FakeTensorMode(allow_non_fake_inputs=True):
        queries = torch.empty((5, BITS // 8), dtype=torch.uint8, device=devices[0])
        filter = {
            "none": None,
            "mask": torch.empty(len(index), dtype=torch.bool, device=devices[0]),
            "bitmaps": torch.empty((5, width), dtype=torch.uint8, device=devices[0]),
        }[kind]
        own = [share.count(100) for share in _codes.shares(gpus)]
        sizes = zip(own, devices, strict=True)
        parts = tuple(torch.empty((n, BITS // 8), dtype=torch.uint8, device=device) for n, device in sizes)
        home_ids = torch.empty(100, dtype=torch.int64, device=devices[0]) if own_ids else None
        index._state = replace(index._state, codes=_codes.Codes(parts), home_ids=home_ids)
        index._devices = devices
        _ = index._state.home_live
        with NothingOnTheCpu():
            found = index.search(queries, 10, filter=filter)
            counts = index.count(queries, filter=filter)
    assert [tuple(part.shape) for part in (*found, counts)] == [(5, 10), (5, 10), (5, BITS + 1)]
    assert all(part.device == devices[0] for part in (*found, counts))
