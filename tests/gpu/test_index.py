"""A HammingIndex on GPUs gives the same results as one on the CPU. Skipped without a GPU."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from hashengine import HammingIndex, InputError, _native, metrics, ops
from hashengine.index import HammingKNN, execution
from tests.helpers.index_operations import (
    BITS,
    MARKS,
    OperationsOnDevices,
    check_states_beside_a_writer,
    few_codes,
    use_small_blocks,
)

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or _native.build_config().get("build") != "cuda",
    reason="needs a GPU and the native CUDA module",
)
GPUS = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
PLACEMENTS = {
    "one GPU": {"device": "cuda", "streamed": False},
    "one GPU, streamed": {"device": "cuda", "streamed": True},
    "three shards on one GPU": {"device": ["cuda"] * 3, "streamed": False},
    "all GPUs": {"device": GPUS, "streamed": False},
    "each GPU twice, streamed": {"device": GPUS * 2, "streamed": True},
}


@pytest.fixture
def small_blocks(monkeypatch):
    use_small_blocks(monkeypatch)


class OperationsOnGpus(OperationsOnDevices):
    placements = [*PLACEMENTS.values(), {"device": "cpu", "streamed": False}]

    @staticmethod
    def as_tensor(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).cuda()


OperationsOnGpus.TestCase.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.usefixtures("small_blocks")
class TestOperationsOnGpus(OperationsOnGpus.TestCase):
    pass


def random_codes(count: int, bits: int = 64, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, bits // 8), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def on_cpu() -> HammingIndex:
    """Return an index on the CPU with ids given by the user and with removed codes."""
    index = HammingIndex(64)
    index.add(random_codes(100_003), torch.randperm(200_000, generator=torch.Generator().manual_seed(1))[:100_003])
    index.remove(index.ids[::7])
    return index


def search_all(index: HammingIndex, queries: torch.Tensor, **options: Any) -> list[torch.Tensor]:
    """Return the results of every kind of search."""
    return [
        *index.search(queries, 100, **options),
        *index.range_search(queries, 16, **options),
        *index.range_search(queries, 20, max_results=10, **options),
        index.count(queries, **options),
    ]


@pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=PLACEMENTS)
@pytest.mark.parametrize("filtered", [False, True])
def test_an_index_on_gpus_equals_one_on_the_cpu(monkeypatch, on_cpu, placement, filtered):
    monkeypatch.setattr(execution, "STREAM_CHUNK_BYTES", 1 << 16)
    index, queries = on_cpu.to(**placement), random_codes(33, seed=2)
    mask = torch.rand(len(on_cpu), generator=torch.Generator().manual_seed(3)) < 0.3 if filtered else None
    expected = search_all(on_cpu, queries, filter=mask)
    for got, want in zip(search_all(index, queries, filter=mask), expected, strict=True):
        assert torch.equal(got, want)
    mask = None if mask is None else mask.cuda()
    for got, want in zip(search_all(index, queries.cuda(), filter=mask), expected, strict=True):
        assert got.is_cuda and torch.equal(got.cpu(), want)
    # The index on the CPU takes a mask on the GPU too.
    assert all(map(torch.equal, search_all(on_cpu, queries, filter=mask), expected))
    for results in (1, 1 << 9):  # one query at a time, and blocks of several queries
        monkeypatch.setattr(execution, "RESULTS_PER_BLOCK", results)
        for got, want in zip(search_all(index, queries.cuda(), filter=mask), expected, strict=True):
            assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize("filter", ["none", "mask", "bitmaps"])
def test_a_search_does_not_synchronize(on_cpu, filter):
    index, queries = on_cpu.to("cuda"), random_codes(16, seed=2).cuda()
    mask = {"none": None, "mask": torch.ones(len(on_cpu), dtype=torch.bool, device="cuda")}.get(filter)
    if filter == "bitmaps":
        mask = torch.full((16, (len(on_cpu) + 7) // 8), 0xF7, dtype=torch.uint8, device="cuda")
    expected = index.search(queries, 100, filter=mask)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = index.search(queries, 100, filter=mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, found, expected))


def test_packing_and_search_are_captured_in_a_graph(on_cpu):
    index, activations = on_cpu.to("cuda"), torch.randn(16, 64, device="cuda")

    def search() -> tuple[torch.Tensor, torch.Tensor]:
        return index.search(ops.pack_bits(activations), 10)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        search()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = search()
    for seed in range(3):
        activations.copy_(torch.randn(16, 64, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        assert all(map(torch.equal, found, search()))


def test_during_writes_a_search_on_another_stream_sees_one_state():
    index = HammingIndex(16, "cuda")
    index.add(MARKS)
    query = torch.zeros(1, 2, dtype=torch.uint8, device="cuda")
    check_states_beside_a_writer(index, query, steps=200, within=lambda: torch.cuda.stream(torch.cuda.Stream()))


def test_reading_codes_and_moving_to_the_same_gpu_copy_nothing():
    index = HammingIndex(BITS, "cuda")
    index.add(torch.from_numpy(few_codes(100, 0)).cuda())
    assert index.codes.device == index.devices[0] == torch.device("cuda", torch.cuda.current_device())
    assert index.codes.data_ptr() == index.codes.data_ptr()  # a view, no copy
    assert index.to("cuda") is index


def test_a_database_that_does_not_fit_raises_an_error_and_can_be_streamed():
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    filler = torch.empty(max(free - (1 << 30), 0), dtype=torch.uint8, device="cuda")
    codes = np.zeros((1 << 28, 8), np.uint8)  # 2 GiB
    index = HammingIndex(64, "cuda")
    index.add(codes[:10])
    with pytest.raises(
        torch.cuda.OutOfMemoryError, match=r"add: free GPU memory must be at least 2 GiB, got .* on cuda"
    ):
        index.add(codes)
    assert len(index) == 10 and index.search(codes[:1], 10)[1].tolist() == [list(range(10))]
    streamed = HammingIndex(64, "cuda", streamed=True)
    streamed.add(codes)
    assert streamed.search(codes[:1], 3)[1].tolist() == [[0, 1, 2]]
    del filler


def test_metrics_and_knn_on_the_gpu_equal_those_on_the_cpu():
    codes, labels = random_codes(2000), torch.arange(2000) % 7
    queries, query_labels = codes[:50], labels[:50]
    on_gpu = metrics.distance_counts(queries.cuda(), codes.cuda(), labels=(query_labels.cuda(), labels.cuda()))
    on_cpu = metrics.distance_counts(queries, codes, labels=(query_labels, labels))
    assert torch.equal(on_gpu.items, on_cpu.items) and torch.equal(on_gpu.relevant, on_cpu.relevant)
    for found, expected in zip(HammingKNN()(codes.cuda(), 5), HammingKNN()(codes, 5), strict=True):
        assert found.is_cuda and torch.equal(found.cpu(), expected)


def test_a_gpu_that_does_not_exist_is_an_error():
    with pytest.raises(InputError, match=f"device must be one of {len(GPUS)} GPUs, .* got 'cuda:{len(GPUS)}'"):
        HammingIndex(64, f"cuda:{len(GPUS)}")
