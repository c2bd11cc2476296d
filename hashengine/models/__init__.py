"""Hash networks: a backbone with optional attention, and a hash layer; they turn images into bits.

`HashNetConfig` is importable without torch; the rest loads torch when it is first used.
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
