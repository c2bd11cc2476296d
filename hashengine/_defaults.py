"""Defaults that a function of the library and its command share, so that each is written once.

The help of a command shows them without importing the function, which would import torch.
"""

from __future__ import annotations

DATA_SETS = ("digits", "fashion-mnist", "cifar10")  # the names that `hashengine.training.prepare` knows
SEED = 0
BATCH_SIZE = 256  # images per call of the network
NEIGHBOURS = 10  # per query
RADIUS = 2  # bits
REPORT_ROWS = 12  # queries in the picture grid of a report
