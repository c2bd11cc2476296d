"""The top-k search's kernels, in the emulation of CUDA's execution model on the host and, where there is one, on a GPU.

A scan that lost a candidate would still give the right answer, as the selection looks at all codes where candidates are
missing; so every step is tested by itself, too, and that the selection had no need to.
"""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from tests.emulation.harness import FORWARD, SCHEDULES, Host, array, load_emulation
from tests.emulation.on_gpu import load_on_gpu
from tests.helpers.hamming_levels import all_distances, assert_same, make_codes, make_filter, nearest

POPCOUNT, MMA, WGMMA = range(3)
SCANS = {"popcount": POPCOUNT, "mma": MMA, "wgmma": WGMMA}
# What a device of each compute capability runs: wgmma from 64 queries on, mma from 2 on, population counts alone.
CAPABILITIES = [90, 80, 120]
SECTIONS, STEPS = 64, 16
POISON = -7
NO_BOUND = 2**31 - 1  # as k: candidates never are so many that they lower a limit


@pytest.fixture(scope="module", params=[load_emulation, load_on_gpu], ids=["emulation", "gpu"])
def machine(request):
    return request.param()


@dataclass
class Search:
    """What the launchers take."""

    queries: np.ndarray
    codes: np.ndarray
    filter: np.ndarray | None = None
    offset: int = 0  # bytes past a 16-byte boundary

    def __post_init__(self) -> None:
        self.bits = 8 * self.codes.shape[1]
        self.position_bits = int(len(self.codes) - 1).bit_length()
        bitmap = None if self.filter is None else np.packbits(self.filter, axis=-1, bitorder="little")
        stride = bitmap.shape[1] if bitmap is not None and bitmap.ndim == 2 else 0
        self.sizes = torch.tensor([len(self.queries), *self.codes.shape, stride])
        self._bitmap = None if bitmap is None else torch.from_numpy(bitmap)
        self._rows = [self._placed(rows) for rows in (self.queries, self.codes)]

    def _placed(self, rows: np.ndarray) -> torch.Tensor:
        return array(rows.size, torch.uint8, self.offset).copy_(torch.from_numpy(rows.ravel()))

    @property
    def arguments(self) -> tuple:
        return (*self._rows, Host(self.sizes), self._bitmap)

    def keys(self) -> np.ndarray:
        """uint64 [queries, codes]; the largest number where the filter leaves a code out."""
        keys = all_distances(self.queries, self.codes).astype(np.uint64) << np.uint64(self.position_bits)
        keys |= np.arange(len(self.codes), dtype=np.uint64)
        return keys if self.filter is None else np.where(self.filter, keys, ~np.uint64(0))

    @property
    def everything(self) -> int:
        return self.bits << self.position_bits | len(self.codes) - 1


def topk(machine, search: Search, k: int, capability: int = 90, schedule: int = FORWARD):
    """The answer, and how many queries the selection took from all codes though there were candidates."""
    queries = len(search.queries)
    distances = torch.full((queries, k), POISON, dtype=torch.int32)
    positions = torch.full((queries, k), POISON)
    workspace = machine.workspace("hamming_topk", Host(search.sizes), k, capability=capability)
    arguments = (*search.arguments, k, distances, positions, workspace)
    machine.call("hamming_topk", *arguments, capability=capability, schedule=schedule)
    misled = 0
    if workspace.numel():
        place, capacity = (torch.zeros(1, dtype=torch.int64) for _ in range(2))
        machine.call("hamming_topk_counts", Host(search.sizes), k, Host(place), Host(capacity))
        counts = workspace[int(place) : int(place) + 4 * queries].view(torch.int32)
        found = len(search.codes) if search.filter is None else torch.from_numpy(np.asarray(search.filter.sum(-1)))
        enough = torch.as_tensor(found).clamp(max=k)
        misled = int(((counts > capacity) | (counts < enough)).sum())
    return (distances.numpy(), positions.numpy()), misled


def make_search(kind: str, count: int, bits: int, queries: int, seed: int = 0, **options) -> Search:
    rng = np.random.default_rng(seed)
    codes = make_codes(kind, count, bits, rng)
    own = codes[rng.integers(0, count, queries)]  # every other query is a code
    drawn = rng.integers(0, 256, own.shape, dtype=np.uint8)
    return Search(np.where(np.arange(queries)[:, None] % 2, own, drawn), codes, **options)


# --- all steps --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["random", "clustered", "duplicate"])
@pytest.mark.parametrize("bits", [8, 64, 200])
@pytest.mark.parametrize("queries", [1, 5, 67])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_topk(machine, capability, queries, bits, kind):
    search = make_search(kind, 9001, bits, queries)
    got, misled = topk(machine, search, 50, capability)
    assert_same(got, nearest(search.queries, search.codes, 50))
    assert misled == 0


@pytest.mark.parametrize("count", [1, 31, 33, 1000, 8192])
@pytest.mark.parametrize("bits", [8, 24, 64, 264])
def test_small_databases(machine, bits, count):
    search = make_search("clustered", count, bits, 3)
    for k in sorted({1, count // 2 + 1, min(count, 4096)}):
        got, _ = topk(machine, search, k)
        assert_same(got, nearest(search.queries, search.codes, k))


@pytest.mark.parametrize("k", [1, 2, 1000, 4096])
@pytest.mark.parametrize("queries", [2, 65])
def test_k(machine, queries, k):
    search = make_search("random", 20011, 64, queries)
    got, misled = topk(machine, search, k)
    assert_same(got, nearest(search.queries, search.codes, k))
    assert misled == 0


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("share", [0.5, 0.02, 0.001, 0.0])
@pytest.mark.parametrize("queries", [1, 66])
def test_filters(machine, queries, share, own):
    search = make_search("clustered", 9003, 64, queries)
    search = Search(search.queries, search.codes, make_filter(np.random.default_rng(1), 9003, queries, share, own))
    got, misled = topk(machine, search, 20)
    assert_same(got, nearest(search.queries, search.codes, 20, search.filter))
    assert misled == 0


@pytest.mark.parametrize("order", ["best first", "best last"])
@pytest.mark.parametrize("queries", [1, 64])
def test_adverse_orders(machine, queries, order):
    search = make_search("random", 10007, 64, queries)
    search.queries[:] = search.queries[0]
    ranks = np.argsort(all_distances(search.queries[:1], search.codes)[0], kind="stable")
    search = Search(search.queries, search.codes[ranks if order == "best first" else ranks[::-1]])
    got, misled = topk(machine, search, 100)
    assert_same(got, nearest(search.queries, search.codes, 100))
    assert misled == 0


@pytest.mark.parametrize("bits, queries", [(64, 3), (64, 70), (72, 70), (128, 70)])
def test_rows_that_are_not_aligned(machine, bits, queries):
    search = make_search("clustered", 8500, bits, queries, offset=1)
    got, misled = topk(machine, search, 10)
    assert_same(got, nearest(search.queries, search.codes, 10))
    assert misled == 0


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("queries", [1, 3, 64])
def test_the_order_of_threads_changes_nothing(machine, queries, schedule):
    search = make_search("clustered", 8300, 64, queries)
    got, _ = topk(machine, search, 30, schedule=schedule)
    assert_same(got, nearest(search.queries, search.codes, 30))


def test_sparse_codes(machine):
    """Fingerprints: few ones, in queries fewer than the distance to their nearest."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (9000, 32), dtype=np.uint8)
    for _ in range(4):
        codes &= rng.integers(0, 256, codes.shape, dtype=np.uint8)
    queries = codes[:70] & rng.integers(0, 256, (70, 32), dtype=np.uint8)
    queries[0], queries[1] = 0, 255
    got, misled = topk(machine, Search(queries, codes), 40)
    assert_same(got, nearest(queries, codes, 40))
    assert misled == 0


def test_codes_that_the_sample_hides(machine):
    """A period of the codes that the sample cannot miss by design, and one query in 64 that finds it misleading."""
    search = make_search("random", 9000, 64, 4)
    search.codes[::2] = search.codes[:1]
    search = Search(search.queries, search.codes)
    got, misled = topk(machine, search, 64)
    assert_same(got, nearest(search.queries, search.codes, 64))
    assert misled == 0


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
def test_batches_of_queries(machine, own):
    search = make_search("clustered", 8400, 64, 7)
    search = Search(search.queries, search.codes, make_filter(np.random.default_rng(5), 8400, 7, 0.5, own))
    distances, positions = torch.full((7, 12), POISON, dtype=torch.int32), torch.full((7, 12), POISON)
    workspace = machine.workspace("hamming_topk", Host(search.sizes), 12)
    machine.call("hamming_topk_in_batches", *search.arguments, 12, 3, distances, positions, workspace)
    assert_same((distances, positions), nearest(search.queries, search.codes, 12, search.filter))


# --- the steps --------------------------------------------------------------------------------------------------------


def poisson_tail(mean: float, least: int) -> float:
    """The probability of `least` or more."""
    return sum(math.exp(i * math.log(mean) - mean - math.lgamma(i + 1)) for i in range(least, least + 400))


@pytest.mark.parametrize("queries", [1, 100])
@pytest.mark.parametrize("count", [8193, 100_000, 1_000_000, 100_000_000, 2**32 - 1])
@pytest.mark.parametrize("k", [1, 10, 100, 256, 257, 1000, 4096])
def test_a_sample_misleads_less_than_one_query_in_100_000(machine, k, count, queries):
    """The sample has as many of the k nearest as its rank, or too few of as many codes as there is room for."""
    plan = torch.zeros(3, dtype=torch.int64)
    machine.call("hamming_topk_plan", Host(torch.tensor([queries, count, 8, 0])), k, Host(plan))
    samples, rank, capacity = plan.tolist()
    share = samples / count
    assert poisson_tail(k * share, rank) < 1e-5
    assert capacity == count or 1 - poisson_tail(capacity * share, rank) < 1e-5


def hash32(x: int) -> int:
    x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
    x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
    return x ^ x >> 16


def sampled_positions(samples: int, count: int) -> np.ndarray:
    length = (count << 30) // samples
    edges = [i * length >> 30 for i in range(samples + 1)]
    return np.array([edges[i] + (hash32(i) * (edges[i + 1] - edges[i]) >> 32) for i in range(samples)])


@pytest.mark.parametrize("kind", ["random", "clustered", "duplicate"])
@pytest.mark.parametrize("queries", [1, 11, 40])
@pytest.mark.parametrize("share", [None, 0.5, 0.01])
def test_limits(machine, share, queries, kind):
    """A limit is the key of the rank that was asked for, among the sampled codes that may be found."""
    search = make_search(kind, 5001, 64, queries)
    if share is not None:
        search = Search(search.queries, search.codes, make_filter(np.random.default_rng(2), 5001, queries, share, True))
    keys = search.keys()
    for samples, rank in ((640, 1), (640, 7), (640, 640), (2496, 100)):
        limits, counts = array(queries, torch.int64), array(queries, torch.int32)
        nearer = array(queries * STEPS, torch.int32)
        arguments = (*search.arguments, samples, rank, limits, counts, nearer, search.position_bits)
        machine.call("hamming_limits", *arguments)
        sampled = np.sort(keys[:, sampled_positions(samples, 5001)], axis=1)[:, rank - 1]
        expected = np.where(sampled == ~np.uint64(0), np.uint64(search.everything), sampled)
        np.testing.assert_array_equal(limits.numpy().view(np.uint64), expected)
        assert not counts.any() and not nearer.any()


def scan(machine, name: str, search: Search, limits: np.ndarray, k: int, capacity: int, schedule: int = FORWARD):
    """The candidates' keys of each query, sorted, and how many there were."""
    queries = len(search.queries)
    keys = torch.full((queries, capacity), POISON)
    counts = torch.zeros(queries, dtype=torch.int32)
    nearer = array(queries * STEPS, torch.int32).fill_(0)
    placed = torch.from_numpy(limits.astype(np.uint64).view(np.int64))
    arguments = (*search.arguments, keys, placed, counts, nearer, capacity, k, search.position_bits)
    machine.call("hamming_scan", SCANS[name], *arguments, schedule=schedule)
    kept = [row[: min(int(count), capacity)] for row, count in zip(keys, counts, strict=True)]
    return [np.sort(row.numpy().view(np.uint64)) for row in kept], counts.numpy()


def draw_limits(search: Search, seed: int = 0) -> np.ndarray:
    """Keys of all ranks, so that ties are cut at any place; at the ends, no code and all."""
    rng = np.random.default_rng(seed)
    keys = np.sort(search.keys(), axis=1)
    ranks = np.minimum(np.exp(rng.uniform(0, np.log(len(search.codes)), len(keys))).astype(int), keys.shape[1] - 1)
    limits = keys[np.arange(len(keys)), ranks]
    limits[0] = search.everything
    limits[-1] = 0
    return np.minimum(limits, np.uint64(search.everything))


@pytest.mark.parametrize("kind", ["random", "clustered", "duplicate"])
@pytest.mark.parametrize("bits", [8, 32, 40, 64, 72, 128, 200, 256, 512, 1024])
@pytest.mark.parametrize("name", SCANS)
def test_a_scan_takes_what_is_within_the_limit(machine, name, bits, kind):
    queries, count = 9, 1501
    search = make_search(kind, count, bits, queries, seed=bits)
    limits = draw_limits(search)
    found, counts = scan(machine, name, search, limits, NO_BOUND, count)
    for keys, limit, got, number in zip(search.keys(), limits, found, counts, strict=True):
        np.testing.assert_array_equal(got, np.sort(keys[keys <= limit]))
        assert number == len(got)


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("name, queries", [("popcount", 300), ("mma", 2100), ("wgmma", 600)])
def test_a_scan_of_many_queries(machine, name, queries, own):
    """More than a block's group, with a filter, and buffers too small for some."""
    count, capacity = 700, 20
    search = make_search("clustered", count, 64, queries)
    search = Search(search.queries, search.codes, make_filter(np.random.default_rng(3), count, queries, 0.5, own))
    limits = draw_limits(search)
    found, counts = scan(machine, name, search, limits, NO_BOUND, capacity)
    for keys, limit, got, number in zip(search.keys(), limits, found, counts, strict=True):
        within = keys[keys <= limit]
        assert number == len(within) and len(got) == min(number, capacity)
        assert len(np.unique(got)) == len(got) and np.isin(got, within).all()


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
def test_codes_that_a_shared_filter_leaves_out_are_rows_of_zeros(machine, own):
    """Only time shows it else: a candidate is asked for its filter again."""
    search = make_search("random", 16, 64, 1)
    mask = np.arange(16) % 3 == 0
    search = Search(search.queries, search.codes, mask[None] if own else mask)
    out = array(32 * 4, torch.int32)
    machine.call("hamming_rows", *search.arguments, out)
    halves = out.numpy().reshape(8, 4, 2, 2)  # g, t, word t or t + 4, row g or g + 8
    is_there = halves.any(axis=(1, 2)).T.ravel()
    np.testing.assert_array_equal(is_there, np.ones(16, bool) if own else mask)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", ["random", "clustered", "duplicate"])
@pytest.mark.parametrize("name", SCANS)
def test_what_a_scan_has_found_bounds_what_it_looks_for(machine, name, kind, schedule):
    """The k nearest are among the candidates, whatever has been left out; and on the way limits do shrink."""
    queries, count, k = 66, 12_000, 8
    search = make_search(kind, count, 64, queries)
    keys = np.sort(search.keys(), axis=1)
    found, _ = scan(machine, name, search, keys[:, count // 10], k, count, schedule)
    for row, got in zip(keys, found, strict=True):
        assert len(np.unique(got)) == len(got) and (got <= row[count // 10]).all()
        assert np.isin(row[:k], got).all()
    if name != "popcount" and kind == "random":
        assert sum(map(len, found)) < queries * count // 20  # of a tenth of them


@pytest.mark.parametrize("k, size", [(1, 1), (1, 900), (7, 7), (64, 900), (700, 900), (900, 900)])
def test_selection(machine, k, size):
    """From candidates in any order: too few of them, too many, or as many as there are."""
    queries, count = 5, 2000
    search = make_search("clustered", count, 64, queries)
    rng = np.random.default_rng(4)
    keys = np.sort(search.keys(), axis=1)
    buffer = rng.permuted(keys[:, :size], axis=1)
    counts = torch.full((queries,), size, dtype=torch.int32)
    counts[1] = size + 1  # more than fit: what is kept is no use
    counts[2] = k - 1  # fewer than asked for
    buffer[1], buffer[2] = 0, 0
    limits = keys[:, size - 1].copy()
    placed = [torch.from_numpy(values.view(np.int64).copy()) for values in (buffer, limits)]
    distances, positions = torch.zeros((queries, k), dtype=torch.int32), torch.zeros((queries, k), dtype=torch.int64)
    arguments = (*search.arguments, *placed, counts, size, k, search.position_bits, distances, positions)
    machine.call("hamming_select", *arguments)
    assert_same((distances, positions), nearest(search.queries, search.codes, k))


def test_selection_of_fewer_than_k(machine):
    """Where the limit is everything, few candidates are all that the filter leaves."""
    search = make_search("random", 3000, 64, 2)
    search = Search(search.queries, search.codes, np.arange(3000) % 1000 == 5)
    keys = np.sort(search.keys(), axis=1)[:, :3]
    placed = torch.from_numpy(keys.view(np.int64).copy())
    limits = torch.full((2,), search.everything)
    distances, positions = torch.zeros((2, 9), dtype=torch.int32), torch.zeros((2, 9), dtype=torch.int64)
    arguments = (*search.arguments, placed, limits, torch.full((2,), 3, dtype=torch.int32), 3, 9)
    machine.call("hamming_select", *arguments, search.position_bits, distances, positions)
    assert_same((distances, positions), nearest(search.queries, search.codes, 9, search.filter))
