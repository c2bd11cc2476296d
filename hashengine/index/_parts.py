"""Searches of codes in parts: on several devices at once, or out of host memory through devices that hold a chunk each.

A part is a share of the rows that one call of an op searches. What the calls answer is merged exactly: what order the
parts came in, and what device answered, cannot be told from the result. Codes in one part are not merged at all.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from hashengine.index._codes import Codes, Share
from hashengine.index._devices import moved

_CHUNK_BYTES = 1 << 28  # of a chunk of streamed codes; two of them lie on each device, and two in pinned memory
_PENDING = 8  # answers that wait to be merged: fewer merges for more memory

Answer = tuple[Tensor, ...]
Ask = Callable[[Share, Tensor], Answer]  # the share and its codes, on the device that shall search them
Merge = Callable[[list[Answer]], Answer]
Told = Callable[[int, int], None]  # parts done, of so many


@dataclass(frozen=True)
class Lane:
    """The parts that one device searches, one after the other."""

    device: torch.device
    shares: tuple[Share, ...]
    codes: Tensor  # of its one share, on the device; or all codes, in host memory
    streamed: bool

    def parts(self) -> Iterator[tuple[Share, Tensor]]:
        if not self.streamed:
            yield self.shares[0], self.codes
        elif self.device.type == "cuda":
            yield from _staged(self.codes, self.shares, self.device)
        else:
            yield from ((share, share.cut(self.codes)) for share in self.shares)


def lanes(codes: Codes, devices: tuple[torch.device, ...], streamed: bool) -> list[Lane]:
    """At least one, also of no codes; none of several is without."""
    if not streamed:
        dealt = zip(codes.devices, codes.shares, codes.parts, strict=True)
        every = [Lane(device, (share,), part, False) for device, share, part in dealt]
        return [lane for lane in every if len(lane.codes)] or every[:1]
    run = max(_CHUNK_BYTES // codes.width // 8, 1) * 8
    count = max(-(-len(codes) // run), 1)
    chunks = tuple(Share(place, count, run) for place in range(count))
    dealt = [chunks[place :: len(devices)] for place in range(len(devices))]
    return [Lane(device, own, codes.parts[0], True) for device, own in zip(devices, dealt, strict=True) if own]


def _staged(codes: Tensor, shares: tuple[Share, ...], device: torch.device) -> Iterator[tuple[Share, Tensor]]:
    """Chunks of host memory on a GPU: while one is searched, the next is copied, by way of pinned memory."""
    searches, copies = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    shape = (min(shares[0].run, len(codes)), codes.shape[1])
    slots = [_Slot(shape, device) for _ in range(min(2, len(shares)))]
    copies.wait_stream(searches)  # whatever was in the slots' memory before may still be in use there

    def copy(number: int) -> Tensor:
        slot, chunk = slots[number % 2], shares[number].cut(codes)
        slot.copied.synchronize()  # of the chunk before: the pinned memory is free
        staging, target = slot.staging[: len(chunk)], slot.codes[: len(chunk)]
        staging.copy_(chunk)
        with torch.cuda.stream(copies):
            copies.wait_event(slot.searched)
            target.copy_(staging, non_blocking=True)
            slot.copied.record(copies)
        return target

    try:
        coming = copy(0)
        for number, share in enumerate(shares):
            chunk, slot = coming, slots[number % 2]
            if number + 1 < len(shares):
                coming = copy(number + 1)
            searches.wait_event(slot.copied)
            yield share, chunk
            slot.searched.record(searches)
    finally:
        searches.wait_stream(copies)  # an interrupted search's copy ends before its memory is given to another


class _Slot:
    """Room for a chunk in pinned memory and on a GPU."""

    def __init__(self, shape: tuple[int, int], device: torch.device):
        self.staging = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        self.codes = torch.empty(shape, dtype=torch.uint8, device=device)
        self.copied, self.searched = torch.cuda.Event(), torch.cuda.Event()


def answered(lanes: list[Lane], ask: Ask, merge: Merge, told: Told | None) -> Answer:
    """What all parts answer, merged on the first lane's device.

    The other lanes run in threads of their own, since a search may wait for its device. Each thread uses the streams
    that the caller's uses on all devices, since what it reads may come from any: the caller's order of things holds.
    """
    if len(lanes) == 1 and not lanes[0].streamed:  # one part: the call and no more, for single queries
        return ask(lanes[0].shares[0], lanes[0].codes)
    stopped = threading.Event()

    def work(lane: Lane, told: Told | None = None) -> list[Answer]:
        answers = []
        with contextlib.closing(lane.parts()) as parts:
            for number, (share, codes) in enumerate(parts, start=1):
                answers.append(ask(share, codes))
                if len(answers) == _PENDING:
                    answers = [merge(answers)]
                if stopped.is_set():
                    break
                if told is not None:
                    told(number, len(lane.shares))
        return answers if len(answers) == 1 else [merge(answers)]

    def work_beside(lane: Lane, streams: list[torch.cuda.Stream]) -> list[Answer]:
        with contextlib.ExitStack() as stack:
            for stream in streams:
                stack.enter_context(torch.cuda.stream(stream))
            return work(lane)

    if len(lanes) == 1:
        return work(lanes[0], told)[0]
    with ThreadPoolExecutor(len(lanes) - 1) as threads:
        try:
            others = [threads.submit(work_beside, lane, _streams(lanes)) for lane in lanes[1:]]
            answers = work(lanes[0], told)
            for other in others:
                answers += other.result()
        except BaseException:
            stopped.set()  # the others end with the part that they are at
            raise
    return merge([tuple(moved(tensor, lanes[0].device) for tensor in answer) for answer in answers])


def _streams(lanes: list[Lane]) -> list[torch.cuda.Stream]:
    if all(lane.device.type == "cpu" for lane in lanes):
        return []
    return [torch.cuda.current_stream(number) for number in range(torch.cuda.device_count())]


def merged_topk(answers: list[Answer], k: int, rows: int, bits: int) -> Answer:
    """Of each part's nearest (distances int32 [Q, k'], rows int64 [Q, k']) the k nearest; fewer where there are fewer.

    What is absent has distance bits + 1 and row -1.
    """
    keys = [distances.long() * rows + found.clamp(min=0) for distances, found in answers]
    nearest = torch.cat(keys, dim=1).sort(dim=1).values[:, :k]
    distances = nearest.div(rows, rounding_mode="floor")
    return distances.int(), (nearest - distances * rows).masked_fill_(distances > bits, -1)


def merged_range(answers: list[Answer], max_results: int | None, rows: int) -> Answer:
    """Of each part's lims int64 [Q + 1], distances int32 and rows int64, those of all, by (distance, row)."""
    query = torch.cat([_queries_of(lims, len(found)) for lims, _, found in answers])
    every_lims, every_distances, every_found = zip(*answers, strict=True)
    lims, distances, found = sum(every_lims), torch.cat(every_distances), torch.cat(every_found)
    order = (distances.long() * rows + found).argsort()
    order = order[query[order].argsort(stable=True)]
    if max_results is not None:
        order = order[torch.arange(len(order), device=order.device) - lims[query[order]] < max_results]
        lims = torch.cat([lims[:1], lims.diff().clamp(max=max_results).cumsum(0)])
    return lims, distances[order], found[order]


def _queries_of(lims: Tensor, count: int) -> Tensor:
    queries = torch.arange(len(lims) - 1, device=lims.device)
    return queries.repeat_interleave(lims.diff(), output_size=count)


def merged_count(answers: list[Answer]) -> Answer:
    """The sums of each part's counts."""
    return tuple(torch.stack(counts).sum(0) for counts in zip(*answers, strict=True))
