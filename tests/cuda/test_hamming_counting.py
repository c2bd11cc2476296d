"""Counts of Hamming distances, and the rankings made from them, on the GPU: run by the emulation, against numpy."""

import ctypes

import numpy as np
import pytest
import torch

from tests.emulation.harness import FORWARD, SCHEDULES, array, load_emulation, sparse_array
from tests.helpers.hamming_levels import all_distances, assert_same, make_codes, make_filter, nearest, within

SEGMENT = 1024  # codes, of small databases
KINDS = ["random", "clustered", "duplicate"]
FILTERS = ["none", "shared", "own", "few", "nothing"]


@pytest.fixture(scope="module")
def emulation():
    return load_emulation()


def filter_of(kind: str, count: int, queries: int, rng: np.random.Generator) -> np.ndarray | None:
    share = {"none": 1, "shared": 0.5, "own": 0.5, "few": 0.01, "nothing": 0}[kind]
    return None if kind == "none" else make_filter(rng, count, queries, share, kind in ("own", "few"))


class Search:
    """Queries and codes in memory of exactly their size, `offset` bytes past a boundary."""

    def __init__(self, queries: np.ndarray, codes: np.ndarray, filter: np.ndarray | None = None, offset: int = 0):
        self.queries, self.codes, self.filter = queries, codes, filter
        self.bins = 8 * codes.shape[1] + 1
        bitmap = None if filter is None else np.packbits(filter, axis=-1, bitorder="little")
        stride = bitmap.shape[1] if bitmap is not None and bitmap.ndim == 2 else 0
        self.sizes = [len(queries), *codes.shape, stride]
        self.memory = [None if rows is None else place(rows, offset) for rows in (queries, codes, bitmap)]

    def count(self, emulation, labels=None, any_shared: bool = False, schedule: int = FORWARD):
        counts, relevant = (array(len(self.queries) * self.bins, torch.int64) for _ in range(2))
        rows = (None, None) if labels is None else [place(label.view(np.uint8), 0) for label in labels]
        words = -1 if labels is None else labels[0].shape[1]
        arguments = (torch.tensor(self.sizes), *self.memory, *rows, words, any_shared, counts, relevant)
        emulation.call("hamming_count", *arguments, schedule=schedule)
        return counts.view(-1, self.bins), relevant.view(-1, self.bins)

    def rank(self, emulation, radius: int, most: int, schedule: int = FORWARD, with_lims: bool = False):
        """lims, distances and positions of all within the radius, or, without lims, `most` places a query."""
        sizes = torch.tensor([*self.sizes, radius, most])
        workspace = emulation.workspace("hamming_ranking", sizes)
        totals = array(len(self.queries), torch.int64)
        arguments = (sizes, *self.memory, totals if with_lims else None, workspace)
        emulation.call("hamming_ranking_count", *arguments, schedule=schedule)
        lims = torch.nn.functional.pad(totals.cumsum(0), (1, 0)) if with_lims else None
        places = int(lims[-1]) if with_lims else most * len(self.queries)
        distances, positions = array(places, torch.int32), array(places, torch.int64)
        arguments = (sizes, *self.memory, lims, distances, positions, workspace)
        emulation.call("hamming_ranking_place", *arguments, schedule=schedule)
        if with_lims:
            return lims, distances, positions
        return distances.view(-1, most), positions.view(-1, most)


def place(rows: np.ndarray, offset: int) -> torch.Tensor:
    return array(rows.size, torch.uint8, offset).copy_(torch.from_numpy(rows.reshape(-1)))


def counted(search: Search, relevant=True) -> tuple[list[np.ndarray], np.ndarray]:
    """By definition: how many of those that the filter lets through lie at each distance; and all distances."""
    distances = all_distances(search.queries, search.codes)
    passing = np.broadcast_to(True if search.filter is None else search.filter, distances.shape) & relevant
    rows = zip(distances, passing, strict=True)
    return [np.bincount(row[passes], minlength=search.bins) for row, passes in rows], distances


def check(emulation, search: Search, schedules=(FORWARD,)) -> None:
    """Counts, the whole ranking, one cut within ties, and those within a radius, clipped and not."""
    queries, codes, filter = search.queries, search.codes, search.filter
    want, distances = counted(search)
    radius = int(np.median(distances)) if distances.size else 0
    for schedule in schedules:
        assert_same(search.count(emulation, schedule=schedule)[0], want)
        for most in {len(codes), len(codes) * 2 // 3} - {0}:
            got = search.rank(emulation, search.bins - 1, most, schedule)
            assert_same(got, nearest(queries, codes, most, filter))
        for most in (7, len(codes)):
            got = search.rank(emulation, radius, most, schedule, with_lims=True)
            assert_same(got, within(queries, codes, radius, most, filter))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("code_bytes", [1, 3, 8, 12, 16, 33, 128])
def test_widths(emulation, code_bytes, kind):
    rng = np.random.default_rng(code_bytes)
    query_count = 5 if code_bytes < 16 else 2  # the sums of many distances take their time here
    codes, queries = make_codes(kind, 301, 8 * code_bytes, rng), make_codes("random", query_count, 8 * code_bytes, rng)
    queries[0] = codes[-1]
    for offset in (0, 1):
        check(emulation, Search(queries, codes, None, offset))


@pytest.mark.parametrize("count", [0, 1, 31, 33, SEGMENT - 1, SEGMENT, SEGMENT + 1, 2 * SEGMENT + 33])
@pytest.mark.parametrize("query_count", [1, 2, 9])
def test_sizes(emulation, query_count, count):
    rng = np.random.default_rng(count)
    codes, queries = make_codes("random", count, 24, rng), make_codes("random", query_count, 24, rng)
    check(emulation, Search(queries, codes))


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize("kind", KINDS)
def test_filters(emulation, kind, filter):
    rng = np.random.default_rng(1)
    for query_count, bits in ((3, 64), (33, 16)):
        codes, queries = make_codes(kind, 135, bits, rng), make_codes("random", query_count, bits, rng)
        check(emulation, Search(queries, codes, filter_of(filter, 135, query_count, rng)))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(emulation, schedule):
    rng = np.random.default_rng(2)
    codes, queries = make_codes("clustered", 2 * SEGMENT + 77, 64, rng), make_codes("random", 2, 64, rng)
    queries[0] = codes[SEGMENT]
    check(emulation, Search(queries, codes, filter_of("own", len(codes), 2, rng)), (schedule,))


def test_a_long_database(emulation):
    rng = np.random.default_rng(3)
    codes, query = make_codes("clustered", 20_001, 64, rng), make_codes("random", 1, 64, rng)
    check(emulation, Search(query, codes, filter_of("shared", len(codes), 1, rng)))


def test_no_queries(emulation):
    codes = make_codes("random", 40, 64, np.random.default_rng(0))
    search = Search(codes[:0], codes)
    assert search.count(emulation)[0].shape == (0, 65)
    assert search.rank(emulation, 64, 40)[0].shape == (0, 40)
    assert search.rank(emulation, 64, 40, with_lims=True)[0].tolist() == [0]


@pytest.mark.parametrize("code_bytes", [143, 145, 575, 577, 1030, 1151, 1153, 8192])
def test_counters_and_places_beyond_shared_memory(emulation, code_bytes):
    """The widths around which places, counters with labels and counters without them move to global memory."""
    rng = np.random.default_rng(4)
    share = np.linspace(0, 1, 70)[:, None]
    codes = np.packbits(rng.random((70, 8 * code_bytes)) < share, axis=1)  # every distance up to all bits
    queries = np.ascontiguousarray(codes[[0, 69, 30]])
    search = Search(queries, codes, filter_of("own", 70, 3, rng))
    check_labels(emulation, search, [rng.integers(0, 2, (rows, 1), dtype=np.uint64) for rows in (3, 70)], False)
    assert_same(search.count(emulation)[0], counted(search)[0])
    for radius in (0, 40):
        got = search.rank(emulation, radius, 70, with_lims=True)
        assert_same(got, within(queries, codes, radius, 70, search.filter))
    if code_bytes < 8192:  # the sums of 65,537 distances take minutes here
        alone = Search(queries[:1], codes, filter_of("own", 70, 1, rng))
        assert_same(alone.rank(emulation, 8 * code_bytes, 60, 7), nearest(queries[:1], codes, 60, alone.filter))


@pytest.mark.parametrize("radius", [0, 1, 5, 12, 23, 24])
@pytest.mark.parametrize("filter", ["none", "own"])
def test_every_radius_and_cut(emulation, radius, filter):
    rng = np.random.default_rng(5)
    codes, queries = make_codes("clustered", SEGMENT + 200, 24, rng), make_codes("random", 3, 24, rng)
    queries[:2] = codes[[0, -1]]
    search = Search(queries, codes, filter_of(filter, len(codes), 3, rng))
    for most in (1, 33, SEGMENT):  # each within ties
        got = search.rank(emulation, radius, most, with_lims=True)
        assert_same(got, within(queries, codes, radius, most, search.filter))


def test_places_that_no_result_takes(emulation):
    rng = np.random.default_rng(6)
    codes, queries = make_codes("random", 40_000, 8, rng), make_codes("random", 1, 8, rng)
    search = Search(queries, codes, np.arange(40_000) % 9973 == 5)
    assert_same(search.rank(emulation, 8, 40_000), nearest(queries, codes, 40_000, search.filter))


def check_labels(emulation, search: Search, labels: list[np.ndarray], any_shared: bool, schedules=(FORWARD,)) -> None:
    pairs = labels[0][:, None], labels[1]
    relevant = (pairs[0] & pairs[1]).any(2) if any_shared else (pairs[0] == pairs[1]).all(2)
    want = counted(search)[0], counted(search, relevant)[0]
    for schedule in schedules:
        assert_same(search.count(emulation, labels, any_shared, schedule), want)


@pytest.mark.parametrize("words", [0, 1, 2])
@pytest.mark.parametrize("any_shared", [False, True], ids=["equal", "shared"])
@pytest.mark.parametrize("filter", ["none", "shared", "own"])
def test_labels(emulation, filter, any_shared, words):
    rng = np.random.default_rng(7)
    for query_count, code_bytes in ((1, 8), (5, 3), (9, 2)):
        codes, queries = (make_codes("random", rows, 8 * code_bytes, rng) for rows in (300, query_count))
        search = Search(queries, codes, filter_of(filter, 300, query_count, rng))
        labels = [rng.integers(0, 8, (rows, words), dtype=np.uint64) << np.uint64(40) for rows in (query_count, 300)]
        check_labels(emulation, search, labels, any_shared, SCHEDULES)


@pytest.mark.parametrize("code_bytes", [1, 8, 128, 8192])
@pytest.mark.parametrize("count", [0, 1, 10**6, 10**9, 2**40])
def test_a_batch_of_queries_fits_in_its_workspace(emulation, count, code_bytes):
    function = emulation.library.batch_of_hamming_ranking
    function.restype = ctypes.c_int64

    def call(function, query_count: int) -> int:
        function.restype = ctypes.c_int64
        sizes = torch.tensor([query_count, count, code_bytes, 0, 8 * code_bytes, max(count, 1)])
        return function(ctypes.c_void_p(sizes.data_ptr()))

    batch = call(emulation.library.batch_of_hamming_ranking, 1)
    assert batch == call(emulation.library.batch_of_hamming_ranking, 1000) >= 1
    assert call(emulation.library.workspace_bytes_of_hamming_ranking, batch) <= 2**28
    assert count > 10**6 or code_bytes > 128 or batch > 100
    # One query alone has segments enough for all of the device.
    one = call(emulation.library.workspace_bytes_of_hamming_ranking, 1)
    assert one >= 8 * (8 * code_bytes + 1) * (min(count // SEGMENT, 16_000 if code_bytes < 128 else 250) + 1)


# --- beyond 2^32 codes: only the last block runs, and only the pages that it touches exist ----------------------------


def test_far_out(emulation):
    segment, segments = 2**18, 2**14 + 1  # 32,768 segments of one query are enough
    count = (segments - 1) * segment + 4999
    codes = sparse_array(count, torch.uint8)
    tail = torch.randint(0, 256, (4999,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    codes[-4999:] = tail
    query = array(1, torch.uint8).fill_(7)
    sizes = torch.tensor([1, count, 1, 0, 8, 3000])
    workspace = emulation.workspace("hamming_ranking", sizes).zero_()
    arguments = (sizes, query, codes, None)
    emulation.call("hamming_ranking_count", *arguments, None, workspace, first_block=segments - 1)
    words = workspace.view(torch.int64)
    shares, places = words[: 9 * (segments + 1)].view(9, segments + 1), words[9 * (segments + 1) :]
    distances = all_distances(query.view(1, 1).numpy(), tail.view(-1, 1).numpy())[0]
    of_tail = torch.from_numpy(np.bincount(distances, minlength=9))
    assert torch.equal(shares[:, -2], of_tail) and not shares[:, :-2].any()

    shares[:, -1] = of_tail  # the sums, over segments that have no codes but the last one
    shares[:, -2] = 0
    places[1:] = of_tail.cumsum(0)
    got = array(3000, torch.int32), array(3000, torch.int64)
    emulation.call("hamming_ranking_place", *arguments, torch.zeros(2, dtype=torch.int64), *got, workspace,
                   first_block=(segments - 1) // 4)  # fmt: skip
    order = np.argsort(distances, kind="stable")[:3000]
    assert_same(got, (distances[order], order + count - 4999))
