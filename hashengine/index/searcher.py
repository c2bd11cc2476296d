"""`Searcher`: what metrics, evaluation and `HammingKNN` require of an index."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from hashengine._validation import Array, Labels


@runtime_checkable
class Searcher(Protocol):
    """Exact Hamming search over packed codes.

    Results are ordered by (distance, insertion position). They are returned in the queries' library, on their device.
    An implementation may take further keyword arguments with defaults, as `hashengine.HammingIndex` does.
    """

    @property
    def bits(self) -> int:
        """The length of a code."""

    def __len__(self) -> int:
        """The number of codes."""

    def search(self, queries: Array, k: int) -> tuple[Any, Any]:
        """The k nearest codes of each query.

        Args:
            queries: uint8 [Q, bits / 8].
            k: 1 to the number of codes.

        Returns:
            `distances` int32 [Q, k], ascending, and `ids` int64 [Q, k].
        """

    def range_search(self, queries: Array, radius: int) -> tuple[Any, Any, Any]:
        """The codes at a distance of at most `radius` from each query.

        Returns:
            `lims` int64 [Q + 1], `distances` int32 and `ids` int64. The results of query q are
            `distances[lims[q]:lims[q + 1]]` and `ids[lims[q]:lims[q + 1]]`.
        """

    def count(self, queries: Array, *, labels: Labels | None = None) -> Any:
        """The number of codes at each distance from each query.

        Args:
            queries: uint8 [Q, bits / 8].
            labels: (query_labels, code_labels); code_labels are in insertion order. A code is relevant if it has the
                query's label; with multi-hot labels, if it shares a label with the query.

        Returns:
            `counts` int64 [Q, bits + 1]. With labels, (`counts`, `relevant`); `relevant` counts only relevant codes.
        """
