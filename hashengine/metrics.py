"""Retrieval metrics of Hamming rankings. The metrics do not depend on the order of tied items.

With short codes, thousands of items can have the same distance from a query. The order that a sort gives to these tied
items can change mean average precision by several points. Here all orders of tied items are equally likely. Average
precision, precision and recall have three values: the expected value over these orders, computed in closed form, and
the values for the worst and the best order. The expected value is that of McSherry and Najork, "Computing information
retrieval performance measures efficiently in the presence of tied scores", ECIR 2008. This module extends it to a
ranking that is cut inside a tie, and to both common denominators of average precision.

Everything follows from the number of items, and of relevant items, at each distance from a query. `distance_counts`
counts them; each metric is a method of its result, `DistanceCounts`:

    counts = distance_counts(query_codes, database_codes, labels=(query_labels, code_labels))
    counts.mean_average_precision(at=1000).expected

A query without a relevant item scores 0 and is part of the mean, because leaving it out would raise the score of a
database that lacks relevant items. A mistake in an argument raises `hashengine.InputError`, a ValueError.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hashengine._validation import Array, Labels, check_codes, check_integer, check_labels, dtype_name
from hashengine.errors import invalid
from hashengine.index.searcher import Searcher
from hashengine.ops import hamming_count

__all__ = [
    "Denominator",
    "DistanceCounts",
    "MeanAveragePrecision",
    "PrecisionRecallCurve",
    "TieAwareMean",
    "distance_counts",
]

Denominator = Literal["retrieved", "relevant"]
"""What average precision divides by; see `DistanceCounts.mean_average_precision`."""

_BLOCK_VALUES = 2**18  # float64 values per block of queries: 2 MB, which may fit into the cache of a CPU core


@dataclass(frozen=True, eq=False)
class TieAwareMean:
    """A metric, averaged over the queries: expected over all orders of tied items, and for the worst and best order.

    The arrays are float64 [Q], one value per query.
    """

    expected: float
    minimum: float
    maximum: float
    expected_per_query: np.ndarray = field(repr=False)
    minimum_per_query: np.ndarray = field(repr=False)
    maximum_per_query: np.ndarray = field(repr=False)


@dataclass(frozen=True, eq=False)
class MeanAveragePrecision(TieAwareMean):
    """Mean average precision with its definition: the cut `at` (None: the whole ranking) and the denominator."""

    at: int | None
    denominator: Denominator


@dataclass(frozen=True, eq=False)
class PrecisionRecallCurve:
    """Precision and recall within each radius, averaged over the queries; float64 [bits + 1], indexed by radius.

    `empty` is the share of queries with nothing within the radius. The precision of these queries counts as 0.
    Therefore `precision / (1 - empty)` is the mean over the other queries.
    """

    precision: np.ndarray
    recall: np.ndarray
    empty: np.ndarray


def distance_counts(queries: Array, database: Array | Searcher, *, labels: Labels) -> DistanceCounts:
    """Count, at each distance from each query, the database items and the relevant ones among them.

    Args:
        queries: packed codes uint8 [Q, bits / 8], as `hashengine.ops.pack_bits` makes them, torch or numpy.
        database: packed codes uint8 [N, bits / 8] on the queries' device, or a `Searcher` such as `HammingIndex`.
        labels: (query_labels, code_labels). Either integers [Q] and [N]: an item is relevant if it has the query's
            label. Or zeros and ones [Q, L] and [N, L] (multi-hot), with L at least 2: an item is relevant if it shares
            a label with the query.

    Raises:
        InputError: a wrong dtype or shape, no queries, an empty database, or different devices.
    """
    where = "distance_counts"
    query_codes = check_codes(where, "queries", queries)
    bits = 8 * query_codes.shape[1]
    if isinstance(database, Searcher):
        if database.bits != bits:
            raise invalid(where, "database", f"of {bits} bits, like the queries", f"{database.bits}")
        _check_not_empty(where, len(query_codes), len(database))
        pair = check_labels(where, labels, len(query_codes), len(database))
        items, relevant = database.count(query_codes, labels=pair)
        return DistanceCounts(items.cpu(), relevant.cpu())
    codes = check_codes(where, "database", database)
    if codes.shape[1] != query_codes.shape[1]:
        raise invalid(where, "database", f"of {bits} bits, like the queries", f"{8 * codes.shape[1]}")
    _check_not_empty(where, len(query_codes), len(codes))
    query_labels, code_labels = check_labels(where, labels, len(query_codes), len(codes))
    named = (("database", codes), ("query_labels", query_labels), ("code_labels", code_labels))
    for name, tensor in named:
        if tensor.device != query_codes.device:
            expected = f"on the queries' device, {query_codes.device}"
            raise invalid(where, name, expected, tensor.device, "move one of them")
    items, relevant = hamming_count(query_codes, codes, labels=(query_labels, code_labels))
    return DistanceCounts(items.cpu(), relevant.cpu())


def _check_not_empty(where: str, queries: int, codes: int) -> None:
    for name, count in (("queries", queries), ("database", codes)):
        if count == 0:
            raise invalid(where, name, "at least one code", "none")


@dataclass(frozen=True, eq=False)
class DistanceCounts:
    """The number of items at each distance from each query, and the metrics that follow from these numbers.

    Attributes:
        items: the number of database items per query and distance, int64 [Q, bits + 1] on the CPU.
        relevant: the number of relevant items per query and distance, int64 [Q, bits + 1] on the CPU.

    Raises:
        InputError: the two are no int64 tensors of one shape or no counts, or the queries were compared with different
            numbers of items.
    """

    items: Tensor
    relevant: Tensor

    def __post_init__(self) -> None:
        for name, counts in (("items", self.items), ("relevant", self.relevant)):
            kind = f"{dtype_name(counts)} on {counts.device}" if isinstance(counts, Tensor) else type(counts).__name__
            if not isinstance(counts, Tensor) or counts.dtype != torch.int64 or counts.device.type != "cpu":
                raise invalid("DistanceCounts", name, "an int64 tensor on the CPU", kind)
        if self.items.ndim != 2 or self.items.shape != self.relevant.shape:
            actual = f"{list(self.items.shape)} and {list(self.relevant.shape)}"
            raise invalid("DistanceCounts", "items and relevant", "of one shape [Q, bits + 1]", actual)
        if bool((self.relevant < 0).any() or (self.relevant > self.items).any()):
            raise invalid("DistanceCounts", "relevant", "0 to items at each distance", "another number")
        totals = self.items.sum(1).unique().tolist()
        if len(totals) > 1:
            actual = f"{totals[0]} for some and {totals[-1]} for others"
            advice = "make one DistanceCounts for the queries of each number"
            raise invalid("DistanceCounts", "the number of items", "the same for every query", actual, advice)

    def mean_average_precision(
        self, *, at: int | None = None, denominator: Denominator = "retrieved"
    ) -> MeanAveragePrecision:
        """Mean average precision over the whole ranking (mAP), or over its first `at` items (mAP@at).

        Average precision is a sum divided by the denominator. Each relevant item among the first `at` adds the
        precision at its position to the sum. Over the whole ranking the two denominators are equal.

        Args:
            at: 1 to the size of the database. Default: the whole ranking.
            denominator: "retrieved" is the number of relevant items among the first `at`, as in deep-hashing papers. If
                this number is 0, the query scores 0. One more relevant item near the cut can lower the score. If the
                cut divides a tie, the number depends on the order of the tied items. "relevant" is the number of
                relevant items in the database, as in trec_eval. If it exceeds `at`, even a perfect ranking scores less
                than 1.
        """
        if denominator not in ("retrieved", "relevant"):
            raise invalid("mean_average_precision", "denominator", "'retrieved' or 'relevant'", repr(denominator))
        position = self._check_position("mean_average_precision", "at", self._size if at is None else at)
        # 10 * isqrt(position) approximates the number of columns that _hits_drawn returns.
        rows = max(1, _BLOCK_VALUES // (self.items.shape[1] + 10 * math.isqrt(position)))
        blocks = zip(self.items.split(rows), self.relevant.split(rows), strict=True)
        per_query = torch.cat([_average_precision(*block, position, denominator) for block in blocks])
        return MeanAveragePrecision(
            **_mean_and_per_query(*per_query.T), at=None if at is None else position, denominator=denominator
        )

    def precision_at(self, k: int) -> TieAwareMean:
        """The number of relevant items among the first `k`, divided by `k`; `k` is 1 to the size of the database."""
        return TieAwareMean(**_mean_and_per_query(*(hits / k for hits in self._hits_at("precision_at", k))))

    def recall_at(self, k: int) -> TieAwareMean:
        """The number of relevant items among the first `k`, divided by their number in the database.

        `k` is 1 to the size of the database.
        """
        total = self.relevant.sum(1, keepdim=True).clamp(min=1)
        return TieAwareMean(**_mean_and_per_query(*(hits / total for hits in self._hits_at("recall_at", k))))

    def precision_within_radius(self, radius: int) -> float:
        """The share of relevant items among all items within `radius`, averaged over the queries.

        A query with nothing within the radius scores 0. Ties do not matter, because a radius never divides a tie.
        """
        bits = self.items.shape[1] - 1
        radius = check_integer("precision_within_radius", "radius", radius, 0, bits, "the number of bits")
        return float(self.precision_recall_curve().precision[radius])

    def precision_recall_curve(self) -> PrecisionRecallCurve:
        """Precision and recall within each radius from 0 to bits. Ties do not matter."""
        items, hits = self.items.cumsum(1), self.relevant.cumsum(1)
        precision = hits / items.clamp(min=1).double()
        recall = hits / hits[:, -1:].clamp(min=1).double()
        empty = (items == 0).double()
        return PrecisionRecallCurve(*(values.mean(0).numpy() for values in (precision, recall, empty)))

    @property
    def _size(self) -> int:
        return int(self.items[0].sum())

    def _check_position(self, where: str, name: str, value: int) -> int:
        return check_integer(where, name, value, 1, self._size, "the size of the database")

    def _hits_at(self, where: str, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Relevant items among the first k: expected, fewest and most, each float64 [Q, 1]."""
        cut = _cut_at(self.items, self.relevant, self._check_position(where, "k", k))
        return cut.hits + cut.taken * cut.relevant / cut.items, cut.hits + cut.fewest, cut.hits + cut.most


def _mean_and_per_query(expected: Tensor, minimum: Tensor, maximum: Tensor) -> dict[str, Any]:
    """The fields of `TieAwareMean`."""
    values = {"expected": expected, "minimum": minimum, "maximum": maximum}
    per_query = {name: value.flatten().numpy() for name, value in values.items()}
    means = {name: float(value.mean()) for name, value in per_query.items()}
    return means | {f"{name}_per_query": value for name, value in per_query.items()}


# Average precision of a ranking with ties, in closed form.


class _Cut(NamedTuple):
    """For each query, the tie in which the ranking is cut, float64 [Q, 1]."""

    before: Tensor  # the number of items before the tie
    hits: Tensor  # the number of relevant items before the tie
    items: Tensor  # the number of items in the tie
    relevant: Tensor  # the number of relevant items in the tie
    taken: Tensor  # the number of items in the tie that the cut keeps, at least 1
    whole: Tensor  # bool [Q, bits + 1]: true for the distances before the tie, whose items are all kept

    @property
    def fewest(self) -> Tensor:
        """The fewest relevant items that the cut can keep."""
        return (self.taken - (self.items - self.relevant)).clamp(min=0)

    @property
    def most(self) -> Tensor:
        """The most relevant items that the cut can keep."""
        return torch.minimum(self.taken, self.relevant)


def _cut_at(items: Tensor, relevant: Tensor, at: int) -> _Cut:
    reached = items.cumsum(1)
    distance = torch.searchsorted(reached, torch.full((len(items), 1), at, device=items.device))
    n, r, n_to_tie_end, r_to_tie_end = (
        counts.gather(1, distance).double() for counts in (items, relevant, reached, relevant.cumsum(1))
    )
    before, hits = n_to_tie_end - n, r_to_tie_end - r
    whole = torch.arange(items.shape[1], device=items.device) < distance
    return _Cut(before=before, hits=hits, items=n, relevant=r, taken=at - before, whole=whole)


def _average_precision(items: Tensor, relevant: Tensor, at: int, denominator: Denominator) -> Tensor:
    """Average precision of each query, float64 [Q, 3]: expected, minimum, maximum.

    The sums `random`, `worst` and `best` are over the ties before the one that is cut; they do not depend on the
    denominator. In the tie that is cut, everything follows from x, the number of relevant items that the cut keeps. For
    a given x, all places of these items among the kept items are equally likely.
    """
    cut = _cut_at(items, relevant, at)
    n, r = items.double(), relevant.double()
    before, hits = n.cumsum(1) - n, r.cumsum(1) - r
    random = (cut.whole * _precisions(before, hits, n, r)).sum(1, keepdim=True)
    worst = (cut.whole * _precisions(before + n - r, hits, r, r)).sum(1, keepdim=True)
    best = (cut.whole * _precisions(before, hits, r, r)).sum(1, keepdim=True)

    def divisor(x: Tensor) -> Tensor:
        return (r.sum(1, keepdim=True) if denominator == "relevant" else cut.hits + x).clamp(min=1)

    def random_order(x: Tensor) -> Tensor:
        return (random + _precisions(cut.before, cut.hits, cut.taken, x)) / divisor(x)

    def relevant_last(x: Tensor) -> Tensor:
        return (worst + _precisions(cut.before + cut.taken - x, cut.hits, x, x)) / divisor(x)

    def relevant_first(x: Tensor) -> Tensor:
        return (best + _precisions(cut.before, cut.hits, x, x)) / divisor(x)

    x, probability = _hits_drawn(cut)
    expected = (probability * random_order(x)).sum(1, keepdim=True)
    # If the relevant items come last, the sum is convex in x. Its quotient by a linear divisor first falls, then rises.
    minimum = relevant_last(_lowest(relevant_last, cut.fewest, cut.most))
    # If the relevant items come first, the precision does not fall from one of them to the next. Again the sum is
    # convex, and the quotient first falls, then rises. Therefore it is highest for the smallest or the largest x.
    maximum = torch.maximum(relevant_first(cut.fewest), relevant_first(cut.most))
    return torch.cat([expected, minimum, maximum], dim=1)


def _precisions(before: Tensor, hits: Tensor, size: Tensor, relevant: Tensor) -> Tensor:
    """Expected sum of the precisions at the relevant places of a tie in random order.

    The tie has `size` items, of which `relevant` are relevant. It follows `before` items, of which `hits` are relevant.
    Place a = 0..size-1 has a relevant item with probability relevant/size. If it has one, the expected number of
    relevant items before it is hits + slope * a with slope = (relevant - 1)/(size - 1) (McSherry and Najork 2008). The
    sum over a of the precisions (hits + slope * a + 1)/(before + a + 1) is slope * size plus a multiple of a harmonic
    sum.
    """
    # If size is 1, any slope is right. The slope 1 makes the result exactly 1 if all items up to this one are relevant.
    slope = torch.where(size > 1, (relevant - 1) / (size - 1), 1.0)
    places = slope * size + (hits + 1 - slope * (before + 1)) * _harmonic(before, size)
    return relevant / size.clamp(min=1) * places


def _harmonic(before: Tensor, count: Tensor) -> Tensor:
    """1/(before + 1) + ... + 1/(before + count).

    For large arguments, the difference of two digammas would lose most digits to cancellation. For these arguments, the
    series of both digammas are subtracted term by term: digamma(z + 1/2) = log z + 1/(24 z^2) - 7/(960 z^4) + ... For
    z > 128, the sum of the omitted terms is below 1e-15.
    """

    def series(z: Tensor) -> Tensor:
        return (1 / 24 - 7 / 960 / z**2) / z**2

    start, end = before + 0.5, before + count + 0.5
    far = torch.log1p(count / start) + series(end) - series(start)
    return torch.where(start > 128, far, torch.digamma(end + 0.5) - torch.digamma(start + 0.5))


def _hits_drawn(cut: _Cut) -> tuple[Tensor, Tensor]:
    """The possible numbers of relevant items among the kept ones, and their probabilities, float64 [Q, X] each.

    The number x has a hypergeometric distribution. Values further than `reach` from its mean are left out. Their total
    probability is below 2**-60 (Hoeffding 1963, Theorem 1 and section 6). By symmetry, Hoeffding's inequality holds
    with each of the four counts in `draws` as its number of draws; the smallest count gives the smallest reach. X grows
    only with the square root of the tie's size.
    """
    draws = torch.stack([cut.taken, cut.items - cut.taken, cut.relevant, cut.items - cut.relevant]).amin(0)
    reach = (draws * (61 * math.log(2) / 2)).sqrt() + 1
    mean = cut.taken * cut.relevant / cut.items
    first = torch.maximum(cut.fewest, (mean - reach).ceil())
    last = torch.minimum(cut.most, (mean + reach).floor())
    x = first + torch.arange(int((last - first).max()) + 1, device=first.device)
    # The probabilities are computed from the ratios of neighbouring ones, because factorials would lose digits.
    ratio = (cut.relevant - x + 1) * (cut.taken - x + 1) / (x * (cut.items - cut.relevant - cut.taken + x))
    steps = torch.where(x == first, 0.0, torch.where(x > last, -torch.inf, ratio.log()))
    return x, steps.cumsum(1).softmax(1)


def _lowest(function: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    """The integer from low to high at which `function` is lowest, elementwise; the function must fall, then rise."""
    while bool((low < high).any()):
        middle = ((low + high) / 2).floor()
        rises = function(torch.minimum(middle + 1, high)) >= function(middle)
        low, high = torch.where(rises, low, middle + 1), torch.where(rises, middle, high)
    return low
