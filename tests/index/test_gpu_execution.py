"""Searches on GPUs, tested without a GPU: the order of stream operations; the host reads no value from a GPU."""

import contextlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hashengine import HammingIndex
from hashengine.index import execution, hamming_index
from hashengine.index.code_memory import ShardedCodes, device_shards
from tests.helpers.index_operations import BITS, few_codes, use_small_blocks


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    use_small_blocks(monkeypatch)


def test_a_staging_slot_is_refilled_after_its_last_copy_and_its_last_search(monkeypatch):
    """A slot has memory for one chunk. The log lists the operations of host and streams, in the order of submission."""
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
            self.pinned, self.codes = torch.zeros(shape, dtype=torch.uint8), torch.zeros(shape, dtype=torch.uint8)
            number = sum(line == "slot" for line in log)
            log.append("slot")
            self.copied, self.searched = Event(name=f"copied {number}"), Event(name=f"searched {number}")

    monkeypatch.setattr(execution, "StagingSlot", Slot)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("searches"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    codes = torch.from_numpy(few_codes(16 * 3 + 5, 0))
    index = HammingIndex(BITS, streamed=True)
    index.add(codes)
    (worker,) = execution.assign_workers(index._snapshot.codes, (torch.device("cpu"),), True)
    seen = []
    chunks = iter(execution.StagedChunks(worker.codes, worker.shards, worker.device))
    for _, chunk in chunks:
        log.append("search")
        seen.append(chunk.clone())
        if len(seen) == 3:
            break
    chunks.close()
    assert torch.equal(torch.cat(seen), codes[:48])
    assert log[:3] == ["slot", "slot", "copies wait searches"] and log[-1] == "searches wait copies"

    def copy(slot: int) -> list[str]:
        return [f"host wait copied {slot}", f"copies wait searched {slot}", f"copies record copied {slot}"]

    def search(slot: int) -> list[str]:
        return [f"searches wait copied {slot}", "search", f"searches record searched {slot}"]

    assert log[3:-1] == [*copy(0), *copy(1), *search(0), *copy(0), *search(1), *copy(1), *search(0)[:2]]


class NoCpuTensors(TorchDispatchMode):
    """Fails if an op returns a tensor on the CPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            assert not isinstance(value, torch.Tensor) or value.is_cuda, func
        return result


class InThisThread(contextlib.nullcontext):
    """An executor that runs its calls in the calling thread, because fake tensors belong to that thread."""

    def submit(self, call, *args):
        answer = call(*args)
        return SimpleNamespace(result=lambda: answer)

    def __enter__(self):
        return self


@pytest.mark.parametrize("gpus", [1, 2])
@pytest.mark.parametrize("own_ids", [False, True])
@pytest.mark.parametrize("removed", [0, 9])
@pytest.mark.parametrize("kind", ["none", "mask", "bitmaps"])
def test_a_search_on_gpus_makes_no_cpu_tensor_and_reads_no_value(monkeypatch, gpus, own_ids, removed, kind):
    """Fake tensors have a device but no values, so reading a value or mixing devices raises an error."""
    index = HammingIndex(BITS)
    index.add(few_codes(100, 0), np.arange(100) if own_ids else None)
    index.remove(np.arange(removed))
    devices = tuple(torch.device("cuda", number) for number in range(gpus))
    width = (len(index) + 7) // 8
    monkeypatch.setattr(hamming_index, "record_streams", lambda tensors: None)
    monkeypatch.setattr(execution, "_current_streams", lambda workers: [])
    monkeypatch.setattr(execution, "ThreadPoolExecutor", InThisThread)
    with FakeTensorMode(allow_non_fake_inputs=True):
        queries = torch.empty((5, BITS // 8), dtype=torch.uint8, device=devices[0])
        filter = {
            "none": None,
            "mask": torch.empty(len(index), dtype=torch.bool, device=devices[0]),
            "bitmaps": torch.empty((5, width), dtype=torch.uint8, device=devices[0]),
        }[kind]
        own = [shard.size(100) for shard in device_shards(gpus)]
        sizes = zip(own, devices, strict=True)
        parts = tuple(torch.empty((n, BITS // 8), dtype=torch.uint8, device=device) for n, device in sizes)
        device_ids = torch.empty(100, dtype=torch.int64, device=devices[0]) if own_ids else None
        index._snapshot = replace(index._snapshot, codes=ShardedCodes(parts), device_ids=device_ids)
        index._devices = devices
        _ = index._snapshot.device_live  # HammingIndex computes it before a search, too
        with NoCpuTensors():
            found = index.search(queries, 10, filter=filter)
            counts = index.count(queries, filter=filter)
    assert [tuple(part.shape) for part in (*found, counts)] == [(5, 10), (5, 10), (5, BITS + 1)]
    assert all(part.device == devices[0] for part in (*found, counts))
