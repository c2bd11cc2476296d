"""The codes of an index, on one device or dealt over several."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hashengine.index._devices import moved
from hashengine.index._rows import GrowingRows, empty_rows

_RUN = 1 << 12  # consecutive rows that one device gets before the next one's turn comes; a multiple of 8
_BLOCK_BYTES = 1 << 26  # of the codes that are underway from a device to another at once


@dataclass(frozen=True)
class Share:
    """Every ``of``-th run of ``run`` consecutive rows, beginning with run ``place``; the last run may be shorter.

    A share's rows are in insertion order. ``run`` is a multiple of 8, so that bitmaps are cut between bytes.
    """

    place: int = 0
    of: int = 1
    run: int = 8

    def count(self, rows: int) -> int:
        """How many of the first ``rows`` rows are in the share."""
        turns, rest = divmod(rows, self.of * self.run)
        return turns * self.run + min(max(rest - self.place * self.run, 0), self.run)

    def rows(self, own: Tensor) -> Tensor:
        """The rows, int64, of places in the share; -1 of -1."""
        if self.of == 1:
            return own
        rows = own + (own // self.run * (self.of - 1) + self.place) * self.run
        return rows.where(own >= 0, own)

    def cut(self, values: Tensor, dim: int = 0, rows_each: int = 1) -> Tensor:
        """Of values for all rows, in order along ``dim``, those of the share; a view where they are consecutive.

        Args:
            rows_each: 8 for a bitmap, whose values are bytes.
        """
        if self.of == 1:
            return values
        run, dim = self.run // rows_each, dim % values.dim()
        turns, rest = divmod(values.shape[dim], self.of * run)
        whole = values.narrow(dim, 0, turns * self.of * run).unflatten(dim, (turns, self.of, run))
        whole = whole.select(dim + 1, self.place).flatten(dim, dim + 1)
        first = min(self.place * run, rest)
        tail = values.narrow(dim, values.shape[dim] - rest + first, min(rest - first, run))
        return tail if turns == 0 else whole if tail.shape[dim] == 0 else torch.cat([whole, tail], dim)


def shares(count: int) -> tuple[Share, ...]:
    return tuple(Share(place, count, _RUN) for place in range(count))


@dataclass(frozen=True)
class Codes:
    """uint8 [rows, bits / 8]. Each device has its share, however the codes came: a search keeps all of them busy."""

    parts: tuple[Tensor, ...]  # a share each; the memory's devices, and so the shares, stay as they are

    @cached_property
    def shares(self) -> tuple[Share, ...]:
        return shares(len(self.parts))

    @cached_property
    def devices(self) -> tuple[torch.device, ...]:
        return tuple(part.device for part in self.parts)

    @property
    def home(self) -> torch.device:
        return self.parts[0].device

    @property
    def width(self) -> int:
        return self.parts[0].shape[1]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, block: slice) -> Tensor:
        """Consecutive rows, on the CPU."""
        first, last, _ = block.indices(len(self))
        if len(self.parts) == 1:
            return self.parts[0][first:last].cpu()
        return self.take(torch.arange(first, last))

    def take(self, rows: Tensor) -> Tensor:
        """The codes of rows int64 [...]: uint8 [..., bits / 8], on the device; on the CPU where there are several."""
        if len(self.parts) == 1:
            return self.parts[0][moved(rows, self.devices[0])]
        codes = torch.empty((*rows.shape, self.width), dtype=torch.uint8)
        for part, mine, own in self._places(rows):
            codes[mine] = part[moved(own, part.device)].cpu()
        return codes

    def dealt(self, rows: Tensor, codes: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """For :meth:`put`, what shall overwrite the codes of rows int64 [M] on the CPU, where it will be needed."""
        return [
            (part, moved(own, part.device), moved(codes[moved(mine, codes.device)], part.device))
            for part, mine, own in self._places(rows)
        ]

    @staticmethod
    def put(replacement: list[tuple[Tensor, Tensor, Tensor]]) -> None:
        for part, own, codes in replacement:
            part[own] = codes

    def _places(self, rows: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """For each part, which of the ``rows`` are in it, a mask, and their places there."""
        turn = len(self.parts) * _RUN
        for place, part in enumerate(self.parts):
            mine = rows // _RUN % len(self.parts) == place
            own = rows[mine]
            yield part, mine, own // turn * _RUN + own % _RUN

    def whole(self) -> Tensor:
        """All codes, on the device, or on the CPU where there are several: one alone may not hold them."""
        return self.parts[0] if len(self.parts) == 1 else self[:]

    def blocks(self, rows: Tensor | None = None) -> Iterator[Tensor]:
        """The codes of ``rows``, int64 [M] on the CPU, or all of them, in order, a part at a time."""
        step = block_rows(self.width)
        for first in range(0, len(self) if rows is None else len(rows), step):
            if rows is not None:
                yield self.take(rows[first : first + step])
            else:
                yield self.parts[0][first : first + step] if len(self.parts) == 1 else self[first : first + step]


def block_rows(width: int) -> int:
    return max(1, _BLOCK_BYTES // width)


class GrowingCodes:
    """Memory for codes on one device or several, which grows as :class:`GrowingRows` do."""

    def __init__(self, parts: Iterable[GrowingRows]):
        self._parts = tuple(parts)

    @classmethod
    def of(cls, blocks: Iterable[Tensor], count: int, width: int, devices: tuple[torch.device, ...]) -> GrowingCodes:
        """``count`` codes, uint8 [count, width], which come in blocks and are never all elsewhere at once."""
        own = (share.count(count) for share in shares(len(devices)))
        memory = [empty_rows((n, width), torch.uint8, device) for n, device in zip(own, devices, strict=True)]
        codes, first = cls(map(GrowingRows, memory)), 0
        for block in blocks:
            codes = codes.extended(first, block)
            first += len(block)
        return codes

    def first(self, count: int) -> Codes:
        dealt = zip(self._parts, shares(len(self._parts)), strict=True)
        return Codes(tuple(part.first(share.count(count)) for part, share in dealt))

    def extended(self, count: int, codes: Tensor) -> GrowingCodes:
        """The first ``count`` codes with ``codes`` behind them."""
        if len(self._parts) == 1:
            return GrowingCodes([self._parts[0].extended(count, codes)])
        dealt, last = shares(len(self._parts)), count + len(codes)
        parts = [part.with_room(s.count(count), s.count(last)) for part, s in zip(self._parts, dealt, strict=True)]
        step = block_rows(codes.shape[1])
        for first in range(0, len(codes), step):
            block, before = codes[first : first + step], count + first
            turns = torch.arange(before, before + len(block), device=codes.device) // _RUN % len(parts)
            parts = [p.extended(s.count(before), block[turns == s.place]) for p, s in zip(parts, dealt, strict=True)]
        return GrowingCodes(parts)
