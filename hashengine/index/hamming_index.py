"""HammingIndex: packed codes with ids, exact search over them, and a folder to store them in."""

from __future__ import annotations

import copy
import dataclasses
import os
import threading
import weakref
from contextlib import AbstractContextManager
from inspect import ismemberdescriptor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hashengine._validation import (
    Array,
    DeviceName,
    Labels,
    as_tensor,
    check_bits,
    check_callable,
    check_codes,
    check_devices,
    check_filter,
    check_flag,
    check_ids,
    check_integer,
    check_labels,
    check_path,
    check_threads,
    to_callers_type,
)
from hashengine.errors import InputError, invalid
from hashengine.index import execution, folder
from hashengine.index.code_memory import (
    GrowingCodes,
    GrowingRows,
    RowMemory,
    ShardedCodes,
    allocate_rows,
    rows_per_transfer,
)
from hashengine.index.devices import (
    CPU,
    explain_out_of_memory,
    record_streams,
    synchronize_devices,
    synchronize_streams,
    to_device,
)
from hashengine.index.execution import CountRequest, DeviceWorker, Progress, RangeRequest, TopKRequest, assign_workers
from hashengine.index.lock import ReadersWriterLock, in_use
from hashengine.index.rerank import check_candidates, check_query_vectors, rank_candidates
from hashengine.index.snapshot import Snapshot
from hashengine.ops import unpack_bits
from hashengine.ops._plain import can_be_array

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Self

_RESULT_BYTES = 12  # an int32 distance and an int64 id
_OWN_ATTRIBUTES = {
    "_bits", "_devices", "_streamed", "_is_on_host", "_last_saved", "_writer", "_rows_lock", "_memory", "_snapshot",
    "_is_partly_updated", "_is_torn",
}  # fmt: skip

_living: weakref.WeakValueDictionary[int, HammingIndex] = weakref.WeakValueDictionary()  # every index, by its id()


class HammingIndex:
    """Exact nearest neighbours by Hamming distance over packed codes.

    Results are ordered by (distance, insertion position), for every k up to the number of codes; removal, update and
    compaction keep that order. The id of a code is the one that it was added with. Codes added without ids are numbered
    in insertion order. Neither removal nor compaction changes an id. Answers are the same on every device, bit for bit.

    Threads may search while another thread writes: a search uses one snapshot of the index from beginning to end.
    Copies and pickles are independent of the index. The `progress` of a search, and a handler of a signal that comes
    during a search, may search the index, but not change, save or copy it.

    On a GPU, `search` runs on the current stream. It does not wait for the stream if the index is on one GPU and not
    streamed, the queries are on this GPU too, k is at most 4,096, and `progress` is not given. A CUDA graph of a search
    reads the codes that the index had during capture. Therefore keep the index, unchanged, as long as the graph is
    used. Ids that are not positions take 8 bytes per code on the GPU, or on the first of several GPUs.

    Args:
        bits: the length of a code, a multiple of 8 up to 65,536.
        device: the devices that search the codes: "cpu", "cuda", "cuda:1", a torch.device, or a list of these. Codes
            and work are divided equally among several devices.
        streamed: keep the codes in host memory, and copy them to the device in chunks during each search. This allows
            more codes than fit into the device's memory. Several devices take the chunks in turn. The copies take most
            of the time, so pass many queries per call.

    Raises:
        InputError: bits that are not a multiple of 8 or out of range, no such device, a GPU of a compute capability
            below 8.0, or `streamed` is not a bool.

    Example:
        >>> index = HammingIndex(64)
        >>> index.add(codes)  # uint8 [N, 8], torch or numpy
        >>> distances, ids = index.search(queries, k=10)  # int32 and int64 [Q, 10]
    """

    def __init__(self, bits: int, device: DeviceName | Sequence[DeviceName] = "cpu", streamed: bool = False) -> None:
        where = "HammingIndex"
        devices = check_devices(where, device)
        self._initialise(check_bits(where, bits), devices, check_flag(where, "streamed", streamed))

    def _initialise(self, bits: int, devices: tuple[torch.device, ...], streamed: bool) -> None:
        """Make this an empty index. Copies need no constructor, because a subclass may have another one."""
        self._bits = bits
        self._devices = devices
        self._streamed = streamed
        self._is_on_host = devices == (CPU,) and not streamed
        self._last_saved: folder.SavePoint | None = None
        self._is_partly_updated = False  # true while an update overwrites rows
        self._is_torn = False  # true in a process that was forked in the meantime
        self._make_locks()
        self._publish_codes(GrowingCodes.from_blocks([], 0, self.bits // 8, self._code_devices), 0)

    def _make_locks(self) -> None:
        # Held by add, remove, update, compact, save, to and copies. It knows its owner, unlike threading.Lock.
        self._writer: Any = threading.RLock()
        self._rows_lock = ReadersWriterLock()  # a search is a reader; an update, which overwrites rows, is a writer
        _living[id(self)] = self

    @property
    def bits(self) -> int:
        """The length of a code."""
        return self._bits

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """The devices that search the codes."""
        return self._devices

    @property
    def streamed(self) -> bool:
        """Whether the codes stay in host memory and are copied to the devices during each search."""
        return self._streamed

    @property
    def codes(self) -> Tensor:
        """The codes in insertion order, uint8 [N, bits / 8]. Do not write to them: they may be a view.

        They are on the device that stores them, or on the CPU if they are streamed or stored on several devices.
        """
        return self._current("codes").live_codes()

    @property
    def ids(self) -> Tensor:
        """The ids in insertion order, int64 [N], on the CPU."""
        return self._snapshot.live_ids()

    def __len__(self) -> int:
        return self._snapshot.count

    def __repr__(self) -> str:
        devices = "" if self._devices == (CPU,) else f", device={', '.join(map(str, self._devices))}"
        return f"{type(self).__name__}(bits={self.bits}, codes={len(self)}{devices}{', streamed' * self._streamed})"

    # Searching.

    def search(
        self,
        queries: Array,
        k: int,
        *,
        filter: Array | None = None,
        num_threads: int | None = None,
        progress: Progress | None = None,
    ) -> tuple[Any, Any]:
        """The k nearest codes of each query.

        Args:
            queries: uint8 [Q, bits / 8], torch or numpy.
            k: 1 to the number of codes.
            filter: the codes that may be returned. Either a mask, bool [N], with one value per code in insertion order;
                or its bitmap, uint8 [ceil(N / 8)], with the first code in the least significant bit (`numpy.packbits`
                with bitorder="little"). Either form may have one row per query: [Q, N] or [Q, ceil(N / 8)]. Default:
                all codes.
            num_threads: the largest number of torch's threads to use, 1 to 4096. Default: all.
            progress: called with (number of queries done, number of queries) from time to time.

        Returns:
            `distances` int32 [Q, k], ascending, and `ids` int64 [Q, k], in the queries' library, on their device. If
            the filter leaves fewer than k codes, the remaining results have the distance `bits + 1` and the id -1.

        Raises:
            InputError: a wrong dtype or shape, an empty index, or k out of range.
        """
        if filter is None and progress is None:
            answer = self._search_in_one_call(queries, k, num_threads)
            if answer is not None:
                return answer
        query_codes = check_codes("search", "queries", queries, self.bits)
        check_callable("search", "progress", progress)
        with self._rows_lock.reader():
            snapshot = self._current("search")
            if snapshot.count == 0:
                raise invalid("search", "the index", "one that holds codes", "an empty one", "add codes first")
            k = check_integer("search", "k", k, 1, snapshot.count, "the number of codes")
            code_filter, threads = self._check_options("search", snapshot, len(query_codes), filter, num_threads)
            with self._explain_out_of_memory("search", _RESULT_BYTES * len(query_codes) * k):
                request = TopKRequest(snapshot, query_codes, snapshot.row_filter(code_filter), threads, k)
                distances, ids = execution.run(request, self._workers(snapshot), progress)
        return to_callers_type(queries, distances, ids)

    def range_search(
        self,
        queries: Array,
        radius: int,
        *,
        filter: Array | None = None,
        max_results: int | None = None,
        num_threads: int | None = None,
        progress: Progress | None = None,
    ) -> tuple[Any, Any, Any]:
        """The codes at a distance of at most `radius` from each query, in FAISS's layout.

        The radius is inclusive; that of FAISS is exclusive.

        Args:
            queries: as for `search`.
            radius: 0 to bits, inclusive.
            filter: as for `search`.
            max_results: the number of nearest results to keep per query, at least 1. Default: all.
            num_threads: as for `search`.
            progress: as for `search`.

        Returns:
            `lims` int64 [Q + 1], `distances` int32 and `ids` int64. The results of query q are
            `distances[lims[q]:lims[q + 1]]` and `ids[lims[q]:lims[q + 1]]`, ordered by (distance, insertion position).

        Raises:
            InputError: a wrong dtype or shape, or radius or max_results out of range.
        """
        query_codes = check_codes("range_search", "queries", queries, self.bits)
        check_callable("range_search", "progress", progress)
        radius = check_integer("range_search", "radius", radius, 0, self.bits, "the number of bits")
        if max_results is not None:
            max_results = check_integer("range_search", "max_results", max_results, 1)
        with self._rows_lock.reader():
            snapshot = self._current("range_search")
            if max_results is not None:
                max_results = min(max_results, max(snapshot.count, 1))  # the op takes no more than 63 bits
            code_filter, threads = self._check_options("range_search", snapshot, len(query_codes), filter, num_threads)
            with self._explain_out_of_memory("range_search", 8 * len(query_codes)):
                bitmap = snapshot.row_filter(code_filter)
                request = RangeRequest(snapshot, query_codes, bitmap, threads, radius, max_results)
                lims, distances, ids = execution.run(request, self._workers(snapshot), progress)
        return to_callers_type(queries, lims, distances, ids)

    def count(
        self,
        queries: Array,
        *,
        filter: Array | None = None,
        labels: Labels | None = None,
        num_threads: int | None = None,
        progress: Progress | None = None,
    ) -> Any:
        """The number of codes at each distance from each query.

        Args:
            queries: as for `search`.
            filter: as for `search`.
            labels: (query_labels, code_labels); code_labels are in insertion order. Either integers [Q] and [N]: a code
                is relevant if it has the query's label. Or zeros and ones [Q, L] and [N, L], with L at least 2: a code
                is relevant if it shares a label with the query.
            num_threads: as for `search`.
            progress: as for `search`.

        Returns:
            `counts` int64 [Q, bits + 1]. With labels, (`counts`, `relevant`); `relevant` counts only relevant codes.

        Raises:
            InputError: a wrong dtype or shape, or multi-hot labels that are not zeros and ones.
        """
        query_codes = check_codes("count", "queries", queries, self.bits)
        check_callable("count", "progress", progress)
        with self._rows_lock.reader():
            snapshot = self._current("count")
            code_filter, threads = self._check_options("count", snapshot, len(query_codes), filter, num_threads)
            row_labels: tuple[Tensor, Tensor] | None = None
            if labels is not None:
                query_labels, code_labels = check_labels("count", labels, len(query_codes), snapshot.count)
                row_labels = (query_labels, snapshot.expand_to_rows(code_labels))
            with self._explain_out_of_memory("count", 8 * len(query_codes) * (self.bits + 1)):
                request = CountRequest(snapshot, query_codes, snapshot.row_filter(code_filter), threads, row_labels)
                counts, relevant = execution.run(request, self._workers(snapshot), progress)
        return to_callers_type(queries, counts)[0] if labels is None else to_callers_type(queries, counts, relevant)

    def rerank(self, query_activations: Array, ids: Array) -> tuple[Any, Any]:
        """Order candidates by the dot product of the query's activations with the bits of their codes as -1 or +1.

        The products are always computed on the CPU, so that they do not depend on the device that stores the codes.

        Args:
            query_activations: floating [Q, bits], the queries before they were binarised.
            ids: int64 [Q, k], as `search` returns them; -1 means no candidate.

        Returns:
            `scores` float32 [Q, k], descending, and `ids` int64 [Q, k] in that order, as for
            `hashengine.index.rerank_vectors`.

        Raises:
            InputError: a wrong dtype or shape, an id that is not in the index, or activations that are not finite.
        """
        queries = check_query_vectors("rerank", "query_activations", query_activations, self.bits)
        wanted = check_candidates("rerank", ids, len(queries))
        rows = torch.full_like(wanted, -1)
        with self._rows_lock.reader():
            snapshot = self._current("rerank")
            rows[wanted >= 0] = snapshot.rows_of(wanted[wanted >= 0], "rerank")

            def signs_of(rows: Tensor) -> Tensor:
                return 2 * unpack_bits(snapshot.codes.gather(rows).cpu()).float() - 1

            scores, order = rank_candidates("rerank", queries, rows, signs_of)
        return to_callers_type(ids, scores, wanted.gather(1, order))

    def reconstruct(self, ids: Array) -> Any:
        """The codes of ids, int64 [M], which may repeat.

        Returns:
            uint8 [M, bits / 8], in the ids' library, on their device.

        Raises:
            InputError: a wrong dtype or shape, or an id that is not in the index.
        """
        wanted = check_ids("reconstruct", ids, unique=False)
        with self._rows_lock.reader():
            snapshot = self._current("reconstruct")
            record_streams(snapshot.codes.parts)
            codes = snapshot.codes.gather(snapshot.rows_of(wanted, "reconstruct"))
        return to_callers_type(ids, codes)[0]

    # Changing the codes.

    def add(self, codes: Array, ids: Array | None = None) -> None:
        """Append codes. Either all codes of an index are added with ids, or all are added without ids.

        Args:
            codes: uint8 [N, bits / 8], torch on any device or numpy; copied.
            ids: int64 [N], not negative, unique in the index. The id of a removed code may be used again.

        Raises:
            InputError: a wrong dtype or shape, ids that are negative or taken, or ids for only some codes of the index.
            torch.cuda.OutOfMemoryError: a GPU is full; then nothing is added.
        """
        new_codes = check_codes("add", "codes", codes, self.bits)
        new_ids = None if ids is None else check_ids("add", ids, len(new_codes))
        if len(new_codes) == 0:
            return
        with self._writing("add"):
            snapshot = self._current("add")
            total = len(snapshot.codes) + len(new_codes)
            new_ids, next_id = snapshot.allocate_ids(len(new_codes), new_ids)
            with self._explain_out_of_memory("add", self._bytes_per_device(total)):
                memory = self._memory.append(len(snapshot.codes), new_codes, new_ids)
                all_ids = None if new_ids is None else memory.ids.first(total)
                device_ids = None if new_ids is None else memory.device_ids.first(total)
                self._publish(snapshot.appended(memory.codes.first(total), all_ids, device_ids, next_id), memory)

    def remove(self, ids: Array) -> None:
        """Remove codes; their memory is freed by `compact`.

        Args:
            ids: int64 [M], without repetition.

        Raises:
            InputError: a wrong dtype or shape, or an id that repeats or is not in the index; then nothing is removed.
        """
        wanted = check_ids("remove", ids)
        with self._writing("remove"):
            snapshot = self._snapshot
            rows = snapshot.rows_of(wanted, "remove").numpy()
            if len(rows):
                with self._explain_out_of_memory("remove", len(snapshot.codes) // 8):
                    self._publish(snapshot.without(rows), self._memory)

    def update(self, ids: Array, codes: Array) -> None:
        """Replace codes. They keep their places in the order. This waits until the running searches end.

        Args:
            ids: int64 [M], without repetition.
            codes: uint8 [M, bits / 8].

        Raises:
            InputError: a wrong dtype or shape, or an id that repeats or is not in the index; then nothing changes.
        """
        new_codes = check_codes("update", "codes", codes, self.bits)
        wanted = check_ids("update", ids, len(new_codes))
        with self._writing("update"):
            stored = self._current("update").codes
            rows = self._snapshot.rows_of(wanted, "update")
            if len(rows):
                self._write_all_rows_next()
                with self._explain_out_of_memory("update", new_codes.nbytes):
                    replacements = stored.scatter(rows, new_codes)

                def overwrite() -> None:
                    synchronize_devices(self._code_devices)  # a search may return before its kernels end
                    self._is_partly_updated = True
                    try:
                        stored.overwrite(replacements)
                    finally:
                        self._is_partly_updated = False
                    synchronize_streams(self._code_devices)

                self._rows_lock.write(overwrite)

    def compact(self) -> None:
        """Free the memory of removed codes; the next save frees it in the folder. Ids do not change."""
        with self._writing("compact"):
            snapshot = self._current("compact")
            if snapshot.live is not None:
                with self._explain_out_of_memory("compact", self._bytes_per_device(snapshot.count)):
                    blocks = snapshot.codes.blocks(snapshot.live_rows())
                    codes = GrowingCodes.from_blocks(blocks, snapshot.count, self.bits // 8, self._code_devices)
                    self._write_all_rows_next()  # first, because Ctrl-C may end this after the rows have moved
                    self._publish_codes(codes, snapshot.count, snapshot.live_ids(), None, snapshot.next_id)

    # Folders, devices, copies.

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the index to a folder. If the last save or load used this folder, only new codes and ids are written.

        The folder contains a manifest and a file with the codes as they are in memory, row after row. A save appends
        the new codes to that file. After an update or a compaction, or if the file is no longer complete, it writes all
        codes to a new file. If it fails before the new manifest replaces the old one, the old index remains.

        Raises:
            InputError: the path cannot be written to, contains a damaged index, or is in use by another save; or it is
                the folder of the last load or save, and another index was saved to it since, whose codes would be lost.
            OSError: the disk is full or fails.
        """
        with self._writing("save"):
            snapshot = self._current("save")
            ids = None if snapshot.ids is None else snapshot.ids.numpy()
            contents = folder.Contents(self.bits, snapshot.next_id, snapshot.codes, ids, snapshot.live)
            self._last_saved = folder.save(check_path("save", "path", path), contents, self._last_saved)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        mmap: bool = False,
        device: DeviceName | Sequence[DeviceName] = "cpu",
        streamed: bool = False,
    ) -> Self:
        """Read an index from the folder that `save` wrote.

        Args:
            path: the folder.
            mmap: map the codes instead of reading them. Sizes, and all checksums except that of the codes, are checked.
                No other program may shorten or change the file; saves of hashengine do neither. A search and any other
                method that reads codes raises `InputError` if the file has become shorter. If it becomes shorter during
                a search, the process ends with SIGBUS. Changed codes are not noticed.
                Changes stay in memory until they are saved; the map never writes to the file. On Linux, added codes are
                stored behind the map, without copying it, until they take three times its size or 64 MiB, whichever is
                more. Beyond that, and on other systems, `add` copies all codes to memory. `compact` copies the
                remaining codes to memory. `update` copies the pages that it changes.
            device: as for the constructor.
            streamed: as for the constructor; mapped codes that a GPU searches are always streamed.

        Raises:
            InputError: the folder contains no index, a version that this release does not know, or damaged files; or an
                argument is of another kind.
            torch.cuda.OutOfMemoryError: a GPU is full.
        """
        path, devices = check_path("load", "path", path), check_devices("load", device)
        mmap, streamed = check_flag("load", "mmap", mmap), check_flag("load", "streamed", streamed)
        index = cls(8, devices, streamed or (mmap and devices != (CPU,)))
        while True:
            stored = folder.open_folder(path)
            index._bits = stored.bits
            try:
                index._read(stored, mmap)
                return index
            except (InputError, FileNotFoundError):
                if stored.is_current():
                    raise
                # Another save has removed the files of this manifest in the meantime: read the new manifest.

    def _read(self, stored: folder.StoredIndex, mmap: bool) -> None:
        rows, bytes_per_code = stored.rows, self.bits // 8
        with explain_out_of_memory("load", self._code_devices, self._bytes_per_device(rows)):
            if mmap and rows:
                codes = GrowingCodes.from_file(stored.codes_file(), rows, bytes_per_code)
            elif self._code_devices == (CPU,):
                memory = allocate_rows((rows, bytes_per_code), torch.uint8)
                stored.read_codes_into(memory.numpy())
                codes = GrowingCodes([GrowingRows(memory)])
            else:
                blocks = map(torch.from_numpy, stored.code_blocks(rows_per_transfer(bytes_per_code)))
                codes = GrowingCodes.from_blocks(blocks, rows, bytes_per_code, self._code_devices)
            ids, live = stored.read_ids_and_live()
            self._publish_codes(codes, rows, None if ids is None else torch.from_numpy(ids), live, stored.next_id)
        self._last_saved = stored.save_point

    def to(self, device: DeviceName | Sequence[DeviceName] | None = None, *, streamed: bool | None = None) -> Self:
        """The same index on other devices: this one if nothing changes, otherwise an independent copy.

        Args:
            device: as for the constructor. Default: the devices of this index.
            streamed: as for the constructor. Default: that of this index.

        Raises:
            InputError: no such device, or `streamed` is not a bool.
            torch.cuda.OutOfMemoryError: a GPU is full.
        """
        devices = self._devices if device is None else check_devices("to", device)
        streamed = self._streamed if streamed is None else check_flag("to", "streamed", streamed)
        if (devices, streamed) == (self._devices, self._streamed):
            return self
        with self._writing("to"):
            index = self._new_copy(devices, streamed)
            index._copy_rows(self._current("to"), "to")
        return index

    def __copy__(self) -> Self:
        """An independent copy, which has its own codes and shares the attributes that a user or a subclass has set.

        The copy of a mapped index maps the same file. Its codes are copied to memory instead if they have been updated
        since they were saved, or if a later save has removed the file.
        """
        with self._writing("copy"):
            snapshot, stored = self._current("copy"), self._mapped_folder()
            index = self._new_copy(self._devices, self._streamed)
            if stored is None:
                index._copy_rows(snapshot, "copy")
            else:
                added = snapshot.codes.host_rows(slice(stored.rows, None))
                try:
                    index._publish_map(stored, added, snapshot.ids, snapshot.live, snapshot.next_id)
                except (InputError, FileNotFoundError):  # another save has just removed the file
                    index._copy_rows(snapshot, "copy")
        return index

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy as by `copy.copy`, with deep copies of the attributes that a user or a subclass has set."""
        index = copy.copy(self)
        memo[id(self)] = index  # first, because an attribute may refer to this index
        index._set_attributes(copy.deepcopy(self._attributes(), memo))
        return index

    def __getstate__(self) -> dict[str, Any]:
        """The state, without the locks, which cannot be pickled.

        The rows are copies in numpy arrays: this index may be updated while they are pickled, and torch moves tensors
        to shared memory when it sends them to another process. Of a mapped index, only the rows that are not in its
        folder are included. The receiver maps the file of the others.
        """
        with self._writing("pickle"):
            snapshot, stored = self._current("pickle"), self._mapped_folder()
            added = slice(0 if stored is None else stored.rows, None)
            return {
                "bits": self.bits,
                "devices": self._devices,
                "streamed": self._streamed,
                "last_saved": self._last_saved,
                "mapped": stored,
                "codes": snapshot.codes[added].copy(),
                "ids": None if snapshot.ids is None else snapshot.ids[added].numpy().copy(),
                "live": snapshot.live,
                "next_id": snapshot.next_id,
                "attributes": self._attributes(),
            }

    def __setstate__(self, state: dict[str, Any]) -> None:
        stored: folder.StoredIndex | None = state["mapped"]
        self._initialise(state["bits"], state["devices"], state["streamed"])
        codes, ids, live = as_tensor(state["codes"]), state["ids"], state["live"]
        # Pickled arrays may be read-only, or share their memory with the buffers that they were read from.
        live = None if live is None else np.array(live)
        if stored is not None:
            self._map_again(stored, codes, ids, live, state["next_id"])
        else:
            all_ids = None if ids is None else torch.from_numpy(np.array(ids))
            self._copy_rows(Snapshot.from_rows(ShardedCodes((codes,)), all_ids, live, state["next_id"]), "load")
        self._last_saved = state["last_saved"]
        self._set_attributes(state["attributes"])

    def _map_again(
        self,
        stored: folder.StoredIndex,
        added: Tensor,
        added_ids: np.ndarray | None,
        live: np.ndarray | None,
        next_id: int | None,
    ) -> None:
        """Publish the mapped codes of a folder, followed by those that a pickle contains."""
        try:
            saved_ids, _ = stored.read_ids_and_live()
            ids = added_ids
            if ids is not None and saved_ids is not None:
                ids = np.concatenate([saved_ids, ids])
            all_ids = None if ids is None else torch.from_numpy(np.array(ids))
            self._publish_map(stored, added, all_ids, live, next_id)
        except (InputError, FileNotFoundError):
            if stored.has_files():
                raise
            expected = f"those that the pickled index maps, in {stored.path}"
            advice = "load the index again, or send one that is not mapped"
            raise invalid("HammingIndex", "the files", expected, "a folder without them", advice) from None

    # Helpers of the methods above.

    def _attributes(self) -> dict[str, Any]:
        """The attributes that a user or a subclass has set."""
        slots = {name for cls in type(self).__mro__ for name, member in vars(cls).items() if ismemberdescriptor(member)}
        own = {name: getattr(self, name) for name in slots if hasattr(self, name)}
        return own | {name: value for name, value in vars(self).items() if name not in _OWN_ATTRIBUTES}

    def _set_attributes(self, attributes: dict[str, Any]) -> None:
        for name, value in attributes.items():
            object.__setattr__(self, name, value)

    def _new_copy(self, devices: tuple[torch.device, ...], streamed: bool) -> Self:
        """An index without codes that is otherwise equal to this one. The caller holds the writers' lock."""
        index = type(self).__new__(type(self))
        index._initialise(self.bits, devices, streamed)
        index._set_attributes(self._attributes())
        index._last_saved = self._last_saved
        return index

    def _write_all_rows_next(self) -> None:
        """Let the next save write all rows, because rows that are in the folder change."""
        if self._last_saved is not None:
            self._last_saved = dataclasses.replace(self._last_saved, rows_changed=True)

    def _mapped_folder(self) -> folder.StoredIndex | None:
        """The folder whose file equals the first codes of this mapped index.

        It is None if the index is not mapped, if codes were updated after the last save, or if the folder no longer has
        the files, or has another file of codes.
        """
        file = self._snapshot.codes.file
        if self._last_saved is None or self._last_saved.rows_changed or file is None:
            return None
        stored = folder.StoredIndex(self._last_saved.path, self._last_saved.manifest)
        return stored if stored.has_files() and file.is_at(stored.codes_file()) else None

    @property
    def _code_devices(self) -> tuple[torch.device, ...]:
        """Where the codes are stored."""
        return (CPU,) if self._streamed else self._devices

    def _bytes_per_device(self, rows: int) -> int:
        return rows * self.bits // 8 // len(self._code_devices)

    def _explain_out_of_memory(self, where: str, needed: int) -> AbstractContextManager[None]:
        return explain_out_of_memory(where, self._devices, needed, self._streamed)

    def _search_in_one_call(self, queries: Any, k: Any, num_threads: Any) -> tuple[Any, Any] | None:
        """The answer to a small search of codes in host memory, by `execution.topk_in_one_call`.

        It is None for other searches and for wrong arguments.
        """
        array, threads = queries, check_threads("search", num_threads)
        if type(queries) is Tensor and queries.dtype == torch.uint8 and can_be_array(queries):
            array = queries.numpy()
        if not self._is_on_host or type(array) is not np.ndarray or type(k) is not int:
            return None
        with self._rows_lock.reader():
            answer = execution.topk_in_one_call(self._current("search"), array, k, threads)
        if answer is None or array is queries:
            return answer
        distances, ids = answer
        return torch.from_numpy(distances), torch.from_numpy(ids)

    def _writing(self, where: str) -> Any:
        """The lock to hold as a writer: `with self._writing(where):`.

        Raises:
            InputError: this thread already uses the index: the call comes from the `progress` of a search, or from a
                handler of a signal. It would wait for itself.
        """
        if self._writer._is_owned():
            raise in_use(where, "a change of this thread, which a signal has interrupted")
        if self._rows_lock.is_read_here():
            raise in_use(where, "a search of this thread, whose progress or signal handler makes this call")
        return self._writer

    def _current(self, where: str) -> Snapshot:
        """The current snapshot, whose codes can be read.

        Raises:
            InputError: they are mapped and their file has become shorter, or the process was forked during an update.
        """
        snapshot = self._snapshot
        if self._is_torn:
            expected, actual = "one that was complete when the process was forked", "one that a thread was updating"
            raise invalid(where, "the index", expected, actual, "load or build it in this process")
        if snapshot.codes.file is not None:
            snapshot.codes.file.check(where)
        return snapshot

    def _check_options(
        self, where: str, snapshot: Snapshot, queries: int, filter: Array | None, num_threads: int | None
    ) -> tuple[Tensor | None, int]:
        """The filter, copied to the first device if it is on another GPU, and the number of threads."""
        threads = check_threads(where, num_threads)
        if filter is None:
            return None, threads
        checked = check_filter(where, filter, queries, snapshot.count)
        return (to_device(checked, self._devices[0]) if checked.is_cuda else checked), threads

    def _workers(self, snapshot: Snapshot) -> list[DeviceWorker]:
        record_streams((*snapshot.codes.parts, snapshot.device_ids, snapshot.device_live))
        return assign_workers(snapshot.codes, self._devices, self._streamed)

    def _publish(self, snapshot: Snapshot, memory: RowMemory) -> None:
        """Make a snapshot current. Its rows are the first rows of `memory`, to which the next `add` appends."""
        _ = snapshot.device_live  # copied to the device here, so that no search waits for the copy
        synchronize_streams(self._code_devices)  # searches may use other streams
        # Kept until both are stored: to free its memory may let another thread run, which may fork the process.
        replaced = getattr(self, "_memory", None), getattr(self, "_snapshot", None)
        self._memory, self._snapshot = memory, snapshot
        del replaced

    def _publish_codes(
        self,
        codes: GrowingCodes,
        rows: int,
        ids: Tensor | None = None,
        live: np.ndarray | None = None,
        next_id: int | None = 0,
    ) -> None:
        """Publish a snapshot of the first `rows` rows of new memory."""
        snapshot = Snapshot.from_rows(codes.first(rows), ids, live, next_id)
        memory = RowMemory.from_ids(codes, snapshot.codes.first_device, snapshot.ids, snapshot.device_ids)
        self._publish(snapshot, memory)

    def _publish_map(
        self,
        stored: folder.StoredIndex,
        added: Tensor,
        ids: Tensor | None,
        live: np.ndarray | None,
        next_id: int | None,
    ) -> None:
        """Publish the mapped codes of a folder, followed by `added`. The ids and live rows are those of all codes."""
        codes = GrowingCodes.from_file(stored.codes_file(), stored.rows, self.bits // 8)
        self._publish_codes(codes.append_rows(stored.rows, added), stored.rows + len(added), ids, live, next_id)

    def _copy_rows(self, snapshot: Snapshot, where: str) -> None:
        """Publish a copy of another index's snapshot."""
        rows = len(snapshot.codes)
        with self._explain_out_of_memory(where, self._bytes_per_device(rows)):
            blocks = snapshot.codes.blocks()
            codes = GrowingCodes.from_blocks(blocks, rows, self.bits // 8, self._code_devices)
            self._publish_codes(codes, rows, snapshot.ids, snapshot.live, snapshot.next_id)


def _renew_locks() -> None:
    """In a forked process: replace the locks, which threads that were not forked may hold.

    Such a thread may have been inside an update, of which the rest is missing now.
    """
    for index in list(_living.values()):
        index._is_torn |= index._is_partly_updated and not index._rows_lock.is_read_here()
        index._make_locks()


os.register_at_fork(after_in_child=_renew_locks)
