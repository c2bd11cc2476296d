"""The devices of an index: `device`, `streamed` and `to`, missing devices, and full GPUs."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hashengine import HammingIndex, InputError
from hashengine._validation import check_devices
from hashengine.index import code_memory, execution, hamming_index
from hashengine.index.devices import explain_out_of_memory
from tests.helpers.index_operations import BITS, PLACEMENTS, few_codes, use_small_blocks
from tests.helpers.indexes import assert_same_index, codes_of, index_of


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    use_small_blocks(monkeypatch)


def test_the_method_to_changes_the_devices_and_nothing_else(tmp_path):
    index = index_of(100, bits=BITS, ids=True)
    index.remove(np.array([30, 990]))
    assert index.to() is index.to("cpu") is index.to(torch.device("cpu"), streamed=False) is index
    for number, placement in enumerate(PLACEMENTS[1:]):
        folder = tmp_path / str(number)
        index.save(folder)
        other = index.to(**placement)
        assert other.devices == (torch.device("cpu"),) * len(placement["device"])
        assert other.streamed == placement["streamed"]
        assert other.to(**placement) is other
        assert_same_index(other, index)
        inode = {file.stat().st_ino for file in folder.glob("codes-*.bin")}
        other.add(codes_of(1, BITS), np.array([7]))
        other.save(folder)  # appends to the file
        assert {file.stat().st_ino for file in folder.glob("codes-*.bin")} == inode
        other.remove(np.array([7]))
        other.update(np.array([0]), codes_of(1, BITS, seed=5))
        assert len(index) == 98 and (index.reconstruct(np.array([0])) == codes_of(100, BITS)[99]).all()
    assert str(index) == "HammingIndex(bits=16, codes=98)"
    assert str(index.to(["cpu"] * 2, streamed=True)) == "HammingIndex(bits=16, codes=98, device=cpu, cpu, streamed)"


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("mmap", [False, True])
def test_a_loaded_index_equals_the_saved_one_on_any_devices(tmp_path, placement, mmap):
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
        with pytest.raises(InputError, match="the checksum of .*codes-.* must be"):
            HammingIndex.load(tmp_path, **placement)


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
    ("device", "message"),
    [
        ("gpu", "device must be 'cpu', 'cuda', 'cuda:1' or a torch.device, got 'gpu'"),
        ("meta", "got 'meta'"),
        (0, "got int"),
        ([], "got an empty list"),
        (["cpu", None], "got NoneType"),
    ],
)
def test_an_invalid_device_is_refused(device, message, tmp_path):
    calls = {
        "HammingIndex": lambda: HammingIndex(8, device),
        "to": lambda: HammingIndex(8).to(device),
        "load": lambda: HammingIndex.load(tmp_path, device=device),
    }
    for where, call in calls.items():
        with pytest.raises(InputError, match=f"^{where}: .*{message}") as caught:
            call()
        assert "\n" not in str(caught.value)


def test_missing_and_too_old_gpus_are_refused(monkeypatch):
    gpus = SimpleNamespace(count=0, capability=(9, 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus.count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus.count)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: gpus.capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: "Tesla V100")
    with pytest.raises(InputError, match="must be 'cpu', got 'cuda:1'; torch finds no GPU, and 'hashengine"):
        HammingIndex(64, "cuda:1")
    gpus.count = 2
    with pytest.raises(InputError, match="must be one of 2 GPUs, 'cuda:0' to 'cuda:1', got 'cuda:2'"):
        HammingIndex(64, ["cuda:0", "cuda:2"])
    assert check_devices("to", ["cuda", torch.device("cuda", 0)]) == (
        torch.device("cuda:1"),
        torch.device("cuda:0"),
    )
    gpus.capability = (7, 5)
    with pytest.raises(InputError, match=r"capability 8.0 or more, got 'cuda:0' \(Tesla V100\) of 7.5; use 'cpu'"):
        HammingIndex(64).to("cuda:0")


def out_of_memory(*args, **kwargs):
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate much")


def no_memory_for_rows(shape, dtype, device=None):
    return torch.empty(shape, dtype=dtype) if shape[0] == 0 else out_of_memory()


FULL = "^{}: free GPU memory must be at least .*, got .*; {}"  # the method and the advice are inserted
# The advice for streamed = False and for streamed = True.
ADVICE = {False: "use smaller batches, .* with streamed=True", True: "pass fewer queries or a smaller k per call$"}


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
    ops = {"search": "hamming_topk", "range_search": "hamming_range", "count": "hamming_count"}
    for method, call in calls.items():
        with monkeypatch.context() as patch:
            if method in ops:
                patch.setattr(execution, "MAX_PAIRS_IN_ONE_CALL", 0)
                patch.setattr(execution, ops[method], out_of_memory)
            elif method == "update":
                patch.setattr(code_memory, "to_device", out_of_memory)
            else:
                for module in (code_memory, hamming_index):
                    patch.setattr(module, "allocate_rows", no_memory_for_rows)
            # `load` always gives the advice for streamed = False. A streamed load needs no GPU memory; only this test
            # makes it fail.
            streamed = placement["streamed"] and method != "load"
            with pytest.raises(torch.cuda.OutOfMemoryError, match=FULL.format(method, ADVICE[streamed])) as caught:
                call()
        assert "\n" not in str(caught.value)
        assert_same_index(index, before)
    index.add(few_codes(90, 1), ids(50, 90))
    assert index.ids.tolist() == [*range(3), *range(4, 140)]


def test_a_growing_index_takes_the_exact_size_if_there_is_no_memory_for_twice_as_much(monkeypatch):
    index = HammingIndex(BITS)
    index.add(few_codes(50, 0))
    sizes, allocate_rows = [], code_memory.allocate_rows

    def nearly_full(shape, *args):
        sizes.append(shape[0])
        return out_of_memory() if shape[0] > 60 else allocate_rows(shape, *args)

    monkeypatch.setattr(code_memory, "allocate_rows", nearly_full)
    index.add(few_codes(2, 1))
    assert sizes == [100, 52] and len(index) == 52
    with pytest.raises(torch.cuda.OutOfMemoryError):
        index.add(few_codes(70, 1))
    assert len(index) == 52


def test_the_error_says_how_much_memory_is_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 << 30, 80 << 30))
    gpus = (torch.device("cuda:0"), torch.device("cuda:1"), torch.device("cuda:0"))
    with (
        pytest.raises(
            torch.cuda.OutOfMemoryError, match="add: free GPU memory must be at least 5 GiB, got 3 GiB on cuda:0,"
        ),
        explain_out_of_memory("add", gpus, 5 << 30),
    ):
        out_of_memory()


def test_a_pickle_contains_the_codes_once_and_on_the_cpu():
    index = HammingIndex(BITS, ["cpu"] * 3)
    index.add(few_codes(200, 0), np.arange(200))
    index.remove(np.array([3]))
    state = index.__getstate__()
    assert state["codes"].shape == (200, BITS // 8) and state["ids"].shape == (200,)
    assert not any(isinstance(value, torch.Tensor) for value in state.values())
