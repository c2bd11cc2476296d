"""What the Hamming ops share: checks, and distances in plain torch."""

from collections.abc import Iterator

import torch
from torch import Tensor

from hashengine.ops._check import check_codes

_MAX_BYTES = 8192  # of a code
_ENTRIES = 1 << 24  # distances held at once by a reference: 128 MB as int64


def check_search(op: str, queries: Tensor, codes: Tensor, filter: Tensor | None) -> None:
    for name, tensor in (("queries", queries), ("codes", codes)):
        check_codes(op, tensor, name)
        if tensor.dim() != 2 or not 0 < tensor.shape[1] <= _MAX_BYTES:
            raise ValueError(
                f"{op}: {name} must be [rows, bits / 8] of at most {8 * _MAX_BYTES} bits, got {list(tensor.shape)}"
            )
    if queries.shape[1] != codes.shape[1]:
        raise ValueError(
            f"{op}: queries and codes must have the same width, got {8 * queries.shape[1]} and "
            f"{8 * codes.shape[1]} bits"
        )
    if queries.device != codes.device:
        raise ValueError(f"{op}: queries and codes must be on one device, got {queries.device} and {codes.device}")
    if filter is not None:
        _check_filter(op, queries, codes, filter)


def _check_filter(op: str, queries: Tensor, codes: Tensor, filter: Tensor) -> None:
    if filter.dtype != torch.uint8:
        raise TypeError(f"{op}: filter must be a bitmap of uint8, got {filter.dtype}; pack a mask with pack_filter")
    width = (codes.shape[0] + 7) // 8
    if filter.dim() not in (1, 2) or filter.shape[-1] != width or (filter.dim() == 2 and len(filter) != len(queries)):
        raise ValueError(
            f"{op}: filter must be [{width}], or [{len(queries)}, {width}] with a row a query, for {codes.shape[0]} "
            f"codes, got {list(filter.shape)}"
        )
    if filter.device != codes.device:
        raise ValueError(f"{op}: filter must be on the codes' device, {codes.device}, got {filter.device}; move one")


def pack_filter(mask: Tensor) -> Tensor:
    """A mask as the bitmap that the Hamming ops take.

    Args:
        mask: bool [..., N], true where a code may be found.

    Returns:
        uint8 [..., ceil(N / 8)], the first code in the least significant bit; bits beyond N are zero.
    """
    padded = torch.nn.functional.pad(mask, (0, -mask.shape[-1] % 8)).unflatten(-1, (-1, 8))
    places = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (padded.to(torch.uint8) << places).sum(-1, dtype=torch.uint8)


def unpack_filter(filter: Tensor, count: int) -> Tensor:
    """The mask, bool [..., count], of a bitmap."""
    places = torch.arange(8, dtype=torch.uint8, device=filter.device)
    return ((filter.unsqueeze(-1) >> places) & 1).flatten(-2)[..., :count].bool()


def distance_rows(queries: Tensor, codes: Tensor, filter: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """Distances int32 [rows, N] of a block of queries at a time; ``bits + 1`` where the filter leaves a code out.

    They are products of +-1 codes, exact in float32 up to 2^24 bits.
    """
    bits = 8 * codes.shape[1]
    rows = max(1, _ENTRIES // max(codes.shape[0], 1))
    columns = max(1, _ENTRIES // bits)
    for first in range(0, queries.shape[0], rows):
        block = slice(first, min(first + rows, queries.shape[0]))
        signs = _signs(queries[block])
        with torch.autocast(codes.device.type, enabled=False):  # a caller's half precision would round the distances
            parts = [((bits - signs @ _signs(part).T) / 2).int() for part in codes.split(columns)]
        distances = torch.cat(parts, 1) if parts else queries.new_empty((len(signs), 0), dtype=torch.int32)
        if filter is not None:
            mask = unpack_filter(filter if filter.dim() == 1 else filter[block], codes.shape[0])
            distances = distances.masked_fill(~mask, bits + 1)
        yield block, distances


def _signs(codes: Tensor) -> Tensor:
    """Packed codes [N, B] as +-1 in float32 [N, 8 B]; bit order does not matter to a distance."""
    places = torch.arange(8, dtype=torch.uint8, device=codes.device)
    return (((codes.unsqueeze(-1) >> places) & 1).flatten(-2).float() * 2) - 1
