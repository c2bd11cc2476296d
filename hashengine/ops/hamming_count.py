"""How many codes lie at each Hamming distance."""

import torch
from torch import Tensor

from hashengine.ops._hamming import check_search, distance_rows
from hashengine.ops._library import define_op


def hamming_count(
    queries: Tensor,
    codes: Tensor,
    *,
    filter: Tensor | None = None,
    query_labels: Tensor | None = None,
    labels: Tensor | None = None,
    num_threads: int = 0,
) -> tuple[Tensor, Tensor]:
    """The number of codes at each distance from each query, and of the relevant ones among them.

    Metrics, statistics of a radius and the choice of a threshold need no more than this of a full ranking.

    Args:
        queries, codes, filter, num_threads: as for :func:`~hashengine.ops.hamming_topk`.
        query_labels, labels: of the queries and of the codes, both or neither: int64 [Q] and [N], relevant where they
            are equal; or bool [Q, L] and [N, L] (multi-hot), relevant where they share at least one label.

    Returns:
        ``counts`` int64 [Q, bits + 1], and ``relevant``, the same of relevant codes; [Q, 0] without labels.

    Raises:
        TypeError: queries, codes or filter are not uint8, or labels neither int64 [N] nor bool [N, L].
        ValueError: shapes or devices do not fit, or labels came for one side only.
    """
    return _hamming_count(queries, codes, filter, query_labels, labels, num_threads)


def _check(
    queries: Tensor, codes: Tensor, filter: Tensor | None, query_labels: Tensor | None, labels: Tensor | None
) -> None:
    check_search("hamming_count", queries, codes, filter)
    if (query_labels is None) != (labels is None):
        raise ValueError("hamming_count: query_labels and labels must come together, got one of them")
    for name, value, rows in (("query_labels", query_labels, queries), ("labels", labels, codes)):
        if value is None:
            continue
        if value.dim() not in (1, 2) or value.dtype != (torch.int64 if value.dim() == 1 else torch.bool):
            raise TypeError(
                f"hamming_count: {name} must be int64 [N] or bool [N, L], got {value.dtype} {list(value.shape)}"
            )
        if value.shape[0] != rows.shape[0] or value.device != rows.device:
            raise ValueError(
                f"hamming_count: {name} must be a row for each of {rows.shape[0]} on {rows.device}, "
                f"got {list(value.shape)} on {value.device}"
            )
    if labels is not None and query_labels.shape[1:] != labels.shape[1:]:
        raise ValueError(
            f"hamming_count: query_labels and labels must be of one kind and width, got {list(query_labels.shape)} "
            f"and {list(labels.shape)}"
        )


def _reference(
    queries: Tensor,
    codes: Tensor,
    filter: Tensor | None = None,
    query_labels: Tensor | None = None,
    labels: Tensor | None = None,
    num_threads: int = 0,
) -> tuple[Tensor, Tensor]:
    counts, relevant = _fake(queries, codes, filter, query_labels, labels)
    bins = counts.shape[1] + 1  # the last one takes what the filter leaves out
    for block, distances in distance_rows(queries, codes, filter):
        first = bins * torch.arange(len(distances), device=codes.device)[:, None]

        def histogram(keys: Tensor, rows: int = len(distances)) -> Tensor:
            return torch.bincount(keys, minlength=rows * bins).view(rows, bins)[:, :-1]

        counts[block] = histogram((first + distances).flatten())
        if labels is not None:
            relevant[block] = histogram((first + distances)[_is_relevant(query_labels[block], labels)])
    return counts, relevant


def _is_relevant(query_labels: Tensor, labels: Tensor) -> Tensor:
    if labels.dim() == 1:
        return query_labels[:, None] == labels
    return query_labels.float() @ labels.float().T > 0


def _fake(
    queries: Tensor,
    codes: Tensor,
    filter: Tensor | None = None,
    query_labels: Tensor | None = None,
    labels: Tensor | None = None,
    num_threads: int = 0,
) -> tuple[Tensor, Tensor]:
    _check(queries, codes, filter, query_labels, labels)
    bins = 8 * codes.shape[1] + 1
    counts = queries.new_empty((queries.shape[0], bins), dtype=torch.int64)
    return counts, counts.new_empty((queries.shape[0], 0 if labels is None else bins))


_hamming_count = define_op(
    "hamming_count(Tensor queries, Tensor codes, Tensor? filter=None, Tensor? query_labels=None, "
    "Tensor? labels=None, int num_threads=0) -> (Tensor counts, Tensor relevant)",
    reference=_reference,
    fake=_fake,
)
