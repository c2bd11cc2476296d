"""Benchmarks: every number comes from a command here, verified before it is timed, with its peers in the same run."""
