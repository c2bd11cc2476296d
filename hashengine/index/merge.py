"""Exact merging of partial answers: the merged answer equals the answer of one search of the whole database.

A partial answer (`Part`) is the answer of a search of some of the rows; each row is searched once. Answers name rows by
their global positions. The order of a merged answer is total, by (distance, global position). It depends neither on how
the database is split nor on the order of the partial answers. All functions are pure; all tensors are on one device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Part = tuple[Tensor, ...]  # a partial answer; each function documents its tensors


def merge_topk(parts: Sequence[Part], k: int, *, rows: int, bits: int) -> tuple[Tensor, Tensor]:
    """The k nearest rows among the nearest rows of each part.

    Args:
        parts: `distances` int32 [Q, k'] and `positions` int64 [Q, k'] of each part, with k' the smaller of k and the
            part's number of rows. A missing result has distance `bits + 1` and position -1.
        k: the number of results per query; fewer if the parts have fewer in total.
        rows: a number greater than all global positions, such as the number of rows of the database.
        bits: the length of a code.

    Returns:
        `distances` int32 [Q, k] and `positions` int64 [Q, k], ordered by (distance, position), missing results last.
    """
    keys = [distances.long() * rows + positions.clamp(min=0) for distances, positions in parts]
    nearest = torch.cat(keys, dim=1).sort(dim=1).values[:, :k]
    distances = nearest.div(rows, rounding_mode="floor")
    return distances.int(), (nearest - distances * rows).masked_fill_(distances > bits, -1)


def merge_range(parts: Sequence[Part], max_results: int | None, *, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """The results of all parts, or the nearest `max_results` of each query.

    Args:
        parts: `lims` int64 [Q + 1], `distances` int32 [R] and `positions` int64 [R] of each part. The results of query
            q are the entries `lims[q]:lims[q + 1]` of `distances` and `positions`.
        max_results: the number of results per query to keep; None keeps all.
        rows: a number greater than all global positions.

    Returns:
        The same three tensors for all parts, the results of each query ordered by (distance, position).
    """
    query = torch.cat([_query_of_each_result(lims, len(positions)) for lims, _, positions in parts])
    lims = torch.stack([lims for lims, _, _ in parts]).sum(0)
    distances = torch.cat([distances for _, distances, _ in parts])
    positions = torch.cat([positions for _, _, positions in parts])
    order = (distances.long() * rows + positions).argsort()
    order = order[query[order].argsort(stable=True)]
    if max_results is not None:
        rank = torch.arange(len(order), device=order.device) - lims[query[order]]  # among the results of its query
        order = order[rank < max_results]
        lims = torch.cat([lims[:1], lims.diff().clamp(max=max_results).cumsum(0)])
    return lims, distances[order], positions[order]


def _query_of_each_result(lims: Tensor, count: int) -> Tensor:
    queries = torch.arange(len(lims) - 1, device=lims.device)
    return queries.repeat_interleave(lims.diff(), output_size=count)


def merge_counts(parts: Sequence[Part]) -> Part:
    """The sum of each tensor over the parts: `counts`, and `relevant` if there are labels."""
    return tuple(torch.stack(tensors).sum(0) for tensors in zip(*parts, strict=True))
