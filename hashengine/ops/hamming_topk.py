"""Exact Hamming top-k over packed codes."""

import torch
from torch import Tensor

from hashengine.ops._check import check_codes
from hashengine.ops._library import define_op

_REFERENCE_ENTRIES = 1 << 24  # distances held at once by the reference: 128 MB of int64 keys


def hamming_topk(queries: Tensor, codes: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest codes of each query by Hamming distance ``d(q, x) = popcount(q ^ x)``.

    The order is total: by distance, then by position in ``codes``; the same on every device and every path.

    Args:
        queries: uint8 [Q, bits / 8], packed as by :func:`~hashengine.ops.pack_bits`.
        codes: uint8 [N, bits / 8] on the same device.
        k: 1 to N.

    Returns:
        ``distances`` int32 [Q, k], ascending, and ``positions`` int64 [Q, k] in ``codes``.

    Raises:
        TypeError: queries or codes are not uint8.
        ValueError: shapes, devices or k do not fit.
    """
    return _hamming_topk(queries, codes, k)


def _check(queries: Tensor, codes: Tensor, k: int) -> None:
    for name, tensor in (("queries", queries), ("codes", codes)):
        check_codes("hamming_topk", tensor, name)
        if tensor.dim() != 2 or tensor.shape[1] == 0:
            raise ValueError(f"hamming_topk: {name} must be [rows, bits / 8], got {list(tensor.shape)}")
    if queries.shape[1] != codes.shape[1]:
        raise ValueError(
            f"hamming_topk: queries and codes must have the same width, got {8 * queries.shape[1]} and "
            f"{8 * codes.shape[1]} bits"
        )
    if queries.device != codes.device:
        raise ValueError(
            f"hamming_topk: queries and codes must be on one device, got {queries.device} and {codes.device}"
        )
    if not 1 <= k <= codes.shape[0]:
        raise ValueError(f"hamming_topk: k must be 1 to the number of codes ({codes.shape[0]}), got {k}")


def _signs(codes: Tensor) -> Tensor:
    """Packed codes [N, B] as +-1 in float32 [N, 8 B]; bit order does not matter to a distance."""
    places = torch.arange(8, dtype=torch.uint8, device=codes.device)
    return (((codes.unsqueeze(-1) >> places) & 1).flatten(-2).float() * 2) - 1


def _reference(queries: Tensor, codes: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Distances as a product of +-1 codes, exact in float32 up to 2^24 bits; ranked by distance * N + position."""
    _check(queries, codes, k)
    count, bits = codes.shape[0], 8 * codes.shape[1]
    query_signs = _signs(queries)
    rows = max(1, _REFERENCE_ENTRIES // max(count, 1))
    columns = max(1, _REFERENCE_ENTRIES // bits)
    distances, positions = [], []
    for chunk in query_signs.split(rows):
        keys = [
            ((bits - chunk @ _signs(part).T) / 2).long() * count
            + torch.arange(start * columns, start * columns + len(part), device=codes.device)
            for start, part in enumerate(codes.split(columns))
        ]
        nearest = torch.cat(keys, 1).topk(k, largest=False, sorted=True).values
        distances.append((nearest // count).int())
        positions.append(nearest % count)
    if not distances:
        return codes.new_empty((0, k), dtype=torch.int32), codes.new_empty((0, k), dtype=torch.int64)
    return torch.cat(distances), torch.cat(positions)


def _fake(queries: Tensor, codes: Tensor, k: int) -> tuple[Tensor, Tensor]:
    _check(queries, codes, k)
    shape = (queries.shape[0], k)
    return queries.new_empty(shape, dtype=torch.int32), queries.new_empty(shape, dtype=torch.int64)


_hamming_topk = define_op(
    "hamming_topk(Tensor queries, Tensor codes, SymInt k) -> (Tensor distances, Tensor positions)",
    reference=_reference,
    fake=_fake,
)
