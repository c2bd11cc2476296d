"""The number of codes at each Hamming distance."""

import torch
from torch import Tensor

from hashengine._validation import check_label_columns, check_label_pair, check_labels_of_one_kind, dtype_name
from hashengine.errors import invalid
from hashengine.ops._hamming import check_search, distance_rows
from hashengine.ops._library import define_op


def hamming_count(
    queries: Tensor,
    codes: Tensor,
    *,
    labels: tuple[Tensor, Tensor] | None = None,
    filter: Tensor | None = None,
    num_threads: int = 0,
) -> tuple[Tensor, Tensor]:
    """The number of codes at each distance from each query, and how many of them are relevant.

    Retrieval metrics and the number of hits within any radius follow from these counts, without a full ranking.

    Args:
        queries: uint8 [Q, bits / 8], as for `hamming_topk`.
        codes: uint8 [N, bits / 8], on the device of `queries`.
        labels: (query_labels, code_labels), on the device of the codes. With integer labels, int64 [Q] and [N], a code
            is relevant if its label equals the query's. With multi-hot labels, bool [Q, L] and [N, L] with L at
            least 2, a code is relevant if it shares at least one label with the query.
        filter: bitmap of the codes that are counted, as for `hamming_topk`. Default: all codes.
        num_threads: the number of torch's threads to use on the CPU; 0 for all.

    Returns:
        `counts` int64 [Q, bits + 1], indexed by distance, and `relevant`, the same for the relevant codes only;
        `relevant` is [Q, 0] without labels. This function always returns both; `HammingIndex.count` without labels
        returns only `counts`.

    Raises:
        ValueError: a dtype, a shape, a device or `num_threads` is wrong, or `labels` is not a pair.
    """
    if labels is None:
        return _hamming_count(queries, codes, filter, None, None, num_threads)
    query_labels, code_labels = check_label_pair("hamming_count", labels)
    return _hamming_count(queries, codes, filter, query_labels, code_labels, num_threads)


def _check(
    queries: Tensor,
    codes: Tensor,
    filter: Tensor | None,
    query_labels: Tensor | None,
    code_labels: Tensor | None,
    num_threads: int,
) -> None:
    where = "hamming_count"
    check_search(where, queries, codes, filter, num_threads)
    if query_labels is None and code_labels is None:
        return
    if query_labels is None or code_labels is None:
        raise invalid(where, "query_labels and code_labels", "given both or neither", "one of them")
    for name, labels, rows in (("query_labels", query_labels, queries), ("code_labels", code_labels, codes)):
        check_label_columns(where, name, labels.shape)
        count, dtype = rows.shape[0], torch.int64 if labels.dim() == 1 else torch.bool
        shape_fits = labels.dim() in (1, 2) and labels.shape[0] == count
        if not shape_fits or labels.dtype != dtype or labels.device != rows.device:
            expected = f"int64 [{count}] or bool [{count}, L] on {rows.device}"
            raise invalid(where, name, expected, f"{dtype_name(labels)} {list(labels.shape)} on {labels.device}")
    check_labels_of_one_kind(where, query_labels, code_labels)


def _reference(
    queries: Tensor,
    codes: Tensor,
    filter: Tensor | None = None,
    query_labels: Tensor | None = None,
    code_labels: Tensor | None = None,
    num_threads: int = 0,
) -> tuple[Tensor, Tensor]:
    counts, relevant = _fake(queries, codes, filter, query_labels, code_labels, num_threads)
    bins = counts.shape[1] + 1  # the last bin counts the codes that the filter excludes
    for block, distances in distance_rows(queries, codes, filter):
        first = bins * torch.arange(len(distances), device=codes.device)[:, None]

        def histogram(keys: Tensor, rows: int = len(distances)) -> Tensor:
            return torch.bincount(keys, minlength=rows * bins).view(rows, bins)[:, :-1]

        counts[block] = histogram((first + distances).flatten())
        if query_labels is not None and code_labels is not None:
            relevant[block] = histogram((first + distances)[_is_relevant(query_labels[block], code_labels)])
    return counts, relevant


def _is_relevant(query_labels: Tensor, code_labels: Tensor) -> Tensor:
    """Which codes are relevant to which queries, bool [Q, N]."""
    if code_labels.dim() == 1:
        return query_labels[:, None] == code_labels
    return query_labels.float() @ code_labels.float().T > 0


def _fake(
    queries: Tensor,
    codes: Tensor,
    filter: Tensor | None = None,
    query_labels: Tensor | None = None,
    code_labels: Tensor | None = None,
    num_threads: int = 0,
) -> tuple[Tensor, Tensor]:
    _check(queries, codes, filter, query_labels, code_labels, num_threads)
    bins = 8 * codes.shape[1] + 1
    counts = queries.new_empty((queries.shape[0], bins), dtype=torch.int64)
    return counts, counts.new_empty((queries.shape[0], 0 if code_labels is None else bins))


_hamming_count = define_op(
    "hamming_count(Tensor queries, Tensor codes, Tensor? filter=None, Tensor? query_labels=None, "
    "Tensor? code_labels=None, int num_threads=0) -> (Tensor counts, Tensor relevant)",
    reference=_reference,
    fake=_fake,
    is_integer=True,
)
