"""Ordering candidates by float scores."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from hashengine._validation import FLOATING, Array, as_tensor, check_array, to_callers_type
from hashengine.errors import invalid
from hashengine.index.devices import CPU

_FLOATS_PER_BLOCK = 1 << 24  # 64 MB of candidate vectors at a time


def rerank_vectors(query_vectors: Array, vectors: Array, ids: Array) -> tuple[Array, Array]:
    """Order candidates by the dot product of query and candidate vector: cosine similarity if both are normalised.

    Args:
        query_vectors: floating [Q, D], torch or numpy.
        vectors: floating [N, D], row i for id i. Only the rows of candidates are read, so the array may be mapped.
        ids: int64 [Q, k], as `HammingIndex.search` returns them; -1 means no candidate.

    Returns:
        `scores` float32 [Q, k], descending, and `ids` int64 [Q, k] in that order, both in the library and on the device
        of the given ids. Ties keep their order in `ids`; -1 is last, with the score -inf.

    Raises:
        InputError: a wrong dtype or shape, an id without a row, or a query, a candidate or a product that is not finite
            in float32.
    """
    check_array("rerank_vectors", "vectors", vectors, FLOATING)
    if vectors.ndim != 2:
        raise invalid("rerank_vectors", "vectors", "[N, D]", list(vectors.shape))
    queries = check_query_vectors("rerank_vectors", "query_vectors", query_vectors, vectors.shape[1])
    rows = check_candidates("rerank_vectors", ids, len(queries))
    if rows.numel() and int(rows.max()) >= len(vectors):
        expected = f"below {len(vectors)}, the number of vectors"
        raise invalid("rerank_vectors", "ids", expected, int(rows.max()))

    def vectors_of(rows: Tensor) -> Tensor:
        index = rows.numpy() if isinstance(vectors, np.ndarray) else rows.to(vectors.device)
        return _finite("rerank_vectors", "vectors", as_tensor(vectors[index]).cpu())

    scores, order = rank_candidates("rerank_vectors", queries, rows, vectors_of)
    return to_callers_type(ids, scores, rows.gather(1, order))


def check_query_vectors(where: str, name: str, vectors: Array, width: int) -> Tensor:
    """Require finite vectors [rows, width], and return them as float32 on the CPU."""
    check_array(where, name, vectors, FLOATING)
    if vectors.ndim != 2 or vectors.shape[1] != width:
        raise invalid(where, name, f"[rows, {width}]", list(vectors.shape))
    return _finite(where, name, as_tensor(vectors).cpu())


def _finite(where: str, name: str, values: Tensor) -> Tensor:
    """Require values that are finite in float32, and return them in that dtype."""
    result = values.float()
    is_finite = result.isfinite()
    if not bool(is_finite.all()):
        first = values[~is_finite][0].item()
        raise invalid(where, name, "finite in float32", first, "check whether the model has diverged")
    return result


def check_candidates(where: str, ids: Array, queries: int) -> Tensor:
    """Require candidate ids int64 [queries, k] of -1 or more, and return them on the CPU."""
    check_array(where, "ids", ids, ("int64",))
    if ids.ndim != 2 or len(ids) != queries:
        raise invalid(where, "ids", f"[{queries}, k], one row per query", list(ids.shape))
    tensor = as_tensor(ids).cpu()
    if tensor.numel() and int(tensor.min()) < -1:
        raise invalid(where, "ids", "-1 or more", int(tensor.min()))
    return tensor


def rank_candidates(
    where: str, queries: Tensor, rows: Tensor, vectors_of: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Order candidates by their dot products with the queries.

    Args:
        where: the function to name in an error.
        queries: float32 [Q, D].
        rows: int64 [Q, k], the candidates of each query; -1 means no candidate.
        vectors_of: returns the vectors, float32 [q, k, D], of rows int64 [q, k] without -1.

    Returns:
        Scores float32 [Q, k], descending, and for each score the column of `rows` with its candidate, int64 [Q, k].
    """
    scores = torch.full(rows.shape, -torch.inf, dtype=torch.float32, device=CPU)
    block = max(1, _FLOATS_PER_BLOCK // max(1, rows.shape[1] * queries.shape[1]))
    for first in range(0, len(rows) if (rows >= 0).any() else 0, block):
        part = slice(first, first + block)
        known = rows[part].where(rows[part] >= 0, rows.max())  # -1 reads another row; the score is overwritten below
        with torch.autocast("cpu", enabled=False):  # half precision would round the scores
            # Not a matrix product, which may sum the last rows in another order: equal vectors need equal scores.
            scores[part] = (vectors_of(known) * queries[part].unsqueeze(1)).sum(2)
    scores.masked_fill_(rows < 0, 0)
    _finite(where, "the products of queries and candidates", scores)  # so that only -1 has the score -inf
    scores.masked_fill_(rows < 0, -torch.inf)
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    return scores, order
