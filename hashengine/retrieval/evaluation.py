"""How well an index ranks the images of the same class first."""

import time

import numpy as np
import torch
from tqdm import tqdm

from hashengine import metrics
from hashengine.errors import InputError
from hashengine.retrieval.codes import CodesFolder
from hashengine.retrieval.image_index import ImageIndex
from hashengine.retrieval.records import Band, Curve, Evaluation

DEPTHS = (1, 10, 100)
QUERY_BLOCK = 256  # as many as distance_counts works on at once


def evaluate(index: ImageIndex, queries: CodesFolder, *, at: int | None = None, radius: int = 2) -> Evaluation:
    """Measure the ranking of the index's images for each query; an image is relevant where its label is the query's.

    Args:
        at: depth of the mean average precision; None ranks the whole index.
        radius: in bits, of the precision within a Hamming ball; a query whose ball is empty counts 0.

    Raises:
        InputError: a query has no label, `at` is out of range, or the queries come from another model.
    """
    index.check(queries, "queries")
    unlabelled = sum(not item.label for item in queries.items)
    if unlabelled:
        raise InputError(
            f"queries: expected images in class folders, got {unlabelled} of {len(queries.items)} without a class"
        )
    if at is not None and not 1 <= at <= len(index.items):
        raise InputError(f"at: expected 1 to {len(index.items)}, the number of images in the index, got {at}")
    if not 0 <= radius <= index.record.bits:
        raise InputError(f"radius: expected 0 to {index.record.bits}, the number of bits, got {radius}")

    classes = sorted({item.label for item in queries.items})
    number = {label: i for i, label in enumerate(classes)}
    start = time.perf_counter()
    counts = _distance_counts(
        queries.codes,
        np.array([number[item.label] for item in queries.items]),
        index.hamming.codes.numpy(),
        np.array([number.get(item.label, -1) for item in index.items]),  # -1 is no query's class
    )
    depths = [depth for depth in DEPTHS if depth <= len(index.items)]
    curve = counts.precision_recall_curve()
    return Evaluation(
        index=str(index.folder.absolute()),
        bits=index.record.bits,
        database=len(index.items),
        queries=len(queries.items),
        classes=len(classes),
        at=at,
        mean_average_precision=_band(counts.mean_average_precision(at=at)),
        precision_at={k: _band(counts.precision_at(k)) for k in depths},
        recall_at={k: _band(counts.recall_at(k)) for k in depths},
        radius=radius,
        precision_within_radius=counts.precision_within_radius(radius),
        precision_recall_curve=Curve(
            radius=list(range(index.record.bits + 1)),
            precision=curve.precision.tolist(),
            recall=curve.recall.tolist(),
            empty=curve.empty.tolist(),
        ),
        seconds=time.perf_counter() - start,
    )


def _distance_counts(query_codes, query_labels, database_codes, database_labels) -> metrics.DistanceCounts:
    """`metrics.distance_counts` block by block of queries, to show how far it is."""
    blocks = []
    with tqdm(total=len(query_codes), desc="evaluating", unit="query", leave=False, disable=None) as progress:
        for start in range(0, len(query_codes), QUERY_BLOCK):
            block = slice(start, start + QUERY_BLOCK)
            blocks.append(
                metrics.distance_counts(query_codes[block], query_labels[block], database_codes, database_labels)
            )
            progress.update(len(blocks[-1].items))
    return metrics.DistanceCounts(
        torch.cat([counts.items for counts in blocks]), torch.cat([counts.relevant for counts in blocks])
    )


def _band(value: metrics.TieAwareMean) -> Band:
    return Band(expected=value.expected, minimum=value.minimum, maximum=value.maximum)
