"""Benchmarks of hashengine and, in the same run, of other libraries.

The answers of searches and kernels, or a sample of them, are verified; `compare` and `profile` verify nothing.

- `search`: exact Hamming search of codes in CPU memory, of codes in GPU memory, and of a mapped file.
- `kernels`: attention, and the ops that make codes: their forward and backward passes.
- `networks`: whole networks with attention.
- `results`: the committed result rows, which `report` turns into tables and plots.
"""

import os

# Torch's profiler reads this variable when torch is imported. At level 99 it does not print to stderr which devices
# are absent.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
