"""Hash networks: from images to bits."""

from hashengine.models.config import HashNetConfig
from hashengine.models.hashnet import HashNet, HashOutput

__all__ = ["HashNet", "HashNetConfig", "HashOutput"]
