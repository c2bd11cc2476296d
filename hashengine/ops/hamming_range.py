"""All codes within a Hamming radius."""

import torch
from torch import Tensor

from hashengine.ops._hamming import check_search, distance_rows
from hashengine.ops._library import define_op


def hamming_range(
    queries: Tensor,
    codes: Tensor,
    radius: int,
    *,
    filter: Tensor | None = None,
    max_results: int | None = None,
    num_threads: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The codes at a distance of at most ``radius`` from each query, by (distance, position).

    Args:
        queries, codes, filter, num_threads: as for :func:`~hashengine.ops.hamming_topk`.
        radius: 0 to bits, inclusive (FAISS's is exclusive).
        max_results: at least 1; of a query that has more, the nearest. Default: all.

    Returns:
        ``lims`` int64 [Q + 1]; query q has ``distances`` int32 and ``positions`` int64 in ``[lims[q], lims[q + 1])``.

    Raises:
        TypeError: queries, codes or filter are not uint8.
        ValueError: shapes, devices, radius or max_results do not fit.
    """
    return _hamming_range(queries, codes, radius, filter, max_results, num_threads)


def _check(queries: Tensor, codes: Tensor, radius: int, filter: Tensor | None, max_results: int | None) -> None:
    check_search("hamming_range", queries, codes, filter)
    if not 0 <= radius <= 8 * codes.shape[1]:
        raise ValueError(f"hamming_range: radius must be 0 to the number of bits ({8 * codes.shape[1]}), got {radius}")
    if max_results is not None and max_results < 1:
        raise ValueError(f"hamming_range: max_results must be at least 1, got {max_results}")


def _reference(
    queries: Tensor,
    codes: Tensor,
    radius: int,
    filter: Tensor | None = None,
    max_results: int | None = None,
    num_threads: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(queries, codes, radius, filter, max_results)
    found = [(queries.new_empty(0, dtype=torch.int32), queries.new_empty(0, dtype=torch.int64))]
    for _, rows in distance_rows(queries, codes, filter):
        for distances in rows:
            positions = (distances <= radius).nonzero().flatten()
            nearest, order = distances[positions].sort(stable=True)
            found.append((nearest[:max_results], positions[order[:max_results]]))
    lims = torch.tensor([len(distances) for distances, _ in found], device=queries.device).cumsum(0)
    distances, positions = (torch.cat(parts) for parts in zip(*found, strict=True))
    return lims, distances, positions


def _fake(
    queries: Tensor,
    codes: Tensor,
    radius: int,
    filter: Tensor | None = None,
    max_results: int | None = None,
    num_threads: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(queries, codes, radius, filter, max_results)
    total = torch.library.get_ctx().new_dynamic_size()
    return (
        queries.new_empty(queries.shape[0] + 1, dtype=torch.int64),
        queries.new_empty(total, dtype=torch.int32),
        queries.new_empty(total, dtype=torch.int64),
    )


_hamming_range = define_op(
    "hamming_range(Tensor queries, Tensor codes, SymInt radius, Tensor? filter=None, SymInt? max_results=None, "
    "int num_threads=0) -> "
    "(Tensor lims, Tensor distances, Tensor positions)",
    reference=_reference,
    fake=_fake,
)
