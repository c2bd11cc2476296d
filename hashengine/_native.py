"""Loads the native module hashengine._C, which is optional.

Loading the module registers its CPU and CUDA kernels with torch's dispatcher; nothing else has to be called. If the
module is missing or was built for another torch, the ops run their plain-torch references, which are slower, and one
warning says why. HASHENGINE_REQUIRE_NATIVE=1 turns the warning into an ImportError.
"""

import functools
import importlib
import json
import os
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

_RECORD = Path(__file__).with_name("_build.json")


def load() -> None:
    """Load the module. If that fails, warn once, or raise ImportError if HASHENGINE_REQUIRE_NATIVE is set."""
    native, reason = _load()
    if native is not None:
        return
    message = f"hashengine's native module is not used: {reason}; to build it: {rebuild_command()}"
    if os.environ.get("HASHENGINE_REQUIRE_NATIVE", "0") not in ("", "0"):
        raise ImportError(f"{message} (HASHENGINE_REQUIRE_NATIVE is set)")
    warnings.warn(f"{message} (until then the slower plain-torch references run)", RuntimeWarning, stacklevel=3)


def module() -> Any | None:
    """The native module, or None if it is not in use."""
    return _load()[0]


def available() -> bool:
    """Whether the native kernels are in use."""
    return module() is not None


def why_not() -> str | None:
    """Why the native kernels are not in use, or None if they are. `rebuild_command` gives the remedy."""
    return _load()[1]


def build_config() -> dict[str, Any]:
    """How the native module was built; empty if it was never built.

    The keys are version (of hashengine), build ("none", "cpu" or "cuda"), reason, decision (the line that the build
    printed), python, torch, torch_cuda, compiler, nvcc and arch_list. A loaded module adds its own entries.
    """
    native = module()
    return _record() | (native.build_config() if native is not None else {})


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    # The record is checked before the module is imported, because a C++ ABI mismatch may crash instead of raising.
    if reason := mismatch(_record(), torch.__version__, torch.version.cuda):
        return None, reason
    try:
        return importlib.import_module("hashengine._C"), None
    except ImportError as error:
        return None, f"it does not load ({str(error).splitlines()[0]})"


def rebuild_command(build: str = "auto") -> str:
    """The shell command that builds the module for the running Python and torch."""
    force = "" if build == "auto" else f"HASHENGINE_BUILD={build} "
    checkout = Path(__file__).parents[1]
    if (checkout / "setup.py").exists():
        return f"cd {checkout} && {force}{sys.executable} setup.py build_ext --inplace"
    return f"{force}{sys.executable} -m pip install --no-build-isolation --no-deps --force-reinstall <checkout>"


def _record() -> dict[str, Any]:
    """The record of the build that setup.py wrote; empty if it cannot be read."""
    try:
        record: dict[str, Any] = json.loads(_RECORD.read_text())
    except (OSError, ValueError):
        return {}
    return record


def mismatch(record: dict[str, Any], torch_version: str, torch_cuda: str | None) -> str | None:
    """Why a module with this build record cannot run here, or None if it can.

    A module runs only with the minor release of CPython (C ABI), the minor release of torch (C++ ABI) and the major
    release of CUDA that it was built for.
    """
    if not record:
        return "it was never built"
    if record["build"] == "none":
        return f"it was not built, because {record['reason']}"
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    if record["python"].split(".")[:2] != here.split("."):
        return f"it was built for Python {record['python']}, this is Python {here}"
    if record["torch"].split(".")[:2] != torch_version.split(".")[:2]:
        return f"it was built for torch {record['torch']}, this is torch {torch_version}"
    if record["build"] == "cuda" and record["torch_cuda"].split(".")[0] != (torch_cuda or "no").split(".")[0]:
        return f"it was built for CUDA {record['torch_cuda']}, this torch has {torch_cuda or 'no CUDA'}"
    return None
