"""HammingIndex: packed codes in memory, exact search over them, and a folder to keep them in."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import torch
from torch import Tensor

from hashengine.errors import InputError
from hashengine.index import _search, storage
from hashengine.index._arguments import (
    Array,
    checked_bits,
    checked_codes,
    checked_filter,
    checked_ids,
    checked_integer,
    checked_labels,
    checked_threads,
    like,
)
from hashengine.index._lock import ReadersWriterLock
from hashengine.index._rows import GrowingRows
from hashengine.index._search import Progress
from hashengine.index._state import State
from hashengine.index.rerank import checked_candidates, checked_vectors, ranked
from hashengine.ops import unpack_bits


class HammingIndex:
    """Exact nearest neighbours by Hamming distance over packed codes.

    Results are ordered by (distance, insertion position), for every k up to the number of codes; removal, update and
    compaction keep that order. A code has the id that it came with or, where codes come without, its insertion position
    for good: neither removal nor compaction changes an id.

    Threads may search while another one writes: a search sees one state of the index from beginning to end.

    Args:
        bits: length of a code, a multiple of 8 up to 65,536.

    Example:
        >>> index = HammingIndex(64)
        >>> index.add(codes)  # uint8 [N, 8], torch or numpy
        >>> distances, ids = index.search(queries, k=10)  # int32 and int64 [Q, 10]
    """

    def __init__(self, bits: int):
        self.bits = checked_bits(bits)
        self._publish(State(torch.empty((0, bits // 8), dtype=torch.uint8)))
        self._saved: storage.Saved | None = None
        self._writer = threading.Lock()  # add, remove, update, compact and save, one at a time
        self._rows_lock = ReadersWriterLock()  # a search reads the rows that an update overwrites

    def _publish(self, state: State, codes: GrowingRows | None = None) -> None:
        """A state whose rows lie in memory of their own, or its codes at the beginning of ``codes``."""
        self._codes = codes or GrowingRows(state.codes)
        self._ids = GrowingRows(torch.empty(0, dtype=torch.int64) if state.ids is None else state.ids)
        self._state = state

    def __len__(self) -> int:
        return self._state.count

    def __getstate__(self) -> tuple:
        return self.bits, self._state, self._saved  # locks are neither copied nor pickled

    def __setstate__(self, contents: tuple) -> None:
        bits, state, saved = contents
        self.__init__(bits)
        self._publish(state)
        self._saved = saved

    def __repr__(self) -> str:
        return f"HammingIndex(bits={self.bits}, codes={len(self)})"

    @property
    def codes(self) -> Tensor:
        """The codes in insertion order, uint8 [N, bits / 8]; not to be written to, it may be a view."""
        return self._state.live_codes()

    def ids(self) -> Tensor:
        """The ids in insertion order, int64 [N]."""
        return self._state.live_ids()

    def add(self, codes: Array, ids: Array | None = None) -> None:
        """Append codes; either all of them are added with ids or none.

        Args:
            codes: uint8 [N, bits / 8], torch on any device or numpy; copied.
            ids: int64 [N], not negative, unique in the index; the id of a removed code is free again.

        Raises:
            TypeError: a wrong dtype.
            InputError: a wrong shape, ids that are negative or taken, or ids for some codes only.
        """
        new_codes = checked_codes(codes, "codes", self.bits)
        new_ids = None if ids is None else checked_ids(ids, len(new_codes))
        if len(new_codes) == 0:
            return
        with self._writer:
            state = self._state
            rows = len(state.codes)
            new_ids, next_id = state.ids_of_new(len(new_codes), new_ids)
            all_ids = None if new_ids is None else self._ids.extended(rows, new_ids)
            self._state = state.extended(self._codes.extended(rows, new_codes), all_ids, next_id)

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
                self._state = self._state.without(rows)

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
                with self._rows_lock.writing():
                    self._state.codes[rows] = new_codes

    def compact(self) -> None:
        """Free the memory of removed codes, here and, with the next save, in the folder; ids stay what they are."""
        with self._writer:
            if self._state.live is not None:
                self._saved = None  # rows have moved
                self._publish(self._state.compacted())

    def reconstruct(self, ids: Array) -> Array:
        """The codes of ids int64 [M], which may repeat: uint8 [M, bits / 8], in the ids' library, on their device.

        Raises:
            TypeError: a wrong dtype.
            InputError: a wrong shape, or an id that the index does not hold.
        """
        wanted = checked_ids(ids, unique=False)
        with self._rows_lock.reading():
            state = self._state
            codes = state.codes[state.rows_of(wanted, "reconstruct")]
        return like(ids, codes)[0]

    def search(
        self,
        queries: Array,
        k: int,
        *,
        filter: Array | None = None,
        num_threads: int | None = None,
        progress: Progress | None = None,
    ) -> tuple[Array, Array]:
        """The k nearest codes of each query.

        Args:
            queries: uint8 [Q, bits / 8], torch or numpy.
            k: 1 to the number of codes.
            filter: which codes may be found, by insertion position: bool [N] for the N codes in the index, or its
                bitmap, uint8 [ceil(N / 8)], the first code in the least significant bit (numpy.packbits with
                bitorder="little"); with a row a query, [Q, N] or [Q, ceil(N / 8)]. Default: all.
            num_threads: at least 1; of torch's threads, at most so many. Default: all.
            progress: called with (queries done, queries) now and then.

        Returns:
            ``distances`` int32 [Q, k], ascending, and ``ids`` int64 [Q, k], in the queries' library, on their device.
            Where the filter leaves fewer than k codes, the rest is ``bits + 1`` and -1.

        Raises:
            TypeError: a wrong dtype.
            InputError: a wrong shape, an empty index, or k out of range.
        """
        rows = checked_codes(queries, "queries", self.bits)
        threads = checked_threads(num_threads)
        with self._rows_lock.reading():
            state = self._state
            if state.count == 0:
                raise InputError("search: the index is empty; add codes first")
            k = checked_integer(k, "search: k", 1, state.count, "the number of codes")
            bitmap = self._bitmap(state, filter, rows)
            distances, positions = _search.topk(rows, state.codes, k, bitmap, threads, progress)
        return like(queries, distances, state.ids_of(positions))

    def range_search(
        self,
        queries: Array,
        radius: int,
        *,
        filter: Array | None = None,
        max_results: int | None = None,
        num_threads: int | None = None,
        progress: Progress | None = None,
    ) -> tuple[Array, Array, Array]:
        """The codes at a distance of at most ``radius``, as FAISS lays them out; FAISS's own radius is exclusive.

        Args:
            queries, filter, num_threads, progress: as for :meth:`search`.
            radius: 0 to bits, inclusive.
            max_results: at least 1; of a query that has more, the nearest. Default: all.

        Returns:
            ``lims`` int64 [Q + 1]; query q has ``distances`` int32 and ``ids`` int64 in ``[lims[q], lims[q + 1])``,
            ordered by (distance, insertion position).

        Raises:
            TypeError: a wrong dtype.
            InputError: a wrong shape, or radius or max_results out of range.
        """
        rows = checked_codes(queries, "queries", self.bits)
        threads = checked_threads(num_threads)
        radius = checked_integer(radius, "range_search: radius", 0, self.bits, "the number of bits")
        if max_results is not None:
            max_results = checked_integer(max_results, "range_search: max_results", 1)
        with self._rows_lock.reading():
            state = self._state
            bitmap = self._bitmap(state, filter, rows)
            lims, distances, positions = _search.within(
                rows, state.codes, radius, bitmap, max_results, threads, progress
            )
        return like(queries, lims, distances, state.ids_of(positions))

    def count(
        self,
        queries: Array,
        *,
        filter: Array | None = None,
        labels: tuple[Array, Array] | None = None,
        num_threads: int | None = None,
        progress: Progress | None = None,
    ) -> Array | tuple[Array, Array]:
        """How many codes lie at each distance from each query.

        Args:
            queries, filter, num_threads, progress: as for :meth:`search`.
            labels: (query_labels, code_labels), the codes' in insertion order: integers [Q] and [N], relevant where
                they are equal; or zeros and ones [Q, L] and [N, L], relevant where they share a label.

        Returns:
            ``counts`` int64 [Q, bits + 1]; with labels (``counts``, ``relevant``), the same of relevant codes only.

        Raises:
            TypeError: a wrong dtype.
            InputError: a wrong shape, or multi-hot labels that are not zeros and ones.
        """
        rows = checked_codes(queries, "queries", self.bits)
        threads = checked_threads(num_threads)
        with self._rows_lock.reading():
            state = self._state
            bitmap = self._bitmap(state, filter, rows)
            query_labels, code_labels = None, None
            if labels is not None:
                query_labels, code_labels = checked_labels(labels, len(rows), state.count)
                code_labels = state.scattered(code_labels)
            counts, relevant = _search.counted(rows, state.codes, bitmap, query_labels, code_labels, threads, progress)
        if labels is None:
            return like(queries, counts)[0]
        return like(queries, counts, relevant)

    @staticmethod
    def _bitmap(state: State, filter: Array | None, queries: Tensor) -> Tensor | None:
        return state.bitmap(None if filter is None else checked_filter(filter, len(queries), state.count))

    def rerank(self, query_activations: Array, ids: Array) -> tuple[Array, Array]:
        """Order candidates by the dot product of a query before it was binarised with the +-1 bits of their codes.

        Args:
            query_activations: floating [Q, bits].
            ids: int64 [Q, k], as :meth:`search` gives them; -1 is no candidate.

        Returns, Raises: as for :func:`~hashengine.index.rerank_vectors`.
        """
        queries = checked_vectors(query_activations, "query_activations", self.bits)
        wanted = checked_candidates(ids, len(queries))
        rows = torch.full_like(wanted, -1)
        with self._rows_lock.reading():
            state = self._state
            rows[wanted >= 0] = state.rows_of(wanted[wanted >= 0], "rerank")
            scores, order = ranked(queries, rows, lambda rows: 2 * unpack_bits(state.codes[rows]).float() - 1)
        return like(ids, scores, wanted.gather(1, order))

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
    def load(cls, path: str | os.PathLike, mmap: bool = False) -> HammingIndex:
        """Read an index from the folder that :meth:`save` wrote.

        Args:
            path: the folder.
            mmap: map the codes instead of reading them. Sizes and all checksums but the codes' are checked. The file is
                never written to through the map: changes stay in memory until they are saved. On Linux, codes that are
                added stand behind the map, which stays as it is, until they take three times its size, or 64 MB where
                that is more; what is added then, or elsewhere, copies the codes to memory. So does :meth:`compact`;
                :meth:`update` copies the pages that it changes.

        Raises:
            InputError: no index there, a version that this release does not know, or files that are damaged.
        """
        bits, state, codes, saved = storage.load(Path(path), mmap)
        index = cls(bits)
        index._publish(state, codes)
        index._saved = saved
        return index
