"""Exact Hamming top-k over packed codes."""

import torch
from torch import Tensor

from hashengine.errors import invalid
from hashengine.ops._hamming import check_search, distance_rows
from hashengine.ops._library import define_op


def hamming_topk(
    queries: Tensor, codes: Tensor, k: int, *, filter: Tensor | None = None, num_threads: int = 0
) -> tuple[Tensor, Tensor]:
    """The k nearest codes of each query by Hamming distance `d(q, x) = popcount(q ^ x)`.

    Codes at the same distance are ordered by their position in `codes`, so the result is the same on every device.

    Args:
        queries: codes as `pack_bits` returns them, uint8 [Q, bits / 8], of at most 65,536 bits each.
        codes: uint8 [N, bits / 8], on the device of `queries`.
        k: 1 to N.
        filter: the codes that may be returned, as a bitmap from `pack_filter`: uint8 [ceil(N / 8)] for all queries, or
            [Q, ceil(N / 8)] with one row per query. Default: all codes.
        num_threads: the number of torch's threads to use on the CPU; 0 for all.

    Returns:
        `distances` int32 [Q, k], ascending, and `positions` int64 [Q, k] in `codes`. If a filter leaves fewer than k
        codes, the remaining distances are bits + 1 and the remaining positions are -1.

    Raises:
        ValueError: a dtype, a shape, a device, `k` or `num_threads` is wrong.
    """
    return _hamming_topk(queries, codes, k, filter, num_threads)


def _check(queries: Tensor, codes: Tensor, k: int, filter: Tensor | None, num_threads: int) -> None:
    check_search("hamming_topk", queries, codes, filter, num_threads)
    if not 1 <= k <= codes.shape[0]:
        raise invalid("hamming_topk", "k", f"1 to the number of codes ({codes.shape[0]})", k)


def _reference(
    queries: Tensor, codes: Tensor, k: int, filter: Tensor | None = None, num_threads: int = 0
) -> tuple[Tensor, Tensor]:
    """Rank the codes by the key distance * N + position."""
    all_distances, all_positions = _fake(queries, codes, k, filter, num_threads)
    count, excluded = codes.shape[0], 8 * codes.shape[1] + 1
    for block, rows in distance_rows(queries, codes, filter):
        keys = rows.long() * count + torch.arange(count, device=codes.device)
        nearest = keys.topk(k, largest=False, sorted=True).values
        distances = nearest // count
        all_distances[block] = distances.int()
        all_positions[block] = (nearest % count).masked_fill(distances == excluded, -1)
    return all_distances, all_positions


def _fake(
    queries: Tensor, codes: Tensor, k: int, filter: Tensor | None = None, num_threads: int = 0
) -> tuple[Tensor, Tensor]:
    _check(queries, codes, k, filter, num_threads)
    shape = (queries.shape[0], k)
    return queries.new_empty(shape, dtype=torch.int32), queries.new_empty(shape, dtype=torch.int64)


_hamming_topk = define_op(
    "hamming_topk(Tensor queries, Tensor codes, SymInt k, Tensor? filter=None, int num_threads=0) -> "
    "(Tensor distances, Tensor positions)",
    reference=_reference,
    fake=_fake,
    is_integer=True,
)
