"""Benchmarks of hashengine and, in the same run, of other libraries.

The results of searches, kernels and networks, or a sample of them, are verified. `compare` and `profile` verify
nothing.

- `search`: exact Hamming search of codes in CPU memory, of codes in GPU memory, and of a mapped file.
- `kernels`: the forward and backward passes of attention and of the ops that make codes.
- `networks`: whole networks with attention.
- `results`: the committed result rows, which `report` turns into tables and plots.
"""

import os

# Torch's profiler reads this variable when torch is imported. At level 99, the profiler does not print to stderr
# which devices are absent.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
