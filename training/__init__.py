"""Training hash networks: `python -m training prepare`, then `python -m training fit`."""

import os

# Read once, when torch loads OpenMP. Threads that spin while they wait, its default, hold up a small network's training
# badly where another program wants the same cores; threads that sleep do not.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
