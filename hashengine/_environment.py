"""Describes the machine and the installation: processor, GPUs, versions, instruction sets.

`doctor`, reports, training records and benchmarks all describe the machine with these functions.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from hashengine._version import __version__


def processor() -> str:
    """The processor's name, with family and model if Linux reports them, such as "AMD EPYC family 25 model 1"."""
    fields = _cpuinfo()
    name = fields.get("model name") or platform.processor() or platform.machine()
    return name + (f" family {fields['cpu family']} model {fields['model']}" if "cpu family" in fields else "")


def cpu_flags() -> frozenset[str]:
    """The instruction set extensions that the processor reports, in Linux's names, such as "avx512f"."""
    return frozenset(_cpuinfo().get("flags", "").split())


def _cpuinfo() -> dict[str, str]:
    """The fields of /proc/cpuinfo for the first logical processor; empty if the file cannot be read."""
    try:
        block = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0]
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in block.splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def logical_cpus() -> int:
    """The number of logical processors that this process may use."""
    return len(os.sched_getaffinity(0))


def gpu_names() -> list[str]:
    """The name of each GPU that torch sees."""
    import torch

    return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]


def device_name(device: Any) -> str:
    """The description of a torch.device in a report: the name of the GPU, or text such as "cpu, 2 threads"."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"


def versions(*packages: str) -> dict[str, str]:
    """The versions of Python, hashengine, torch, numpy and `packages`; a package that is not installed is left out."""
    found = {"python": platform.python_version(), "hashengine": __version__}
    for package in ("torch", "numpy", *packages):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if "torch" in sys.modules:  # torch.__version__ includes the build, such as "2.15.0+cu132"
        found["torch"] = sys.modules["torch"].__version__
    return found


def torch_release() -> tuple[str, str | None]:
    """The version of torch and of its CUDA: ("", None) without torch, (version, None) for a build without CUDA.

    They come from the imported torch, or from its files, so that torch need not be imported. A module of another kind
    that is found in place of torch, such as a file torch.py, counts as none.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        package = find_spec("torch")
        if package is None or package.origin is None:
            return "", None
        spec = spec_from_file_location("_torch_version", Path(package.origin).with_name("version.py"))
        if spec is None or spec.loader is None:
            return "", None
        release = module_from_spec(spec)
        try:
            spec.loader.exec_module(release)
            return str(release.__version__), release.cuda
        except Exception:  # there is no version.py, or it is that of another package
            return "", None
    return str(torch.__version__), torch.version.cuda


def describe_machine() -> dict[str, str]:
    """The machine and the versions, as a report shows them. The keys are the names of the rows."""
    return {
        "processor": f"{processor()}, {logical_cpus()} threads",
        "GPU": ", ".join(gpu_names()) or "none",
        "system": f"{platform.system()} {platform.machine()}",
        **versions(),
    }


def describe_gpu(device: Any) -> dict[str, str]:
    """Name, compute capability, driver and CUDA version of a torch.device of type "cuda"."""
    import torch

    properties = torch.cuda.get_device_properties(device)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", f"--id={device.index or 0}"]
    driver = subprocess.run(query, capture_output=True, text=True) if shutil.which("nvidia-smi") else None
    return {
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "driver": driver.stdout.strip() if driver else "unknown",
        "cuda": torch.version.cuda or "none",
    }


def simd_level() -> str:
    """The instruction set that the native CPU kernels use, or "none" if there is no native module."""
    from hashengine import _native

    if not _native.available():
        return "none"
    from hashengine import _C

    return _C.simd_level()
