"""Benchmarks of exact Hamming search: `hamming`, `hamming-gpu` and `mapped`."""
