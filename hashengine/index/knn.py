"""Nearest neighbours as pytorch-metric-learning asks for them."""

from __future__ import annotations

import torch
from torch import Tensor

from hashengine.errors import InputError
from hashengine.index._arguments import Array, as_tensor, check_array, checked_codes, checked_integer, like
from hashengine.index._devices import moved
from hashengine.ops import hamming_topk, pack_bits


class HammingKNN:
    """Exact Hamming neighbours as ``knn_func`` of pytorch-metric-learning's ``AccuracyCalculator``.

    Example:
        >>> calculator = AccuracyCalculator(knn_func=HammingKNN())
    """

    def __call__(
        self, query: Array, k: int, reference: Array | None = None, ref_includes_query: bool = False
    ) -> tuple[Array, Array]:
        """The k nearest rows of ``reference`` to each query.

        Args:
            query: packed codes, uint8 [Q, bits / 8], or floating activations [Q, bits], packed by their signs as
                :func:`~hashengine.ops.pack_bits` does.
            k: 1 to the number of references, less one where they include the queries.
            reference: packed codes or activations. Default: the queries, and so ``ref_includes_query``.
            ref_includes_query: the first Q references are the queries. None is found as its own neighbour.

        Returns:
            ``distances`` float32 [Q, k], ascending, and ``indices`` int64 [Q, k], in the queries' library, on their
            device; ties are in the order of the references.

        Raises:
            TypeError: a wrong dtype.
            InputError: a wrong shape, NaN, k out of range, or fewer references than queries that they include.
        """
        query_codes = _packed(query, "query")
        codes = query_codes
        if reference is not None:
            codes = moved(_packed(reference, "reference", 8 * query_codes.shape[1]), query_codes.device)
        own = int(ref_includes_query or reference is None)
        if own and len(codes) < len(query_codes):
            raise InputError(
                f"HammingKNN: reference must begin with the {len(query_codes)} queries where it includes them, "
                f"got {len(codes)} rows"
            )
        if len(codes) <= own:
            raise InputError(
                f"HammingKNN: reference must have more than {own} rows to find neighbours, got {len(codes)}"
            )
        k = checked_integer(k, "HammingKNN: k", 1, len(codes) - own, "the number of references but the query itself")
        distances, indices = hamming_topk(query_codes, codes, k + own)
        if own:
            is_own = indices == torch.arange(len(indices), device=indices.device)[:, None]
            is_own[~is_own.any(dim=1), -1] = True  # too many copies of it stand before it: the last goes
            distances, indices = (array[~is_own].view(-1, k) for array in (distances, indices))
        return like(query, distances.float(), indices)


def _packed(array: Array, name: str, bits: int | None = None) -> Tensor:
    """uint8 [rows, bits / 8]; of any width where bits is None."""
    check_array(array, name, "packed codes or activations")
    tensor = as_tensor(array)
    if tensor.is_floating_point():
        if tensor.dim() != 2 or tensor.shape[1] == 0 or tensor.shape[1] % 8:
            raise InputError(
                f"{name} must be [rows, bits] with bits a positive multiple of 8, got {list(tensor.shape)}"
            )
        if bool(tensor.isnan().any()):
            raise InputError(f"{name} must not hold NaN, whose sign is no bit; look for a diverged model")
        tensor = pack_bits(tensor)
    return checked_codes(tensor, name, bits)
