"""Hashing methods, one file per method; `base` describes what a method is and how to write one.

Importing this package imports neither torch nor a method; `find` imports the file of one method.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

from hashengine._lazy import lazy_imports
from hashengine.errors import invalid

if TYPE_CHECKING:
    from hashengine.methods.base import Batch, HashingMethod, View
else:
    __getattr__, __dir__ = lazy_imports(
        __name__, dict.fromkeys(("Batch", "HashingMethod", "View"), "hashengine.methods.base")
    )

DEFAULT = "greedy_hash"

__all__ = ["DEFAULT", "Batch", "HashingMethod", "View", "create", "find", "names"]


def names() -> list[str]:
    """The names of all methods, sorted: the names of the files in this folder, except `base`."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "base")


def find(name: str, where: str = "methods.find") -> type[HashingMethod]:
    """The class of the method `name`.

    Raises:
        InputError: there is no such method.
    """
    if name not in names():
        raise invalid(where, "method", f"one of {', '.join(names())}", repr(name))
    importlib.import_module(f"{__name__}.{name}")
    from hashengine.methods.base import HashingMethod

    return HashingMethod.registered(name)


def create(name: str, **options: Any) -> HashingMethod:
    """Create the method `name` with `options`; options that are not given have the method's defaults.

    Raises:
        InputError: there is no such method, or an option is unknown or out of range.
    """
    return find(name, "methods.create")(**options)
