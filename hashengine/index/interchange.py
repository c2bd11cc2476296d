"""To FAISS and back."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from hashengine.errors import InputError
from hashengine.index.bit_order import converted
from hashengine.index.hamming_index import HammingIndex

if TYPE_CHECKING:
    import faiss


def from_faiss(index: faiss.IndexBinary, *, bit_order: str) -> HammingIndex:
    """An index of the codes of a FAISS index, in the same order.

    Args:
        index: ``IndexBinaryFlat``, whose ids are positions, or ``IndexBinaryIDMap`` or ``IndexBinaryIDMap2`` over one,
            whose ids are kept; copied.
        bit_order: "msb_first" or "lsb_first", of the codes in ``index``; queries of the result are "msb_first".

    Raises:
        InputError: another kind of index, an unknown bit order, or ids that are negative or not unique.
    """
    faiss = _faiss("from_faiss")
    is_map = isinstance(index, faiss.IndexBinaryIDMap)
    flat = faiss.downcast_IndexBinary(index.index) if is_map else index
    if not isinstance(flat, faiss.IndexBinaryFlat):
        kind = f"{type(index).__name__} over {type(flat).__name__}" if is_map else type(index).__name__
        raise InputError(
            f"from_faiss: index must be an IndexBinaryFlat, or an IndexBinaryIDMap or IndexBinaryIDMap2 over one, "
            f"got {kind}; add its codes to one first"
        )
    codes = faiss.vector_to_array(flat.xb).reshape(flat.ntotal, flat.code_size)
    result = HammingIndex(flat.d)
    result.add(converted(codes, bit_order), faiss.vector_to_array(index.id_map) if is_map else None)
    return result


def to_faiss(index: HammingIndex, *, bit_order: str) -> faiss.IndexBinaryFlat | faiss.IndexBinaryIDMap2:
    """A FAISS index of the codes in an index, in the same order, without the removed ones.

    Args:
        index: copied.
        bit_order: "msb_first" or "lsb_first", that the codes in the result shall have, and its queries.

    Returns:
        ``IndexBinaryFlat`` where the ids are 0 to N - 1 in this order, else ``IndexBinaryIDMap2`` over one.

    Raises:
        InputError: an unknown bit order.
    """
    faiss = _faiss("to_faiss")
    flat = faiss.IndexBinaryFlat(index.bits)
    with index._rows_lock.reading():  # codes and ids of one state, and no update meanwhile
        state = index._state
        ids = state.live_ids().numpy()
        codes = np.ascontiguousarray(converted(state.live_codes().cpu().numpy(), bit_order))
        if np.array_equal(ids, np.arange(len(ids))):
            flat.add(codes)
            return flat
        mapped = faiss.IndexBinaryIDMap2(flat)
        flat.this.disown()  # the map frees it
        mapped.own_fields = True
        mapped.add_with_ids(codes, ids)
    return mapped


def _faiss(function: str) -> ModuleType:
    try:
        import faiss
    except ImportError:
        raise InputError(f"{function} needs faiss: pip install 'hashengine[bench]'") from None
    return faiss
