"""The native Hamming ops give the same results on a GPU as on the CPU and as FAISS. Skipped without a GPU.

tests/cuda tests the logic of the kernels without a GPU. These tests run the compiled kernels and the binding on a GPU.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hashengine import _native, ops
from tests.helpers.faiss_oracle import MAX_GPU_K, FaissOracle, equal_up_to_ties, search_on_gpu
from tests.helpers.hamming_levels import assert_same, make_codes

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or _native.build_config().get("build") != "cuda",
    reason="needs a GPU and the native CUDA module",
)
KINDS = ["random", "clustered", "duplicate"]
# shared: one filter for all queries. own, few: one filter per query. Half of the codes pass the filters shared and own,
# and 0.1% pass few.
FILTERS = ["none", "shared", "own", "few"]
# (code_bytes, codes, queries)
SIZES = [(1, 1, 1), (3, 70, 3), (8, 20_001, 9), (8, 300_000, 1), (16, 5000, 40), (33, 1000, 5), (128, 3000, 17)]
# More than 8,192 codes, so that hamming_topk scans for candidates. On compute capability 9.0, 160 or more queries use
# scan_wgmma, fewer use scan_mma, and codes of 200 bytes use scan_popcount.
SCANNED_SIZES = [
    *((8, 30_001, 300), (12, 9001, 170), (32, 20_003, 200), (64, 9001, 170), (128, 9001, 230)),
    *((8, 30_001, 5), (8, 9001, 12), (8, 9001, 30), (8, 9001, 100), (12, 9001, 30), (128, 9001, 100)),
    (200, 9001, 5),
]
FAISS_SIZES = [(8, 20_001, 9), (16, 5000, 300), (128, 9000, 17)]
MAX_SELECTED_K = 4096  # for a larger k, hamming_topk runs the kernels of hamming_range.cu


def make_search(kind: str, code_bytes: int, count: int, query_count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw queries and codes. The first query equals the last code."""
    rng = np.random.default_rng(seed)
    codes = make_codes(kind, count, 8 * code_bytes, rng)
    queries = make_codes("random", query_count, 8 * code_bytes, rng)
    queries[0] = codes[-1]
    return torch.from_numpy(queries), torch.from_numpy(codes)


def make_bitmap(kind: str, count: int, queries: int) -> Tensor | None:
    share = {"none": 1, "shared": 0.5, "own": 0.5, "few": 0.001}[kind]
    shape = (count,) if kind == "shared" else (queries, count)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < share
    return None if kind == "none" else ops.pack_filter(mask)


def check(op: Callable[..., tuple[Tensor, ...]], *arguments: Any, **options: Any) -> None:
    """Check that the op gives the same results on the CPU and on the GPU. Those of the GPU must be in GPU memory."""

    def to_gpu(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(to_gpu, value))
        return value.cuda() if isinstance(value, Tensor) else value

    expected = op(*arguments, **options)
    got = op(*map(to_gpu, arguments), **{name: to_gpu(value) for name, value in options.items()})
    for on_gpu, on_cpu in zip(got, expected, strict=True):
        assert on_gpu.is_cuda and on_gpu.dtype == on_cpu.dtype
        assert torch.equal(on_gpu.cpu(), on_cpu)


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES + SCANNED_SIZES, ids=str)
def test_topk_equals_the_cpu(size, kind, filter):
    code_bytes, count, query_count = size
    queries, codes = make_search(kind, *size)
    bitmap = make_bitmap(filter, count, query_count)
    for k in {1, 10, 100, 1000, MAX_SELECTED_K, MAX_SELECTED_K + 1, 20_000, count}:
        if k <= count:
            check(ops.hamming_topk, queries, codes, k, filter=bitmap)


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_range_equals_the_cpu(size, kind, filter):
    code_bytes, count, query_count = size
    queries, codes = make_search(kind, *size)
    bitmap = make_bitmap(filter, count, query_count)
    for radius in {0, 3 * code_bytes, 4 * code_bytes, 8 * code_bytes}:
        for max_results in (None, 1, 77):
            check(ops.hamming_range, queries, codes, radius, filter=bitmap, max_results=max_results)


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_count_equals_the_cpu(size, kind, filter):
    code_bytes, count, query_count = size
    queries, codes = make_search(kind, *size)
    bitmap = make_bitmap(filter, count, query_count)
    random = torch.Generator().manual_seed(2)
    check(ops.hamming_count, queries, codes, filter=bitmap)
    labels = tuple(torch.randint(0, 3, (rows,), generator=random) - 1 for rows in (query_count, count))
    check(ops.hamming_count, queries, codes, filter=bitmap, labels=labels)
    for columns in (2, 64, 70):
        labels = tuple(torch.rand(rows, columns, generator=random) < 0.05 for rows in (query_count, count))
        check(ops.hamming_count, queries, codes, filter=bitmap, labels=labels)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", FAISS_SIZES, ids=str)
def test_searches_equal_faiss_on_the_cpu(size, kind):
    """Positions must be equal even for ties, because FAISS's index on the CPU also orders by (distance, position)."""
    pytest.importorskip("faiss", reason="needs faiss")
    queries, codes = make_search(kind, *size)
    on_gpu, count = (queries.cuda(), codes.cuda()), len(codes)
    oracle = FaissOracle(codes.numpy())
    for k in (1, 100, MAX_SELECTED_K + 1, count):
        assert_same([part.cpu() for part in ops.hamming_topk(*on_gpu, k)], oracle.search(queries.numpy(), k))
    counts = ops.hamming_count(*on_gpu)[0].cpu()
    radius = int((counts.cumsum(1).double().mean(0) >= 50).nonzero()[0])  # at least 50 results per query on average
    found = [part.cpu() for part in ops.hamming_range(*on_gpu, radius)]
    assert_same(found, oracle.range_search(queries.numpy(), radius))
    mask = np.random.default_rng(2).random(count) < 0.3
    bitmap = ops.pack_filter(torch.from_numpy(mask)).cuda()
    found = [part.cpu() for part in ops.hamming_topk(*on_gpu, 100, filter=bitmap)]
    assert_same(found, FaissOracle(codes.numpy(), mask).search(queries.numpy(), 100))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", FAISS_SIZES, ids=str)
def test_topk_equals_faiss_on_the_gpu(size, kind):
    """Distances must be equal. Positions may differ in the order of ties, which FAISS on the GPU does not define."""
    faiss = pytest.importorskip("faiss", reason="needs faiss")
    if not hasattr(faiss, "GpuIndexBinaryFlat"):
        pytest.skip(f"needs a faiss with GPU support, got {faiss.__version__}")
    queries, codes = (rows.cuda() for rows in make_search(kind, *size))
    for k in (1, 100, MAX_GPU_K):
        assert equal_up_to_ties(ops.hamming_topk(queries, codes, k), search_on_gpu(queries, codes, k))


@pytest.mark.parametrize("code_bytes", [145, 577, 1153, 8192])
def test_long_codes(code_bytes):
    """For codes this long, the kernels have their counters or the slots of the results in global memory."""
    queries, codes = make_search("clustered", code_bytes, 9000, 9)
    for k in (5, 9000):
        check(ops.hamming_topk, queries, codes, k)
    check(ops.hamming_range, queries, codes, 8 * code_bytes, max_results=300)
    check(ops.hamming_range, queries, codes, 16)
    check(ops.hamming_count, queries, codes, labels=(torch.arange(9), torch.arange(9000) % 7))


def test_more_queries_than_a_batch():
    """The 5,000 queries are searched in batches of up to 4,093 queries (`hamming_ranking_batch`)."""
    queries, codes = make_search("random", 256, 9000, 5000)
    bitmap = make_bitmap("own", 9000, 5000)
    check(ops.hamming_range, queries, codes, 2048, filter=bitmap, max_results=50)
    check(ops.hamming_topk, queries, codes, MAX_SELECTED_K + 1, filter=bitmap)


def test_unaligned_and_strided_rows():
    queries, codes = make_search("random", 32, 2000, 5)
    for code_bytes in (8, 9):
        part = slice(1, 1 + code_bytes)
        check(ops.hamming_topk, queries[:, part], codes[:, part], 20)
        flat = codes.flatten().cuda()[1 : 1 + 1990 * code_bytes].view(1990, code_bytes)  # contiguous, at an odd address
        expected = ops.hamming_topk(flat[:5].cpu(), flat.cpu(), 1990)
        got = ops.hamming_topk(flat[:5], flat, 1990)
        assert all(torch.equal(on_gpu.cpu(), on_cpu) for on_gpu, on_cpu in zip(got, expected, strict=True))
        check(ops.hamming_count, queries[:, part], codes[:, part])


def test_searches_without_queries_or_codes():
    queries, codes = make_search("random", 8, 40, 3)
    check(ops.hamming_topk, queries[:0], codes, 3)
    check(ops.hamming_range, queries[:0], codes, 64)
    check(ops.hamming_range, queries, codes[:0], 64)
    check(ops.hamming_range, queries, codes[:0], 64, filter=torch.zeros(0, dtype=torch.uint8))
    check(ops.hamming_count, queries[:0], codes)
    check(ops.hamming_count, queries, codes[:0], labels=(torch.arange(3), torch.arange(0)))


@pytest.mark.parametrize("filter", FILTERS[:3])
def test_opcheck(filter):
    queries, codes = (rows.cuda() for rows in make_search("random", 8, 5000, 4))
    bitmap = make_bitmap(filter, 5000, 4)
    bitmap = None if bitmap is None else bitmap.cuda()
    library = torch.ops.hashengine
    for k in (10, 5000):
        torch.library.opcheck(library.hamming_topk.default, (queries, codes, k, bitmap))
    torch.library.opcheck(library.hamming_range.default, (queries, codes, 25, bitmap, 100))
    labels = torch.arange(4, device="cuda"), torch.arange(5000, device="cuda") % 4
    torch.library.opcheck(library.hamming_count.default, (queries, codes, bitmap, *labels))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q, c: ops.hamming_topk(q, c.cpu(), 1), "must be on one device, got cuda:0 and cpu"),
        (lambda q, c: ops.hamming_topk(q.cpu(), c, 1), "must be on one device, got cpu and cuda:0"),
        (lambda q, c: ops.hamming_topk(q, c, 41), r"k must be 1 to the number of codes \(40\), got 41"),
        (lambda q, c: ops.hamming_topk(q, c, 1, filter=c[0, :5].cpu()), "must be on the device of codes, cuda:0"),
        (lambda q, c: ops.hamming_topk(q, c, 1, num_threads=-1), "num_threads must be at least 1"),
        (lambda q, c: ops.hamming_range(q, c, 65), "radius must be .*, got 65"),
        (lambda q, c: ops.hamming_range(q, c, 3, max_results=0), "max_results must be at least 1, got 0"),
        (lambda q, c: ops.hamming_count(q, c, labels=c[:, 0].long()), "labels must be a pair"),
    ],
)
def test_invalid_arguments_raise_an_error_of_one_line(call, message):
    queries, codes = (rows.cuda() for rows in make_search("random", 8, 40, 3))
    with pytest.raises(ValueError, match=message) as caught:
        call(queries, codes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("k", [10, MAX_SELECTED_K, MAX_SELECTED_K + 1, 20_000])
def test_topk_runs_on_the_current_stream_and_in_a_graph(k):
    """During a capture, a launch on another stream or a synchronization would be an error."""
    queries, codes = (rows.cuda() for rows in make_search("clustered", 8, 20_000, 5))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        ops.hamming_topk(queries, codes, k)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = ops.hamming_topk(queries, codes, k)
    for seed in (1, 2):
        queries.copy_(make_search("random", 8, 20_000, 5, seed)[0])
        graph.replay()
        expected = ops.hamming_topk(queries.cpu(), codes.cpu(), k)
        assert all(torch.equal(on_gpu.cpu(), on_cpu) for on_gpu, on_cpu in zip(got, expected, strict=True))


def test_count_runs_in_a_graph():
    queries, codes = (rows.cuda() for rows in make_search("random", 8, 20_000, 5))
    labels = torch.rand(5, 70, device="cuda") < 0.1, torch.rand(20_000, 70, device="cuda") < 0.1
    expected = ops.hamming_count(queries, codes, labels=labels)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = ops.hamming_count(queries, codes, labels=labels)
    graph.replay()
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("k", [10, 5000])
def test_topk_compiles_as_one_graph(k):
    queries, codes = (rows.cuda() for rows in make_search("random", 8, 5000, 4))

    def search(queries, codes):
        distances, positions = ops.hamming_topk(queries, codes, k)
        return distances + 1, positions

    got = torch.compile(search, fullgraph=True, backend="aot_eager")(queries, codes)
    assert all(map(torch.equal, got, search(queries, codes)))


def test_repeated_topk_searches_give_the_same_results():
    queries, codes = (rows.cuda() for rows in make_search("clustered", 8, 50_000, 20))
    for k in (100, 50_000):
        first = ops.hamming_topk(queries, codes, k)
        for _ in range(10):
            assert all(map(torch.equal, first, ops.hamming_topk(queries, codes, k)))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_the_ops_run_on_the_device_of_the_codes():
    queries, codes = make_search("random", 8, 9000, 4)
    on_second = queries.to("cuda:1"), codes.to("cuda:1")
    calls = [
        (ops.hamming_topk, (10,)),
        (ops.hamming_topk, (9000,)),
        (ops.hamming_range, (28,)),
        (ops.hamming_count, ()),
    ]
    for op, arguments in calls:
        for on_gpu, on_cpu in zip(op(*on_second, *arguments), op(queries, codes, *arguments), strict=True):
            assert on_gpu.device == on_second[0].device and torch.equal(on_gpu.cpu(), on_cpu)


def test_more_than_two_to_the_32_codes():
    """Four codes are near the query: the first, those at positions 2^31 and 2^32, and the last."""
    count = 2**32 + 5
    codes = torch.full((count, 1), 255, dtype=torch.uint8, device="cuda")
    near = [0, 2**31, 2**32, count - 1]
    codes[near] = torch.tensor([[0], [1], [0], [0]], dtype=torch.uint8, device="cuda")
    query = codes[:1].clone()
    lims, distances, positions = ops.hamming_range(query, codes, 1)
    assert lims.tolist() == [0, 4] and distances.tolist() == [0, 0, 0, 1]
    assert positions.tolist() == [0, 2**32, count - 1, 2**31]
    assert ops.hamming_count(query, codes)[0].tolist() == [[3, 1, 0, 0, 0, 0, 0, 0, count - 4]]
    for k in (5, MAX_SELECTED_K + 1):
        distances, positions = ops.hamming_topk(query, codes, k)
        assert positions[0, :5].tolist() == [0, 2**32, count - 1, 2**31, 1]
        assert distances[0, :5].tolist() == [0, 0, 0, 1, 8]
