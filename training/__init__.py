"""Training hash networks: `python -m training prepare`, then `python -m training fit`."""

import os

# Read once, when torch loads OpenMP. By default its threads spin while they wait; where another program wants the same
# cores, training a small network on two of them then took 4 times as long as with threads that sleep.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
