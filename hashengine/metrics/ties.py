"""Average precision of a ranking with ties, in closed form: the expected value, the lowest and the highest."""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Denominator = Literal["retrieved", "relevant"]


class Cut(NamedTuple):
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


def cut_at(items: Tensor, relevant: Tensor, at: int) -> Cut:
    reached = items.cumsum(1)
    distance = torch.searchsorted(reached, torch.full((len(items), 1), at, device=items.device))
    n, r, last, last_hit = (
        counts.gather(1, distance).double() for counts in (items, relevant, reached, relevant.cumsum(1))
    )
    whole = torch.arange(items.shape[1], device=items.device) < distance
    return Cut(before=last - n, hits=last_hit - r, items=n, relevant=r, taken=at - (last - n), whole=whole)


def average_precision(items: Tensor, relevant: Tensor, at: int, denominator: Denominator) -> Tensor:
    """Average precision of each query, float64 [Q, 3]: expected, minimum, maximum.

    Three sums over the ties before the cut do not depend on the denominator. In the tie that is cut, everything follows
    from the number x of relevant items kept: given x, their places among the kept ones are again equally likely.
    """
    cut = cut_at(items, relevant, at)
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


def _hits_drawn(cut: Cut) -> tuple[Tensor, Tensor]:
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
