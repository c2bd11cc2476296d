"""A HammingIndex on a GPU, against one on the CPU; skipped where there is none."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from hashengine import HammingIndex, InputError, _native, metrics, ops
from hashengine.index import HammingKNN, _codes, _filters, _parts, _search
from tests.index.test_devices import OperationsOnDevices
from tests.index.test_operations import BITS, MARKS, check_states_beside_a_writer, few_codes

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or _native.build_config().get("build") != "cuda",
    reason="needs a GPU and the native CUDA module",
)
GPUS = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
PLACEMENTS = [
    {"device": "cuda", "streamed": False},
    {"device": "cuda", "streamed": True},
    {"device": ["cuda"] * 3, "streamed": False},
    {"device": GPUS, "streamed": False},
    {"device": GPUS * 2, "streamed": True},
]


@pytest.fixture
def short_parts(monkeypatch):
    for module, name, value in (
        (_codes, "_RUN", 8),
        (_codes, "_BLOCK_BYTES", 5 * BITS // 8),
        (_parts, "_CHUNK_BYTES", 16 * BITS // 8),
        (_parts, "_PENDING", 2),
        (_filters, "_ENTRIES", 64),
    ):
        monkeypatch.setattr(module, name, value)


class OperationsOnGpus(OperationsOnDevices):
    placements = [*PLACEMENTS, {"device": "cpu", "streamed": False}]

    @staticmethod
    def as_tensor(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).cuda()


OperationsOnGpus.TestCase.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.usefixtures("short_parts")
class TestOperationsOnGpus(OperationsOnGpus.TestCase):
    pass


def random_codes(count: int, bits: int = 64, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, bits // 8), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def plain() -> HammingIndex:
    """With removed codes and ids of its own."""
    index = HammingIndex(64)
    index.add(random_codes(100_003), torch.randperm(200_000, generator=torch.Generator().manual_seed(1))[:100_003])
    index.remove(index.ids()[::7])
    return index


def answers(index: HammingIndex, queries: torch.Tensor, **options) -> list[torch.Tensor]:
    return [
        *index.search(queries, 100, **options),
        *index.range_search(queries, 16, **options),
        *index.range_search(queries, 20, max_results=10, **options),
        index.count(queries, **options),
    ]


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("filtered", [False, True])
def test_answers_are_those_of_the_cpu(monkeypatch, plain, placement, filtered):
    monkeypatch.setattr(_parts, "_CHUNK_BYTES", 1 << 16)
    index, queries = plain.to(**placement), random_codes(33, seed=2)
    mask = torch.rand(len(plain), generator=torch.Generator().manual_seed(3)) < 0.3 if filtered else None
    for mine, other in zip(answers(index, queries, filter=mask), answers(plain, queries, filter=mask), strict=True):
        assert torch.equal(mine, other)
    mask = None if mask is None else mask.cuda()
    found = answers(index, queries.cuda(), filter=mask)
    for mine, other in zip(found, answers(plain, queries, filter=mask), strict=True):
        assert mine.is_cuda and torch.equal(mine.cpu(), other)
    for results in (1, 1 << 9):  # queries one at a time, and in blocks
        monkeypatch.setattr(_search, "_RESULTS", results)
        for mine, other in zip(answers(index, queries.cuda(), filter=mask), found, strict=True):
            assert torch.equal(mine, other)


@pytest.mark.parametrize("filter", ["none", "mask", "bitmaps"])
def test_a_search_does_not_wait_for_the_gpu(plain, filter):
    index, queries = plain.to("cuda"), random_codes(16, seed=2).cuda()
    mask = {"none": None, "mask": torch.ones(len(plain), dtype=torch.bool, device="cuda")}.get(filter)
    if filter == "bitmaps":
        mask = torch.full((16, (len(plain) + 7) // 8), 0xF7, dtype=torch.uint8, device="cuda")
    expected = index.search(queries, 100, filter=mask)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = index.search(queries, 100, filter=mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, found, expected))


def test_a_search_and_the_packing_before_it_are_captured_in_a_graph(plain):
    index, activations = plain.to("cuda"), torch.randn(16, 64, device="cuda")

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


def test_searches_on_other_streams_beside_a_writer_see_one_state_each():
    index = HammingIndex(16, "cuda")
    index.add(MARKS)
    query = torch.zeros(1, 2, dtype=torch.uint8, device="cuda")
    check_states_beside_a_writer(index, query, steps=200, within=lambda: torch.cuda.stream(torch.cuda.Stream()))


def test_codes_on_the_gpu_are_searched_where_they_lie():
    index = HammingIndex(BITS, "cuda")
    index.add(torch.from_numpy(few_codes(100, 0)).cuda())
    assert index.codes.device == index.device == torch.device("cuda", torch.cuda.current_device())
    assert index.codes.data_ptr() == index.codes.data_ptr()  # a view, no copy
    assert index.to("cuda") is index


def test_a_database_that_does_not_fit_is_told_and_streamed_instead():
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    filler = torch.empty(max(free - (1 << 30), 0), dtype=torch.uint8, device="cuda")
    codes = np.zeros((1 << 28, 8), np.uint8)  # 2 GiB
    index = HammingIndex(64, "cuda")
    index.add(codes[:10])
    with pytest.raises(
        torch.cuda.OutOfMemoryError, match=r"add: the GPU must have at least 2 GiB free, got .* on cuda"
    ):
        index.add(codes)
    assert len(index) == 10 and index.search(codes[:1], 10)[1].tolist() == [list(range(10))]
    streamed = HammingIndex(64, "cuda", streamed=True)
    streamed.add(codes)
    assert streamed.search(codes[:1], 3)[1].tolist() == [[0, 1, 2]]
    del filler


def test_metrics_and_neighbours_on_the_gpu():
    codes, labels = random_codes(2000), torch.arange(2000) % 7
    arguments = codes[:50], labels[:50], codes, labels
    theirs = metrics.distance_counts(*(value.cuda() for value in arguments))
    mine = metrics.distance_counts(*arguments)
    assert torch.equal(theirs.items, mine.items) and torch.equal(theirs.relevant, mine.relevant)
    for found, expected in zip(HammingKNN()(codes.cuda(), 5), HammingKNN()(codes, 5), strict=True):
        assert found.is_cuda and torch.equal(found.cpu(), expected)


def test_there_is_no_such_gpu():
    with pytest.raises(InputError, match=f"device must be one of {len(GPUS)} GPUs, .* got 'cuda:{len(GPUS)}'"):
        HammingIndex(64, f"cuda:{len(GPUS)}")
