"""Metrics against brute force over all orders of tied items, against the literature's formula and scikit-learn."""

import itertools
import math

import numpy as np
import pytest
import torch

from hashengine import metrics
from hashengine.errors import InputError
from hashengine.metrics import DistanceCounts, distance_counts

# The sum over a tie that begins within the first 128 items is off by at most 129 times the error of a difference of
# digammas, 8 eps; further down, by a few eps.
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
    """Codes drawn from few patterns, so that most distances are tied."""
    pool = rng.integers(0, 256, (patterns, bits // 8), dtype=np.uint8)
    return (
        pool[rng.integers(0, patterns, queries)],
        random_labels(rng, queries, kind),
        pool[rng.integers(0, patterns, size)],
        random_labels(rng, size, kind),
    )


def orders(distances, relevance):
    """Relevance down the ranking, for all orders of tied items; each comes equally often among the permutations."""
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
    """Compare with the metric's values over all orders, listed for each query."""
    for statistic, reduce in (("expected", np.mean), ("minimum", min), ("maximum", max)):
        per_query = [float(reduce(values)) for values in values_per_query]
        assert getattr(result, f"{statistic}_per_query").tolist() == close(per_query)
        assert getattr(result, statistic) == close(np.mean(per_query))


@pytest.mark.parametrize("kind", ["single", "multi-hot"])
@pytest.mark.parametrize("seed", range(12))
def test_all_orders(seed, kind):
    rng = np.random.default_rng(seed)
    size = int(rng.integers(1, 9))
    data = random_data(rng, 4, size, kind)
    distances, relevance = naive_distances(data[0], data[2]), naive_relevance(data[1], data[3])
    rankings = [orders(*query) for query in zip(distances, relevance, strict=True)]
    for denominator in DENOMINATORS:
        for at in (None, *range(1, size + 1)):
            result = metrics.mean_average_precision(*data, at=at, denominator=denominator)
            expect(result, [[average_precision(order, at or size, denominator) for order in r] for r in rankings])
            assert (result.at, result.denominator) == (at, denominator)
    for k in range(1, size + 1):
        expect(metrics.precision_at(*data, k), [[sum(order[:k]) / k for order in r] for r in rankings])
        expect(metrics.recall_at(*data, k), [[sum(order[:k]) / max(1, sum(order)) for order in r] for r in rankings])


@pytest.mark.parametrize("denominator", DENOMINATORS)
@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_every_cut_of_a_tie(size, denominator):
    """Every number of relevant items in a tie that follows some other items, and every cut inside."""
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
    """Expected average precision (ECIR 2008, section 3.3), place by place."""
    total, before, hits = 0.0, 0, 0
    for n, r in zip(items, relevant, strict=True):
        for place in range(1, n + 1):
            earlier = (place - 1) * (r - 1) / (n - 1) if n > 1 else 0.0
            total += r / n * (hits + earlier + 1) / (before + place)
        before, hits = before + n, hits + r
    return total / hits


def test_formula_of_the_literature():
    rng = np.random.default_rng(0)
    data = random_data(rng, 5, 4000, "single", patterns=300)
    counts = distance_counts(*data)
    expected = [mcsherry_najork(*pair) for pair in zip(counts.items.tolist(), counts.relevant.tolist(), strict=True)]
    assert counts.mean_average_precision().expected_per_query.tolist() == close(expected)


@pytest.mark.parametrize("before, hits, n, r, taken", [(150, 60, 3000, 700, 1100), (1, 0, 2000, 900, 1500)])
def test_cut_of_a_large_tie(before, hits, n, r, taken):
    """Too large to enumerate: hypergeometric probabilities from whole numbers, and every number of hits tried."""

    def average(first, places, ranks):
        """`first`: sum of the precisions before the tie; its hits stand at these places and have these ranks."""
        return (first + (ranks / places).sum()) / max(1, hits + len(ranks))

    place, head = before + 1 + np.arange(taken), 1 + np.arange(hits)
    first = 0.0 if hits == 0 else hits * mcsherry_najork([before], [hits])
    expected, lowest, highest = 0.0, [], []
    for x in range(max(0, taken - (n - r)), min(taken, r) + 1):
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


def test_ties_of_a_million():
    """The closed form keeps its digits where the terms of the sum are a millionth."""
    items, relevant = [2, 1_000_000, 3, 1_000_000], [0, 1, 2, 3]
    total, before, hits = 0.0, 0, 0
    for n, r in zip(items, relevant, strict=True):
        place = np.arange(n)
        total += r / n * ((hits + 1 + place * (r - 1) / (n - 1)) / (before + 1 + place)).sum()
        before, hits = before + n, hits + r
    counts = DistanceCounts(torch.tensor([items]), torch.tensor([relevant]))
    assert counts.mean_average_precision().expected == pytest.approx(total / hits, rel=1e-9, abs=0)
    # Cut in the middle, half of them relevant: the hits kept are 250,000 give or take 250, precision 1/2 throughout.
    counts = DistanceCounts(torch.tensor([[1_000_000]]), torch.tensor([[500_000]]))
    assert counts.precision_at(500_000).expected == 0.5
    assert counts.mean_average_precision(at=500_000).expected == pytest.approx(0.5, abs=1e-4)


def test_whole_ranking_has_one_denominator():
    data = random_data(np.random.default_rng(1), 6, 300, "multi-hot", patterns=40)
    retrieved, relevant = (
        metrics.mean_average_precision(*data, denominator=denominator) for denominator in DENOMINATORS
    )
    assert retrieved.expected_per_query.tolist() == close(relevant.expected_per_query.tolist())
    whole = metrics.mean_average_precision(*data, at=300)
    assert whole.expected_per_query.tolist() == retrieved.expected_per_query.tolist()


def untied_data(seed):
    """One query of 64 zero bits and codes of 1 to 64 set bits, in random places and order."""
    rng = np.random.default_rng(seed)
    bits = np.array([rng.permutation(64) < weight for weight in rng.permutation(64) + 1])
    return np.zeros((1, 8), np.uint8), np.array([1]), np.packbits(bits, axis=1), rng.integers(0, 3, 64)


@pytest.mark.parametrize("seed", range(5))
def test_without_ties_as_scikit_learn(seed):
    average_precision_score = pytest.importorskip("sklearn.metrics").average_precision_score
    data = untied_data(seed)
    result = metrics.mean_average_precision(*data)
    score = average_precision_score(data[3] == 1, -naive_distances(data[0], data[2])[0])
    assert [result.expected, result.minimum, result.maximum] == close([score] * 3)


@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_without_ties_every_cut(denominator):
    data = untied_data(9)
    order = (data[3] == 1)[np.argsort(naive_distances(data[0], data[2])[0])].tolist()
    for at in range(1, 65):
        result = metrics.mean_average_precision(*data, at=at, denominator=denominator)
        expect(result, [[average_precision(order, at, denominator)]])


def test_perfect_ranking_is_exactly_one():
    query_codes, query_labels, codes, _ = untied_data(0)
    for at in (None, 1, 2, 63, 64):
        result = metrics.mean_average_precision(query_codes, query_labels, codes, np.ones(64, int), at=at)
        assert (result.minimum, result.expected, result.maximum) == (1, 1, 1)


def test_all_duplicate_codes():
    """One tie: whatever the cut, each place is relevant with the same probability."""
    codes, labels = np.full((100, 4), 37, np.uint8), np.arange(100) % 5
    counts = distance_counts(codes[:1], labels[:1], codes, labels)
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


def test_query_without_relevant_items_counts_as_zero():
    codes, labels = np.zeros((4, 1), np.uint8), np.array([1, 1, 1, 1])
    data = codes[:2], np.array([1, 2]), codes, labels
    for result in (
        metrics.mean_average_precision(*data),
        metrics.mean_average_precision(*data, at=2, denominator="relevant"),
        metrics.precision_at(*data, 2),
        metrics.recall_at(*data, 4),
    ):
        assert result.maximum_per_query[1] == 0
        assert result.expected == result.expected_per_query[0] / 2 > 0
    assert metrics.precision_within_radius(*data, 0) == 0.5
    assert metrics.precision_recall_curve(*data).recall.tolist() == [0.5] * 9


@pytest.mark.parametrize("kind", ["single", "multi-hot"])
def test_radius_and_curve(kind):
    data = random_data(np.random.default_rng(3), 7, 60, kind, patterns=60)
    distances, relevance = naive_distances(data[0], data[2]), naive_relevance(data[1], data[3])
    curve = metrics.precision_recall_curve(*data)
    assert curve.precision.shape == curve.recall.shape == curve.empty.shape == (17,)
    for radius in range(17):
        within = distances <= radius
        hits = (within & relevance).sum(1)
        precision = np.mean([h / n if n else 0.0 for h, n in zip(hits, within.sum(1), strict=True)])
        assert metrics.precision_within_radius(*data, radius) == curve.precision[radius] == close(precision)
        assert curve.recall[radius] == close(np.mean(hits / np.maximum(1, relevance.sum(1))))
        assert curve.empty[radius] == close(np.mean(~within.any(1)))
    assert curve.empty[0] > 0, "the case of an empty ball must be among them"


def naive_counts(data, bits):
    distances, relevance = naive_distances(data[0], data[2]), naive_relevance(data[1], data[3])
    rows = zip(distances, relevance, strict=True)
    items, relevant = zip(
        *((np.bincount(d, minlength=bits + 1), np.bincount(d[r], minlength=bits + 1)) for d, r in rows), strict=True
    )
    return np.array(items), np.array(relevant)


@pytest.mark.parametrize("kind", ["single", "multi-hot"])
@pytest.mark.parametrize("bits", [8, 24, 64, 136])
def test_counts(bits, kind):
    data = random_data(np.random.default_rng(bits), 300, 500, kind, patterns=200, bits=bits)
    items, relevant = naive_counts(data, bits)
    counts = distance_counts(*data)
    assert counts.items.dtype == counts.relevant.dtype == torch.int64
    assert np.array_equal(counts.items, items) and np.array_equal(counts.relevant, relevant)


def test_counts_whatever_the_precision_of_matrix_products():
    data = random_data(np.random.default_rng(0), 300, 100, "multi-hot", patterns=100, bits=136)
    items, relevant = naive_counts(data, 136)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            counts = distance_counts(*data)
    finally:
        torch.set_float32_matmul_precision(before)
    assert np.array_equal(counts.items, items) and np.array_equal(counts.relevant, relevant)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["single", "multi-hot"])
def test_counts_on_the_gpu(kind):
    data = random_data(np.random.default_rng(0), 300, 5000, kind, patterns=1000, bits=64)
    counts = distance_counts(*(torch.from_numpy(array).cuda() for array in data))
    assert counts.items.device.type == "cpu"
    assert np.array_equal(counts.items, naive_counts(data, 64)[0])
    assert np.array_equal(counts.relevant, naive_counts(data, 64)[1])


@pytest.mark.parametrize("kind", ["single", "multi-hot"])
def test_kinds_of_input(kind, tmp_path, recwarn):
    """Torch or numpy, in any integer type, strided or a read-only file: the same numbers and no warning."""
    data = random_data(np.random.default_rng(2), 5, 50, kind)
    reference = metrics.mean_average_precision(*data, at=20).expected_per_query.tolist()
    np.save(tmp_path / "codes.npy", data[2])
    mapped = data[0], data[1], np.load(tmp_path / "codes.npy", mmap_mode="r"), data[3]
    strided = [np.repeat(array, 2, axis=0)[::2] for array in data]
    reversed_ = [array[::-1].copy()[::-1] for array in data]
    tensors = [torch.from_numpy(array) for array in data]
    narrow = data[0], data[1].astype(np.uint8), data[2], data[3].astype(">i4")
    for variant in (mapped, strided, reversed_, tensors, narrow, (*tensors[:2], *data[2:])):
        assert metrics.mean_average_precision(*variant, at=20).expected_per_query.tolist() == reference
    assert not recwarn.list


GOOD = dict(
    query_codes=np.zeros((2, 4), np.uint8),
    query_labels=np.array([0, 1]),
    database_codes=np.zeros((3, 4), np.uint8),
    database_labels=np.array([0, 1, 2]),
)
MULTI_HOT = dict(query_labels=np.eye(2, 5, dtype=bool), database_labels=np.eye(3, 5, dtype=bool))


@pytest.mark.parametrize(
    "bad, message",
    [
        (dict(query_codes=np.zeros((2, 4), np.int8)), "query_codes must be packed codes of uint8, got torch.int8"),
        (dict(query_codes=[[0, 0, 0, 0]]), "query_codes must be a torch tensor or a numpy array of numbers, got list"),
        (dict(database_labels=np.array(["cat", "dog", "eel"])), "database_labels must be .* got an array of <U3"),
        (dict(query_codes=np.zeros(4, np.uint8)), "query_codes must be .*at least one code, got shape .4."),
        (dict(query_codes=np.zeros((0, 4), np.uint8)), "query_codes must be .*at least one code, got shape .0, 4."),
        (
            dict(database_codes=np.zeros((0, 4), np.uint8)),
            "database_codes must be .*at least one code, got shape .0, 4.",
        ),
        (
            dict(database_codes=np.zeros((3, 8), np.uint8)),
            "database_codes must have the 32 bits of query_codes, got 64",
        ),
        (dict(query_labels=np.array([0, 1, 2])), "query_labels must be .* for N = 2 codes, got shape .3."),
        (dict(database_labels=np.array(0)), "database_labels must be .* for N = 3 codes, got shape .."),
        (dict(query_labels=np.array([0.0, 1.0])), "query_labels of shape .N. must be integers, got torch.float64"),
        (dict(query_labels=np.array([True, False])), "query_labels of shape .N. must be integers, got torch.bool"),
        (dict(database_labels=np.full((3, 5), 2)), "database_labels of shape .N, L. must be bool or 0 and 1"),
        (
            dict(database_labels=np.eye(3)),
            "database_labels must be integers .N. as query_labels are, got multi-hot .N, 3.",
        ),
        (
            MULTI_HOT | dict(database_labels=np.eye(3)),
            "database_labels must be multi-hot .N, 5. .* got multi-hot .N, 3.",
        ),
        (
            dict(database_codes=torch.zeros(3, 4, dtype=torch.uint8, device="meta")),
            "database_labels must be on .* meta, got cpu",
        ),
        (
            dict(
                database_codes=torch.zeros(3, 4, dtype=torch.uint8, device="meta"),
                database_labels=torch.zeros(3, dtype=torch.int64, device="meta"),
            ),
            "database_codes must be on the device of query_codes, cpu, got meta",
        ),
        (dict(at=0), "at must be an integer from 1 to 3 .the size of the database., got 0"),
        (dict(at=4), "at must be an integer from 1 to 3 .the size of the database., got 4"),
        (dict(at=2.0), "at must be an integer from 1 to 3 .* got 2.0"),
        (dict(at=True), "at must be an integer from 1 to 3 .* got True"),
        (dict(denominator="all"), "denominator must be 'retrieved' or 'relevant', got 'all'"),
    ],
)
def test_mistakes_in_one_line(bad, message):
    with pytest.raises(InputError, match=f"^{message}") as error:
        metrics.mean_average_precision(**(GOOD | bad))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("k", [0, 4, -1, 1.5, None])
def test_mistaken_k_and_radius(k):
    for metric in (metrics.precision_at, metrics.recall_at):
        with pytest.raises(InputError, match=r"^k must be an integer from 1 to 3 \(the size of the database\), got "):
            metric(**GOOD, k=k)
    radius = 33 if k == 4 else -1 if k == 0 else k
    with pytest.raises(InputError, match=r"^radius must be an integer from 0 to 32 \(bits\), got "):
        metrics.precision_within_radius(**GOOD, radius=radius)
