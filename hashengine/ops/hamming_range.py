"""All codes within a Hamming radius."""

import torch
from torch import Tensor

from hashengine.errors import invalid
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
    """The codes at a distance of at most `radius` from each query, ordered by (distance, position).

    Args:
        queries: uint8 [Q, bits / 8], as for `hamming_topk`.
        codes: uint8 [N, bits / 8], on the device of `queries`.
        radius: 0 to the number of bits. A code at exactly this distance is a result; with FAISS, it is not.
        filter: bitmap of the codes that may be returned, as for `hamming_topk`. Default: all codes.
        max_results: the largest number of results per query, at least 1. If more codes are within `radius`, the nearest
            are returned. Default: no limit.
        num_threads: the number of torch's threads to use on the CPU; 0 for all.

    Returns:
        `lims` int64 [Q + 1], `distances` int32 and `positions` int64. The results of query q are
        `distances[lims[q]:lims[q + 1]]` and `positions[lims[q]:lims[q + 1]]`.

    Raises:
        ValueError: a dtype, a shape, a device, `radius`, `max_results` or `num_threads` is wrong.
    """
    return _hamming_range(queries, codes, radius, filter, max_results, num_threads)


def _check(
    queries: Tensor, codes: Tensor, radius: int, filter: Tensor | None, max_results: int | None, num_threads: int
) -> None:
    check_search("hamming_range", queries, codes, filter, num_threads)
    bits = 8 * codes.shape[1]
    if not 0 <= radius <= bits:
        raise invalid("hamming_range", "radius", f"0 to the number of bits ({bits})", radius)
    if max_results is not None and max_results < 1:
        raise invalid("hamming_range", "max_results", "at least 1", max_results)


def _reference(
    queries: Tensor,
    codes: Tensor,
    radius: int,
    filter: Tensor | None = None,
    max_results: int | None = None,
    num_threads: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(queries, codes, radius, filter, max_results, num_threads)
    found = [(queries.new_empty(0, dtype=torch.int32), queries.new_empty(0, dtype=torch.int64))]
    for _, rows in distance_rows(queries, codes, filter):
        for row in rows:
            within = (row <= radius).nonzero().flatten()
            nearest, order = row[within].sort(stable=True)
            found.append((nearest[:max_results], within[order[:max_results]]))
    lims = torch.tensor([len(part) for part, _ in found], device=queries.device).cumsum(0)
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
    _check(queries, codes, radius, filter, max_results, num_threads)
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
    is_integer=True,
)
