"""Benchmarks: every number comes from a command here, verified before it is timed, with its peers in the same run."""

import os

# torch's profiler reports on stderr, at each use, which devices it does not find; read once, when torch is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
