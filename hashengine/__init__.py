"""hashengine: images to short binary codes, and exact search over billions of them.

``hashengine.nn`` and ``hashengine.ops`` hold the layers and the ops below them, :class:`HammingIndex` the search,
``hashengine.metrics`` what judges it, and ``hashengine.models`` the networks that make the codes.
"""

from hashengine import _native, metrics, nn, ops
from hashengine._version import __version__
from hashengine.errors import InputError
from hashengine.index import HammingIndex

_native.load()

__all__ = ["HammingIndex", "InputError", "__version__", "metrics", "nn", "ops"]
