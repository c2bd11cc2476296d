"""hamming_topk's kernels, in the CUDA emulator and, if there is one, on a GPU.

A scan that loses a candidate can still lead to the correct answer, because the selection reads all codes if candidates
are missing. Therefore the tests also run each step alone, and check that the selection did not need this fallback.
"""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from tests.emulation.harness import FORWARD, SCHEDULES, Emulation, Host, array, load_emulation
from tests.emulation.on_gpu import OnGpu, load_on_gpu
from tests.helpers.architectures import PAIRS
from tests.helpers.hamming_levels import all_distances, assert_same, make_codes, make_filter, nearest

POPCOUNT, MMA, WGMMA = range(3)
SCANS = {"popcount": POPCOUNT, "mma": MMA, "wgmma": WGMMA}
OWN_FILTER = 3
# On compute capability 9.0, hamming_topk uses mma for 2 to 159 queries and wgmma for more; on 8.0, mma for 2 or more.
# For a single query, and on 12.0 for any number, it uses population counts.
CAPABILITIES = [90, 80, 120]
MARGINS = 32  # Candidates::kMargins
SELECTIVE = 0  # Candidates::kSelective
POISON = -7
NEVER_TIGHTEN = 2**31 - 1  # a k larger than any number of candidates: bounds are never tightened

Machine = Emulation | OnGpu


@pytest.fixture(scope="module", params=[load_emulation, load_on_gpu], ids=["emulation", "gpu"])
def machine(request) -> Machine:
    return request.param()


@dataclass
class Search:
    """The arguments of the launchers."""

    queries: np.ndarray
    codes: np.ndarray
    filter: np.ndarray | None = None
    offset: int = 0  # queries and codes begin this number of bytes after a 16-byte boundary

    def __post_init__(self) -> None:
        self.bits = 8 * self.codes.shape[1]
        self.position_bits = int(len(self.codes) - 1).bit_length()
        bitmap = None if self.filter is None else np.packbits(self.filter, axis=-1, bitorder="little")
        stride = bitmap.shape[1] if bitmap is not None and bitmap.ndim == 2 else 0
        self.sizes = torch.tensor([len(self.queries), *self.codes.shape, stride])
        self._bitmap = None if bitmap is None else torch.from_numpy(bitmap)
        self._rows = [self._copy(rows) for rows in (self.queries, self.codes)]

    def _copy(self, rows: np.ndarray) -> torch.Tensor:
        return array(rows.size, torch.uint8, self.offset).copy_(torch.from_numpy(rows.ravel()))

    @property
    def arguments(self) -> tuple:
        return (*self._rows, Host(self.sizes), self._bitmap)

    def keys(self) -> np.ndarray:
        """Return the keys, uint64 [queries, codes]; the largest number for codes that the filter excludes."""
        keys = all_distances(self.queries, self.codes).astype(np.uint64) << np.uint64(self.position_bits)
        keys |= np.arange(len(self.codes), dtype=np.uint64)
        return keys if self.filter is None else np.where(self.filter, keys, ~np.uint64(0))

    @property
    def largest_bound(self) -> int:
        """The bound that admits every code: the largest key that a code can have."""
        return self.bits << self.position_bits | len(self.codes) - 1


def topk(
    machine: Machine, search: Search, k: int, capability: int = 90, schedule: int = FORWARD
) -> tuple[tuple[np.ndarray, np.ndarray], int]:
    """Return (distances, positions), and the number of queries for which the selection had to read all codes."""
    queries = len(search.queries)
    distances = torch.full((queries, k), POISON, dtype=torch.int32)
    positions = torch.full((queries, k), POISON)
    workspace = machine.workspace("hamming_topk", Host(search.sizes), k, capability=capability)
    arguments = (*search.arguments, k, distances, positions, workspace)
    machine.call("hamming_topk", *arguments, capability=capability, schedule=schedule)
    fallbacks = 0
    if workspace.numel():
        offset, capacity = (torch.zeros(1, dtype=torch.int64) for _ in range(2))
        machine.call("hamming_topk_counts", Host(search.sizes), k, Host(offset), Host(capacity), capability=capability)
        counts = workspace[int(offset) : int(offset) + 4 * queries].view(torch.int32)
        passing = len(search.codes) if search.filter is None else torch.from_numpy(np.asarray(search.filter.sum(-1)))
        needed = torch.as_tensor(passing).clamp(max=k)
        fallbacks = int(((counts > capacity) | (counts < needed)).sum())
    return (distances.numpy(), positions.numpy()), fallbacks


def make_search(kind: str, count: int, bits: int, queries: int, seed: int = 0, offset: int = 0) -> Search:
    """Draw codes and queries. Every second query equals one of the codes."""
    rng = np.random.default_rng(seed)
    codes = make_codes(kind, count, bits, rng)
    equal = codes[rng.integers(0, count, queries)]
    drawn = rng.integers(0, 256, equal.shape, dtype=np.uint8)
    return Search(np.where(np.arange(queries)[:, None] % 2, equal, drawn), codes, offset=offset)


# --- the whole search -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["random", "clustered", "duplicate"])
@pytest.mark.parametrize("bits", [8, 64, 200])
# Each capability has a scan of its own for many queries; that of 9.0 takes 160 or more.
@pytest.mark.parametrize(
    ("capability", "queries"),
    [(c, queries) for c in CAPABILITIES for queries in (1, 5, 163 if c == 90 else 67)],
)
def test_topk(machine, capability, queries, bits, kind):
    search = make_search(kind, 9001, bits, queries)
    got, fallbacks = topk(machine, search, 50, capability)
    assert_same(got, nearest(search.queries, search.codes, 50))
    assert fallbacks == 0


@pytest.mark.parametrize(("device", "code"), PAIRS)
def test_every_device_gives_the_answers_with_the_code_that_it_runs(device, code):
    """No kernel starts early in code that does not wait."""
    emulation = load_emulation()
    for queries in (1, 5, 163 if device == 90 else 67):
        search = make_search("random", 9001, 64, queries)
        with emulation.device(code=code):
            got, _ = topk(emulation, search, 50, device)
        assert_same(got, nearest(search.queries, search.codes, 50))


@pytest.mark.parametrize("count", [1, 31, 33, 1000, 8192])
@pytest.mark.parametrize("bits", [8, 24, 64, 264])
def test_small_databases(machine, bits, count):
    search = make_search("clustered", count, bits, 3)
    for k in sorted({1, count // 2 + 1, min(count, 4096)}):
        got, _ = topk(machine, search, k)
        assert_same(got, nearest(search.queries, search.codes, k))


@pytest.mark.parametrize("k", [1, 2, 1000, 4096])
@pytest.mark.parametrize("queries", [2, 161])
def test_topk_for_small_and_large_k(machine, queries, k):
    search = make_search("random", 20011, 64, queries)
    got, fallbacks = topk(machine, search, k)
    assert_same(got, nearest(search.queries, search.codes, k))
    assert fallbacks == 0


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("share", [0.5, 0.02, 0.001, 0.0])
@pytest.mark.parametrize("queries", [1, 20, 162])
def test_filters(machine, queries, share, own):
    search = make_search("clustered", 9003, 64, queries)
    search = Search(search.queries, search.codes, make_filter(np.random.default_rng(1), 9003, queries, share, own))
    got, fallbacks = topk(machine, search, 20)
    assert_same(got, nearest(search.queries, search.codes, 20, search.filter))
    assert fallbacks == 0


@pytest.mark.parametrize("order", ["nearest first", "nearest last"])
@pytest.mark.parametrize("queries", [1, 160])
def test_adverse_orders(machine, queries, order):
    search = make_search("random", 10007, 64, queries)
    search.queries[:] = search.queries[0]
    ranks = np.argsort(all_distances(search.queries[:1], search.codes)[0], kind="stable")
    search = Search(search.queries, search.codes[ranks if order == "nearest first" else ranks[::-1]])
    got, fallbacks = topk(machine, search, 100)
    assert_same(got, nearest(search.queries, search.codes, 100))
    assert fallbacks == 0


# 3 queries use mma, 170 use wgmma. Codes of 72 bits are padded to 128 bits.
@pytest.mark.parametrize("bits, queries", [(64, 3), (64, 170), (72, 170), (128, 170)])
def test_unaligned_rows(machine, bits, queries):
    search = make_search("clustered", 8500, bits, queries, offset=1)
    got, fallbacks = topk(machine, search, 10)
    assert_same(got, nearest(search.queries, search.codes, 10))
    assert fallbacks == 0


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("queries", [1, 3, 160])
def test_the_result_does_not_depend_on_the_schedule(machine, queries, schedule):
    search = make_search("clustered", 8300, 64, queries)
    got, _ = topk(machine, search, 30, schedule=schedule)
    assert_same(got, nearest(search.queries, search.codes, 30))


def test_sparse_codes(machine):
    """The codes have few ones. Some queries have fewer ones than the distance to their nearest code."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (9000, 32), dtype=np.uint8)
    for _ in range(4):
        codes &= rng.integers(0, 256, codes.shape, dtype=np.uint8)
    queries = codes[:170] & rng.integers(0, 256, (170, 32), dtype=np.uint8)
    queries[0], queries[1] = 0, 255
    got, fallbacks = topk(machine, Search(queries, codes), 40)
    assert_same(got, nearest(queries, codes, 40))
    assert fallbacks == 0


def test_periodic_databases(machine):
    """Every second code is the same. A sample of every 8th code would contain only this code or never contain it."""
    search = make_search("random", 9000, 64, 4)
    search.codes[::2] = search.codes[:1]
    search = Search(search.queries, search.codes)
    got, fallbacks = topk(machine, search, 64)
    assert_same(got, nearest(search.queries, search.codes, 64))
    assert fallbacks == 0


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
def test_batches_of_queries(machine, own):
    search = make_search("clustered", 8400, 64, 7)
    search = Search(search.queries, search.codes, make_filter(np.random.default_rng(5), 8400, 7, 0.5, own))
    distances, positions = torch.full((7, 12), POISON, dtype=torch.int32), torch.full((7, 12), POISON)
    workspace = machine.workspace("hamming_topk", Host(search.sizes), 12)
    machine.call("hamming_topk_in_batches", *search.arguments, 12, 3, distances, positions, workspace)
    assert_same((distances, positions), nearest(search.queries, search.codes, 12, search.filter))


# --- the steps, each alone --------------------------------------------------------------------------------------------


def poisson_tail(mean: float, minimum: int) -> float:
    """Return the probability of at least `minimum` events."""
    return sum(math.exp(i * math.log(mean) - mean - math.lgamma(i + 1)) for i in range(minimum, minimum + 400))


def plan(machine: Machine, queries: int, count: int, k: int, device_bytes: int = 16 << 30) -> list[int]:
    """Return the size of the sample, the rank, the capacity, and the queries per batch."""
    out = torch.zeros(4, dtype=torch.int64)
    machine.call("hamming_topk_plan", Host(torch.tensor([queries, count, 8, 0])), k, device_bytes, Host(out))
    return out.tolist()


@pytest.mark.parametrize("queries", [1, 1667, 10_000, 1_000_000])
@pytest.mark.parametrize("count, k", [(10_000_000, 10), (100_000_000, 1), (2**32 - 1, 4096)])
@pytest.mark.parametrize("gigabytes", [8, 40, 80, 141, 288])
def test_the_candidates_of_a_batch_take_a_share_of_the_memory(machine, gigabytes, count, k, queries):
    """The batches are about equal; they are whole tiles of 256 queries if the memory suffices for a tile more."""
    _, _, capacity, batch = plan(machine, queries, count, k, gigabytes << 30)
    share = min(max(512 << 20, (gigabytes << 30) // 32), 4 << 30)
    most = max(share // (8 * capacity), 1)
    assert 1 <= batch <= min(queries, most)
    batches = math.ceil(queries / batch)
    assert batches <= math.ceil(queries / most)
    equal = math.ceil(queries / math.ceil(queries / most))
    assert equal <= batch < equal + 256
    if batches > 1 and equal + 255 <= most:
        assert batch % 256 == 0


def test_ten_thousand_queries_are_one_batch_on_an_h200(machine):
    assert plan(machine, 10_000, 10_000_000, 10, 141 << 30)[3] == 10_000


@pytest.mark.parametrize("queries", [1, 100])
@pytest.mark.parametrize("count", [8193, 100_000, 1_000_000, 100_000_000, 2**32 - 1])
@pytest.mark.parametrize("k", [1, 10, 100, 256, 257, 1000, 4096])
def test_too_few_and_too_many_candidates_are_each_rarer_than_1_in_100_000(machine, k, count, queries):
    """A query has too few candidates if the sample contains at least `rank` of its k nearest codes.

    It has too many if the sample contains fewer than `rank` of its `capacity` nearest codes.
    """
    samples, rank, capacity, _ = plan(machine, queries, count, k)
    fraction = samples / count
    assert poisson_tail(k * fraction, rank) < 1e-5
    assert capacity == count or 1 - poisson_tail(capacity * fraction, rank) < 1e-5


def hash32(x: int) -> int:
    """Return the hash of Strata::position in csrc/cuda/hamming/bounds.cu."""
    x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
    x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
    return x ^ x >> 16


def sampled_positions(samples: int, count: int) -> np.ndarray:
    length = (count << 30) // samples
    edges = [i * length >> 30 for i in range(samples + 1)]
    return np.array([edges[i] + (hash32(i) * (edges[i + 1] - edges[i]) >> 32) for i in range(samples)])


def check_bounds(machine: Machine, search: Search, samples: int, rank: int, **call) -> None:
    """A bound is the key with the given rank among the sampled codes that pass the filter."""
    queries = len(search.queries)
    bounds, counts = array(queries, torch.int64), array(queries, torch.int32)
    margin_counts = array(queries * MARGINS, torch.int32)
    workspace = machine.workspace("hamming_bounds", Host(search.sizes), samples)
    arguments = (*search.arguments, samples, rank, bounds, counts, margin_counts, search.position_bits, workspace)
    machine.call("hamming_bounds", *arguments, **call)
    count = len(search.codes)
    sampled = np.sort(search.keys()[:, sampled_positions(samples, count)], axis=1)[:, rank - 1]
    is_own = search.filter is not None and search.filter.ndim == 2
    of_few_codes = np.uint64(SELECTIVE if is_own else search.largest_bound)
    expected = np.where(sampled == ~np.uint64(0), of_few_codes, sampled)
    np.testing.assert_array_equal(bounds.numpy().view(np.uint64), expected)
    assert not counts.any() and not margin_counts.any()


# The emulated device has four multiprocessors: a block has 1, 2, 4 or 8 queries. The last block may have fewer.
@pytest.mark.parametrize("kind", ["random", "clustered", "duplicate"])
@pytest.mark.parametrize("queries", [1, 7, 11, 39])
@pytest.mark.parametrize("share", [None, 0.5, 0.01])
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
def test_bounds(machine, own, share, queries, kind):
    search = make_search(kind, 5001, 64, queries)
    if share is not None:
        search = Search(search.queries, search.codes, make_filter(np.random.default_rng(2), 5001, queries, share, own))
    for samples, rank in ((640, 1), (640, 7), (640, 640), (2496, 100)):
        check_bounds(machine, search, samples, rank)


# From 1,288 bits on, a block has at most four queries, and from 5,120 bits on one. The longer the codes, the fewer
# sections does the sample have.
@pytest.mark.parametrize("bits", [8, 40, 128, 520, 1024, 1288, 2560, 5120, 8184])
@pytest.mark.parametrize("queries", [3, 30])
def test_bounds_for_codes_of_all_lengths(machine, queries, bits):
    search = make_search("clustered", 5001, bits, queries, offset=bits % 3)
    for samples, rank in ((1024, 5), (2496, 900)):
        check_bounds(machine, search, samples, rank)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("queries", [2, 30])
def test_bounds_do_not_depend_on_the_schedule(machine, queries, schedule):
    check_bounds(machine, make_search("clustered", 5001, 64, queries), 2496, 300, schedule=schedule)


def scan(
    machine: Machine, number: int, search: Search, bounds: np.ndarray, k: int, capacity: int, schedule: int = FORWARD
) -> tuple[list[np.ndarray], np.ndarray]:
    """Return the stored keys per query, sorted, and the number of candidates per query."""
    queries = len(search.queries)
    keys = torch.full((queries, capacity), POISON)
    counts = torch.zeros(queries, dtype=torch.int32)
    margin_counts = array(queries * MARGINS, torch.int32).fill_(0)
    bounds_tensor = torch.from_numpy(bounds.astype(np.uint64).view(np.int64))
    arguments = (*search.arguments, keys, bounds_tensor, counts, margin_counts, capacity, k, search.position_bits)
    machine.call("hamming_scan", number, *arguments, schedule=schedule)
    stored = [row[: min(int(count), capacity)] for row, count in zip(keys, counts, strict=True)]
    return [np.sort(row.numpy().view(np.uint64)) for row in stored], counts.numpy()


def draw_bounds(search: Search, seed: int = 0) -> np.ndarray:
    """Return one bound per query: the key of a code of random rank, so that some bounds separate tied codes.

    The first bound admits all codes, and the last at most one.
    """
    rng = np.random.default_rng(seed)
    keys = np.sort(search.keys(), axis=1)
    ranks = np.minimum(np.exp(rng.uniform(0, np.log(len(search.codes)), len(keys))).astype(int), keys.shape[1] - 1)
    bounds = keys[np.arange(len(keys)), ranks]
    bounds[0] = search.largest_bound
    bounds[-1] = 0
    return np.minimum(bounds, np.uint64(search.largest_bound))


@pytest.mark.parametrize("kind", ["random", "clustered", "duplicate"])
@pytest.mark.parametrize("bits", [8, 32, 40, 64, 72, 128, 200, 256, 512, 1024])
@pytest.mark.parametrize("name", SCANS)
def test_candidates_are_the_codes_within_the_bound(machine, name, bits, kind):
    queries, count = 9, 1501
    search = make_search(kind, count, bits, queries, seed=bits)
    bounds = draw_bounds(search)
    stored, counts = scan(machine, SCANS[name], search, bounds, NEVER_TIGHTEN, count)
    for keys, bound, got, candidates in zip(search.keys(), bounds, stored, counts, strict=True):
        np.testing.assert_array_equal(got, np.sort(keys[keys <= bound]))
        assert candidates == len(got)


@pytest.mark.parametrize("queries", [1, 8, 16, 17, 32, 33, 70])
@pytest.mark.parametrize("bits", [64, 128, 256])
@pytest.mark.parametrize("share", [None, 0.3, 0.01])
def test_scan_mma_compares_eight_to_32_queries_at_a_time(machine, share, bits, queries):
    """With a filter that all queries share, some warps have no code to compare."""
    count = 1501
    search = make_search("random", count, bits, queries)
    if share is not None:
        mask = make_filter(np.random.default_rng(6), count, queries, share, own=False)
        search = Search(search.queries, search.codes, mask)
    bounds = draw_bounds(search)
    stored, counts = scan(machine, SCANS["mma"], search, bounds, NEVER_TIGHTEN, count)
    for keys, bound, got, candidates in zip(search.keys(), bounds, stored, counts, strict=True):
        np.testing.assert_array_equal(got, np.sort(keys[keys <= bound]))
        assert candidates == len(got)


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("name, queries", [("popcount", 300), ("mma", 2100), ("wgmma", 600)])
def test_a_scan_of_many_queries(machine, name, queries, own):
    """Search with a filter. For some queries there are more candidates than the capacity.

    scan_popcount and scan_mma divide so many queries among several blocks, scan_wgmma among several instructions.
    """
    count, capacity = 700, 20
    search = make_search("clustered", count, 64, queries)
    search = Search(search.queries, search.codes, make_filter(np.random.default_rng(3), count, queries, 0.5, own))
    bounds = draw_bounds(search)
    stored, counts = scan(machine, SCANS[name], search, bounds, NEVER_TIGHTEN, capacity)
    for keys, bound, got, candidates in zip(search.keys(), bounds, stored, counts, strict=True):
        within = keys[keys <= bound]
        assert candidates == len(within) and len(got) == min(candidates, capacity)
        assert len(np.unique(got)) == len(got) and np.isin(got, within).all()


@pytest.mark.parametrize("bits", [64, 256])
@pytest.mark.parametrize("queries, count, share", [(1600, 400, 4), (70, 6000, 16)], ids=["full", "many"])
def test_scan_wgmma_adds_all_queued_hits(machine, queries, count, share, bits):
    """In each round of codes, nearly every lane of a warp has hits for each tile of queries.

    With several tiles the queue becomes full within a round. With one tile it has many entries after a few rounds; then
    the warp processes a multiple of 32 of them.
    """
    search = make_search("random", count, bits, queries)
    keys = search.keys()
    bounds = np.sort(keys, axis=1)[:, count // share]
    stored, _ = scan(machine, SCANS["wgmma"], search, bounds, NEVER_TIGHTEN, count)
    for row, bound, got in zip(keys, bounds, stored, strict=True):
        np.testing.assert_array_equal(got, np.sort(row[row <= bound]))


@pytest.mark.parametrize("bits", [64, 128])
@pytest.mark.parametrize("name", SCANS)
def test_hits_of_one_chunk_are_checked_against_the_bounds_of_this_chunk(machine, name, bits):
    """Codes equal to the query are candidates up to the bound's position. For later chunks the distance 0 is too far.

    Other queries lie so far from all codes that a warp has few hits per chunk.
    """
    count, last = 6000, 2900  # a block's second chunk of scan_wgmma begins at position 3072 or later
    codes = np.full((count, bits // 8), 0x55, dtype=np.uint8)
    codes[::16] = 0
    queries = np.full((70, bits // 8), 0xAA, dtype=np.uint8)
    queries[0] = 0
    search = Search(queries, codes)
    bounds = np.zeros(len(queries), np.uint64)
    bounds[0] = last
    stored, counts = scan(machine, SCANS[name], search, bounds, NEVER_TIGHTEN, count)
    np.testing.assert_array_equal(stored[0], np.arange(0, last + 1, 16))
    assert not counts[1:].any()


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
def test_a_shared_filter_zeroes_the_rows_of_excluded_codes(machine, own):
    """Zeroing only saves time, because add_if_within_bound checks the filter too. A filter per query zeroes no rows."""
    search = make_search("random", 16, 64, 1)
    mask = np.arange(16) % 3 == 0
    search = Search(search.queries, search.codes, mask[None] if own else mask)
    out = array(32 * 4, torch.int32)
    machine.call("hamming_rows", *search.arguments, out)
    words = out.numpy().reshape(8, 4, 2, 2)  # of lane 4g + t: [g, t, word t or t + 4, row g or g + 8]
    is_nonzero = words.any(axis=(1, 2)).T.ravel()
    np.testing.assert_array_equal(is_nonzero, np.ones(16, bool) if own else mask)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", ["random", "clustered", "duplicate"])
@pytest.mark.parametrize("name", SCANS)
def test_a_scan_tightens_its_bounds(machine, name, kind, schedule):
    """The candidates contain the k nearest codes.

    On random codes, scan_mma and scan_wgmma also omit at least half of the codes within the initial bounds.
    """
    queries, count, k = 66, 12_000, 8
    search = make_search(kind, count, 64, queries)
    keys = np.sort(search.keys(), axis=1)
    stored, _ = scan(machine, SCANS[name], search, keys[:, count // 10], k, count, schedule)
    for row, got in zip(keys, stored, strict=True):
        assert len(np.unique(got)) == len(got) and (got <= row[count // 10]).all()
        assert np.isin(row[:k], got).all()
    if name != "popcount" and kind == "random":
        assert sum(map(len, stored)) < queries * count // 20  # half of the number of codes within the initial bounds


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("bits", [64, 256])
def test_scan_wgmma_tightens_a_bound_that_admits_every_code(machine, bits, schedule):
    queries, count, k = 70, 12_000, 8
    search = make_search("random", count, bits, queries)
    keys = np.sort(search.keys(), axis=1)
    bounds = np.full(queries, search.largest_bound, np.uint64)
    stored, _ = scan(machine, SCANS["wgmma"], search, bounds, k, count, schedule)
    for row, got in zip(keys, stored, strict=True):
        assert len(np.unique(got)) == len(got)
        assert np.isin(row[:k], got).all()
    assert sum(map(len, stored)) < queries * count // 2


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    "bits, count", [(8, 4000), (64, 4001), (64, 8 * 5001), (200, 1003), (1064, 1024), (64, 8 * (32 << 10) + 50)]
)
def test_scan_own_filter_adds_the_codes_of_selective_queries(machine, bits, count, schedule):
    """Rows of the bitmap begin at multiples of 4 bytes or not, and have one segment or more.

    The code with the key 0 is left to the other scan. Queries that are not selective get no candidate.
    """
    queries, capacity = 6, 50
    search = make_search("clustered", count, bits, queries)
    search.queries[3] = search.codes[0]
    mask = make_filter(np.random.default_rng(5), count, queries, 20 / count, own=True)
    mask[3, 0] = mask[2, -1] = True
    mask[4] = np.arange(count) < capacity + 10  # more than the capacity
    mask[5] = False
    search = Search(search.queries, search.codes, mask)
    bounds = np.full(queries, SELECTIVE, np.uint64)
    bounds[1] = search.largest_bound
    stored, counts = scan(machine, OWN_FILTER, search, bounds, 10, capacity, schedule)
    for query, (keys, got, candidates) in enumerate(zip(search.keys(), stored, counts, strict=True)):
        selected = np.sort(keys[mask[query] & (keys != 0)]) if query != 1 else keys[:0]
        assert candidates == len(selected) and len(got) == min(len(selected), capacity)
        assert np.isin(got, selected).all() and len(np.unique(got)) == len(got)


@pytest.mark.parametrize("k, size", [(1, 1), (1, 900), (7, 7), (64, 900), (700, 900), (900, 900)])
def test_selection_among_candidates_and_among_all_codes(machine, k, size):
    """The candidates are shuffled. One query has too many candidates and one too few; these two need the fallback."""
    queries, count = 5, 2000
    search = make_search("clustered", count, 64, queries)
    rng = np.random.default_rng(4)
    keys = np.sort(search.keys(), axis=1)
    buffer = rng.permuted(keys[:, :size], axis=1)
    counts = torch.full((queries,), size, dtype=torch.int32)
    counts[1] = size + 1  # more than the capacity
    counts[2] = k - 1
    buffer[1], buffer[2] = 0, 0  # the fallback must not read these
    bounds = keys[:, size - 1].copy()
    keys_and_bounds = [torch.from_numpy(values.view(np.int64).copy()) for values in (buffer, bounds)]
    distances, positions = torch.zeros((queries, k), dtype=torch.int32), torch.zeros((queries, k), dtype=torch.int64)
    arguments = (*search.arguments, *keys_and_bounds, counts, size, k, search.position_bits, distances, positions)
    machine.call("hamming_select", *arguments)
    assert_same((distances, positions), nearest(search.queries, search.codes, k))


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
def test_selection_when_fewer_than_k_codes_pass_the_filter(machine, own):
    """The candidates are complete and no fallback is needed, which would read other codes."""
    search = make_search("random", 3000, 64, 2)
    search = Search(search.queries, search.codes, np.arange(3000) % 1000 == 5)
    keys = torch.from_numpy(np.sort(search.keys(), axis=1)[:, :3].view(np.int64).copy())
    bounds = torch.full((2,), SELECTIVE if own else search.largest_bound)
    counts = torch.full((2,), 3, dtype=torch.int32)
    distances, positions = torch.zeros((2, 9), dtype=torch.int32), torch.zeros((2, 9), dtype=torch.int64)
    arguments = (*search.arguments, keys, bounds, counts, 3, 9, search.position_bits, distances, positions)
    machine.call("hamming_select", *arguments)
    assert_same((distances, positions), nearest(search.queries, search.codes, 9, search.filter))
