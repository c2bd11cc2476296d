"""Hashing methods, one file per method; `base` describes what a method is and how to write one.

A method outside this package is a class derived from `HashingMethod` with a `name` of its own. It can be used by this
name, and models that it trained can be loaded, as soon as the class is defined. For the commands, an installed package
names the class in the entry point group `hashengine.methods`.

Importing this package imports neither torch nor a method; `find` imports one method.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from hashengine._lazy import lazy_imports
from hashengine.errors import invalid, shown

if TYPE_CHECKING:
    from hashengine._config import Config
    from hashengine.methods.base import Batch, HashingMethod, View
else:
    __getattr__, __dir__ = lazy_imports(
        __name__,
        {
            **dict.fromkeys(("Batch", "HashingMethod", "View"), "hashengine.methods.base"),
            "Config": "hashengine._config",
        },
    )

DEFAULT = "greedy_hash"

__all__ = ["DEFAULT", "Batch", "Config", "HashingMethod", "View", "create", "find", "names"]


def names() -> list[str]:
    """The names of all methods, sorted: those of this package, of installed packages, and of classes in memory."""
    return sorted({*own_names(), *_installed(), *_defined()})


def own_names() -> list[str]:
    """The names of the methods of this package: those of the files in this folder, except `base`."""
    return [module.name for module in pkgutil.iter_modules(__path__) if module.name != "base"]


def find(name: str, where: str = "methods.find") -> type[HashingMethod]:
    """The class of the method `name`.

    Raises:
        InputError: there is no such method, or its package does not define it; the error names `where`.
    """
    if name in own_names():
        importlib.import_module(f"{__name__}.{name}")
    elif name not in _defined() and (entry := _installed().get(name)):
        try:
            entry.load()
        except (ImportError, AttributeError) as error:
            raise invalid(where, f"method {name!r}", f"defined by {entry.value}", f"{error}") from error
    if name not in _defined():
        advice = "import the module that defines it first"
        raise invalid(where, "method", f"one of {', '.join(names())}", shown(name), advice)
    return _defined()[name]


def _installed() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=__name__)}


def _defined() -> dict[str, type[HashingMethod]]:
    """The classes in memory, by name."""
    base = sys.modules.get(f"{__name__}.base")
    return base.HashingMethod.registry if base else {}


def create(name: str, **options: Any) -> HashingMethod:
    """Create the method `name` with `options`; options that are not given have the method's defaults.

    Raises:
        InputError: there is no such method, or an option is unknown or out of range.
    """
    return find(name, "methods.create")(**options)
