"""An index over several devices, and one that streams its codes: the answers are those of an index on one.

No GPU is needed: the same device may be named more than once, and codes can be streamed to the CPU, too.
"""

import contextlib
import copy
import pickle
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import rule

from hashengine import HammingIndex, InputError
from hashengine.index import _codes, _devices, _filters, _parts, _rows, _search, storage
from hashengine.index._codes import Share
from tests.test_index import assert_same_index, codes_of, index_of
from tests.test_index_operations import BITS, Operations, few_codes

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


def test_to_changes_the_place_and_nothing_else(tmp_path):
    index = index_of(100, bits=BITS, ids=True)
    index.remove(np.array([30, 990]))
    index.save(tmp_path)
    assert index.to() is index.to("cpu") is index.to(torch.device("cpu"), streamed=False) is index
    for placement in PLACEMENTS[1:]:
        other = index.to(**placement)
        devices = (torch.device("cpu"),) * len(placement["device"])
        assert other.device == (devices[0] if len(devices) == 1 else devices)
        assert other.streamed == placement["streamed"]
        assert other.to(**placement) is other
        assert_same_index(other, index)
        inode = {file.stat().st_ino for file in tmp_path.glob("codes-*.bin")}
        other.add(codes_of(1, BITS), np.array([7]))
        other.save(tmp_path)  # appends to what is there
        assert {file.stat().st_ino for file in tmp_path.glob("codes-*.bin")} == inode
        other.remove(np.array([7]))
        other.update(np.array([0]), codes_of(1, BITS, seed=5))
        assert len(index) == 98 and (index.reconstruct(np.array([0])) == codes_of(100, BITS)[99]).all()
        index.save(tmp_path)
    assert str(index) == "HammingIndex(bits=16, codes=98)"
    assert str(index.to(["cpu"] * 2, streamed=True)) == "HammingIndex(bits=16, codes=98, device=cpu, cpu, streamed)"


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("mmap", [False, True])
def test_load_places_the_codes(tmp_path, placement, mmap):
    index = index_of(100, bits=BITS, ids=True)
    index.remove(np.array([30, 990]))
    index.save(tmp_path)
    loaded = HammingIndex.load(tmp_path, mmap=mmap, **placement)
    assert_same_index(loaded, index)
    assert loaded.streamed == (placement["streamed"] or (mmap and len(placement["device"]) > 1))
    loaded.add(codes_of(9, BITS), np.arange(9) + 1)
    loaded.save(tmp_path)
    assert_same_index(HammingIndex.load(tmp_path), loaded)
    (file,) = tmp_path.glob("codes-*.bin")
    damaged = bytearray(file.read_bytes())
    damaged[40] ^= 1
    file.write_bytes(damaged)
    if not mmap:
        with pytest.raises(InputError, match="codes-.* is damaged: its checksum must be"):
            HammingIndex.load(tmp_path, **placement)


def test_rerank_and_reconstruct_are_those_of_one_device():
    plain = index_of(100, bits=BITS, ids=True)
    activations = np.random.default_rng(0).standard_normal((4, BITS))
    ids = plain.search(np.packbits(activations > 0, axis=1), 20)[1]
    for placement in PLACEMENTS:
        index = plain.to(**placement)
        for mine, other in zip(index.rerank(activations, ids), plain.rerank(activations, ids), strict=True):
            np.testing.assert_array_equal(mine, other)
        np.testing.assert_array_equal(index.reconstruct(ids[0]), plain.reconstruct(ids[0]))


def test_codes_added_in_inference_mode_can_be_changed_outside_of_it():
    for placement in PLACEMENTS:
        with torch.inference_mode():
            index = HammingIndex(BITS, **placement)
            index.add(torch.from_numpy(few_codes(50, 0)))
        index.update(np.array([3, 40]), few_codes(2, 1))
        index.add(few_codes(50, 2))
        index.remove(np.array([5]))
        assert len(index.search(few_codes(1, 0), 99)[0][0]) == 99


@pytest.mark.parametrize(
    ("device", "error", "message"),
    [
        ("gpu", InputError, "device must be 'cpu', 'cuda', 'cuda:1' or the like, .*, got 'gpu'"),
        ("meta", InputError, "got 'meta'"),
        (0, TypeError, "got int"),
        ([], InputError, "got an empty list"),
        (["cpu", None], TypeError, "got NoneType"),
    ],
)
def test_no_such_device(device, error, message):
    for call in (lambda: HammingIndex(8, device), lambda: HammingIndex(8).to(device)):
        with pytest.raises(error, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_a_gpu_that_is_not_there_or_too_old(monkeypatch):
    gpus = SimpleNamespace(count=0, capability=(9, 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus.count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus.count)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: gpus.capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: "Tesla V100")
    with pytest.raises(InputError, match="must be 'cpu', for torch finds no GPU, got 'cuda:1'; 'hashengine doctor'"):
        HammingIndex(64, "cuda:1")
    gpus.count = 2
    with pytest.raises(InputError, match="must be one of 2 GPUs, 'cuda:0' to 'cuda:1', got 'cuda:2'"):
        HammingIndex(64, ["cuda:0", "cuda:2"])
    assert _devices.checked_devices(["cuda", torch.device("cuda", 0)]) == (
        torch.device("cuda:1"),
        torch.device("cuda:0"),
    )
    gpus.capability = (7, 5)
    with pytest.raises(InputError, match=r"of compute capability 8.0 or more, got 'cuda:0' \(Tesla V100\) of 7.5"):
        HammingIndex(64).to("cuda:0")


def out_of_memory(*args, **kwargs):
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate much")


def no_memory_for_rows(shape, dtype, device=None):
    return torch.empty(shape, dtype=dtype) if shape[0] == 0 else out_of_memory()


FULL = "{}: the GPU must have at least .* free, got .*; ask for less at once, .* with streamed=True"


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("own_ids", [False, True])
def test_a_full_gpu_leaves_the_index_as_it_was(monkeypatch, tmp_path, placement, own_ids):
    def ids(first: int, count: int) -> np.ndarray | None:
        return np.arange(first, first + count) if own_ids else None

    index = HammingIndex(BITS, **placement)
    index.add(few_codes(50, 0), ids(0, 50))
    index.remove(np.array([3]))
    index.save(tmp_path)
    before = index.to(["cpu"])
    calls = {
        "add": lambda: index.add(few_codes(90, 1), ids(50, 90)),
        "compact": index.compact,
        "load": lambda: HammingIndex.load(tmp_path, **placement),
        "to": lambda: index.to(["cpu"] * 5),
        "update": lambda: index.update(np.array([1]), few_codes(1, 1)),
        "search": lambda: index.search(few_codes(1, 1), 2),
        "range_search": lambda: index.range_search(few_codes(1, 1), 2),
        "count": lambda: index.count(few_codes(1, 1)),
    }
    for op, call in calls.items():
        ops = {"search": "hamming_topk", "range_search": "hamming_range", "count": "hamming_count"}
        with monkeypatch.context() as patch:
            if op in ops:
                patch.setattr(_search, ops[op], out_of_memory)
            elif op == "update":
                patch.setattr(_codes, "moved", out_of_memory)
            else:
                for module in (_rows, _codes, storage):
                    patch.setattr(module, "empty_rows", no_memory_for_rows)
            with pytest.raises(torch.cuda.OutOfMemoryError, match=FULL.format(op)) as caught:
                call()
        assert "\n" not in str(caught.value)
        assert_same_index(index, before)
    index.add(few_codes(90, 1), ids(50, 90))
    assert index.ids().tolist() == [*range(3), *range(4, 140)]


def test_a_growing_index_takes_the_exact_size_where_twice_is_not_to_be_had(monkeypatch):
    index = HammingIndex(BITS)
    index.add(few_codes(50, 0))
    sizes, empty_rows = [], _rows.empty_rows

    def nearly_full(shape, *args):
        sizes.append(shape[0])
        return out_of_memory() if shape[0] > 60 else empty_rows(shape, *args)

    monkeypatch.setattr(_rows, "empty_rows", nearly_full)
    index.add(few_codes(2, 1))
    assert sizes == [100, 52] and len(index) == 52
    with pytest.raises(torch.cuda.OutOfMemoryError):
        index.add(few_codes(70, 1))
    assert len(index) == 52


def test_the_error_says_what_is_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 << 30, 80 << 30))
    gpus = (torch.device("cuda:0"), torch.device("cuda:1"), torch.device("cuda:0"))
    with (
        pytest.raises(
            torch.cuda.OutOfMemoryError, match="add: the GPU must have at least 5 GiB free, got 3 GiB on cuda:0,"
        ),
        _devices.memory_for("add", gpus, 5 << 30),
    ):
        out_of_memory()


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


def test_a_pickle_holds_the_codes_on_the_cpu_once():
    index = HammingIndex(BITS, ["cpu"] * 3)
    index.add(few_codes(200, 0), np.arange(200))
    index.remove(np.array([3]))
    state = index.__getstate__()[3]
    assert [part.shape for part in state.codes.parts] == [(200, BITS // 8)] and state.home_ids is None
    assert "home_live" not in vars(state)


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
