"""How a search runs: the queries are cut into blocks, every device searches its shards, and the answers are merged.

Reading order: `run` cuts the queries into blocks. `_run_block` gives a block to the workers, one per device.
`DeviceWorker.search` calls the op on each of its shards. The request determines the op and how partial answers are
merged. Merging is exact (`hashengine.index.merge`), so the answer depends neither on the shards nor on the devices.

Between two calls of an op, Python handles Ctrl-C, and progress is reported. A small search on the CPU takes none of
these steps: `topk_in_one_call`.
"""

from __future__ import annotations

import abc
import contextlib
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hashengine import _native
from hashengine.index.code_memory import BlockCyclicShard, ShardedCodes, allocate_rows
from hashengine.index.devices import CPU, copy_into, synchronize_streams, to_device
from hashengine.index.merge import Part, merge_counts, merge_range, merge_topk
from hashengine.index.snapshot import Snapshot
from hashengine.ops import hamming_count, hamming_range, hamming_topk

if TYPE_CHECKING:
    from typing_extensions import Self

CPU_PAIRS_PER_BLOCK = 1 << 32  # (query, code) pairs; few enough to handle Ctrl-C and report progress often
QUERIES_PER_KERNEL_BLOCK = 512  # the most queries that a CPU kernel compares in one pass over the codes
GPU_PAIRS_PER_BLOCK = 1 << 40  # (query, code) pairs, if progress is not reported
GPU_PAIRS_PER_REPORT = 1 << 36  # the same if progress is reported; not fewer, because each report waits for the GPU
RESULTS_PER_BLOCK = 1 << 26  # on a GPU, a distance with its id takes 12 bytes, and a count 8 (16 with labels)
STREAM_CHUNK_BYTES = 1 << 28  # a chunk of streamed codes; a GPU holds two chunks, and pinned host memory two more
# A larger search takes milliseconds, or writes its results to huge pages; it is not worth a path of its own.
MAX_PAIRS_IN_ONE_CALL = 1 << 24
MAX_RESULTS_IN_ONE_CALL = 1 << 16
MAX_UNMERGED_PARTS = 8  # partial answers that a worker keeps before it merges them

Progress = Callable[[int, int], None]  # called with (queries done, queries)


@dataclass(frozen=True)
class Request(abc.ABC):
    """A search of some queries over the rows of a snapshot; one subclass per kind of search."""

    snapshot: Snapshot
    queries: Tensor  # uint8 [Q, bits / 8], on any device; the results are returned on the same device
    row_filter: Tensor | None  # the bitmap of rows that may be returned, on any device
    num_threads: int  # 0 means all of torch's threads

    @property
    def bits(self) -> int:
        """The length of a code."""
        return 8 * self.queries.shape[1]

    @property
    def rows(self) -> int:
        """The number of rows, live or not."""
        return len(self.snapshot.codes)

    @property
    @abc.abstractmethod
    def results_per_query(self) -> int:
        """The number of results per query for which the device needs memory, at least 1."""

    def of_queries(self, block: slice) -> Self:
        """The same request for some of the queries."""
        row_filter = self.row_filter
        if row_filter is not None and row_filter.dim() == 2:
            row_filter = row_filter[block]
        return replace(self, queries=self.queries[block], row_filter=row_filter)

    @abc.abstractmethod
    def search_shard(self, shard: BlockCyclicShard, codes: Tensor) -> Part:
        """Search the codes of one shard, on their device."""

    @abc.abstractmethod
    def merge(self, parts: Sequence[Part]) -> Part:
        """Merge partial answers of several shards, all on one device."""

    @abc.abstractmethod
    def with_ids(self, answer: Part) -> Part:
        """Replace the rows in an answer by ids."""

    @abc.abstractmethod
    def collect(self, answers: Iterator[tuple[slice, Part]]) -> Part:
        """Join the answers of the blocks of queries, on the device of the queries."""

    def _operands(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        return to_device(self.queries, codes.device), codes

    def _options(self, shard: BlockCyclicShard, codes: Tensor) -> dict[str, Any]:
        row_filter = self.row_filter
        if row_filter is not None:
            row_filter = to_device(shard.slice_of(row_filter, dim=-1, rows_per_value=8), codes.device)
        return {"filter": row_filter, "num_threads": self.num_threads}


@dataclass(frozen=True)
class TopKRequest(Request):
    """The request of `HammingIndex.search`. Its answer: distances int32 [Q, k] and ids int64 [Q, k]."""

    k: int

    @property
    def results_per_query(self) -> int:
        """The `k` of the request."""
        return self.k

    def search_shard(self, shard: BlockCyclicShard, codes: Tensor) -> Part:
        """The k nearest rows of the shard, or all of them if there are fewer."""
        k = min(self.k, len(codes))
        distances, local_rows = hamming_topk(*self._operands(codes), k, **self._options(shard, codes))
        return distances, shard.global_rows(local_rows)

    def merge(self, parts: Sequence[Part]) -> Part:
        """The k nearest of all parts."""
        return merge_topk(parts, self.k, rows=self.rows, bits=self.bits)

    def with_ids(self, answer: Part) -> Part:
        """Distances and ids."""
        distances, rows = answer
        return distances, self.snapshot.ids_of(rows)

    def collect(self, answers: Iterator[tuple[slice, Part]]) -> Part:
        """One result row per query."""
        return _collect_rows(self.queries, answers)


@dataclass(frozen=True)
class RangeRequest(Request):
    """The request of `HammingIndex.range_search`. Its answer: lims int64 [Q + 1], distances int32 and ids int64 [R]."""

    radius: int
    max_results: int | None

    @property
    def results_per_query(self) -> int:
        """`max_results`, or 1 if there is no limit, because the number is then unknown before the search."""
        return self.max_results or 1

    def search_shard(self, shard: BlockCyclicShard, codes: Tensor) -> Part:
        """The rows of the shard within the radius."""
        lims, distances, local_rows = hamming_range(
            *self._operands(codes), self.radius, max_results=self.max_results, **self._options(shard, codes)
        )
        return lims, distances, shard.global_rows(local_rows)

    def merge(self, parts: Sequence[Part]) -> Part:
        """The results of all parts, at most `max_results` per query."""
        return merge_range(parts, self.max_results, rows=self.rows)

    def with_ids(self, answer: Part) -> Part:
        """Lims, distances and ids."""
        lims, distances, rows = answer
        return lims, distances, self.snapshot.ids_of(rows)

    def collect(self, answers: Iterator[tuple[slice, Part]]) -> Part:
        """The concatenated results of all blocks, and their lims."""
        device = self.queries.device
        found = [(lims, to_device(near, device), to_device(ids, device)) for _, (lims, near, ids) in answers]
        lims, distances, ids = zip(*found, strict=True)
        if len(found) == 1:
            return to_device(lims[0], device), distances[0], ids[0]
        counts = torch.cat([lims[0][:1], *(block_lims.diff() for block_lims in lims)])
        return to_device(counts.cumsum(0), device), torch.cat(distances), torch.cat(ids)


@dataclass(frozen=True)
class CountRequest(Request):
    """The request of `HammingIndex.count`. Its answer: counts of codes and of relevant codes, int64 [Q, bits + 1] each.

    Without labels, the counts of relevant codes are [Q, 0].
    """

    labels: tuple[Tensor, Tensor] | None  # labels of the queries and of all rows, on any devices

    @property
    def results_per_query(self) -> int:
        """The number of possible distances, 0 to bits."""
        return self.bits + 1

    def of_queries(self, block: slice) -> Self:
        """The same request for some of the queries and their labels."""
        request = super().of_queries(block)
        return request if self.labels is None else replace(request, labels=(self.labels[0][block], self.labels[1]))

    def search_shard(self, shard: BlockCyclicShard, codes: Tensor) -> Part:
        """The counts of the shard."""
        options = self._options(shard, codes)
        if self.labels is not None:
            query_labels, row_labels = self.labels
            options["labels"] = (
                to_device(query_labels, codes.device),
                to_device(shard.slice_of(row_labels), codes.device),
            )
        return hamming_count(*self._operands(codes), **options)

    def merge(self, parts: Sequence[Part]) -> Part:
        """The sum of all parts."""
        return merge_counts(parts)

    def with_ids(self, answer: Part) -> Part:
        """The counts, which contain no rows."""
        return answer

    def collect(self, answers: Iterator[tuple[slice, Part]]) -> Part:
        """One result row per query."""
        return _collect_rows(self.queries, answers)


def _collect_rows(queries: Tensor, answers: Iterator[tuple[slice, Part]]) -> Part:
    """Join answers with one row per query.

    The memory of all rows is allocated once and filled block by block, because concatenation would take twice as much.
    """
    total, device = len(queries), queries.device
    results: Part = ()
    for block, answer in answers:
        if block == slice(0, total):
            return tuple(to_device(tensor, device) for tensor in answer)
        results = results or tuple(allocate_rows((total, *tensor.shape[1:]), tensor.dtype, device) for tensor in answer)
        for result, tensor in zip(results, answer, strict=True):
            copy_into(result[block], tensor)
    return results


def topk_in_one_call(
    snapshot: Snapshot, queries: np.ndarray, k: int, num_threads: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """The k nearest codes of each query by one call of the native module, without torch's dispatcher.

    The other path makes tensors, a request and workers, and dispatches the op. For a single query and few codes, that
    takes longer than the search itself.

    Args:
        snapshot: its codes must be in host memory.
        queries: uint8 [Q, bits / 8].
        k: the number of nearest codes.
        num_threads: the largest number of torch's threads to use; 0 for all.

    Returns:
        Distances int32 [Q, k] and ids int64 [Q, k]; None if the search is large, an argument is wrong, or the native
        module is not in use.
    """
    native = _native.module()
    if native is None or queries.ndim != 2 or not 0 < k <= snapshot.count:
        return None
    if len(queries) * snapshot.count > MAX_PAIRS_IN_ONE_CALL or len(queries) * k > MAX_RESULTS_IN_ONE_CALL:
        return None
    answer: tuple[np.ndarray, np.ndarray] | None
    answer = native.hamming_topk(queries, snapshot.host_codes, k, snapshot.live, num_threads)
    if answer is None or snapshot.ids is None:
        return answer
    distances, rows = answer
    return distances, snapshot.ids.numpy()[rows]


def run(request: Request, workers: list[DeviceWorker], progress: Progress | None) -> Part:
    """Answer a request. The answer contains ids instead of rows, and is on the device of the queries."""
    return request.collect(_run_blocks(request, workers, progress))


def _run_blocks(
    request: Request, workers: list[DeviceWorker], progress: Progress | None
) -> Iterator[tuple[slice, Part]]:
    """The answer of each block of queries, on the first worker's device. Without queries, there is one empty block."""
    total = len(request.queries)
    step = _queries_per_block(request, workers, progress is not None)
    for start in range(0, max(total, 1), step):
        block = slice(start, min(start + step, total))
        block_request = request if step >= total else request.of_queries(block)
        report = None
        if progress is not None:
            report = BlockReport(progress, block, total, tuple(worker.device for worker in workers))
        answer = _run_block(block_request, workers, report)
        if report is not None:
            report.block_done()
        yield block, request.with_ids(answer)


def _queries_per_block(request: Request, workers: list[DeviceWorker], reports_progress: bool) -> int:
    if workers[0].streamed:  # large blocks, because each block copies all codes again
        return max(RESULTS_PER_BLOCK // request.results_per_query, 1)
    if workers[0].device.type == "cuda":
        pairs = GPU_PAIRS_PER_REPORT if reports_progress else GPU_PAIRS_PER_BLOCK
        return max(min(pairs // max(request.rows, 1), RESULTS_PER_BLOCK // request.results_per_query), 1)
    kernel_blocks = CPU_PAIRS_PER_BLOCK // max(request.rows, 1) // QUERIES_PER_KERNEL_BLOCK
    return max(kernel_blocks, 1) * QUERIES_PER_KERNEL_BLOCK


@dataclass(frozen=True)
class BlockReport:
    """Reports the progress of one block of queries."""

    progress: Progress
    block: slice
    total: int  # queries of all blocks
    devices: tuple[torch.device, ...]

    def shard_done(self, done: int, shards: int) -> None:
        """Report a share of the block's queries as done: the share of the first worker's shards that are searched.

        The last shard is not reported: other workers may still be searching, and `block_done` follows.
        """
        if done < shards:
            self._report(self.block.start + (self.block.stop - self.block.start) * done // shards)

    def block_done(self) -> None:
        """Report all queries of the block."""
        self._report(self.block.stop)

    def _report(self, done: int) -> None:
        synchronize_streams(self.devices)  # the kernels may still be running
        self.progress(done, self.total)


def _run_block(request: Request, workers: list[DeviceWorker], report: BlockReport | None) -> Part:
    """Search all shards and merge the answers, on the first worker's device.

    The first worker runs in this thread. The others run in threads of their own, because a search may wait for its
    device. Each thread uses the caller's current stream on every device, so its work is ordered after the caller's.
    """
    first = workers[0]
    if len(workers) == 1 and not first.streamed:  # a single shard: nothing to merge
        return request.search_shard(first.shards[0], first.codes)
    stop = threading.Event()
    if len(workers) == 1:
        return first.search(request, stop, report)
    streams = _current_streams(workers)
    with ThreadPoolExecutor(len(workers) - 1) as threads:
        try:
            others = [threads.submit(worker.search_on_streams, request, stop, streams) for worker in workers[1:]]
            parts = [first.search(request, stop, report)]
            parts += [other.result() for other in others]
        except BaseException:
            stop.set()  # each of the others ends after its current shard
            raise
    return request.merge([tuple(to_device(tensor, first.device) for tensor in part) for part in parts])


def _current_streams(workers: list[DeviceWorker]) -> list[torch.cuda.Stream]:
    if all(worker.device.type == "cpu" for worker in workers):
        return []
    return [torch.cuda.current_stream(number) for number in range(torch.cuda.device_count())]


@dataclass(frozen=True)
class DeviceWorker:
    """One device and the shards that it searches, one after the other."""

    device: torch.device
    shards: tuple[BlockCyclicShard, ...]
    codes: Tensor  # not streamed: those of its only shard, on the device; streamed: all codes, in host memory
    streamed: bool

    def search(self, request: Request, stop: threading.Event, report: BlockReport | None = None) -> Part:
        """Search the shards until `stop` is set, and merge their answers."""
        parts: list[Part] = []
        with contextlib.closing(self._shard_codes()) as shard_codes:
            for number, (shard, codes) in enumerate(shard_codes, start=1):
                parts.append(request.search_shard(shard, codes))
                if len(parts) == MAX_UNMERGED_PARTS:
                    parts = [request.merge(parts)]
                if stop.is_set():
                    break
                if report is not None:
                    report.shard_done(number, len(self.shards))
        return parts[0] if len(parts) == 1 else request.merge(parts)

    def search_on_streams(self, request: Request, stop: threading.Event, streams: Iterable[torch.cuda.Stream]) -> Part:
        """`search` in another thread, on the caller's streams."""
        with contextlib.ExitStack() as stack:
            for stream in streams:
                stack.enter_context(torch.cuda.stream(stream))
            return self.search(request, stop)

    def _shard_codes(self) -> Generator[tuple[BlockCyclicShard, Tensor], None, None]:
        """Each shard with its codes, on the device."""
        if not self.streamed:
            yield self.shards[0], self.codes
        elif self.device.type == "cuda":
            yield from StagedChunks(self.codes, self.shards, self.device)
        else:
            for shard in self.shards:
                yield shard, shard.slice_of(self.codes)


def assign_workers(codes: ShardedCodes, devices: tuple[torch.device, ...], streamed: bool) -> list[DeviceWorker]:
    """A worker for each device that has codes to search; at least one, even if there are no codes.

    Streamed codes are in host memory. They are cut into chunks, which the devices take in turn.
    """
    if not streamed:
        shards = zip(codes.devices, codes.shards, codes.parts, strict=True)
        workers = [DeviceWorker(device, (shard,), part, False) for device, shard, part in shards]
        return [worker for worker in workers if len(worker.codes)] or workers[:1]
    chunk_rows = max(STREAM_CHUNK_BYTES // codes.bytes_per_code // 8, 1) * 8
    count = max(-(-len(codes) // chunk_rows), 1)
    chunks = tuple(BlockCyclicShard(index, count, chunk_rows) for index in range(count))
    turns = [chunks[index :: len(devices)] for index in range(len(devices))]
    return [DeviceWorker(device, own, codes.parts[0], True) for device, own in zip(devices, turns, strict=True) if own]


class StagingSlot:
    """Room for a chunk in pinned host memory and on a GPU, and the events of the last copy and the last search."""

    def __init__(self, shape: tuple[int, int], device: torch.device) -> None:
        self.pinned = torch.empty(shape, dtype=torch.uint8, device=CPU, pin_memory=True)
        self.codes = torch.empty(shape, dtype=torch.uint8, device=device)
        self.copied, self.searched = torch.cuda.Event(), torch.cuda.Event()


class StagedChunks:
    """Copies chunks of codes to a GPU: while one chunk is searched, the next is copied through pinned host memory."""

    def __init__(self, codes: Tensor, shards: Sequence[BlockCyclicShard], device: torch.device) -> None:
        self._codes, self._shards = codes, shards
        self._search_stream, self._copy_stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)
        shape = (min(shards[0].block, len(codes)), codes.shape[1])
        self._slots = [StagingSlot(shape, device) for _ in range(min(2, len(shards)))]
        self._copy_stream.wait_stream(self._search_stream)  # earlier work may still use memory that is now a slot

    def __iter__(self) -> Iterator[tuple[BlockCyclicShard, Tensor]]:
        try:
            next_chunk = self._copy(0)
            for number, shard in enumerate(self._shards):
                chunk, slot = next_chunk, self._slots[number % 2]
                if number + 1 < len(self._shards):
                    next_chunk = self._copy(number + 1)
                self._search_stream.wait_event(slot.copied)
                yield shard, chunk
                slot.searched.record(self._search_stream)
        finally:
            # The copy of an interrupted search must end before the allocator reuses the slot.
            self._search_stream.wait_stream(self._copy_stream)

    def _copy(self, number: int) -> Tensor:
        """Start the copy of a chunk to its slot. The copy waits for the last search of the slot. Returns the copy."""
        slot, chunk = self._slots[number % 2], self._shards[number].slice_of(self._codes)
        slot.copied.synchronize()  # before that, the last copy may still be reading the pinned memory
        pinned, target = slot.pinned[: len(chunk)], slot.codes[: len(chunk)]
        pinned.copy_(chunk)
        with torch.cuda.stream(self._copy_stream):
            self._copy_stream.wait_event(slot.searched)
            target.copy_(pinned, non_blocking=True)
            slot.copied.record(self._copy_stream)
        return target
