"""Long searches in parts: between them Ctrl-C is heard and progress is told."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from hashengine.ops import hamming_count, hamming_range, hamming_topk

Progress = Callable[[int, int], None]

_PAIRS = 1 << 32  # of a query and a code in a part: a fraction of a second on two cores
_BLOCK = 512  # queries of the largest block that a kernel takes at once; of fewer, codes would be read more often


def topk(
    queries: Tensor, codes: Tensor, k: int, filter: Tensor | None, num_threads: int, progress: Progress | None
) -> tuple[Tensor, Tensor]:
    parts = [
        hamming_topk(rows, codes, k, filter=bitmap, num_threads=num_threads)
        for rows, bitmap, _ in _parts(queries, codes, filter, None, progress)
    ]
    distances, positions = map(_joined, zip(*parts, strict=True))
    return distances, positions


def within(
    queries: Tensor, codes: Tensor, radius: int, filter: Tensor | None, max_results: int | None, num_threads: int,
    progress: Progress | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    parts = [
        hamming_range(rows, codes, radius, filter=bitmap, max_results=max_results, num_threads=num_threads)
        for rows, bitmap, _ in _parts(queries, codes, filter, None, progress)
    ]
    lims, distances, positions = zip(*parts, strict=True)
    found = torch.cat([lims[0][:1], *(part.diff() for part in lims)])
    return found.cumsum(0), _joined(distances), _joined(positions)


def counted(
    queries: Tensor, codes: Tensor, filter: Tensor | None, query_labels: Tensor | None, labels: Tensor | None,
    num_threads: int, progress: Progress | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    parts = [
        hamming_count(rows, codes, filter=bitmap, query_labels=own, labels=labels, num_threads=num_threads)
        for rows, bitmap, own in _parts(queries, codes, filter, query_labels, progress)
    ]
    counts, relevant = map(_joined, zip(*parts, strict=True))
    return counts, relevant


def _parts(
    queries: Tensor, codes: Tensor, filter: Tensor | None, query_labels: Tensor | None, progress: Progress | None
) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None]]:
    """The queries of each part, with what belongs to them; at least one part."""
    total = len(queries)
    step = max(_PAIRS // max(len(codes), 1) // _BLOCK, 1) * _BLOCK
    for start in range(0, max(total, 1), step):
        part = slice(start, min(start + step, total))
        bitmap = filter[part] if filter is not None and filter.dim() == 2 else filter
        yield queries[part], bitmap, None if query_labels is None else query_labels[part]
        if progress is not None:
            progress(part.stop, total)


def _joined(parts: tuple[Tensor, ...]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
