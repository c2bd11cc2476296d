"""Nearest neighbours in the form that pytorch-metric-learning requires."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hashengine._validation import (
    FLOATING,
    Array,
    as_tensor,
    check_array,
    check_codes,
    check_flag,
    check_integer,
    nan_error,
    to_callers_type,
)
from hashengine.errors import invalid
from hashengine.index.devices import to_device
from hashengine.index.searcher import Searcher
from hashengine.ops import hamming_topk, pack_bits


class HammingKNN:
    """Exact Hamming neighbours as `knn_func` of pytorch-metric-learning's `AccuracyCalculator`.

    Example:
        >>> calculator = AccuracyCalculator(knn_func=HammingKNN())
    """

    def __call__(
        self, query: Array, k: int, reference: Array | Searcher | None = None, ref_includes_query: bool = False
    ) -> tuple[Any, Any]:
        """The k nearest references of each query.

        Args:
            query: packed codes, uint8 [Q, bits / 8], or floating activations [Q, bits], packed by their signs as
                `hashengine.ops.pack_bits` does.
            k: 1 to the number of references, or 1 to one less if the references include the queries.
            reference: packed codes, activations, or a `Searcher` whose ids are positions. Default: the queries; then
                `ref_includes_query` is taken as True.
            ref_includes_query: whether the first Q references are the queries. If so, no query is its own neighbour.

        Returns:
            `distances` float32 [Q, k], ascending, and `indices` int64 [Q, k], in the queries' library, on their
            device; ties are in the order of the references.

        Raises:
            InputError: a wrong dtype or shape, NaN, k out of range, or too few references to include the queries.
        """
        query_codes = _packed(query, "query")
        references: Tensor | Searcher = query_codes
        if isinstance(reference, Searcher):
            references = reference
            if reference.bits != 8 * query_codes.shape[1]:
                raise invalid("HammingKNN", "query", f"of {reference.bits} bits", f"{8 * query_codes.shape[1]} bits")
        elif reference is not None:
            bits = 8 * query_codes.shape[1]
            references = to_device(_packed(reference, "reference", bits), query_codes.device)
        own = int(check_flag("HammingKNN", "ref_includes_query", ref_includes_query) or reference is None)
        if own and len(references) < len(query_codes):
            expected = f"at least {len(query_codes)} rows, because it includes the queries"
            raise invalid("HammingKNN", "reference", expected, f"{len(references)} rows")
        if len(references) <= own:
            raise invalid("HammingKNN", "reference", ["at least 1 row", "at least 2 rows"][own], len(references))
        limit = "the number of other references" if own else "the number of references"
        k = check_integer("HammingKNN", "k", k, 1, len(references) - own, limit)
        if isinstance(references, Tensor):
            distances, indices = hamming_topk(query_codes, references, k + own)
        else:
            distances, indices = references.search(query_codes, k + own)
        if own:
            is_own = indices == torch.arange(len(indices), device=indices.device)[:, None]
            # If more than k duplicates precede a query, the query is not in its results. Drop the last result instead.
            is_own[~is_own.any(dim=1), -1] = True
            distances, indices = (results[~is_own].view(-1, k) for results in (distances, indices))
        return to_callers_type(query, distances.float(), indices)


def _packed(array: Array, name: str, bits: int | None = None) -> Tensor:
    """Check codes or activations, and return packed codes, uint8 [rows, bits / 8], of any width if bits is None."""
    check_array("HammingKNN", name, array, ("uint8", *FLOATING))
    tensor = as_tensor(array)
    if tensor.is_floating_point():
        if tensor.dim() != 2 or tensor.shape[1] == 0 or tensor.shape[1] % 8:
            expected = "[rows, bits] with bits a positive multiple of 8"
            raise invalid("HammingKNN", name, expected, list(tensor.shape))
        if bool(tensor.isnan().any()):
            raise nan_error("HammingKNN", name)
        tensor = pack_bits(tensor)
    return check_codes("HammingKNN", name, tensor, bits)
