"""The native Hamming ops on a GPU, against the CPU's, bit for bit, and against FAISS; skipped where there is none.

The kernels' logic is proved without a GPU, in test_cuda_hamming_counting and its neighbours; here stands what only a
device shows.
"""

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import gpu_peers
from benchmarks.systems import Oracle, draw_mask, in_order, radius_of
from hashengine import _native, ops
from tests.helpers.hamming_levels import assert_same, make_codes

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or _native.build_config().get("build") != "cuda",
    reason="needs a GPU and the native CUDA module",
)
KINDS = ["random", "clustered", "duplicate"]
FILTERS = ["none", "shared", "own", "few"]
# (bytes, codes, queries)
SIZES = [(1, 1, 1), (3, 70, 3), (8, 20_001, 9), (8, 300_000, 1), (16, 5000, 40), (33, 1000, 5), (128, 3000, 17)]
# Beyond what is selected from directly, with as many queries as every scan takes, of every length.
SCANNED_SIZES = [(8, 30_001, 300), (12, 9001, 70), (32, 20_003, 100), (64, 9001, 70), (128, 9001, 130), (200, 9001, 5)]
FAISS_SIZES = [(8, 20_001, 9), (16, 5000, 300), (128, 9000, 17)]
MOST_SELECTED = 4096  # beyond this k a ranking is made by counting


def make(kind: str, code_bytes: int, count: int, queries: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    codes, asked = make_codes(kind, count, 8 * code_bytes, rng), make_codes("random", queries, 8 * code_bytes, rng)
    asked[0] = codes[-1]
    return torch.from_numpy(asked), torch.from_numpy(codes)


def make_bitmap(kind: str, count: int, queries: int) -> Tensor | None:
    share = {"none": 1, "shared": 0.5, "own": 0.5, "few": 0.001}[kind]
    shape = (count,) if kind == "shared" else (queries, count)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < share
    return None if kind == "none" else ops.pack_filter(mask)


def check(op, *arguments, **options) -> None:
    """The same on both devices; the GPU's results in its memory."""

    def on_gpu(value):
        return value.cuda() if isinstance(value, Tensor) else value

    want = op(*arguments, **options)
    got = op(*map(on_gpu, arguments), **{name: on_gpu(value) for name, value in options.items()})
    for mine, theirs in zip(got, want, strict=True):
        assert mine.is_cuda and mine.dtype == theirs.dtype
        assert torch.equal(mine.cpu(), theirs)


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES + SCANNED_SIZES, ids=str)
def test_topk_equals_the_cpu(size, kind, filter):
    code_bytes, count, query_count = size
    queries, codes = make(kind, *size)
    bitmap = make_bitmap(filter, count, query_count)
    for k in {1, 10, 100, 1000, MOST_SELECTED, MOST_SELECTED + 1, 20_000, count}:
        if k <= count:
            check(ops.hamming_topk, queries, codes, k, filter=bitmap)


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_range_equals_the_cpu(size, kind, filter):
    code_bytes, count, query_count = size
    queries, codes = make(kind, *size)
    bitmap = make_bitmap(filter, count, query_count)
    for radius in {0, 3 * code_bytes, 4 * code_bytes, 8 * code_bytes}:
        for most in (None, 1, 77):
            check(ops.hamming_range, queries, codes, radius, filter=bitmap, max_results=most)


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_count_equals_the_cpu(size, kind, filter):
    code_bytes, count, query_count = size
    queries, codes = make(kind, *size)
    bitmap = make_bitmap(filter, count, query_count)
    random = torch.Generator().manual_seed(2)
    check(ops.hamming_count, queries, codes, filter=bitmap)
    labels = [torch.randint(0, 3, (rows,), generator=random) - 1 for rows in (query_count, count)]
    check(ops.hamming_count, queries, codes, filter=bitmap, query_labels=labels[0], labels=labels[1])
    for columns in (0, 1, 64, 70):
        labels = [torch.rand(rows, columns, generator=random) < 0.05 for rows in (query_count, count)]
        check(ops.hamming_count, queries, codes, filter=bitmap, query_labels=labels[0], labels=labels[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", FAISS_SIZES, ids=str)
def test_answers_are_those_of_faiss(size, kind):
    """Ids and distances: its index on the CPU orders by (distance, position), too."""
    pytest.importorskip("faiss", reason="needs faiss")
    queries, codes = make(kind, *size)
    on_gpu, count = (queries.cuda(), codes.cuda()), len(codes)
    oracle = Oracle(codes.numpy())
    for k in (1, 100, MOST_SELECTED + 1, count):
        assert_same([part.cpu() for part in ops.hamming_topk(*on_gpu, k)], oracle.search(queries.numpy(), k))
    radius = radius_of(ops.hamming_count(*on_gpu)[0].cpu().numpy(), 50)
    found = [part.cpu() for part in ops.hamming_range(*on_gpu, radius)]
    assert_same(found, in_order(oracle.range_search(queries.numpy(), radius)))
    mask = draw_mask(count, 0.3)
    bitmap = ops.pack_filter(torch.from_numpy(mask)).cuda()
    found = [part.cpu() for part in ops.hamming_topk(*on_gpu, 100, filter=bitmap)]
    assert_same(found, Oracle(codes.numpy(), mask).search(queries.numpy(), 100))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", FAISS_SIZES, ids=str)
def test_distances_are_those_of_faiss_on_the_gpu(size, kind):
    """And the sets of ids below the last ties, whose order it leaves open."""
    queries, codes = (rows.cuda() for rows in make(kind, *size))
    theirs = gpu_peers.add_to_faiss(codes.cpu().numpy(), codes.device)
    if theirs is None:
        pytest.skip(f"needs a faiss that knows GPUs, there is {gpu_peers.faiss_version() or 'none'}")
    for k in (1, 100, gpu_peers.FAISS_MOST):
        assert gpu_peers.agrees(theirs.search(queries, k), ops.hamming_topk(queries, codes, k))


@pytest.mark.parametrize("code_bytes", [145, 577, 1153, 8192])
def test_long_codes(code_bytes):
    """Whose counters or places are in global memory."""
    queries, codes = make("clustered", code_bytes, 9000, 9)
    for k in (5, 9000):
        check(ops.hamming_topk, queries, codes, k)
    check(ops.hamming_range, queries, codes, 8 * code_bytes, max_results=300)
    check(ops.hamming_range, queries, codes, 16)
    check(ops.hamming_count, queries, codes, query_labels=torch.arange(9), labels=torch.arange(9000) % 7)


def test_more_queries_than_a_batch():
    """Rankings of 2,048 bits take 4,092 queries at a time; with a filter for each query."""
    queries, codes = make("random", 256, 9000, 5000)
    bitmap = make_bitmap("own", 9000, 5000)
    check(ops.hamming_range, queries, codes, 2048, filter=bitmap, max_results=50)
    check(ops.hamming_topk, queries, codes, MOST_SELECTED + 1, filter=bitmap)


def test_unaligned_and_strided_rows():
    queries, codes = make("random", 32, 2000, 5)
    for code_bytes in (8, 9):
        part = slice(1, 1 + code_bytes)
        check(ops.hamming_topk, queries[:, part], codes[:, part], 20)
        flat = codes.flatten().cuda()[1 : 1 + 1990 * code_bytes].view(1990, code_bytes)  # contiguous, at an odd address
        want = ops.hamming_topk(flat[:5].cpu(), flat.cpu(), 1990)
        got = ops.hamming_topk(flat[:5], flat, 1990)
        assert all(torch.equal(mine.cpu(), theirs) for mine, theirs in zip(got, want, strict=True))
        check(ops.hamming_count, queries[:, part], codes[:, part])


def test_no_queries_no_codes():
    queries, codes = make("random", 8, 40, 3)
    check(ops.hamming_topk, queries[:0], codes, 3)
    check(ops.hamming_range, queries[:0], codes, 64)
    check(ops.hamming_range, queries, codes[:0], 64)
    check(ops.hamming_range, queries, codes[:0], 64, filter=torch.zeros(0, dtype=torch.uint8))
    check(ops.hamming_count, queries[:0], codes)
    check(ops.hamming_count, queries, codes[:0], query_labels=torch.arange(3), labels=torch.arange(0))


@pytest.mark.parametrize("filter", FILTERS[:3])
def test_opcheck(filter):
    queries, codes = (rows.cuda() for rows in make("random", 8, 5000, 4))
    bitmap = make_bitmap(filter, 5000, 4)
    bitmap = None if bitmap is None else bitmap.cuda()
    library = torch.ops.hashengine
    for k in (10, 5000):
        torch.library.opcheck(library.hamming_topk.default, (queries, codes, k, bitmap))
    torch.library.opcheck(library.hamming_range.default, (queries, codes, 25, bitmap, 100))
    labels = torch.arange(4, device="cuda"), torch.arange(5000, device="cuda") % 4
    torch.library.opcheck(library.hamming_count.default, (queries, codes, bitmap, *labels))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda q, c: ops.hamming_topk(q, c.cpu(), 1), ValueError, "one device, got cuda:0 and cpu"),
        (lambda q, c: ops.hamming_topk(q.cpu(), c, 1), ValueError, "one device, got cpu and cuda:0"),
        (lambda q, c: ops.hamming_topk(q, c, 41), ValueError, r"\(40\), got 41"),
        (lambda q, c: ops.hamming_topk(q, c, 1, filter=c[0, :5].cpu()), ValueError, "on the codes' device, cuda:0"),
        (lambda q, c: ops.hamming_topk(q, c, 1, num_threads=-1), ValueError, "num_threads must be at least 1"),
        (lambda q, c: ops.hamming_range(q, c, 65), ValueError, "got 65"),
        (lambda q, c: ops.hamming_range(q, c, 3, max_results=0), ValueError, "must be at least 1, got 0"),
        (lambda q, c: ops.hamming_count(q, c, labels=c[:, 0].long()), ValueError, "must come together"),
    ],
)  # fmt: skip
def test_errors_are_those_of_the_cpu(call, error, message):
    queries, codes = (rows.cuda() for rows in make("random", 8, 40, 3))
    with pytest.raises(error, match=message) as caught:
        call(queries, codes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("k", [10, MOST_SELECTED, MOST_SELECTED + 1, 20_000])
def test_topk_takes_the_current_stream_and_a_graph(k):
    """In a capture every launch on another stream and every synchronisation is an error."""
    queries, codes = (rows.cuda() for rows in make("clustered", 8, 20_000, 5))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        ops.hamming_topk(queries, codes, k)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = ops.hamming_topk(queries, codes, k)
    for seed in (1, 2):
        queries.copy_(make("random", 8, 20_000, 5, seed)[0])
        graph.replay()
        want = ops.hamming_topk(queries.cpu(), codes.cpu(), k)
        assert all(torch.equal(mine.cpu(), theirs) for mine, theirs in zip(got, want, strict=True))


def test_count_takes_a_graph():
    queries, codes = (rows.cuda() for rows in make("random", 8, 20_000, 5))
    labels = torch.rand(5, 70, device="cuda") < 0.1, torch.rand(20_000, 70, device="cuda") < 0.1
    want = ops.hamming_count(queries, codes, query_labels=labels[0], labels=labels[1])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = ops.hamming_count(queries, codes, query_labels=labels[0], labels=labels[1])
    graph.replay()
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("k", [10, 5000])
def test_topk_compiles_as_one_graph(k):
    queries, codes = (rows.cuda() for rows in make("random", 8, 5000, 4))

    def search(queries, codes):
        distances, positions = ops.hamming_topk(queries, codes, k)
        return distances + 1, positions

    got = torch.compile(search, fullgraph=True, backend="aot_eager")(queries, codes)
    assert all(map(torch.equal, got, search(queries, codes)))


def test_every_run_gives_the_same_bits():
    queries, codes = (rows.cuda() for rows in make("clustered", 8, 50_000, 20))
    for k in (100, 50_000):
        first = ops.hamming_topk(queries, codes, k)
        for _ in range(10):
            assert all(map(torch.equal, first, ops.hamming_topk(queries, codes, k)))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_takes_the_tensors_device():
    queries, codes = make("random", 8, 9000, 4)
    on_second = queries.to("cuda:1"), codes.to("cuda:1")
    calls = [
        (ops.hamming_topk, (10,)),
        (ops.hamming_topk, (9000,)),
        (ops.hamming_range, (28,)),
        (ops.hamming_count, ()),
    ]
    for op, arguments in calls:
        for mine, theirs in zip(op(*on_second, *arguments), op(queries, codes, *arguments), strict=True):
            assert mine.device == on_second[0].device and torch.equal(mine.cpu(), theirs)


def test_more_codes_than_two_to_the_31():
    """Of one byte: only the first and the last are near."""
    count = 2**32 + 5
    codes = torch.full((count, 1), 255, dtype=torch.uint8, device="cuda")
    near = [0, 2**31, 2**32, count - 1]
    codes[near] = torch.tensor([[0], [1], [0], [0]], dtype=torch.uint8, device="cuda")
    query = codes[:1].clone()
    lims, distances, positions = ops.hamming_range(query, codes, 1)
    assert lims.tolist() == [0, 4] and distances.tolist() == [0, 0, 0, 1]
    assert positions.tolist() == [0, 2**32, count - 1, 2**31]
    assert ops.hamming_count(query, codes)[0].tolist() == [[3, 1, 0, 0, 0, 0, 0, 0, count - 4]]
    for k in (5, MOST_SELECTED + 1):
        distances, positions = ops.hamming_topk(query, codes, k)
        assert positions[0, :5].tolist() == [0, 2**32, count - 1, 2**31, 1]
        assert distances[0, :5].tolist() == [0, 0, 0, 1, 8]
