"""Hash networks, which turn images into codes: a backbone with optional attention, and a hash layer.

Importing `HashNetConfig` does not import torch. The first use of another name does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hashengine._lazy import lazy_imports
from hashengine.models.config import HashNetConfig

if TYPE_CHECKING:
    from hashengine.models.hashnet import HashNet, HashOutput
else:
    __getattr__, __dir__ = lazy_imports(__name__, dict.fromkeys(("HashNet", "HashOutput"), "hashengine.models.hashnet"))

__all__ = ["HashNet", "HashNetConfig", "HashOutput"]
