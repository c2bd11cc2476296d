"""Exact search over packed binary codes."""

from hashengine.index.hamming_index import HammingIndex
from hashengine.index.rerank import rerank_vectors

__all__ = ["HammingIndex", "rerank_vectors"]
