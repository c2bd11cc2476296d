"""Hash networks, which turn images into codes: a backbone with optional attention, and a hash layer.

Importing `HashNetConfig` does not import torch. The first use of another name does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hashengine._lazy import lazy_imports

if TYPE_CHECKING:
    from hashengine.models.config import HashNetConfig
    from hashengine.models.hashnet import HashNet, HashOutput
else:
    __getattr__, __dir__ = lazy_imports(
        __name__,
        {
            "HashNet": "hashengine.models.hashnet",
            "HashNetConfig": "hashengine.models.config",
            "HashOutput": "hashengine.models.hashnet",
        },
    )

__all__ = ["HashNet", "HashNetConfig", "HashOutput"]
