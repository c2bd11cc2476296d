"""Memory for codes: it grows, can be mapped from a file, and can be divided block-cyclically among devices.

A writer appends to a `RowMemory`, which consists of a `GrowingCodes` for the codes and `GrowingRows` for the ids. A
`GrowingCodes` has one `GrowingRows` per device. Searches read a `ShardedCodes`, a view of the first rows of the codes.
Appending does not change earlier views: it writes after their last row, or to new, larger memory. Only
`ShardedCodes.overwrite` changes rows in place.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import sys
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from hashengine._computed_once import computed_once
from hashengine.errors import invalid
from hashengine.index.devices import CPU, copy_into, to_device

SHARD_BLOCK_ROWS = 1 << 12  # consecutive rows on one device before the next device's turn; a multiple of 8
TRANSFER_BYTES = 1 << 26  # bytes of codes that are copied between two devices at a time

_CACHE_LINE_BYTES = 64

# A mapped file gets address space for MAP_GROWTH_FACTOR times its size, or for its size plus MAP_GROWTH_BYTES,
# whichever is larger. When the rows need more than that, all of them are copied to memory.
MAP_GROWTH_FACTOR = 4
MAP_GROWTH_BYTES = 1 << 26
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
_MAP_FIXED = 0x10
_MAP_FAILED = ctypes.c_void_p(-1).value


@dataclass(frozen=True)
class BlockCyclicShard:
    """The rows of every `count`-th block, from block `index` on. A block has `block` rows; the last may have fewer.

    The rows of a shard are in insertion order. `block` is a multiple of 8, so that a bitmap can be cut between bytes.
    """

    index: int = 0
    count: int = 1
    block: int = 8

    def size(self, rows: int) -> int:
        """How many of the first `rows` rows are in the shard."""
        cycles, rest = divmod(rows, self.count * self.block)
        return cycles * self.block + min(max(rest - self.index * self.block, 0), self.block)

    def global_rows(self, local_rows: Tensor) -> Tensor:
        """The rows, int64, whose positions in the shard are `local_rows`; -1 stays -1."""
        if self.count == 1:
            return local_rows
        rows = local_rows + (local_rows // self.block * (self.count - 1) + self.index) * self.block
        return rows.where(local_rows >= 0, local_rows)

    def slice_of(self, values: Tensor, dim: int = 0, rows_per_value: int = 1) -> Tensor:
        """The values of the shard's rows, out of `values`; a view if these rows are consecutive.

        Args:
            values: values for all rows, in order along `dim`.
            dim: the dimension of the rows.
            rows_per_value: 8 for a bitmap, whose values are bytes.
        """
        if self.count == 1:
            return values
        block, dim = self.block // rows_per_value, dim % values.dim()
        cycles, rest = divmod(values.shape[dim], self.count * block)
        whole = values.narrow(dim, 0, cycles * self.count * block).unflatten(dim, (cycles, self.count, block))
        whole = whole.select(dim + 1, self.index).flatten(dim, dim + 1)
        first = min(self.index * block, rest)
        tail = values.narrow(dim, values.shape[dim] - rest + first, min(rest - first, block))
        return tail if cycles == 0 else whole if tail.shape[dim] == 0 else torch.cat([whole, tail], dim)


def device_shards(count: int) -> tuple[BlockCyclicShard, ...]:
    """One shard for each of `count` devices."""
    return tuple(BlockCyclicShard(index, count, SHARD_BLOCK_ROWS) for index in range(count))


class MappedFile:
    """An open file of which the first bytes are mapped.

    Reading a mapped page after the end of its file ends the process with SIGBUS. Nothing in Python can prevent that
    while codes are read; `check` does before.
    """

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._path, self._size, self._descriptor = file.name, size, os.dup(file.fileno())
        weakref.finalize(self, os.close, self._descriptor)

    def is_at(self, path: Path) -> bool:
        """Whether `path` is still the name of this file."""
        try:
            return os.path.samestat(os.stat(path), os.fstat(self._descriptor))
        except OSError:
            return False

    def check(self, where: str) -> None:
        """Require that the file still has the bytes that are mapped.

        Raises:
            InputError: another program has made the file shorter; the error names `where`.
        """
        size = os.fstat(self._descriptor).st_size
        if size < self._size:
            expected = f"as long as when it was mapped, {self._size} bytes"
            raise invalid(where, f"the file {self._path}", expected, f"{size} bytes", "restore the file")


@dataclass(frozen=True)
class Replacement:
    """New codes for some rows of a shard, on the device of the shard."""

    shard_codes: Tensor  # all codes of the shard
    local_rows: Tensor  # the positions of the rows in the shard
    codes: Tensor  # the new codes of these rows


@dataclass(frozen=True)
class ShardedCodes:
    """Codes uint8 [rows, bits / 8]: all on one device, or one block-cyclic shard on each of several devices.

    The sizes of the shards differ by at most one block, however the codes were added. A search therefore keeps all
    devices busy.
    """

    parts: tuple[Tensor, ...]  # the codes of each shard
    file: MappedFile | None = None  # from which the first codes are mapped

    @computed_once
    def shards(self) -> tuple[BlockCyclicShard, ...]:
        """The shards, in the order of `parts`."""
        return device_shards(len(self.parts))

    @computed_once
    def devices(self) -> tuple[torch.device, ...]:
        """The device of each shard."""
        return tuple(part.device for part in self.parts)

    @property
    def first_device(self) -> torch.device:
        """The device on which a search merges its results."""
        return self.parts[0].device

    @property
    def bytes_per_code(self) -> int:
        """The length of a code in bytes."""
        return self.parts[0].shape[1]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, block: slice) -> np.ndarray:
        """Consecutive rows in host memory; a view if the codes are in host memory and not sharded."""
        return self.host_rows(block).numpy()

    def host_rows(self, block: slice = slice(None)) -> Tensor:
        """Consecutive rows on the CPU; a view if the codes are on the CPU and not sharded."""
        first, last, _ = block.indices(len(self))
        if len(self.parts) == 1:
            return self.parts[0][first:last].cpu()
        return self.gather(torch.arange(first, last, device=CPU))

    def gather(self, rows: Tensor) -> Tensor:
        """The codes of `rows`, int64 [...], as uint8 [..., bits / 8].

        They are on the device that stores the codes, or on the CPU if several devices store them.
        """
        if len(self.parts) == 1:
            return self.parts[0][to_device(rows, self.devices[0])]
        codes = torch.empty((*rows.shape, self.bytes_per_code), dtype=torch.uint8, device=CPU)
        for part, in_part, local_rows in self._local_rows(rows):
            codes[in_part] = part[to_device(local_rows, part.device)].cpu()
        return codes

    def all_rows(self) -> Tensor:
        """All codes, on the device that stores them.

        If several devices store them, the result is on the CPU, because one device may be too small for all codes.
        """
        return self.parts[0] if len(self.parts) == 1 else self.host_rows()

    def blocks(self, rows: Tensor | None = None) -> Iterator[Tensor]:
        """The codes of `rows` (int64 [M] on the CPU; None: all rows), in this order, `TRANSFER_BYTES` at a time."""
        step = rows_per_transfer(self.bytes_per_code)
        for first in range(0, len(self) if rows is None else len(rows), step):
            if rows is not None:
                yield self.gather(rows[first : first + step])
            elif len(self.parts) == 1:
                yield self.parts[0][first : first + step]
            else:
                yield self.host_rows(slice(first, first + step))

    def scatter(self, rows: Tensor, codes: Tensor) -> list[Replacement]:
        """Copy new codes for `rows` (int64 [M] on the CPU) to the devices that store these rows, for `overwrite`."""
        replacements = []
        for part, in_part, local_rows in self._local_rows(rows):
            own_codes = codes[to_device(in_part, codes.device)]
            replacements.append(
                Replacement(part, to_device(local_rows, part.device), to_device(own_codes, part.device))
            )
        return replacements

    @staticmethod
    def overwrite(replacements: Iterable[Replacement]) -> None:
        """Write the codes that `scatter` has copied; nothing is copied between devices."""
        for replacement in replacements:
            replacement.shard_codes[replacement.local_rows] = replacement.codes

    def _local_rows(self, rows: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield each part, a mask that selects the `rows` stored in the part, and their positions in the part."""
        cycle = len(self.parts) * SHARD_BLOCK_ROWS
        for index, part in enumerate(self.parts):
            in_part = rows // SHARD_BLOCK_ROWS % len(self.parts) == index
            own = rows[in_part]
            yield part, in_part, own // cycle * SHARD_BLOCK_ROWS + own % SHARD_BLOCK_ROWS


def rows_per_transfer(bytes_per_code: int) -> int:
    """The number of codes in `TRANSFER_BYTES`, at least 1."""
    return max(1, TRANSFER_BYTES // bytes_per_code)


def allocate_rows(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device = CPU) -> Tensor:
    """Uninitialised memory that starts at a cache line.

    On the CPU, NumPy allocates it, because NumPy asks for huge pages for large memory, and torch by default does not.
    """
    with torch.inference_mode(False):  # an inference tensor could not be updated outside of inference mode
        if device.type != "cpu":
            return torch.empty(shape, dtype=dtype, device=device)
        size = math.prod(shape) * dtype.itemsize
        memory = np.empty(size + _CACHE_LINE_BYTES, np.uint8)
        start = -memory.ctypes.data % _CACHE_LINE_BYTES
        return torch.from_numpy(memory[start : start + size]).view(dtype).view(shape)


class GrowingRows:
    """Memory for rows on one device. It doubles when it is full, so that adding N rows one by one copies O(N) rows.

    The caller keeps the number of rows in use. The memory after these rows is free.
    """

    def __init__(self, memory: Tensor, file: MappedFile | None = None) -> None:
        self._memory = memory
        self.file = file

    def first(self, count: int) -> Tensor:
        """A view of the first `count` rows. On the CPU, its pickle does not contain the free memory."""
        with torch.inference_mode(False):
            rows = self._memory[:count]
            # torch pickles the whole storage of a view. A tensor from a numpy array has a storage of its own rows only.
            return rows if rows.is_cuda else torch.from_numpy(rows.numpy())

    def reserve(self, count: int, needed: int) -> GrowingRows:
        """This memory if it has room for `needed` rows, otherwise new memory with a copy of the first `count` rows."""
        if needed <= len(self._memory):
            return self
        memory = self._allocate(needed, 2 * count)
        memory[:count] = self._memory[:count]
        return GrowingRows(memory)

    def _allocate(self, needed: int, preferred: int) -> Tensor:
        row_shape, dtype, device = self._memory.shape[1:], self._memory.dtype, self._memory.device
        try:
            return allocate_rows((max(needed, preferred), *row_shape), dtype, device)
        except torch.cuda.OutOfMemoryError:  # the GPU has too little memory for twice the rows
            if preferred <= needed:
                raise
            return allocate_rows((needed, *row_shape), dtype, device)

    def append_rows(self, count: int, rows: Tensor) -> GrowingRows:
        """Memory of the first `count` rows followed by `rows`; views of the first `count` stay valid and unchanged.

        The append takes effect when the caller stores the returned memory and the new number of rows.
        """
        grown = self.reserve(count, count + len(rows))
        copy_into(grown._memory[count : count + len(rows)], rows)
        return grown


class GrowingCodes:
    """Memory for codes on one device or, sharded, on several. It grows like `GrowingRows`."""

    def __init__(self, parts: Iterable[GrowingRows]) -> None:
        self._parts = tuple(parts)

    @classmethod
    def from_blocks(
        cls, blocks: Iterable[Tensor], count: int, bytes_per_code: int, devices: tuple[torch.device, ...]
    ) -> GrowingCodes:
        """Allocate memory for exactly `count` codes and fill it block by block.

        Args:
            blocks: uint8 [rows, bytes_per_code] each, `count` rows in total, on any device.
            count: the number of codes.
            bytes_per_code: bits / 8.
            devices: the device of each shard.
        """
        sizes = (shard.size(count) for shard in device_shards(len(devices)))
        memory = [
            allocate_rows((size, bytes_per_code), torch.uint8, device)
            for size, device in zip(sizes, devices, strict=True)
        ]
        codes, first = cls(map(GrowingRows, memory)), 0
        for block in blocks:
            codes = codes.append_rows(first, block)
            first += len(block)
        return codes

    @classmethod
    def from_file(cls, file: Path, count: int, bytes_per_code: int) -> GrowingCodes:
        """Map `count` codes of a file, as `map_rows` does."""
        with open(file, "rb") as opened:
            rows = map_rows(opened, count, bytes_per_code)
            return cls([GrowingRows(rows, MappedFile(opened, count * bytes_per_code))])

    @property
    def is_mapped(self) -> bool:
        """Whether the first codes are mapped from a file."""
        return self._parts[0].file is not None

    def first(self, count: int) -> ShardedCodes:
        """A view of the first `count` codes."""
        shards = zip(self._parts, device_shards(len(self._parts)), strict=True)
        return ShardedCodes(tuple(part.first(shard.size(count)) for part, shard in shards), self._parts[0].file)

    def append_rows(self, count: int, codes: Tensor) -> GrowingCodes:
        """Memory of the first `count` codes followed by `codes`, uint8 [rows, bits / 8] on any device."""
        if len(self._parts) == 1:
            return GrowingCodes([self._parts[0].append_rows(count, codes)])
        shards, total = device_shards(len(self._parts)), count + len(codes)
        parts = [
            part.reserve(shard.size(count), shard.size(total)) for part, shard in zip(self._parts, shards, strict=True)
        ]
        step = rows_per_transfer(codes.shape[1])
        for start in range(0, len(codes), step):
            block, before = codes[start : start + step], count + start
            rows = torch.arange(before, before + len(block), device=codes.device)
            shard_of_row = rows // SHARD_BLOCK_ROWS % len(parts)
            parts = [
                part.append_rows(shard.size(before), block[shard_of_row == shard.index])
                for part, shard in zip(parts, shards, strict=True)
            ]
        return GrowingCodes(parts)


@dataclass(frozen=True)
class RowMemory:
    """The memory to which `add` appends: codes, and ids both on the CPU and on the first device of the codes."""

    codes: GrowingCodes
    ids: GrowingRows  # int64 on the CPU; empty if the id of a code is its row
    device_ids: GrowingRows  # the copy on the first device of the codes; if that is the CPU, `ids` itself

    @classmethod
    def from_ids(
        cls, codes: GrowingCodes, device: torch.device, ids: Tensor | None, device_ids: Tensor | None
    ) -> RowMemory:
        """Memory with these contents. `device` is the first device of the codes; `device_ids` are the ids on it."""
        no_ids = torch.empty(0, dtype=torch.int64, device=CPU)
        host_memory = GrowingRows(no_ids if ids is None else ids)
        if device == CPU:
            return cls(codes, host_memory, host_memory)
        return cls(codes, host_memory, GrowingRows(no_ids.to(device) if device_ids is None else device_ids))

    def append(self, count: int, codes: Tensor, ids: Tensor | None) -> RowMemory:
        """Memory of the first `count` rows followed by new ones; `ids` is None if the id of every code is its row."""
        grown_codes = self.codes.append_rows(count, codes)
        if ids is None:
            return RowMemory(grown_codes, self.ids, self.device_ids)
        grown_ids = self.ids.append_rows(count, ids)
        if self.device_ids is self.ids:
            return RowMemory(grown_codes, grown_ids, grown_ids)
        return RowMemory(grown_codes, grown_ids, self.device_ids.append_rows(count, ids))


def map_rows(file: BinaryIO, count: int, bytes_per_row: int) -> Tensor:
    """Map `count` rows of an open file instead of reading them. Returns uint8 [count or more, bytes_per_row].

    The pages of the file are read when they are used. Writes stay in memory and never reach the file. On Linux, further
    rows follow those of the file; they take memory only when they are written. On other systems, or if there is too
    little address space, there are exactly `count` rows.
    """
    rows = _reserve_address_space(count, bytes_per_row) if sys.platform == "linux" else None
    if rows is None:
        return _ordinary_tensor(np.memmap(file, np.uint8, mode="c", shape=(count, bytes_per_row)))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | _MAP_FIXED
    # This replaces the first pages of `rows`. When `rows` is freed, it unmaps them with its other pages.
    mapped = libc.mmap(rows.ctypes.data, count * bytes_per_row, protection, flags, file.fileno(), 0)
    if mapped == _MAP_FAILED:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), file.name)
    return _ordinary_tensor(rows)


def _ordinary_tensor(rows: np.ndarray) -> Tensor:
    """`rows` as a tensor that may be written outside of inference mode, even if it is made inside."""
    with torch.inference_mode(False):
        return torch.from_numpy(rows)


def _reserve_address_space(count: int, bytes_per_row: int) -> np.ndarray | None:
    """Address space for `count` rows and more, initially zeros; None if the system refuses it."""
    rows = max(MAP_GROWTH_FACTOR * count, count + MAP_GROWTH_BYTES // bytes_per_row)
    try:
        space = mmap.mmap(-1, rows * bytes_per_row, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    except OSError:  # address space is limited, or the system does not overcommit memory
        return None
    return np.frombuffer(space, np.uint8).reshape(rows, bytes_per_row)
