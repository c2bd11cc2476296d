"""Benchmarks of whole networks with attention in every block: `model`."""
