"""Imports the names of a package when they are first used.

`import hashengine.index.folder` first runs `hashengine/__init__.py` and `hashengine/index/__init__.py`. Neither of them
may import torch, therefore both import their names lazily. Such a package lists its names twice: as imports for type
checkers, and as a mapping from names to defining modules for the run time::

    if TYPE_CHECKING:
        from hashengine.index.hamming_index import HammingIndex
    else:
        __getattr__, __dir__ = lazy_imports(__name__, {"HammingIndex": "hashengine.index.hamming_index"})
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def lazy_imports(
    package: str, modules: Mapping[str, str], before: Callable[[], None] | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make the functions `__getattr__` and `__dir__` of a package.

    Args:
        package: the package's name.
        modules: the module that defines each name. If that module is `package.name`, the value is the submodule itself.
        before: called before each of these imports.
    """

    def import_name(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if before is not None:
            before()
        module = importlib.import_module(modules[name])
        value = module if modules[name] == f"{package}.{name}" else getattr(module, name)
        setattr(sys.modules[package], name, value)  # so that later accesses do not call this function
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *modules})

    return import_name, names
