"""Reranking of what a search found by float scores."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from hashengine.errors import InputError
from hashengine.index._arguments import Array, check_array, like, on_cpu

_ENTRIES = 1 << 24  # floats held at once: 64 MB


def rerank_vectors(query_vectors: Array, vectors: Array, ids: Array) -> tuple[Array, Array]:
    """Order candidates by the dot product with their own vectors; normalise both sides for cosine similarity.

    Args:
        query_vectors: floating [Q, D], torch or numpy.
        vectors: floating [N, D], row i the vector of id i; only the rows asked for are read, so it may be mapped.
        ids: int64 [Q, k], as :meth:`HammingIndex.search` gives them; -1 is no candidate.

    Returns:
        ``scores`` float32 [Q, k], descending, and ``ids`` int64 [Q, k] in that order, in the ids' library, on their
        device. Ties keep the order that they came in; -1 stands last with the score -inf.

    Raises:
        TypeError: a wrong dtype.
        InputError: a wrong shape, an id without a row, or vectors of queries that are not finite.
    """
    check_array(vectors, "vectors", "floating point")
    if vectors.ndim != 2:
        raise InputError(f"vectors must be [N, D], got {list(vectors.shape)}")
    queries = checked_vectors(query_vectors, "query_vectors", vectors.shape[1])
    rows = checked_candidates(ids, len(queries))
    if rows.numel() and int(rows.max()) >= len(vectors):
        raise InputError(f"ids must be below {len(vectors)}, the number of vectors, got {int(rows.max())}")

    def vectors_of(rows: Tensor) -> Tensor:
        return on_cpu(vectors[rows.numpy() if isinstance(vectors, np.ndarray) else rows.to(vectors.device)]).float()

    scores, order = ranked(queries, rows, vectors_of)
    return like(ids, scores, rows.gather(1, order))


def checked_vectors(vectors: Array, name: str, width: int) -> Tensor:
    """float32 [rows, width]."""
    check_array(vectors, name, "floating point")
    tensor = on_cpu(vectors)
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {vectors.dtype}")
    if tensor.dim() != 2 or tensor.shape[1] != width:
        raise InputError(f"{name} must be [rows, {width}], got {list(tensor.shape)}")
    if not bool(tensor.isfinite().all()):
        raise InputError(f"{name} must be finite, got NaN or infinity; look for a diverged model")
    return tensor.float()


def checked_candidates(ids: Array, queries: int) -> Tensor:
    """int64 [queries, k], -1 or more."""
    check_array(ids, "ids", "int64")
    if ids.dtype not in (torch.int64, np.int64):
        raise TypeError(f"ids must be int64, got {ids.dtype}")
    if ids.ndim != 2 or len(ids) != queries:
        raise InputError(f"ids must be [{queries}, k], a row a query, got {list(ids.shape)}")
    tensor = on_cpu(ids)
    if tensor.numel() and int(tensor.min()) < -1:
        raise InputError(f"ids must not be below -1, got {int(tensor.min())}")
    return tensor


def ranked(queries: Tensor, rows: Tensor, vectors_of: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Scores float32 [Q, k], descending, and the places int64 [Q, k] of ``rows`` [Q, k] in that order.

    Args:
        vectors_of: rows [q, k], none below 0, to float32 [q, k, D].
    """
    scores = torch.full(rows.shape, -torch.inf)
    block = max(1, _ENTRIES // max(1, rows.shape[1] * queries.shape[1]))
    for first in range(0, len(rows) if (rows >= 0).any() else 0, block):
        part = slice(first, first + block)
        known = rows[part].where(rows[part] >= 0, rows.max())
        scores[part] = (vectors_of(known) @ queries[part].unsqueeze(2)).squeeze(2)
    scores.masked_fill_(rows < 0, -torch.inf)
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    return scores, order
