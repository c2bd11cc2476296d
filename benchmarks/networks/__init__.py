"""Benchmarks of whole networks, without attention and with attention in every block: the command `model`."""
