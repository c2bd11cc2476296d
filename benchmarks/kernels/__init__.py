"""Benchmarks of attention and of the ops that make codes: `kernels` and `profile`."""
