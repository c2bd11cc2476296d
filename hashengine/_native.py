"""Loads the native module hashengine._C, which is optional.

Loading the module registers its CPU and CUDA kernels with torch's dispatcher; nothing else has to be called. If the
module is missing or was built for another torch, the ops run their plain-torch references, which are slower, and one
warning says why. HASHENGINE_REQUIRE_NATIVE=1 turns the warning into an ImportError.
"""

import functools
import hashlib
import importlib
import json
import os
import re
import shlex
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

_RECORD = Path(__file__).with_name("_build.json")
_refused = ""  # set by `refuse`
_TEXT_FIELDS = ("build", "reason", "python", "torch")  # the fields that every usable record has


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


def refuse(reason: str) -> None:
    """Do not load the module in this process, if it is not loaded yet, and give `reason` as `why_not`."""
    global _refused
    _refused = reason


def build_config() -> dict[str, Any]:
    """How the native module was built; empty if it was never built.

    The keys are version (of hashengine), build ("none", "cpu" or "cuda"), reason, decision (the line that the build
    printed), python, torch, torch_cuda, compiler, nvcc, arch_list, and the name, size in bytes and sha256 of the file
    of the module. A loaded module adds its own entries.
    """
    native = module()
    return record() | (native.build_config() if native is not None else {})


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    import torch

    # The record is checked before the module is imported, because a C++ ABI mismatch may crash instead of raising.
    if reason := _refused or mismatch(record(), torch.__version__, torch.version.cuda):
        return None, reason
    try:
        return importlib.import_module("hashengine._C"), None
    except ImportError as error:
        return None, f"it does not load ({str(error).splitlines()[0]})"


def rebuild_command(build: str = "auto") -> str:
    """The shell command that builds the module for the running Python and torch."""
    force = "" if build == "auto" else f"HASHENGINE_BUILD={build} "
    checkout, python = Path(__file__).parents[1], shlex.quote(sys.executable)
    if (checkout / "setup.py").exists():
        return f"cd {shlex.quote(str(checkout))} && {force}{python} setup.py build_ext --inplace"
    return f"{force}{python} -m pip install --no-build-isolation --no-deps --force-reinstall CHECKOUT"


def record() -> dict[str, Any]:
    """The record of the build that setup.py wrote; empty if there is none, {"damaged": True} if it is unusable."""
    try:
        found = json.loads(_RECORD.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError):  # not JSON, not UTF-8, or nested too deeply
        return {"damaged": True}
    is_usable = (
        isinstance(found, dict)
        and all(isinstance(found.get(name), str) for name in _TEXT_FIELDS)
        and isinstance(found.get("arch_list", []), list)
        and re.fullmatch(r"_C[\w.-]{0,100}", str(found.get("module") or "_C")) is not None
    )
    return found if is_usable else {"damaged": True}


def mismatch(record: dict[str, Any], torch_version: str, torch_cuda: str | None) -> str | None:
    """Why a module with this build record cannot run here, or None if it can.

    A module runs only with the minor release of CPython (C ABI), the minor release of torch (C++ ABI) and the major
    release of CUDA that it was built for.
    """
    if not record:
        return "it was never built"
    if "damaged" in record:
        return f"the record of its build, {_RECORD}, is damaged"
    if record["build"] == "none":
        return f"it was not built, because {record['reason']}"
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    if record["python"].split(".")[:2] != here.split("."):
        return f"it was built for Python {record['python']}, this is Python {here}"
    if record["torch"].split(".")[:2] != torch_version.split(".")[:2]:
        return f"it was built for torch {record['torch']}, this is torch {torch_version}"
    if record["build"] == "cuda" and str(record.get("torch_cuda")).split(".")[0] != (torch_cuda or "no").split(".")[0]:
        return f"it was built for CUDA {record.get('torch_cuda')}, this torch has {torch_cuda or 'no CUDA'}"
    module, name = _module_file(record), record.get("module")
    if module is None and name:
        return f"its file {_RECORD.with_name(name)} is missing"
    if module is not None and module.stat().st_size != record.get("size"):
        # Loading an incomplete file may end the process with SIGBUS.
        return f"its file has {module.stat().st_size} bytes instead of {record.get('size')}"
    return None


def damage(record: dict[str, Any]) -> str | None:
    """How the file of the module differs from the one that was built, or None. This reads the whole file.

    `load` does not read it, and loads such a file. `mismatch` reports a file that is missing.
    """
    module = _module_file(record)
    if module is None:
        return None
    try:
        checksum = hashlib.sha256(module.read_bytes()).hexdigest()
    except OSError as error:
        return f"{module} cannot be read ({error.strerror})"
    if checksum == record.get("sha256"):
        return None
    return f"the checksum of {module} is not that of the module that was built"


def _module_file(record: dict[str, Any]) -> Path | None:
    """The file that the record names; None if there is none. Then importing the module says what is missing."""
    module = _RECORD.with_name(str(record.get("module")))
    return module if module.is_file() else None
