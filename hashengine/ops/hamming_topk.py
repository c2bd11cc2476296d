"""Exact Hamming top-k over packed codes."""

import torch
from torch import Tensor

from hashengine.ops._hamming import check_search, distance_rows
from hashengine.ops._library import define_op


def hamming_topk(
    queries: Tensor, codes: Tensor, k: int, *, filter: Tensor | None = None, num_threads: int = 0
) -> tuple[Tensor, Tensor]:
    """The k nearest codes of each query by Hamming distance ``d(q, x) = popcount(q ^ x)``.

    The order is total: by distance, then by position in ``codes``; the same on every device and every path.

    Args:
        queries: uint8 [Q, bits / 8] of at most 65,536 bits, packed as by :func:`~hashengine.ops.pack_bits`.
        codes: uint8 [N, bits / 8] on the same device.
        k: 1 to N.
        filter: which codes may be found, a bitmap as :func:`~hashengine.ops.pack_filter` makes it: uint8
            [ceil(N / 8)], or [Q, ceil(N / 8)] with a row a query. Default: all.
        num_threads: of torch's threads on the CPU, at most this many; 0 for all.

    Returns:
        ``distances`` int32 [Q, k], ascending, and ``positions`` int64 [Q, k] in ``codes``; where a filter leaves fewer
        than k codes, the rest is ``bits + 1`` and -1.

    Raises:
        TypeError: queries, codes or filter are not uint8.
        ValueError: shapes, devices or k do not fit.
    """
    return _hamming_topk(queries, codes, k, filter, num_threads)


def _check(queries: Tensor, codes: Tensor, k: int, filter: Tensor | None) -> None:
    check_search("hamming_topk", queries, codes, filter)
    if not 1 <= k <= codes.shape[0]:
        raise ValueError(f"hamming_topk: k must be 1 to the number of codes ({codes.shape[0]}), got {k}")


def _reference(
    queries: Tensor, codes: Tensor, k: int, filter: Tensor | None = None, num_threads: int = 0
) -> tuple[Tensor, Tensor]:
    """Ranked by distance * N + position."""
    _check(queries, codes, k, filter)
    count, absent = codes.shape[0], 8 * codes.shape[1] + 1
    all_distances, all_positions = _fake(queries, codes, k, filter)
    for block, rows in distance_rows(queries, codes, filter):
        keys = rows.long() * count + torch.arange(count, device=codes.device)
        nearest = keys.topk(k, largest=False, sorted=True).values
        distances = nearest // count
        all_distances[block] = distances.int()
        all_positions[block] = (nearest % count).masked_fill(distances == absent, -1)
    return all_distances, all_positions


def _fake(
    queries: Tensor, codes: Tensor, k: int, filter: Tensor | None = None, num_threads: int = 0
) -> tuple[Tensor, Tensor]:
    _check(queries, codes, k, filter)
    shape = (queries.shape[0], k)
    return queries.new_empty(shape, dtype=torch.int32), queries.new_empty(shape, dtype=torch.int64)


_hamming_topk = define_op(
    "hamming_topk(Tensor queries, Tensor codes, SymInt k, Tensor? filter=None, int num_threads=0) -> "
    "(Tensor distances, Tensor positions)",
    reference=_reference,
    fake=_fake,
)
