"""Exact search over packed binary codes."""

from typing import TYPE_CHECKING

from hashengine._lazy import lazy_imports

if TYPE_CHECKING:
    from hashengine.index.formats import (
        from_faiss,
        read_ann_benchmarks,
        read_codes,
        reverse_bits,
        to_faiss,
        write_codes,
    )
    from hashengine.index.hamming_index import HammingIndex
    from hashengine.index.knn import HammingKNN
    from hashengine.index.rerank import rerank_vectors
    from hashengine.index.searcher import Searcher
else:
    _FORMATS = ("from_faiss", "read_ann_benchmarks", "read_codes", "reverse_bits", "to_faiss", "write_codes")
    __getattr__, __dir__ = lazy_imports(
        __name__,
        {
            "HammingIndex": "hashengine.index.hamming_index",
            "HammingKNN": "hashengine.index.knn",
            "Searcher": "hashengine.index.searcher",
            "rerank_vectors": "hashengine.index.rerank",
            **dict.fromkeys(_FORMATS, "hashengine.index.formats"),
        },
    )

__all__ = [
    "HammingIndex",
    "HammingKNN",
    "Searcher",
    "from_faiss",
    "read_ann_benchmarks",
    "read_codes",
    "rerank_vectors",
    "reverse_bits",
    "to_faiss",
    "write_codes",
]
