"""Metrics, compared with brute force over all orders of tied items, with a published formula, and with scikit-learn."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hashengine import HammingIndex, InputError
from hashengine.metrics import DistanceCounts, distance_counts
from tests.helpers.toy_searcher import ToySearcher

# hashengine/metrics.py computes the sum of the precisions in a tie in closed form. If the tie begins within the first
# 128 items, the error of this sum is at most 128 times that of a difference of two digammas. The latter is estimated as
# 8 eps, which gives about 1000 eps. If the tie begins later, the error is estimated as a few eps.
TOLERANCE = 1000 * np.finfo(np.float64).eps

DENOMINATORS = ("retrieved", "relevant")


def close(value):
    return pytest.approx(value, rel=0, abs=TOLERANCE)


def naive_distances(query_codes, database_codes):
    return np.unpackbits(query_codes[:, None] ^ database_codes[None], axis=-1).sum(-1)


def naive_relevance(query_labels, database_labels):
    if query_labels.ndim == 1:
        return query_labels[:, None] == database_labels
    return (query_labels[:, None] & database_labels[None]).any(-1)


def random_labels(rng, count, kind):
    return rng.integers(0, 3, count) if kind == "single" else rng.random((count, 4)) < 0.3


def random_data(rng, queries, size, kind, patterns=3, bits=16):
    """Queries, their labels, database codes and their labels. Few codes are distinct, so most distances are ties."""
    pool = rng.integers(0, 256, (patterns, bits // 8), dtype=np.uint8)
    return (
        pool[rng.integers(0, patterns, queries)],
        random_labels(rng, queries, kind),
        pool[rng.integers(0, patterns, size)],
        random_labels(rng, size, kind),
    )


def counts_of(data):
    query_codes, query_labels, database_codes, database_labels = data
    return distance_counts(query_codes, database_codes, labels=(query_labels, database_labels))


def orders(distances, relevance):
    """The relevance of the ranked items in each distinct order. All distinct orders are equally likely."""
    ties = []
    for distance in np.unique(distances):
        tie = relevance[distances == distance]
        places = itertools.combinations(range(len(tie)), int(tie.sum()))
        ties.append([[place in relevant for place in range(len(tie))] for relevant in map(set, places)])
    return [list(itertools.chain(*order)) for order in itertools.product(*ties)]


def average_precision(order, at, denominator):
    hits = list(itertools.accumulate(order))
    precisions = [hits[i] / (i + 1) for i in range(at) if order[i]]
    return math.fsum(precisions) / max(1, len(precisions) if denominator == "retrieved" else sum(order))


def expect(result, values_per_query):
    """Compare a result with the values of the metric for all orders, given as one list per query."""
    for statistic, reduce in (("expected", np.mean), ("minimum", min), ("maximum", max)):
        per_query = [float(reduce(values)) for values in values_per_query]
        assert getattr(result, f"{statistic}_per_query").tolist() == close(per_query)
        assert getattr(result, statistic) == close(np.mean(per_query))


@pytest.mark.parametrize("kind", ["single", "multi-hot"])
@pytest.mark.parametrize("seed", range(12))
def test_metrics_equal_brute_force_over_all_orders(seed, kind):
    rng = np.random.default_rng(seed)
    size = int(rng.integers(1, 9))
    data = random_data(rng, 4, size, kind)
    distances, relevance = naive_distances(data[0], data[2]), naive_relevance(data[1], data[3])
    rankings = [orders(*query) for query in zip(distances, relevance, strict=True)]
    for denominator in DENOMINATORS:
        for at in (None, *range(1, size + 1)):
            result = counts_of(data).mean_average_precision(at=at, denominator=denominator)
            expect(result, [[average_precision(order, at or size, denominator) for order in r] for r in rankings])
            assert (result.at, result.denominator) == (at, denominator)
    for k in range(1, size + 1):
        expect(counts_of(data).precision_at(k), [[sum(order[:k]) / k for order in r] for r in rankings])
        expect(counts_of(data).recall_at(k), [[sum(order[:k]) / max(1, sum(order)) for order in r] for r in rankings])


@pytest.mark.parametrize("denominator", DENOMINATORS)
@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_average_precision_at_every_cut_inside_a_tie_equals_brute_force(size, denominator):
    """Other items precede the tie. Every number of relevant items in the tie and every cut in the tie are tested."""
    for misses, hits in itertools.product([0, 1, 3, 7], repeat=2):
        before = [True] * hits + [False] * misses
        rankings = [
            [before + order for order in orders(np.zeros(size), np.arange(size) < relevant)]
            for relevant in range(size + 1)
        ]
        relevant = torch.tensor([[*before, number] for number in range(size + 1)], dtype=torch.int64)
        items = torch.tensor([[1] * len(before) + [size]] * (size + 1))
        counts = DistanceCounts(items, relevant)
        for at in range(len(before) + 1, len(before) + size + 1):
            result = counts.mean_average_precision(at=at, denominator=denominator)
            expect(result, [[average_precision(order, at, denominator) for order in r] for r in rankings])


def mcsherry_najork(items, relevant):
    """The expected average precision by the formula of McSherry and Najork (ECIR 2008, section 3.3)."""
    total, before, hits = 0.0, 0, 0
    for n, r in zip(items, relevant, strict=True):
        for place in range(1, n + 1):
            earlier = (place - 1) * (r - 1) / (n - 1) if n > 1 else 0.0
            total += r / n * (hits + earlier + 1) / (before + place)
        before, hits = before + n, hits + r
    return total / hits


def test_mean_average_precision_equals_the_published_formula():
    rng = np.random.default_rng(0)
    data = random_data(rng, 5, 4000, "single", patterns=300)
    counts = counts_of(data)
    expected = [mcsherry_najork(*pair) for pair in zip(counts.items.tolist(), counts.relevant.tolist(), strict=True)]
    assert counts.mean_average_precision().expected_per_query.tolist() == close(expected)


@pytest.mark.parametrize("before, hits, n, r, taken", [(150, 60, 3000, 700, 1100), (1, 0, 2000, 900, 1500)])
def test_average_precision_at_a_cut_inside_a_large_tie_equals_a_sum_over_hit_counts(before, hits, n, r, taken):
    """`before` items, `hits` of them relevant, precede a tie of `n` items, `r` of them relevant.

    The cut keeps `taken` items of the tie. The tie has too many orders to enumerate. The hypergeometric
    probabilities are computed from exact integers.
    """

    def average(first, places, ranks):
        """Average precision.

        first: the sum of the precisions before the tie.
        places, ranks: for each hit in the tie, its place in the ranking and its rank among all hits.
        """
        return (first + (ranks / places).sum()) / max(1, hits + len(ranks))

    place, head = before + 1 + np.arange(taken), 1 + np.arange(hits)
    first = 0.0 if hits == 0 else hits * mcsherry_najork([before], [hits])
    expected, lowest, highest = 0.0, [], []
    for x in range(max(0, taken - (n - r)), min(taken, r) + 1):  # x: how many of the `taken` items are relevant
        probability = math.comb(r, x) * math.comb(n - r, taken - x) / math.comb(n, taken)
        ranks = hits + 1 + np.arange(taken) * (x - 1) / (taken - 1)
        expected += probability * (first + x / taken * (ranks / place).sum()) / max(1, hits + x)
        ranks = hits + 1 + np.arange(x)
        lowest.append(average((head / (before - hits + head)).sum(), place[taken - x :], ranks))
        highest.append(average(hits, place[:x], ranks))

    result = DistanceCounts(torch.tensor([[before, n]]), torch.tensor([[hits, r]])).mean_average_precision(
        at=before + taken
    )
    assert result.expected == close(expected)
    assert result.minimum == close(min(lowest))
    assert result.maximum == close(max(highest))


def test_ties_of_a_million_items_are_accurate():
    """The closed form stays accurate if most terms of its harmonic sums are about one millionth."""
    items, relevant = [2, 1_000_000, 3, 1_000_000], [0, 1, 2, 3]
    total, before, hits = 0.0, 0, 0
    for n, r in zip(items, relevant, strict=True):
        place = np.arange(n)
        total += r / n * ((hits + 1 + place * (r - 1) / (n - 1)) / (before + 1 + place)).sum()
        before, hits = before + n, hits + r
    counts = DistanceCounts(torch.tensor([items]), torch.tensor([relevant]))
    assert counts.mean_average_precision().expected == pytest.approx(total / hits, rel=1e-9, abs=0)
    # Half of the tie is relevant. A cut in its middle keeps 250,000 +- 250 hits, and the precision at each is near 1/2.
    counts = DistanceCounts(torch.tensor([[1_000_000]]), torch.tensor([[500_000]]))
    assert counts.precision_at(500_000).expected == 0.5
    assert counts.mean_average_precision(at=500_000).expected == pytest.approx(0.5, abs=1e-4)


def test_both_denominators_give_the_same_value_over_the_whole_ranking():
    data = random_data(np.random.default_rng(1), 6, 300, "multi-hot", patterns=40)
    retrieved, relevant = (
        counts_of(data).mean_average_precision(denominator=denominator) for denominator in DENOMINATORS
    )
    assert retrieved.expected_per_query.tolist() == close(relevant.expected_per_query.tolist())
    whole = counts_of(data).mean_average_precision(at=300)
    assert whole.expected_per_query.tolist() == retrieved.expected_per_query.tolist()


def untied_data(seed):
    """One query of 64 zero bits, and codes with 1 to 64 set bits in random places, in random order."""
    rng = np.random.default_rng(seed)
    bits = np.array([rng.permutation(64) < weight for weight in rng.permutation(64) + 1])
    return np.zeros((1, 8), np.uint8), np.array([1]), np.packbits(bits, axis=1), rng.integers(0, 3, 64)


@pytest.mark.parametrize("seed", range(5))
def test_average_precision_without_ties_equals_scikit_learn(seed):
    average_precision_score = pytest.importorskip("sklearn.metrics").average_precision_score
    data = untied_data(seed)
    result = counts_of(data).mean_average_precision()
    score = average_precision_score(data[3] == 1, -naive_distances(data[0], data[2])[0])
    assert [result.expected, result.minimum, result.maximum] == close([score] * 3)


@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_average_precision_at_every_cut_without_ties_equals_brute_force(denominator):
    data = untied_data(9)
    order = (data[3] == 1)[np.argsort(naive_distances(data[0], data[2])[0])].tolist()
    for at in range(1, 65):
        result = counts_of(data).mean_average_precision(at=at, denominator=denominator)
        expect(result, [[average_precision(order, at, denominator)]])


def test_a_perfect_ranking_scores_exactly_one():
    query_codes, query_labels, codes, _ = untied_data(0)
    for at in (None, 1, 2, 63, 64):
        result = counts_of((query_codes, query_labels, codes, np.ones(64, int))).mean_average_precision(at=at)
        assert (result.minimum, result.expected, result.maximum) == (1, 1, 1)


def test_equal_codes_are_one_tie():
    """In a single tie, the item at each place is relevant with the same probability."""
    codes, labels = np.full((100, 4), 37, np.uint8), np.arange(100) % 5
    counts = counts_of((codes[:1], labels[:1], codes, labels))
    for k in (1, 19, 20, 50, 100):
        precision, recall = counts.precision_at(k), counts.recall_at(k)
        assert (precision.expected, precision.minimum, precision.maximum) == close(
            (0.2, max(0, k - 80) / k, min(1, 20 / k))
        )
        assert (recall.expected, recall.minimum, recall.maximum) == close(
            (k / 100, max(0, k - 80) / 20, min(1, k / 20))
        )
    whole = counts.mean_average_precision()
    assert whole.expected == close(mcsherry_najork([100], [20]))
    assert (whole.minimum, whole.maximum) == close((math.fsum(i / (80 + i) for i in range(1, 21)) / 20, 1))


def test_a_query_without_relevant_items_scores_zero():
    codes, labels = np.zeros((4, 1), np.uint8), np.array([1, 1, 1, 1])
    data = codes[:2], np.array([1, 2]), codes, labels
    for result in (
        counts_of(data).mean_average_precision(),
        counts_of(data).mean_average_precision(at=2, denominator="relevant"),
        counts_of(data).precision_at(2),
        counts_of(data).recall_at(4),
    ):
        assert result.maximum_per_query[1] == 0
        assert result.expected == result.expected_per_query[0] / 2 > 0
    assert counts_of(data).precision_within_radius(0) == 0.5
    assert counts_of(data).precision_recall_curve().recall.tolist() == [0.5] * 9


@pytest.mark.parametrize("kind", ["single", "multi-hot"])
def test_metrics_within_a_radius_equal_brute_force(kind):
    data = random_data(np.random.default_rng(3), 7, 60, kind, patterns=60)
    distances, relevance = naive_distances(data[0], data[2]), naive_relevance(data[1], data[3])
    curve = counts_of(data).precision_recall_curve()
    assert curve.precision.shape == curve.recall.shape == curve.empty.shape == (17,)
    for radius in range(17):
        within = distances <= radius
        hits = (within & relevance).sum(1)
        precision = np.mean([h / n if n else 0.0 for h, n in zip(hits, within.sum(1), strict=True)])
        assert counts_of(data).precision_within_radius(radius) == curve.precision[radius] == close(precision)
        assert curve.recall[radius] == close(np.mean(hits / np.maximum(1, relevance.sum(1))))
        assert curve.empty[radius] == close(np.mean(~within.any(1)))
    assert curve.empty[0] > 0, "some query must have nothing within radius 0"


def naive_counts(data, bits):
    distances, relevance = naive_distances(data[0], data[2]), naive_relevance(data[1], data[3])
    rows = zip(distances, relevance, strict=True)
    items, relevant = zip(
        *((np.bincount(d, minlength=bits + 1), np.bincount(d[r], minlength=bits + 1)) for d, r in rows), strict=True
    )
    return np.array(items), np.array(relevant)


@pytest.mark.parametrize("kind", ["single", "multi-hot"])
@pytest.mark.parametrize("bits", [8, 24, 64, 136])
def test_counts_equal_brute_force(bits, kind):
    data = random_data(np.random.default_rng(bits), 300, 500, kind, patterns=200, bits=bits)
    items, relevant = naive_counts(data, bits)
    counts = counts_of(data)
    assert counts.items.dtype == counts.relevant.dtype == torch.int64
    assert np.array_equal(counts.items, items) and np.array_equal(counts.relevant, relevant)


def test_counts_do_not_depend_on_the_precision_of_matrix_products():
    data = random_data(np.random.default_rng(0), 300, 100, "multi-hot", patterns=100, bits=136)
    items, relevant = naive_counts(data, 136)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            counts = counts_of(data)
    finally:
        torch.set_float32_matmul_precision(before)
    assert np.array_equal(counts.items, items) and np.array_equal(counts.relevant, relevant)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["single", "multi-hot"])
def test_counts_on_a_gpu_equal_brute_force(kind):
    data = random_data(np.random.default_rng(0), 300, 5000, kind, patterns=1000, bits=64)
    counts = counts_of([torch.from_numpy(array).cuda() for array in data])
    assert counts.items.device.type == "cpu"
    assert np.array_equal(counts.items, naive_counts(data, 64)[0])
    assert np.array_equal(counts.relevant, naive_counts(data, 64)[1])


@pytest.mark.parametrize("kind", ["single", "multi-hot"])
def test_all_kinds_of_input_give_the_same_numbers(kind, tmp_path, recwarn):
    """Torch tensors, other integer types, strided arrays and a read-only map give equal numbers, without a warning."""
    data = random_data(np.random.default_rng(2), 5, 50, kind)
    reference = counts_of(data).mean_average_precision(at=20).expected_per_query.tolist()
    np.save(tmp_path / "codes.npy", data[2])
    mapped = data[0], data[1], np.load(tmp_path / "codes.npy", mmap_mode="r"), data[3]
    strided = [np.repeat(array, 2, axis=0)[::2] for array in data]
    reversed_ = [array[::-1].copy()[::-1] for array in data]
    tensors = [torch.from_numpy(array) for array in data]
    narrow = data[0], data[1].astype(np.uint8), data[2], data[3].astype(">i4")
    for variant in (mapped, strided, reversed_, tensors, narrow, (*tensors[:2], *data[2:])):
        assert counts_of(variant).mean_average_precision(at=20).expected_per_query.tolist() == reference
    assert not recwarn.list


GOOD = dict(
    queries=np.zeros((2, 4), np.uint8),
    database=np.zeros((3, 4), np.uint8),
    labels=(np.array([0, 1]), np.array([0, 1, 2])),
)
QUERY_LABELS, DATABASE_LABELS = GOOD["labels"]
ON_META = torch.zeros(3, 4, dtype=torch.uint8, device="meta")
with FakeTensorMode():  # a tensor that says that it is on a GPU; it needs none
    ON_GPU = torch.zeros(3, 4, dtype=torch.uint8, device="cuda:0")
    LABELS_ON_GPU = torch.zeros(3, dtype=torch.int64, device="cuda:0")


@pytest.mark.parametrize(
    "bad, message",
    [
        (dict(queries=np.zeros((2, 4), np.int8)), "queries must be uint8, got int8; pack activations"),
        (dict(queries=[[0, 0, 0, 0]]), "queries must be a torch tensor or a numpy array of uint8, got list"),
        (
            dict(labels=(QUERY_LABELS, np.array(["cat", "dog", "eel"]))),
            "code_labels must be numbers, got an array of <U3",
        ),
        (dict(queries=np.zeros(4, np.uint8)), r"queries must be \[rows, bits / 8\], got \[4\]"),
        (dict(queries=np.zeros((0, 4), np.uint8)), "queries must be at least one code, got none"),
        (dict(database=np.zeros((0, 4), np.uint8)), "database must be at least one code, got none"),
        (dict(database=np.zeros((3, 8), np.uint8)), "database must be of 32 bits, like the queries, got 64"),
        (dict(labels=QUERY_LABELS), r"labels must be a pair \(query_labels, code_labels\), got ndarray"),
        (dict(labels=(np.array([0, 1, 2]), DATABASE_LABELS)), r"query_labels must be \[2\], or .*, got \[3\]"),
        (dict(labels=(QUERY_LABELS, np.array(0))), r"code_labels must be \[3\], or .*, got \[\]"),
        (dict(labels=(np.array([0.0, 1.0]), DATABASE_LABELS)), "query_labels must be integers .*, got float64"),
        (dict(labels=(np.array([True, False]), DATABASE_LABELS)), "query_labels must be integers .*, got bool"),
        (dict(labels=(QUERY_LABELS, np.full((3, 5), 2))), "code_labels must be zeros and ones .*, got other values"),
        (dict(labels=(QUERY_LABELS, np.eye(3))), r".* must be of one kind .*, got \[2\] and \[3, 3\]"),
        (
            dict(labels=(np.eye(2, 5, dtype=bool), np.eye(3))),
            r"query_labels and code_labels must be of one kind .*, got \[2, 5\] and \[3, 3\]",
        ),
        (dict(database=ON_META), "database must be a tensor with values, got one on the device 'meta'"),
        (dict(database=ON_GPU), "database must be on the queries' device, cpu, got cuda:0; move one of them"),
        (
            dict(labels=(QUERY_LABELS, LABELS_ON_GPU)),
            "code_labels must be on the queries' device, cpu, got cuda:0; move one of them",
        ),
        (
            dict(labels=(np.array([[0], [1]]), np.array([[0], [1], [0]]))),
            r"query_labels must be \[2\], or multi-hot with at least 2 columns, got \[2, 1\]; pass query_labels",
        ),
    ],
)
def test_mistakes_raise_an_error_of_one_line(bad, message):
    with pytest.raises(InputError, match=f"^distance_counts: {message}") as error:
        distance_counts(**(GOOD | bad))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "bad, message",
    [
        (dict(at=0), r"at must be 1 to 3 \(the size of the database\), got 0"),
        (dict(at=4), r"at must be 1 to 3 \(the size of the database\), got 4"),
        (dict(at=2.0), "at must be an integer from 1 to 3 .*, got 2.0"),
        (dict(at=True), "at must be an integer from 1 to 3 .*, got True"),
        (dict(denominator="all"), "denominator must be 'retrieved' or 'relevant', got 'all'"),
    ],
)
def test_an_invalid_cut_or_denominator_is_refused(bad, message):
    with pytest.raises(InputError, match=f"^mean_average_precision: {message}"):
        distance_counts(**GOOD).mean_average_precision(**bad)


@pytest.mark.parametrize("k", [0, 4, -1, 1.5, None])
def test_an_invalid_k_or_radius_is_refused(k):
    counts = distance_counts(**GOOD)
    for name in ("precision_at", "recall_at"):
        expected = rf"^{name}: k must be (an integer from )?1 to 3 \(the size of the database\), got "
        with pytest.raises(InputError, match=expected):
            getattr(counts, name)(k=k)
    radius = 33 if k == 4 else -1 if k == 0 else k  # 4 and 0 are valid radii
    expected = r"^precision_within_radius: radius must be (an integer from )?0 to 32 \(the number of bits\), got "
    with pytest.raises(InputError, match=expected):
        counts.precision_within_radius(radius=radius)


@pytest.mark.parametrize("kind", ["single", "multi-hot"])
@pytest.mark.parametrize("make", [HammingIndex, ToySearcher])
def test_a_database_can_be_any_searcher(make, kind):
    query_codes, query_labels, codes, labels = random_data(np.random.default_rng(4), 9, 80, kind, patterns=20)
    searcher = make(16)
    searcher.add(codes)
    counts = distance_counts(query_codes, searcher, labels=(query_labels, labels))
    expected = distance_counts(query_codes, codes, labels=(query_labels, labels))
    assert torch.equal(counts.items, expected.items) and torch.equal(counts.relevant, expected.relevant)


@pytest.mark.parametrize("make", [HammingIndex, ToySearcher])
def test_mistakes_with_a_searcher_are_refused(make):
    searcher = make(16)
    with pytest.raises(InputError, match="distance_counts: database must be at least one code, got none"):
        distance_counts(np.zeros((2, 2), np.uint8), searcher, labels=(QUERY_LABELS, DATABASE_LABELS))
    searcher.add(np.zeros((3, 2), np.uint8))
    with pytest.raises(InputError, match="distance_counts: database must be of 32 bits, like the queries, got 16"):
        distance_counts(**(GOOD | dict(database=searcher)))
    with pytest.raises(InputError, match=r"distance_counts: code_labels must be \[3\]"):
        distance_counts(np.zeros((2, 2), np.uint8), searcher, labels=(QUERY_LABELS, QUERY_LABELS))


@pytest.mark.parametrize(
    ("items", "relevant", "message"),
    [
        (
            [[1, 1, 0], [4, 4, 2]],
            [[1, 0, 0], [0, 4, 2]],
            "the number of items must be the same for every query, got 2",
        ),
        ([[1, 1]], [[1]], r"items and relevant must be of one shape \[Q, bits \+ 1\], got \[1, 2\] and \[1, 1\]"),
        ([1, 1], [1, 1], "items and relevant must be of one shape"),
    ],
)
def test_counts_of_different_rankings_are_refused(items, relevant, message):
    with pytest.raises(InputError, match=f"^DistanceCounts: {message}"):
        DistanceCounts(torch.tensor(items), torch.tensor(relevant))


@pytest.mark.parametrize(
    ("items", "relevant", "message"),
    [
        (torch.tensor([[1, 2]]), torch.tensor([[2, 1]]), "relevant must be 0 to items at each distance"),
        (torch.tensor([[1, 2]]), torch.tensor([[-1, 1]]), "relevant must be 0 to items at each distance"),
        (torch.tensor([[1.0, 2]]), torch.tensor([[1.0, 1]]), "items must be an int64 tensor on the CPU, got float32"),
        (np.array([[1, 2]]), torch.tensor([[1, 1]]), "items must be an int64 tensor on the CPU, got ndarray"),
    ],
)
def test_what_is_no_count_is_refused(items, relevant, message):
    with pytest.raises(InputError, match=f"^DistanceCounts: {message}"):
        DistanceCounts(items, relevant)
