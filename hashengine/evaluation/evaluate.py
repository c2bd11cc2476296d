"""Measures how well an index ranks the images of a query's class before all others."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import torch

from hashengine import _progress, metrics
from hashengine._defaults import RADIUS
from hashengine._validation import check_integer
from hashengine.errors import invalid
from hashengine.evaluation.encode import CodesFolder, codes_digest
from hashengine.evaluation.image_index import ImageIndex
from hashengine.evaluation.records import Band, Curve, Evaluation, labels_digest

if TYPE_CHECKING:
    from hashengine.index import Searcher

DEPTHS = (1, 10, 100)  # the k of precision@k and recall@k
QUERY_BLOCK = 256  # queries per call of distance_counts; progress is reported after each call


def evaluate(index: ImageIndex, queries: CodesFolder, *, at: int | None = None, radius: int = RADIUS) -> Evaluation:
    """Measure how the index ranks its images for each query. An image is relevant if it has the label of the query.

    Args:
        index: the images to rank.
        queries: labelled images, encoded by the index's model.
        at: the number of ranked images that the mean average precision covers; None for all.
        radius: the radius in bits for the precision within a radius. A query with no image within it scores 0.

    Raises:
        InputError: a query has no label, `at` or `radius` is out of range, or the queries come from another model.
    """
    index.check("evaluate", queries, "queries")
    unlabelled = sum(not item.label for item in queries.items)
    if unlabelled:
        actual = f"{unlabelled} of {len(queries.items)} without a class"
        raise invalid("evaluate", "queries", "images in class folders", actual)
    if at is not None:
        at = check_integer("evaluate", "at", at, 1, len(index.items), "the number of images in the index")
    radius = check_integer("evaluate", "radius", radius, 0, index.record.bits, "the number of bits")

    classes = sorted({item.label for item in queries.items})
    number = {label: i for i, label in enumerate(classes)}
    start = time.perf_counter()
    counts = _distance_counts(
        queries.codes,
        index.hamming,
        np.array([number[item.label] for item in queries.items]),
        np.array([number.get(item.label, -1) for item in index.items]),  # -1: a class without queries
    )
    depths = [depth for depth in DEPTHS if depth <= len(index.items)]
    curve = counts.precision_recall_curve()
    return Evaluation(
        index=str(index.folder.absolute()),
        identity=index.record.identity,
        bits=index.record.bits,
        database=len(index.items),
        queries=len(queries.items),
        source=queries.record.source,
        codes_sha256=codes_digest(queries.codes),
        labels_sha256=labels_digest(item.label for item in queries.items),
        without_relevant=int((counts.relevant.sum(1) == 0).sum()),
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


def _distance_counts(
    queries: np.ndarray, database: Searcher, query_labels: np.ndarray, labels: np.ndarray
) -> metrics.DistanceCounts:
    """Call `metrics.distance_counts` for one block of queries after the other, with progress, and join the results."""
    blocks = []
    with _progress.task("evaluating", len(queries), "query") as progress:
        for start in range(0, len(queries), QUERY_BLOCK):
            block = slice(start, start + QUERY_BLOCK)
            counts = metrics.distance_counts(queries[block], database, labels=(query_labels[block], labels))
            blocks.append(counts)
            progress.update(len(counts.items))
    return metrics.DistanceCounts(
        torch.cat([counts.items for counts in blocks]), torch.cat([counts.relevant for counts in blocks])
    )


def _band(value: metrics.TieAwareMean) -> Band:
    return Band(expected=value.expected, minimum=value.minimum, maximum=value.maximum)
