"""Mean average precision of a full ranking: hashengine's, and the definition in numpy that verifies it."""

from typing import TypeVar

import numpy as np
from torch import Tensor

from hashengine import metrics

Array = TypeVar("Array", np.ndarray, Tensor)


def mean_average_precision(
    queries: Array, database: Array, query_labels: Array, labels: Array
) -> metrics.MeanAveragePrecision:
    """hashengine's metric; a code is relevant to a query of the same label."""
    return metrics.distance_counts(queries, database, labels=(query_labels, labels)).mean_average_precision()


def average_precision(distances: np.ndarray, relevant: np.ndarray) -> float:
    """Average precision of one query's ranking, as the expected value over all orders of tied codes.

    Average precision is the mean of the precisions at the ranks of the relevant codes. In a tie of n codes, of which r
    are relevant, each rank holds a relevant code with probability r / n. If it does, each other rank of the tie holds a
    relevant code with probability (r - 1) / (n - 1).

    Args:
        distances: [N], the distance of each code.
        relevant: bool [N].
    """
    total, codes_before, relevant_before = 0.0, 0, 0
    for distance in np.unique(distances):
        tie = distances == distance
        n, r = int(tie.sum()), int(relevant[tie].sum())
        offset = np.arange(n)
        relevant_up_to = relevant_before + 1 + offset * ((r - 1) / max(1, n - 1))
        total += (r / n * relevant_up_to / (codes_before + offset + 1)).sum()
        codes_before, relevant_before = codes_before + n, relevant_before + r
    return total / max(1, relevant_before)
