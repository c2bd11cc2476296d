"""Retrieval metrics of a Hamming ranking that do not depend on how ties are ordered.

Short codes put thousands of items at one distance, and the order in which a sort leaves them moves mean average
precision by several points. Here all orders of tied items are equally likely: a metric is its expected value over
them, in closed form, and beside it stand its values for the worst and the best order. The expectation is that of
McSherry and Najork, "Computing information retrieval performance measures efficiently in the presence of tied scores",
ECIR 2008, extended to a ranking that is cut inside a tie, with either denominator in use.

All of it follows from the number of items, and of relevant items, at each distance from a query:
``distance_counts``. To compute several metrics, call it once and use the methods of its result.

Every function takes the same data, torch tensors or numpy arrays, all on one device:

- codes: packed uint8 [N, bits / 8], as ``hashengine.ops.pack_bits`` makes them;
- labels: integers [N], an item of the same label is relevant; or bool or 0/1 [N, L] (multi-hot), an item that shares
  at least one label is relevant.

A query without a relevant item scores 0 and counts in the mean: leaving it out would flatter a database that lacks
what is asked for. A mistake in an argument raises ``hashengine.errors.InputError``, a ValueError.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from hashengine.errors import InputError
from hashengine.metrics.arguments import Array, checked, integer
from hashengine.metrics.ties import Denominator, average_precision, cut_at
from hashengine.ops import hamming_count

TILE = 2**18  # float64 values in work at once stay in a CPU core's cache


@dataclass(frozen=True, eq=False)
class TieAwareMean:
    """A metric averaged over the queries: expected over all orders of tied items, and for the worst and best order.

    The arrays are float64 [Q], the values of the single queries.
    """

    expected: float
    minimum: float
    maximum: float
    expected_per_query: np.ndarray = field(repr=False)
    minimum_per_query: np.ndarray = field(repr=False)
    maximum_per_query: np.ndarray = field(repr=False)

    @classmethod
    def _of(cls, expected: Tensor, minimum: Tensor, maximum: Tensor, **definition):
        per_query = [values.flatten().numpy() for values in (expected, minimum, maximum)]
        return cls(*(float(values.mean()) for values in per_query), *per_query, **definition)


@dataclass(frozen=True, eq=False)
class MeanAveragePrecision(TieAwareMean):
    """Mean average precision with what defines it: the cut ``at`` (None: the whole ranking) and the denominator."""

    at: int | None
    denominator: Denominator


@dataclass(frozen=True, eq=False)
class PrecisionRecallCurve:
    """Precision and recall within each radius, averaged over the queries; float64 [bits + 1], index = radius.

    ``empty`` is the share of queries with nothing within the radius. Their precision counts as 0, so
    ``precision / (1 - empty)`` is the mean over the other queries alone.
    """

    precision: np.ndarray
    recall: np.ndarray
    empty: np.ndarray


def mean_average_precision(
    query_codes: Array,
    query_labels: Array,
    database_codes: Array,
    database_labels: Array,
    *,
    at: int | None = None,
    denominator: Denominator = "retrieved",
) -> MeanAveragePrecision:
    """Mean average precision over the whole ranking (mAP), or over its first ``at`` items (mAP@at).

    Average precision is the sum, over the relevant items among the first ``at``, of the precision at their position,
    divided by

    - "retrieved": the number of relevant items among the first ``at``, as in deep-hashing papers; 0 where there is
      none. A hit far down lowers it, and where the cut divides a tie this number is itself random;
    - "relevant": the number of relevant items in the database, as trec_eval does. Where that exceeds ``at``, even a
      perfect ranking stays below 1.

    Over the whole ranking the two are the same.
    """
    counts = distance_counts(query_codes, query_labels, database_codes, database_labels)
    return counts.mean_average_precision(at=at, denominator=denominator)


def precision_at(
    query_codes: Array, query_labels: Array, database_codes: Array, database_labels: Array, k: int
) -> TieAwareMean:
    """Share of relevant items among the first ``k``."""
    return distance_counts(query_codes, query_labels, database_codes, database_labels).precision_at(k)


def recall_at(
    query_codes: Array, query_labels: Array, database_codes: Array, database_labels: Array, k: int
) -> TieAwareMean:
    """Share of the database's relevant items that are among the first ``k``."""
    return distance_counts(query_codes, query_labels, database_codes, database_labels).recall_at(k)


def precision_within_radius(
    query_codes: Array,
    query_labels: Array,
    database_codes: Array,
    database_labels: Array,
    radius: int,
) -> float:
    """Share of relevant items among those at a distance of at most ``radius``, averaged over the queries.

    A query with nothing within the radius counts 0. Ties play no part: a radius never divides one.
    """
    counts = distance_counts(query_codes, query_labels, database_codes, database_labels)
    return counts.precision_within_radius(radius)


def precision_recall_curve(
    query_codes: Array, query_labels: Array, database_codes: Array, database_labels: Array
) -> PrecisionRecallCurve:
    """Precision and recall within each radius from 0 to bits. Ties play no part."""
    counts = distance_counts(query_codes, query_labels, database_codes, database_labels)
    return counts.precision_recall_curve()


def distance_counts(
    query_codes: Array, query_labels: Array, database_codes: Array, database_labels: Array
) -> "DistanceCounts":
    """Count, at each distance from each query, the database items and the relevant ones among them."""
    query_codes, query_labels, database_codes, database_labels = checked(
        query_codes, query_labels, database_codes, database_labels
    )
    items, relevant = hamming_count(query_codes, database_codes, query_labels=query_labels, labels=database_labels)
    return DistanceCounts(items.cpu(), relevant.cpu())


@dataclass(frozen=True, eq=False)
class DistanceCounts:
    """Items at each distance from each query, and the metrics that follow: methods named as this module's functions.

    items, relevant: int64 [Q, bits + 1] on the CPU.
    """

    items: Tensor
    relevant: Tensor

    def mean_average_precision(
        self, *, at: int | None = None, denominator: Denominator = "retrieved"
    ) -> MeanAveragePrecision:
        if denominator not in ("retrieved", "relevant"):
            raise InputError(f"denominator must be 'retrieved' or 'relevant', got {denominator!r}")
        position = self._position("at", self._size if at is None else at)
        rows = max(1, TILE // (self.items.shape[1] + 10 * math.isqrt(position)))  # see ties._hits_drawn for the root
        blocks = zip(self.items.split(rows), self.relevant.split(rows), strict=True)
        per_query = torch.cat([average_precision(*block, position, denominator) for block in blocks])
        return MeanAveragePrecision._of(*per_query.T, at=None if at is None else position, denominator=denominator)

    def precision_at(self, k: int) -> TieAwareMean:
        return TieAwareMean._of(*(hits / k for hits in self._hits_at(k)))

    def recall_at(self, k: int) -> TieAwareMean:
        total = self.relevant.sum(1, keepdim=True).clamp(min=1)
        return TieAwareMean._of(*(hits / total for hits in self._hits_at(k)))

    def precision_within_radius(self, radius: int) -> float:
        radius = integer("radius", radius, 0, self.items.shape[1] - 1, " (bits)")
        return float(self.precision_recall_curve().precision[radius])

    def precision_recall_curve(self) -> PrecisionRecallCurve:
        items, hits = self.items.cumsum(1), self.relevant.cumsum(1)
        precision = hits / items.clamp(min=1).double()
        recall = hits / hits[:, -1:].clamp(min=1).double()
        return PrecisionRecallCurve(*(values.mean(0).numpy() for values in (precision, recall, (items == 0).double())))

    @property
    def _size(self) -> int:
        return int(self.items[0].sum())

    def _position(self, name: str, value: int) -> int:
        return integer(name, value, 1, self._size, " (the size of the database)")

    def _hits_at(self, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Relevant items among the first k: expected, fewest, most; float64 [Q, 1]."""
        cut = cut_at(self.items, self.relevant, self._position("k", k))
        return cut.hits + cut.taken * cut.relevant / cut.items, cut.hits + cut.fewest, cut.hits + cut.most
