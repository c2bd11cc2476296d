"""Default values that a library function shares with the command that calls it.

They have a module of their own so that the help of the command can show them without importing the function: that
import would also import torch.
"""

from __future__ import annotations

DATA_SETS = ("digits", "fashion-mnist", "cifar10")  # the names that `hashengine.training.prepare` knows
SEED = 0
BATCH_SIZE = 256  # images per call of the network
NEIGHBOURS = 10  # results per query of a search
RADIUS = 2  # in bits, for precision within a radius
REPORT_ROWS = 12  # rows of the picture grid in a report, one query per row
