"""Code shared by the Hamming ops: argument checks, bitmaps, and distances in plain torch."""

from collections.abc import Iterator

import torch
from torch import Tensor

from hashengine._validation import MAX_BITS, check_code_array, check_filter_shape, dtype_name
from hashengine.errors import invalid
from hashengine.ops._plain import without_autocast

# A reference computes the distances of a block of queries together. A block has at most this many distances, unless one
# query alone has more: 64 MiB as int32, and 128 MiB for the int64 keys that hamming_topk and hamming_count derive.
_BLOCK_DISTANCES = 1 << 24


def check_search(where: str, queries: Tensor, codes: Tensor, filter: Tensor | None, num_threads: int) -> None:
    for name, rows in (("queries", queries), ("codes", codes)):
        check_code_array(where, name, rows, may_be_meta=True)
        if 8 * rows.shape[1] > MAX_BITS:
            raise invalid(where, name, f"of at most {MAX_BITS} bits", 8 * rows.shape[1])
    if queries.shape[1] != codes.shape[1]:
        widths = f"{8 * queries.shape[1]} and {8 * codes.shape[1]} bits"
        raise invalid(where, "queries and codes", "of the same width", widths)
    if queries.device != codes.device:
        raise invalid(where, "queries and codes", "on one device", f"{queries.device} and {codes.device}")
    if filter is not None:
        _check_bitmap(where, queries, codes, filter)
    if num_threads < 0:
        raise invalid(where, "num_threads", "at least 1, or 0 for all", num_threads)


def _check_bitmap(where: str, queries: Tensor, codes: Tensor, filter: Tensor) -> None:
    if filter.dtype != torch.uint8:
        advice = "pack a mask with hashengine.ops.pack_filter first"
        raise invalid(where, "filter", "a bitmap of uint8", dtype_name(filter), advice)
    rows, count = queries.shape[0], codes.shape[0]
    check_filter_shape(where, filter.shape, (count + 7) // 8, rows, count)
    if filter.device != codes.device:
        raise invalid(where, "filter", f"on the device of codes, {codes.device}", filter.device, "move one of them")


def pack_filter(mask: Tensor) -> Tensor:
    """Pack a mask into the bitmap that the Hamming ops take as their filter.

    Args:
        mask: bool [..., N], true for each code that a search may return.

    Returns:
        uint8 [..., ceil(N / 8)]. The first code is in the least significant bit of the first byte; the bits after the
        last code are 0.

    Raises:
        InputError: `mask` is not a tensor of bool with at least one dimension.
    """
    if not isinstance(mask, Tensor):
        raise invalid("pack_filter", "mask", "a torch tensor of bool", type(mask).__name__)
    if mask.dtype != torch.bool or mask.dim() == 0:
        raise invalid("pack_filter", "mask", "bool [..., N]", f"{dtype_name(mask)} {list(mask.shape)}")
    padded = torch.nn.functional.pad(mask, (0, -mask.shape[-1] % 8)).unflatten(-1, (-1, 8))
    places = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (padded.to(torch.uint8) << places).sum(-1, dtype=torch.uint8)


def unpack_filter(filter: Tensor, count: int) -> Tensor:
    """The mask, bool [..., count], that `pack_filter` packed into `filter`."""
    return _unpack_bytes(filter)[..., :count].bool()


def distance_rows(queries: Tensor, codes: Tensor, filter: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """Yield each block of queries, as a slice, and its distances to all codes, int32 [rows, N].

    A code that the filter excludes gets the distance bits + 1. The distances are computed from scalar products of codes
    whose bits are written as +1 and -1. In float32, these products are exact for codes of up to 2^24 bits.
    """
    bits = 8 * codes.shape[1]
    rows = max(1, _BLOCK_DISTANCES // max(codes.shape[0], 1))
    columns = max(1, _BLOCK_DISTANCES // bits)
    for first in range(0, queries.shape[0], rows):
        block = slice(first, min(first + rows, queries.shape[0]))
        signs = _signs(queries[block])
        with without_autocast(codes):  # half precision would round the distances
            parts = [((bits - signs @ _signs(part).T) / 2).int() for part in codes.split(columns)]
        distances = torch.cat(parts, 1) if parts else queries.new_empty((len(signs), 0), dtype=torch.int32)
        if filter is not None:
            mask = unpack_filter(filter if filter.dim() == 1 else filter[block], codes.shape[0])
            distances = distances.masked_fill(~mask, bits + 1)
        yield block, distances


def _signs(codes: Tensor) -> Tensor:
    """The bits of packed codes [N, B] as +1 and -1, float32 [N, 8 B]. Their order does not affect a distance."""
    return _unpack_bytes(codes).float() * 2 - 1


def _unpack_bytes(packed: Tensor) -> Tensor:
    """The bits of uint8 [..., B] as 0 and 1 in uint8 [..., 8 B], the least significant bit of each byte first."""
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> places) & 1).flatten(-2)
