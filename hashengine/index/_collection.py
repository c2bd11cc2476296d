"""What an index holds: codes and their ids, on one device or several, and in a folder."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hashengine.index import storage
from hashengine.index._arguments import Array, checked_bits, checked_codes, checked_ids, like
from hashengine.index._codes import Codes, GrowingCodes
from hashengine.index._devices import CPU, Devices, checked_devices, keep, memory_for, settle, stop
from hashengine.index._lock import ReadersWriterLock
from hashengine.index._rows import GrowingRows
from hashengine.index._state import State

if TYPE_CHECKING:
    from typing_extensions import Self


class CodeCollection:
    """Packed codes with ids, which come, change and go; :class:`~hashengine.HammingIndex` searches them."""

    def __init__(self, bits: int, device: Devices = "cpu", streamed: bool = False):
        self.bits = checked_bits(bits)
        self._devices = checked_devices(device)
        self._streamed = bool(streamed)
        self._saved: storage.Saved | None = None
        self._writer = threading.Lock()  # add, remove, update, compact and save, one at a time
        self._rows_lock = ReadersWriterLock()  # a search reads the rows that an update overwrites
        codes = GrowingCodes.of([], 0, bits // 8, self._memory)
        self._adopt(State(codes.first(0)), codes)

    @property
    def _memory(self) -> tuple[torch.device, ...]:
        """Where the codes lie."""
        return (CPU,) if self._streamed else self._devices

    def _adopt(self, state: State, codes: GrowingCodes) -> None:
        """Publish a state whose codes are the first in ``codes``, and whose ids lie in memory of their own."""
        ids = GrowingRows(torch.empty(0, dtype=torch.int64) if state.ids is None else state.ids)
        home_ids = ids
        if state.codes.home != CPU:
            nothing = torch.empty(0, dtype=torch.int64, device=state.codes.home)
            home_ids = GrowingRows(nothing if state.home_ids is None else state.home_ids)
        self._publish(state, codes, ids, home_ids)

    def _publish(self, state: State, codes: GrowingCodes, ids: GrowingRows, home_ids: GrowingRows) -> None:
        _ = state.home_live  # a search must not wait for it
        settle(self._memory)  # searches may use other streams
        self._codes, self._ids, self._home_ids = codes, ids, home_ids
        self._state = state

    def _gpu_memory(self, op: str, needed: int) -> AbstractContextManager:
        return memory_for(op, self._devices, needed, self._streamed)

    def __len__(self) -> int:
        return self._state.count

    def __getstate__(self) -> tuple:
        """Without the locks, which are neither copied nor pickled, and with the codes on the CPU."""
        with self._rows_lock.reading():
            state, saved = self._state, self._saved
            state = replace(state, codes=Codes((state.codes[:],)), home_ids=None)
        return self.bits, self.device, self._streamed, state, saved

    def __setstate__(self, contents: tuple) -> None:
        bits, device, streamed, state, saved = contents
        self.__init__(bits, device, streamed)
        if self._memory == (CPU,):
            codes = GrowingCodes(map(GrowingRows, state.codes.parts))
            self._adopt(self._moved(state, codes), codes)
        else:
            self._take(state, state.codes.blocks())
        self._saved = saved

    def __repr__(self) -> str:
        devices = "" if self._devices == (CPU,) else f", device={', '.join(map(str, self._devices))}"
        return f"{type(self).__name__}(bits={self.bits}, codes={len(self)}{devices}{', streamed' * self._streamed})"

    @property
    def device(self) -> torch.device | tuple[torch.device, ...]:
        """The device, or the devices where there are several, that searches the codes."""
        return self._devices[0] if len(self._devices) == 1 else self._devices

    @property
    def streamed(self) -> bool:
        """Whether the codes stay in host memory and pass through the devices in each search."""
        return self._streamed

    def to(self, device: Devices | None = None, *, streamed: bool | None = None) -> Self:
        """The same index elsewhere: itself where nothing changes, else a copy, which no longer follows this one.

        Args:
            device, streamed: as for the constructor. Default: as they are here.

        Raises:
            TypeError, InputError: no such device.
            torch.cuda.OutOfMemoryError: a GPU is full.
        """
        devices = self._devices if device is None else checked_devices(device)
        streamed = self._streamed if streamed is None else bool(streamed)
        if (devices, streamed) == (self._devices, self._streamed):
            return self
        index = type(self)(self.bits, devices, streamed)
        with self._writer:
            index._take(self._state, self._state.codes.blocks(), "to")
            index._saved = self._saved
        return index

    def _take(self, state: State, blocks: Iterable[Tensor], op: str = "load") -> None:
        """Publish a state with a copy of its codes, which come in blocks."""
        count = len(state.codes)
        with self._gpu_memory(op, count * self.bits // 8 // len(self._memory)):
            codes = GrowingCodes.of(blocks, count, self.bits // 8, self._memory)
            self._adopt(self._moved(state, codes), codes)

    @staticmethod
    def _moved(state: State, codes: GrowingCodes) -> State:
        return State.of(codes.first(len(state.codes)), state.ids, state.live, state.next_id)

    @property
    def codes(self) -> Tensor:
        """The codes in insertion order, uint8 [N, bits / 8]; not to be written to, it may be a view.

        On the device where they lie: the CPU if they are streamed, and if they lie on several.
        """
        return self._state.live_codes()

    def ids(self) -> Tensor:
        """The ids in insertion order, int64 [N], on the CPU."""
        return self._state.live_ids()

    def add(self, codes: Array, ids: Array | None = None) -> None:
        """Append codes; either all of them are added with ids or none.

        Args:
            codes: uint8 [N, bits / 8], torch on any device or numpy; copied.
            ids: int64 [N], not negative, unique in the index; the id of a removed code is free again.

        Raises:
            TypeError: a wrong dtype.
            InputError: a wrong shape, ids that are negative or taken, or ids for some codes only.
            torch.cuda.OutOfMemoryError: a GPU is full; then nothing is added.
        """
        new_codes = checked_codes(codes, "codes", self.bits)
        new_ids = None if ids is None else checked_ids(ids, len(new_codes))
        if len(new_codes) == 0:
            return
        with self._writer:
            state = self._state
            old, new = len(state.codes), len(state.codes) + len(new_codes)
            new_ids, next_id = state.ids_of_new(len(new_codes), new_ids)
            with self._gpu_memory("add", new * self.bits // 8 // len(self._memory)):
                codes, ids, home_ids = self._codes.extended(old, new_codes), self._ids, self._home_ids
                if new_ids is not None:
                    ids = self._ids.extended(old, new_ids)
                    home_ids = ids if state.codes.home == CPU else self._home_ids.extended(old, new_ids)
                every_id = (None, None) if new_ids is None else (ids.first(new), home_ids.first(new))
                self._publish(state.extended(codes.first(new), *every_id, next_id), codes, ids, home_ids)

    def remove(self, ids: Array) -> None:
        """Remove codes; their memory is kept until :meth:`compact`.

        Args:
            ids: int64 [M], each once.

        Raises:
            TypeError: a wrong dtype.
            InputError: an id that the index does not hold, or one that came twice; then nothing is removed.
        """
        wanted = checked_ids(ids)
        with self._writer:
            rows = self._state.rows_of(wanted, "remove").numpy()
            if len(rows):
                with self._gpu_memory("remove", len(self._state.codes) // 8):
                    self._publish(self._state.without(rows), self._codes, self._ids, self._home_ids)

    def update(self, ids: Array, codes: Array) -> None:
        """Replace codes, each in its place in the order; waits for the searches that are running.

        Args:
            ids: int64 [M], each once.
            codes: uint8 [M, bits / 8].

        Raises:
            TypeError: a wrong dtype.
            InputError: a wrong shape, an id that the index does not hold, or one that came twice; then nothing changes.
        """
        new_codes = checked_codes(codes, "codes", self.bits)
        wanted = checked_ids(ids, len(new_codes))
        with self._writer:
            rows = self._state.rows_of(wanted, "update")
            if len(rows):
                self._saved = None  # what lies in the folder is no longer the beginning of what lies here
                with self._gpu_memory("update", new_codes.nbytes):
                    replacement = self._state.codes.dealt(rows, new_codes)
                with self._rows_lock.writing():
                    stop(self._memory)  # a search has returned, and its kernels may not have
                    self._state.codes.put(replacement)
                    settle(self._memory)

    def compact(self) -> None:
        """Free the memory of removed codes, here and, with the next save, in the folder; ids stay what they are."""
        with self._writer:
            state = self._state
            if state.live is not None:
                with self._gpu_memory("compact", state.count * self.bits // 8 // len(self._memory)):
                    blocks = state.codes.blocks(state.live_rows())
                    codes = GrowingCodes.of(blocks, state.count, self.bits // 8, self._memory)
                    self._adopt(State.of(codes.first(state.count), state.live_ids(), None, state.next_id), codes)
                self._saved = None  # rows have moved

    def reconstruct(self, ids: Array) -> Array:
        """The codes of ids int64 [M], which may repeat: uint8 [M, bits / 8], in the ids' library, on their device.

        Raises:
            TypeError: a wrong dtype.
            InputError: a wrong shape, or an id that the index does not hold.
        """
        wanted = checked_ids(ids, unique=False)
        with self._rows_lock.reading():
            state = self._state
            keep(state.codes.parts)
            codes = state.codes.take(state.rows_of(wanted, "reconstruct"))
        return like(ids, codes)[0]

    def save(self, path: str | os.PathLike) -> None:
        """Write the index to a folder; into the folder it was last saved to or loaded from, only what is new.

        The folder holds the codes as they lie in memory, row after row in one file that is only ever appended to, and a
        manifest. Replacing the manifest is what commits: until then, and after any failure, the folder holds what it
        held before. After an update or a compaction, or where the folder has changed since, all is written anew.

        Raises:
            InputError: a path that cannot be written to, that holds something damaged, or where a save is running.
            OSError: the disk is full or fails.
        """
        with self._writer:
            self._saved = storage.save(Path(path), self.bits, self._state, self._saved)

    @classmethod
    def load(cls, path: str | os.PathLike, mmap: bool = False, device: Devices = "cpu", streamed: bool = False) -> Self:
        """Read an index from the folder that :meth:`save` wrote.

        Args:
            path: the folder.
            mmap: map the codes instead of reading them. Sizes and all checksums but the codes' are checked. The file is
                never written to through the map: changes stay in memory until they are saved. On Linux, codes that are
                added stand behind the map, which stays as it is, until they take three times its size, or 64 MB where
                that is more; what is added then, or elsewhere, copies the codes to memory. So does :meth:`compact`;
                :meth:`update` copies the pages that it changes.
            device, streamed: as for the constructor; what is mapped and searched on a GPU is streamed.

        Raises:
            InputError: no index there, a version that this release does not know, or files that are damaged.
            torch.cuda.OutOfMemoryError: a GPU is full.
        """
        devices = checked_devices(device)
        streamed = streamed or (mmap and devices != (CPU,))
        index = cls(8, devices, streamed)
        index.bits, state, codes, index._saved = storage.load(Path(path), mmap, index._memory)
        index._adopt(state, codes)
        return index
