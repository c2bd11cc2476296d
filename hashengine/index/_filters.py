"""A user's filter of the codes in an index as the bitmap of rows that the ops take."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hashengine.ops._hamming import pack_filter, unpack_filter

_ENTRIES = 1 << 27  # of a mask that a GPU works on at once


def combined(filter: np.ndarray, live: np.ndarray | None, rows: int, count: int) -> np.ndarray:
    """uint8 [..., ceil(rows / 8)]: the live rows that the filter lets through.

    Args:
        filter: of the ``count`` live rows, in order: a mask, bool [..., count], or its bitmap, uint8.
        live: the bitmap of the live rows; None: all.
    """
    is_mask = filter.dtype == bool
    if live is not None:
        bitmap = np.empty((*filter.shape[:-1], len(live)), np.uint8)
        live_mask, found = np.unpackbits(live, count=rows, bitorder="little").view(bool), np.zeros(rows, bool)
        for query in np.ndindex(filter.shape[:-1]):  # one at a time: a mask is eight times as large as its bitmap
            mask = filter[query]
            found[live_mask] = mask if is_mask else np.unpackbits(mask, count=count, bitorder="little")
            bitmap[query] = np.packbits(found, bitorder="little")
        return bitmap
    if is_mask:
        return np.packbits(filter, axis=-1, bitorder="little")
    bitmap = filter.copy()
    if count % 8:  # the ops take zeros behind the last code
        bitmap[..., -1] &= (1 << count % 8) - 1
    return bitmap


def combined_on_gpu(filter: Tensor, live: Tensor | None, rows: int, count: int) -> Tensor:
    """As :func:`combined`, of tensors on one device, in steps whose sizes do not depend on their values: none waits."""
    if live is not None:
        live_mask = unpack_filter(live, rows)
        place = (live_mask.cumsum(0) - 1).clamp_(min=0)  # among the live rows
    is_mask = filter.dtype == torch.bool
    bitmap = filter.new_empty((*filter.shape[:-1], (rows + 7) // 8), dtype=torch.uint8)
    step = max(_ENTRIES // max(rows, 1), 1)
    for part, target in zip(_rows(filter).split(step), _rows(bitmap).split(step), strict=True):
        if count == 0:
            target.zero_()
            continue
        mask = part if is_mask else unpack_filter(part, count)
        target.copy_(pack_filter(mask if live is None else mask.index_select(1, place).logical_and_(live_mask)))
    return bitmap


def _rows(values: Tensor) -> Tensor:
    return values.unsqueeze(0) if values.dim() == 1 else values
