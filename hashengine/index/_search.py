"""Long searches in blocks of queries: between them Ctrl-C is heard and progress is told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from hashengine.index._codes import Share
from hashengine.index._devices import moved, settle, write
from hashengine.index._parts import Answer, Lane, Merge, answered, merged_count, merged_range, merged_topk
from hashengine.index._rows import empty_rows
from hashengine.ops import hamming_count, hamming_range, hamming_topk

Progress = Callable[[int, int], None]

_PAIRS = 1 << 32  # of a query and a code in a block: a fraction of a second on two cores
_BLOCK = 512  # queries of the largest block that a kernel takes at once; of fewer, codes would be read more often
_GPU_PAIRS = 1 << 40
_TOLD_GPU_PAIRS = 1 << 36  # where progress is told: the GPU is idle between blocks
_RESULTS = 1 << 26  # of a block: they lie on a GPU beside the codes, 12 bytes each


@dataclass(frozen=True)
class Search:
    """What the three searches have in common."""

    lanes: list[Lane]
    rows: int  # of all lanes
    queries: Tensor  # uint8 [Q, bits / 8], on any device; results go there
    filter: Tensor | None  # the bitmap of rows that may be found, on any device
    num_threads: int
    progress: Progress | None

    @property
    def bits(self) -> int:
        return 8 * self.queries.shape[1]

    def topk(self, k: int, ids_of: Callable[[Tensor], Tensor]) -> Answer:
        """Distances int32 [Q, k] and ids int64 [Q, k]."""

        def ask(block: slice, share: Share, codes: Tensor) -> Answer:
            found = self._call(hamming_topk, block, share, codes, min(k, len(codes)))
            return found[0], share.rows(found[1])

        blocks = self._blocks(ask, partial(merged_topk, k=k, rows=self.rows, bits=self.bits), k)
        return self._joined((block, (distances, ids_of(rows))) for block, (distances, rows) in blocks)

    def within(self, radius: int, max_results: int | None, ids_of: Callable[[Tensor], Tensor]) -> Answer:
        """Lims int64 [Q + 1], distances int32 and ids int64."""

        def ask(block: slice, share: Share, codes: Tensor) -> Answer:
            found = self._call(hamming_range, block, share, codes, radius, max_results=max_results)
            return found[0], found[1], share.rows(found[2])

        target = self.queries.device
        merge = partial(merged_range, max_results=max_results, rows=self.rows)
        blocks = self._blocks(ask, merge, max_results or 1)
        found = [(lims, moved(near, target), moved(ids_of(rows), target)) for _, (lims, near, rows) in blocks]
        lims, distances, ids = zip(*found, strict=True)
        if len(found) == 1:
            return moved(lims[0], target), distances[0], ids[0]
        counts = torch.cat([lims[0][:1], *(part.diff() for part in lims)])
        return moved(counts.cumsum(0), target), torch.cat(distances), torch.cat(ids)

    def counted(self, query_labels: Tensor | None, labels: Tensor | None) -> Answer:
        """Counts and relevant counts int64 [Q, bits + 1]; labels on any device, those of codes a row each."""

        def ask(block: slice, share: Share, codes: Tensor) -> Answer:
            if labels is None:
                return self._call(hamming_count, block, share, codes)
            own = moved(query_labels[block], codes.device)
            theirs = moved(share.cut(labels), codes.device)
            return self._call(hamming_count, block, share, codes, query_labels=own, labels=theirs)

        return self._joined(self._blocks(ask, merged_count, self.bits + 1))

    def _call(self, op: Callable, block: slice, share: Share, codes: Tensor, *arguments, **options) -> Answer:
        bitmap = self.filter
        if bitmap is not None:
            bitmap = moved(share.cut(bitmap[block] if bitmap.dim() == 2 else bitmap, -1, 8), codes.device)
        queries = moved(self.queries[block], codes.device)
        return op(queries, codes, *arguments, filter=bitmap, num_threads=self.num_threads, **options)

    def _blocks(self, ask: Callable, merge: Merge, results: int) -> Iterator[tuple[slice, Answer]]:
        """What each block of queries is answered on the first lane's device; at least one."""
        total = len(self.queries)
        step = self._step(results)
        for start in range(0, max(total, 1), step):
            block = slice(start, min(start + step, total))

            def told(done: int, parts: int, block: slice = block) -> None:
                if done < parts:  # the last part is done when those of other devices are
                    self._tell(block.start + (block.stop - block.start) * done // parts)

            answer = answered(self.lanes, partial(ask, block), merge, self.progress and told)
            if self.progress is not None:
                self._tell(block.stop)
            yield block, answer

    def _tell(self, done: int) -> None:
        settle(lane.device for lane in self.lanes)  # a GPU has but been asked
        self.progress(done, len(self.queries))

    def _step(self, results: int) -> int:
        """Queries of a block, of which each has so many results."""
        if self.lanes[0].streamed:  # every block reads all codes once more
            return max(_RESULTS // results, 1)
        if self.lanes[0].device.type == "cuda":
            pairs = _GPU_PAIRS if self.progress is None else _TOLD_GPU_PAIRS
            return max(min(pairs // max(self.rows, 1), _RESULTS // results), 1)
        return max(_PAIRS // max(self.rows, 1) // _BLOCK, 1) * _BLOCK

    def _joined(self, blocks: Iterator[tuple[slice, Answer]]) -> Answer:
        """Rows for the queries of each block, where the queries are.

        Memory for all of them is asked for once: joining the blocks at the end would take twice as much.
        """
        total, target, results = len(self.queries), self.queries.device, ()
        for block, answer in blocks:
            if block == slice(0, total):
                return tuple(moved(part, target) for part in answer)
            results = results or [empty_rows((total, *part.shape[1:]), part.dtype, target) for part in answer]
            for result, part in zip(results, answer, strict=True):
                write(result[block], part)
        return tuple(results)
