"""Lazy imports of a package's names: `import hashengine.index.folder` must not import torch.

A package lists its names twice: for type checkers as imports, at run time as the modules that define them::

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
        modules: the module that defines each name. If that module is `package.name`, the name is the submodule itself.
        before: called before each import of such a module.
    """

    def import_name(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if before is not None:
            before()
        module = importlib.import_module(modules[name])
        value = module if modules[name] == f"{package}.{name}" else getattr(module, name)
        setattr(sys.modules[package], name, value)  # later accesses find it there and do not call this function
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *modules})

    return import_name, names
