"""Training of hash networks: prepare a data set, fit a network, sweep over options, report on the runs.

Each of these four steps is also a command, `hashengine train prepare|fit|sweep|report`. Importing this package imports
neither torch nor pydantic. The first use of `fit`, `prepare` or `sweep` does, and so does the creation of a
`FitConfig`.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from hashengine._lazy import lazy_imports

if TYPE_CHECKING:
    from hashengine.training.config import FitConfig, SweepConfig
    from hashengine.training.datasets import prepare
    from hashengine.training.loop import fit
    from hashengine.training.runs import Run, RunTable, report
    from hashengine.training.sweeps import sweep

__all__ = ["FitConfig", "Run", "RunTable", "SweepConfig", "fit", "prepare", "report", "sweep"]


def let_waiting_threads_sleep() -> None:
    """Make OpenMP threads sleep while they wait; this has an effect only before torch is first imported.

    By default, waiting threads spin. Spinning slows the training of a small network a lot if another program uses the
    same cores.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_imports(
        __name__,
        {
            "FitConfig": "hashengine.training.config",
            "Run": "hashengine.training.runs",
            "RunTable": "hashengine.training.runs",
            "SweepConfig": "hashengine.training.config",
            "fit": "hashengine.training.loop",
            "prepare": "hashengine.training.datasets",
            "report": "hashengine.training.runs",
            "sweep": "hashengine.training.sweeps",
        },
        before=let_waiting_threads_sleep,
    )
