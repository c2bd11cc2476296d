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
import operator
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hashengine.errors import InputError
from hashengine.ops import unpack_bits

Array = Tensor | np.ndarray
Denominator = Literal["retrieved", "relevant"]

TILE = 2**18  # pairs of query and database code in work at once: 1 MiB of distances stays in a CPU core's cache


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
    chunk: int = TILE,
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
    counts = distance_counts(query_codes, query_labels, database_codes, database_labels, chunk=chunk)
    return counts.mean_average_precision(at=at, denominator=denominator)


def precision_at(
    query_codes: Array, query_labels: Array, database_codes: Array, database_labels: Array, k: int, *, chunk: int = TILE
) -> TieAwareMean:
    """Share of relevant items among the first ``k``."""
    return distance_counts(query_codes, query_labels, database_codes, database_labels, chunk=chunk).precision_at(k)


def recall_at(
    query_codes: Array, query_labels: Array, database_codes: Array, database_labels: Array, k: int, *, chunk: int = TILE
) -> TieAwareMean:
    """Share of the database's relevant items that are among the first ``k``."""
    return distance_counts(query_codes, query_labels, database_codes, database_labels, chunk=chunk).recall_at(k)


def precision_within_radius(
    query_codes: Array,
    query_labels: Array,
    database_codes: Array,
    database_labels: Array,
    radius: int,
    *,
    chunk: int = TILE,
) -> float:
    """Share of relevant items among those at a distance of at most ``radius``, averaged over the queries.

    A query with nothing within the radius counts 0. Ties play no part: a radius never divides one.
    """
    counts = distance_counts(query_codes, query_labels, database_codes, database_labels, chunk=chunk)
    return counts.precision_within_radius(radius)


def precision_recall_curve(
    query_codes: Array, query_labels: Array, database_codes: Array, database_labels: Array, *, chunk: int = TILE
) -> PrecisionRecallCurve:
    """Precision and recall within each radius from 0 to bits. Ties play no part."""
    counts = distance_counts(query_codes, query_labels, database_codes, database_labels, chunk=chunk)
    return counts.precision_recall_curve()


def distance_counts(
    query_codes: Array, query_labels: Array, database_codes: Array, database_labels: Array, *, chunk: int = TILE
) -> "DistanceCounts":
    """Count, at each distance from each query, the database items and the relevant ones among them.

    Distances come from a float32 matrix product of codes of +-1, exact for codes of less than 2**23 bits: every value
    on the way is an integer or a half below 2**24.

    ``chunk`` is the number of pairs of query and database code in work at once; larger suits a GPU. Beside the
    arguments, memory holds at most 16 bytes for each of these pairs, 8 for each of as many unpacked bits and labels,
    and per query its unpacked bits and labels and 40 bytes a distance. Only labels other than int64 or bool, and numpy
    arrays that are not contiguous, are copied as a whole.
    """
    chunk = _integer("chunk", chunk, 1)
    query_codes, query_labels, database_codes, database_labels = _checked(
        query_codes, query_labels, database_codes, database_labels
    )
    queries, bits, device = len(query_codes), 8 * query_codes.shape[1], query_codes.device
    distances = bits + 1
    bins = 2 * distances  # of one query: its irrelevant items by distance, then its relevant ones
    rows = max(1, min(queries, 256, chunk, 2**24 // bins))
    columns = max(1, chunk // max(rows, bits, database_labels[0].numel()))

    counts = torch.zeros(queries, bins, dtype=torch.int64, device=device)
    query_signs = _signs(query_codes)
    # Each row of a tile starts at its own bin, so that one bincount serves all of them; distance = bits/2 - <q, x>/2.
    first_bin = bins * torch.arange(rows, dtype=torch.float32, device=device)[:, None] + bits / 2
    with torch.autocast(device.type, enabled=False):  # a caller's half precision would round the distances
        for column in range(0, len(database_codes), columns):
            database_signs = _signs(database_codes[column : column + columns])
            labels = database_labels[column : column + columns]
            for row in range(0, queries, rows):
                signs = query_signs[row : row + rows]
                tile = torch.addmm(first_bin[: len(signs)], signs, database_signs.T, alpha=-0.5)
                tile.add_(_relevant(query_labels[row : row + rows], labels), alpha=distances)
                histogram = torch.bincount(tile.to(torch.int32).flatten(), minlength=len(signs) * bins)
                counts[row : row + rows] += histogram.view(len(signs), bins)
    irrelevant, relevant = counts.cpu().split(distances, dim=1)
    return DistanceCounts(irrelevant + relevant, relevant)


def _signs(codes: Tensor) -> Tensor:
    return unpack_bits(codes).float().mul_(2).sub_(1)


def _relevant(query_labels: Tensor, database_labels: Tensor) -> Tensor:
    if query_labels.dim() == 1:
        return query_labels[:, None] == database_labels
    return query_labels.float() @ database_labels.float().T > 0


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
        rows = max(1, TILE // (self.items.shape[1] + 10 * math.isqrt(position)))  # see _hits_drawn for the root
        blocks = zip(self.items.split(rows), self.relevant.split(rows), strict=True)
        per_query = torch.cat([_average_precision(*block, position, denominator) for block in blocks])
        return MeanAveragePrecision._of(*per_query.T, at=None if at is None else position, denominator=denominator)

    def precision_at(self, k: int) -> TieAwareMean:
        return TieAwareMean._of(*(hits / k for hits in self._hits_at(k)))

    def recall_at(self, k: int) -> TieAwareMean:
        total = self.relevant.sum(1, keepdim=True).clamp(min=1)
        return TieAwareMean._of(*(hits / total for hits in self._hits_at(k)))

    def precision_within_radius(self, radius: int) -> float:
        radius = _integer("radius", radius, 0, self.items.shape[1] - 1, " (bits)")
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
        return _integer(name, value, 1, self._size, " (the size of the database)")

    def _hits_at(self, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Relevant items among the first k: expected, fewest, most; float64 [Q, 1]."""
        cut = _cut(self.items, self.relevant, self._position("k", k))
        return cut.hits + cut.taken * cut.relevant / cut.items, cut.hits + cut.fewest, cut.hits + cut.most


class _Cut(NamedTuple):
    """The tie in which a ranking is cut, for each query, float64 [Q, 1]: the cut keeps ``taken`` of its items."""

    before: Tensor  # items before the tie
    hits: Tensor  # relevant ones among them
    items: Tensor  # items in the tie
    relevant: Tensor  # relevant ones among them
    taken: Tensor  # from 1 to items
    whole: Tensor  # bool [Q, bits + 1]: the distances before the tie

    @property
    def fewest(self) -> Tensor:
        """Relevant items that the cut keeps at least."""
        return (self.taken - (self.items - self.relevant)).clamp(min=0)

    @property
    def most(self) -> Tensor:
        return torch.minimum(self.taken, self.relevant)


def _cut(items: Tensor, relevant: Tensor, at: int) -> _Cut:
    reached = items.cumsum(1)
    distance = torch.searchsorted(reached, torch.full((len(items), 1), at, device=items.device))
    n, r, last, last_hit = (
        counts.gather(1, distance).double() for counts in (items, relevant, reached, relevant.cumsum(1))
    )
    whole = torch.arange(items.shape[1], device=items.device) < distance
    return _Cut(before=last - n, hits=last_hit - r, items=n, relevant=r, taken=at - (last - n), whole=whole)


def _average_precision(items: Tensor, relevant: Tensor, at: int, denominator: Denominator) -> Tensor:
    """Average precision of each query, float64 [Q, 3]: expected, minimum, maximum.

    Three sums over the ties before the cut do not depend on the denominator. In the tie that is cut, everything follows
    from the number x of relevant items kept: given x, their places among the kept ones are again equally likely.
    """
    cut = _cut(items, relevant, at)
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
    # Relevant items last: the sum is convex in x, so its quotient by a linear divisor falls, then rises.
    minimum = relevant_last(_lowest(relevant_last, cut.fewest, cut.most))
    # Relevant items first: each further precision is no lower than the one before, so a mean of them, too, falls and
    # then rises, and is highest at an end.
    maximum = torch.maximum(relevant_first(cut.fewest), relevant_first(cut.most))
    return torch.cat([expected, minimum, maximum], dim=1)


def _precisions(before: Tensor, hits: Tensor, size: Tensor, relevant: Tensor) -> Tensor:
    """Expected sum of the precisions at the relevant places of a tie in random order.

    The tie has ``size`` items, ``relevant`` of them relevant, and follows ``before`` items with ``hits`` relevant ones.
    Place a = 0..size-1 is relevant with probability relevant/size, and then expects hits + slope * a relevant items
    before it, slope = (relevant - 1)/(size - 1) (McSherry and Najork 2008). The sum over a of the precisions
    (hits + slope * a + 1)/(before + a + 1) is slope * size and a multiple of a harmonic sum.
    """
    slope = torch.where(size > 1, (relevant - 1) / (size - 1), 1.0)  # of one item any; 1 keeps precision 1 exact
    places = slope * size + (hits + 1 - slope * (before + 1)) * _harmonic(before, size)
    return relevant / size.clamp(min=1) * places


def _harmonic(before: Tensor, count: Tensor) -> Tensor:
    """1/(before + 1) + ... + 1/(before + count).

    Far out the difference of two digammas would lose all but a few digits, so it is taken term by term of
    digamma(z + 1/2) = log z + 1/(24 z^2) - 7/(960 z^4) + ..., where z > 128 leaves less than 1e-15 for the rest.
    """

    def series(z: Tensor) -> Tensor:
        return (1 / 24 - 7 / 960 / z**2) / z**2

    start, end = before + 0.5, before + count + 0.5
    far = torch.log1p(count / start) + series(end) - series(start)
    return torch.where(start > 128, far, torch.digamma(end + 0.5) - torch.digamma(start + 0.5))


def _hits_drawn(cut: _Cut) -> tuple[Tensor, Tensor]:
    """How many relevant items a random order puts among the kept ones: numbers and probabilities, float64 [Q, X].

    The number x is hypergeometric. Beyond ``reach`` from its mean lies less than 2**-60 of the probability (Hoeffding
    1963, Theorem 1 and section 6; the four symmetries of the distribution allow the smallest of the four counts), so X
    grows with the root of the tie's size only.
    """
    draws = torch.stack([cut.taken, cut.items - cut.taken, cut.relevant, cut.items - cut.relevant]).amin(0)
    reach = (draws * (61 * math.log(2) / 2)).sqrt() + 1
    mean = cut.taken * cut.relevant / cut.items
    first = torch.maximum(cut.fewest, (mean - reach).ceil())
    last = torch.minimum(cut.most, (mean + reach).floor())
    x = first + torch.arange(int((last - first).max()) + 1, device=first.device)
    # Ratios of neighbours stay near 1, where factorials of a large tie would lose half the digits.
    ratio = (cut.relevant - x + 1) * (cut.taken - x + 1) / (x * (cut.items - cut.relevant - cut.taken + x))
    steps = torch.where(x == first, 0.0, torch.where(x > last, -torch.inf, ratio.log()))
    return x, steps.cumsum(1).softmax(1)


def _lowest(function: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    """The integer from low to high where ``function`` is lowest, elementwise; it must fall, then rise."""
    while bool((low < high).any()):
        middle = ((low + high) / 2).floor()
        rises = function(torch.minimum(middle + 1, high)) >= function(middle)
        low, high = torch.where(rises, low, middle + 1), torch.where(rises, middle, high)
    return low


def _checked(
    query_codes: Array, query_labels: Array, database_codes: Array, database_labels: Array
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    query_codes = _codes("query_codes", query_codes)
    query_labels = _labels("query_labels", query_labels, query_codes)
    database_codes = _codes("database_codes", database_codes)
    database_labels = _labels("database_labels", database_labels, database_codes)
    if database_codes.device != query_codes.device:
        raise InputError(
            f"database_codes must be on the device of query_codes, {query_codes.device}, "
            f"got {database_codes.device}; move one"
        )
    bits, database_bits = 8 * query_codes.shape[1], 8 * database_codes.shape[1]
    if database_bits != bits:
        raise InputError(f"database_codes must have the {bits} bits of query_codes, got {database_bits}")
    if database_labels.shape[1:] != query_labels.shape[1:]:
        raise InputError(
            f"database_labels must be {_kind(query_labels)} as query_labels are, got {_kind(database_labels)}"
        )
    return query_codes, query_labels, database_codes, database_labels


def _kind(labels: Tensor) -> str:
    return "integers [N]" if labels.dim() == 1 else f"multi-hot [N, {labels.shape[1]}]"


def _codes(name: str, value: Array) -> Tensor:
    codes = _tensor(name, value)
    if codes.dtype != torch.uint8:
        raise InputError(
            f"{name} must be packed codes of uint8, got {codes.dtype}; pack bits with hashengine.ops.pack_bits"
        )
    if codes.dim() != 2 or not codes.numel():
        raise InputError(f"{name} must be [N, bits / 8] with at least one code, got shape {list(codes.shape)}")
    return codes


def _labels(name: str, value: Array, codes: Tensor) -> Tensor:
    """int64 [N] or bool [N, L]."""
    labels = _tensor(name, value)
    if labels.device != codes.device:
        raise InputError(f"{name} must be on the device of the codes, {codes.device}, got {labels.device}; move one")
    if labels.dim() not in (1, 2) or len(labels) != len(codes):
        raise InputError(f"{name} must be [N] or [N, L] for N = {len(codes)} codes, got shape {list(labels.shape)}")
    if labels.dim() == 1:
        if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
            raise InputError(f"{name} of shape [N] must be integers, got {labels.dtype}; multi-hot labels are [N, L]")
        return labels.long()
    if labels.dtype != torch.bool and not bool(((labels == 0) | (labels == 1)).all()):
        raise InputError(f"{name} of shape [N, L] must be bool or 0 and 1 (multi-hot), got other values")
    return labels.bool()


def _tensor(name: str, value: Array) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "biuf":
        got = f"an array of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
        raise InputError(f"{name} must be a torch tensor or a numpy array of numbers, got {got}")
    with warnings.catch_warnings():  # a memory-mapped file is read-only, and is only read
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(np.ascontiguousarray(value, value.dtype.newbyteorder("=")))


def _integer(name: str, value: int, low: int, high: int | None = None, meaning: str = "") -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or number < low or (high is not None and number > high):
        expected = f"at least {low}" if high is None else f"from {low} to {high}{meaning}"
        raise InputError(f"{name} must be an integer {expected}, got {value!r}")
    return number
