"""The native module hashengine._C: loaded once, never needed.

It registers the CPU and CUDA kernels of hashengine's ops with torch's dispatcher, so that loading it is all there is to
it. Where it is missing or was built for another torch, the plain-torch reference answers: slower, with one warning that
says why. HASHENGINE_REQUIRE_NATIVE=1 turns the warning into an ImportError.
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
    """Load the module; where that cannot be, warn once (RuntimeWarning) or, if it is required, raise ImportError."""
    module, reason = _load()
    if module is not None:
        return
    message = f"hashengine's native module is not used: {reason}; to build it: {rebuild_command()}"
    if os.environ.get("HASHENGINE_REQUIRE_NATIVE", "0") not in ("", "0"):
        raise ImportError(f"{message} (HASHENGINE_REQUIRE_NATIVE is set)")
    warnings.warn(f"{message} (until then plain torch answers, slower)", RuntimeWarning, stacklevel=3)


def available() -> bool:
    """Whether the native kernels are in use."""
    return _load()[0] is not None


def why_not() -> str | None:
    """Why the native kernels are not in use; None where they are. `rebuild_command` says what to do."""
    return _load()[1]


def build_config() -> dict[str, Any]:
    """How the native module was built; empty where it never was.

    version (hashengine's), build ("none", "cpu" or "cuda"), reason, decision (the line that the build printed), python,
    torch, torch_cuda, compiler, nvcc, arch_list; and, where the module is loaded, what it says of itself.
    """
    module, _ = _load()
    return _record() | (module.build_config() if module is not None else {})


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    # The record is compared before the library is opened: a C++ ABI mismatch may crash instead of raising.
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
    try:
        return json.loads(_RECORD.read_text())
    except (OSError, ValueError):
        return {}


def mismatch(record: dict[str, Any], torch_version: str, torch_cuda: str | None) -> str | None:
    """Why a module with this build record cannot run here; None where it can.

    CPython keeps its C ABI within a minor release, torch its C++ ABI within a minor one, CUDA its runtime within a
    major one.
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
