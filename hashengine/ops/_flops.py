"""Formulas for `torch.utils.flop_counter`, which counts 0 operations for an op without a formula.

That module is not imported here, because it imports triton where triton is installed, which takes half a second. The
formulas are registered when a program imports the module.
"""

import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_MODULE = "torch.utils.flop_counter"

_waiting: dict[Any, Callable[..., int]] = {}  # the formulas that are registered after the import


def register_flops(op: Any, formula: Callable[..., int]) -> None:
    """Register the number of floating-point operations of `op`.

    Args:
        op: the op without overload.
        formula: called with the arguments of the op, and with its result as `out_val`.
    """
    if _MODULE in sys.modules:
        _register(sys.modules[_MODULE], op, formula)
        return
    if not _waiting:
        sys.meta_path.insert(0, _RegisterAfterImport())
    _waiting[op] = formula


def _register(module: ModuleType, op: Any, formula: Callable[..., int]) -> None:
    module.register_flop_formula(op, get_raw=True)(formula)


class _RegisterAfterImport(MetaPathFinder):
    """Finds `_MODULE` by the other finders, and registers the formulas after its import."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                for op, formula in _waiting.items():
                    _register(module, op, formula)

            spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec
