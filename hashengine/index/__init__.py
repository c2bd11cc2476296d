"""Exact search over packed binary codes."""

from hashengine.index.hamming_index import HammingIndex

__all__ = ["HammingIndex"]
