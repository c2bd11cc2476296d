"""hamming_count's and hamming_range's kernels in the CUDA emulator, compared with numpy."""

import ctypes

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.emulation.harness import FORWARD, SCHEDULES, Emulation, array, load_emulation, sparse_array
from tests.helpers.hamming_levels import all_distances, assert_same, make_codes, make_filter, nearest, within

SEGMENT = 1024  # codes per segment of a small database
KINDS = ["random", "clustered", "duplicate"]
# shared: one filter for all queries, which half of the codes pass. own, few: one filter per query, which half or 1% of
# the codes pass. nothing: one filter, which no code passes.
FILTERS = ["none", "shared", "own", "few", "nothing"]


@pytest.fixture(scope="module")
def emulation() -> Emulation:
    return load_emulation()


def filter_of(kind: str, count: int, queries: int, rng: np.random.Generator) -> np.ndarray | None:
    share = {"none": 1, "shared": 0.5, "own": 0.5, "few": 0.01, "nothing": 0}[kind]
    return None if kind == "none" else make_filter(rng, count, queries, share, kind in ("own", "few"))


class Search:
    """The arguments of the launchers, and methods that call them.

    Each array of queries, codes or filters begins `offset` bytes after a 16-byte boundary.
    """

    def __init__(
        self, queries: np.ndarray, codes: np.ndarray, filter: np.ndarray | None = None, offset: int = 0
    ) -> None:
        self.queries, self.codes, self.filter = queries, codes, filter
        self.bins = 8 * codes.shape[1] + 1
        bitmap = None if filter is None else np.packbits(filter, axis=-1, bitorder="little")
        stride = bitmap.shape[1] if bitmap is not None and bitmap.ndim == 2 else 0
        self.sizes = [len(queries), *codes.shape, stride]
        self.memory = [None if rows is None else copy_rows(rows, offset) for rows in (queries, codes, bitmap)]

    def count(
        self,
        emulation: Emulation,
        labels: list[np.ndarray] | None = None,
        any_shared: bool = False,
        schedule: int = FORWARD,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the counts and the relevant counts, [queries, bins]. Without labels, `relevant` is not written."""
        counts, relevant = (array(len(self.queries) * self.bins, torch.int64) for _ in range(2))
        rows = (None, None) if labels is None else [copy_rows(label.view(np.uint8), 0) for label in labels]
        words = -1 if labels is None else labels[0].shape[1]
        arguments = (torch.tensor(self.sizes), *self.memory, *rows, words, any_shared, counts, relevant)
        emulation.call("hamming_count", *arguments, schedule=schedule)
        return counts.view(-1, self.bins), relevant.view(-1, self.bins)

    def rank(
        self, emulation: Emulation, radius: int, max_results: int, schedule: int = FORWARD, with_lims: bool = False
    ) -> tuple[torch.Tensor, ...]:
        """Return (lims, distances, positions) or, without lims, (distances, positions) of [queries, max_results]."""
        sizes = torch.tensor([*self.sizes, radius, max_results])
        workspace = emulation.workspace("hamming_ranking", sizes)
        totals = array(len(self.queries), torch.int64)
        arguments = (sizes, *self.memory, totals if with_lims else None, workspace)
        emulation.call("hamming_ranking_count", *arguments, schedule=schedule)
        lims = torch.nn.functional.pad(totals.cumsum(0), (1, 0)) if with_lims else None
        slots = int(lims[-1]) if with_lims else max_results * len(self.queries)
        distances, positions = array(slots, torch.int32), array(slots, torch.int64)
        arguments = (sizes, *self.memory, lims, distances, positions, workspace)
        emulation.call("hamming_ranking_place", *arguments, schedule=schedule)
        if with_lims:
            return lims, distances, positions
        return distances.view(-1, max_results), positions.view(-1, max_results)


def copy_rows(rows: np.ndarray, offset: int) -> torch.Tensor:
    return array(rows.size, torch.uint8, offset).copy_(torch.from_numpy(rows.reshape(-1)))


def expected_counts(search: Search, relevant: np.ndarray | bool = True) -> tuple[list[np.ndarray], np.ndarray]:
    """Return, by definition, the number of relevant codes that pass the filter at each distance; and all distances."""
    distances = all_distances(search.queries, search.codes)
    passing = np.broadcast_to(True if search.filter is None else search.filter, distances.shape) & relevant
    rows = zip(distances, passing, strict=True)
    return [np.bincount(row[passes], minlength=search.bins) for row, passes in rows], distances


def check(emulation: Emulation, search: Search, schedules: tuple[int, ...] = (FORWARD,)) -> None:
    """Check the counts; and, for several `max_results`, the nearest codes and the codes within a radius."""
    queries, codes, filter = search.queries, search.codes, search.filter
    want, distances = expected_counts(search)
    radius = int(np.median(distances)) if distances.size else 0
    for schedule in schedules:
        assert_same(search.count(emulation, schedule=schedule)[0], want)
        for max_results in {len(codes), len(codes) * 2 // 3} - {0}:
            got = search.rank(emulation, search.bins - 1, max_results, schedule)
            assert_same(got, nearest(queries, codes, max_results, filter))
        for max_results in (7, len(codes)):
            got = search.rank(emulation, radius, max_results, schedule, with_lims=True)
            assert_same(got, within(queries, codes, radius, max_results, filter))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("code_bytes", [1, 3, 8, 12, 16, 33, 128])
def test_code_lengths(emulation, code_bytes, kind):
    rng = np.random.default_rng(code_bytes)
    query_count = 5 if code_bytes < 16 else 2  # the emulator is slow at prefix sums over many distances
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
def test_every_schedule_gives_the_correct_result(emulation, schedule):
    rng = np.random.default_rng(2)
    codes, queries = make_codes("clustered", 2 * SEGMENT + 77, 64, rng), make_codes("random", 2, 64, rng)
    queries[0] = codes[SEGMENT]
    check(emulation, Search(queries, codes, filter_of("own", len(codes), 2, rng)), (schedule,))


def test_a_long_database(emulation):
    rng = np.random.default_rng(3)
    codes, query = make_codes("clustered", 20_001, 64, rng), make_codes("random", 1, 64, rng)
    check(emulation, Search(query, codes, filter_of("shared", len(codes), 1, rng)))


def test_a_search_without_queries_is_empty(emulation):
    codes = make_codes("random", 40, 64, np.random.default_rng(0))
    search = Search(codes[:0], codes)
    assert search.count(emulation)[0].shape == (0, 65)
    assert search.rank(emulation, 64, 40)[0].shape == (0, 40)
    assert search.rank(emulation, 64, 40, with_lims=True)[0].tolist() == [0]


@pytest.mark.parametrize("code_bytes", [143, 145, 575, 577, 1030, 1151, 1153, 8192])
def test_code_lengths_around_the_limits_of_shared_memory(emulation, code_bytes):
    """The lengths lie on both sides of three limits.

    Beyond the first, the slots of a ranking are in global memory; beyond the second, the counters with labels; beyond
    the third, the counters without labels.
    """
    rng = np.random.default_rng(4)
    fraction_of_ones = np.linspace(0, 1, 70)[:, None]
    codes = np.packbits(rng.random((70, 8 * code_bytes)) < fraction_of_ones, axis=1)  # distances from 0 to all bits
    queries = np.ascontiguousarray(codes[[0, 69, 30]])
    search = Search(queries, codes, filter_of("own", 70, 3, rng))
    check_labels(emulation, search, [rng.integers(0, 2, (rows, 1), dtype=np.uint64) for rows in (3, 70)], False)
    assert_same(search.count(emulation)[0], expected_counts(search)[0])
    for radius in (0, 40):
        got = search.rank(emulation, radius, 70, with_lims=True)
        assert_same(got, within(queries, codes, radius, 70, search.filter))
    if code_bytes < 8192:  # the emulator is slow at prefix sums over 65,537 distances
        alone = Search(queries[:1], codes, filter_of("own", 70, 1, rng))
        assert_same(
            alone.rank(emulation, 8 * code_bytes, 60, schedule=7), nearest(queries[:1], codes, 60, alone.filter)
        )


@pytest.mark.parametrize("radius", [0, 1, 5, 12, 23, 24])
@pytest.mark.parametrize("filter", ["none", "own"])
def test_rankings_that_are_cut_off(emulation, radius, filter):
    rng = np.random.default_rng(5)
    codes, queries = make_codes("clustered", SEGMENT + 200, 24, rng), make_codes("random", 3, 24, rng)
    queries[:2] = codes[[0, -1]]
    search = Search(queries, codes, filter_of(filter, len(codes), 3, rng))
    for max_results in (1, 33, SEGMENT):  # a cut can separate codes of equal distance
        got = search.rank(emulation, radius, max_results, with_lims=True)
        assert_same(got, within(queries, codes, radius, max_results, search.filter))


def test_unused_slots_are_filled(emulation):
    rng = np.random.default_rng(6)
    codes, queries = make_codes("random", 40_000, 8, rng), make_codes("random", 1, 8, rng)
    search = Search(queries, codes, np.arange(40_000) % 9973 == 5)
    assert_same(search.rank(emulation, 8, 40_000), nearest(queries, codes, 40_000, search.filter))


def check_labels(
    emulation: Emulation,
    search: Search,
    labels: list[np.ndarray],
    any_shared: bool,
    schedules: tuple[int, ...] = (FORWARD,),
) -> None:
    query_labels, code_labels = labels[0][:, None], labels[1]
    relevant = (query_labels & code_labels).any(2) if any_shared else (query_labels == code_labels).all(2)
    want = expected_counts(search)[0], expected_counts(search, relevant)[0]
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
    def call(name: str, query_count: int) -> int:
        function = getattr(emulation.library, name)
        function.restype = ctypes.c_int64
        sizes = torch.tensor([query_count, count, code_bytes, 0, 8 * code_bytes, max(count, 1)])
        return function(ctypes.c_void_p(sizes.data_ptr()))

    batch = call("batch_of_hamming_ranking", 1)
    assert batch == call("batch_of_hamming_ranking", 1000) >= 1
    assert call("workspace_bytes_of_hamming_ranking", batch) <= 2**28
    assert count > 10**6 or code_bytes > 128 or batch > 100
    # The workspace of a single query has counters for enough segments to occupy a whole GPU, if there are enough codes.
    one = call("workspace_bytes_of_hamming_ranking", 1)
    assert one >= 8 * (8 * code_bytes + 1) * (min(count // SEGMENT, 16_000 if code_bytes < 128 else 250) + 1)


@settings(max_examples=300, deadline=None)
@given(
    query_count=st.integers(0, 20_000),
    count=st.integers(0, 10**8),
    code_bytes=st.sampled_from([1, 8, 16, 128]),
    radius=st.integers(0, 1024),
)
# In these searches the last batch needs more memory than the others.
@example(query_count=10_000, count=10**6, code_bytes=8, radius=64)
@example(query_count=8_225, count=10**6, code_bytes=8, radius=64)
@example(query_count=10_000, count=10**6, code_bytes=16, radius=128)
@example(query_count=98, count=10**8, code_bytes=8, radius=48)
def test_the_last_batch_fits_in_the_workspace(query_count, count, code_bytes, radius):
    library = load_emulation().library

    def call(name: str, queries: int) -> int:
        function = getattr(library, name)
        function.restype = ctypes.c_int64
        sizes = torch.tensor([queries, count, code_bytes, 0, min(radius, 8 * code_bytes), max(count, 1)])
        return function(ctypes.c_void_p(sizes.data_ptr()))

    batch = call("batch_of_hamming_ranking", query_count)
    workspace = call("workspace_bytes_of_hamming_ranking", query_count)
    batches = {min(batch, query_count - first) for first in range(0, query_count, batch)}
    assert all(call("workspace_bytes_of_hamming_ranking", queries) <= workspace for queries in batches)


# --- more than 2^32 codes: only the last block runs, and only the pages that it accesses exist ------------------------


def test_more_than_two_to_the_32_codes(emulation):
    # Segments of 2^17 codes would be more than kEnoughSegments = 2^15, so the kernel takes segments of 2^18 codes.
    segment, segments = 2**18, 2**14 + 1
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
    counts, offsets = words[: 9 * (segments + 1)].view(9, segments + 1), words[9 * (segments + 1) :]
    distances = all_distances(query.view(1, 1).numpy(), tail.view(-1, 1).numpy())[0]
    tail_counts = torch.from_numpy(np.bincount(distances, minlength=9))
    assert torch.equal(counts[:, -2], tail_counts) and not counts[:, :-2].any()

    # Store the prefix sums that result if all segments but the last one are empty.
    counts[:, -1] = tail_counts
    counts[:, -2] = 0
    offsets[1:] = tail_counts.cumsum(0)
    got = array(3000, torch.int32), array(3000, torch.int64)
    emulation.call("hamming_ranking_place", *arguments, torch.zeros(2, dtype=torch.int64), *got, workspace,
                   first_block=(segments - 1) // 4)  # fmt: skip
    order = np.argsort(distances, kind="stable")[:3000]
    assert_same(got, (distances[order], order + count - 4999))
