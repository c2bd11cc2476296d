"""HammingIndex: packed codes in memory, exact search over them, and a folder to keep them in."""

from __future__ import annotations

import torch
from torch import Tensor

from hashengine.errors import InputError
from hashengine.index._arguments import (
    Array,
    checked_codes,
    checked_filter,
    checked_integer,
    checked_labels,
    checked_threads,
    like,
)
from hashengine.index._collection import CodeCollection
from hashengine.index._devices import keep, moved
from hashengine.index._parts import lanes
from hashengine.index._search import Progress, Search
from hashengine.index._state import State
from hashengine.index.rerank import checked_candidates, checked_vectors, ranked
from hashengine.ops import unpack_bits

_RESULT_BYTES = 12  # an int32 distance and an int64 id


class HammingIndex(CodeCollection):
    """Exact nearest neighbours by Hamming distance over packed codes.

    Results are ordered by (distance, insertion position), for every k up to the number of codes; removal, update and
    compaction keep that order. A code has the id that it came with or, where codes come without, its insertion position
    for good: neither removal nor compaction changes an id. Answers are the same on every device, bit for bit.

    Threads may search while another one writes: a search sees one state of the index from beginning to end.

    On a GPU, :meth:`search` of queries that lie there runs on the current stream and, where k is at most 4,096, does
    not wait for it. A CUDA graph of it searches the codes as they were when it was captured: keep the index, unchanged,
    as long as the graph is used. Ids of one's own take 8 bytes a code there, on the first of several GPUs.

    Args:
        bits: length of a code, a multiple of 8 up to 65,536.
        device: what searches the codes, "cpu", "cuda", "cuda:1", a torch.device, or a list of them. Over several, the
            codes are dealt: each has its share, in memory and in work.
        streamed: keep the codes in host memory, and copy them through the device chunk by chunk in each search: for
            more codes than it holds. Several devices take turns. Ask for many queries at once: the copy is what takes
            time.

    Raises:
        InputError: bits out of range, or no such device, or a GPU before compute capability 8.0.

    Example:
        >>> index = HammingIndex(64)
        >>> index.add(codes)  # uint8 [N, 8], torch or numpy
        >>> distances, ids = index.search(queries, k=10)  # int32 and int64 [Q, 10]
    """

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
        with self._rows_lock.reading():
            state = self._state
            if state.count == 0:
                raise InputError("search: the index is empty; add codes first")
            k = checked_integer(k, "search: k", 1, state.count, "the number of codes")
            with self._gpu_memory("search", _RESULT_BYTES * len(rows) * k):
                found = self._search(state, rows, filter, num_threads, progress).topk(k, state.ids_of)
        return like(queries, *found)

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
        radius = checked_integer(radius, "range_search: radius", 0, self.bits, "the number of bits")
        if max_results is not None:
            max_results = checked_integer(max_results, "range_search: max_results", 1)
        with self._rows_lock.reading():
            state = self._state
            with self._gpu_memory("range_search", 8 * len(rows)):
                search = self._search(state, rows, filter, num_threads, progress)
                found = search.within(radius, max_results, state.ids_of)
        return like(queries, *found)

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
        with self._rows_lock.reading():
            state = self._state
            query_labels, code_labels = None, None
            if labels is not None:
                query_labels, code_labels = checked_labels(labels, len(rows), state.count)
                code_labels = state.scattered(code_labels)
            with self._gpu_memory("count", 8 * len(rows) * (self.bits + 1)):
                search = self._search(state, rows, filter, num_threads, progress)
                counts, relevant = search.counted(query_labels, code_labels)
        return like(queries, counts)[0] if labels is None else like(queries, counts, relevant)

    def _search(
        self, state: State, queries: Tensor, filter: Array | None, num_threads: int | None, progress: Progress | None
    ) -> Search:
        threads = checked_threads(num_threads)
        if filter is not None:
            filter = checked_filter(filter, len(queries), state.count)
            filter = moved(filter, self._devices[0]) if filter.is_cuda else filter
        keep((*state.codes.parts, state.home_ids, state.home_live))
        bitmap = state.bitmap(filter)
        every_lane = lanes(state.codes, self._devices, self._streamed)
        return Search(every_lane, len(state.codes), queries, bitmap, threads, progress)

    def rerank(self, query_activations: Array, ids: Array) -> tuple[Array, Array]:
        """Order candidates by the dot product of a query before it was binarised with the +-1 bits of their codes.

        The products are computed on the CPU, wherever the codes lie, so that they are the same.

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
            scores, order = ranked(
                queries, rows, lambda rows: 2 * unpack_bits(state.codes.take(rows).cpu()).float() - 1
            )
        return like(ids, scores, wanted.gather(1, order))
