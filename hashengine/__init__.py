"""hashengine turns images into short binary codes, and searches billions of codes exactly.

`HammingIndex` searches codes, and `hashengine.metrics` measures the quality of a search. `hashengine.models`,
`hashengine.methods` and `hashengine.training` define and train the networks that compute codes. `hashengine.evaluation`
evaluates networks on folders of images. `hashengine.nn` contains layers. `hashengine.ops` contains the ops that layers
and searches call.
"""

from typing import TYPE_CHECKING

from hashengine._lazy import lazy_imports
from hashengine._version import __version__
from hashengine.errors import InputError

if TYPE_CHECKING:
    from hashengine import evaluation, index, methods, metrics, models, nn, ops, training
    from hashengine.index import HammingIndex
else:
    __getattr__, __dir__ = lazy_imports(
        __name__,
        {
            "HammingIndex": "hashengine.index.hamming_index",
            "evaluation": "hashengine.evaluation",
            "index": "hashengine.index",
            "methods": "hashengine.methods",
            "metrics": "hashengine.metrics",
            "models": "hashengine.models",
            "nn": "hashengine.nn",
            "ops": "hashengine.ops",
            "training": "hashengine.training",
        },
    )

__all__ = [
    "HammingIndex",
    "InputError",
    "__version__",
    "evaluation",
    "index",
    "methods",
    "metrics",
    "models",
    "nn",
    "ops",
    "training",
]
