"""Exact search over packed binary codes."""

from hashengine.index.bit_order import reverse_bits
from hashengine.index.files import read_ann_benchmarks, read_codes, write_codes
from hashengine.index.hamming_index import HammingIndex
from hashengine.index.interchange import from_faiss, to_faiss
from hashengine.index.knn import HammingKNN
from hashengine.index.rerank import rerank_vectors

__all__ = [
    "HammingIndex",
    "HammingKNN",
    "from_faiss",
    "read_ann_benchmarks",
    "read_codes",
    "rerank_vectors",
    "reverse_bits",
    "to_faiss",
    "write_codes",
]
