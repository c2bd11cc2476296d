"""hashengine doctor: reports what was built, what this machine can run, what is missing and how to install it.

Most checks are functions that return or yield a `Check`. No check changes anything.
"""

import importlib
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from hashengine import _environment, _native, _toolchain
from hashengine._version import __version__
from hashengine.ops import pack_bits, unpack_bits

OLDEST_TORCH = (2, 11)
_LEVEL = "HASHENGINE_SIMD_LEVEL"
_UNSET_LEVEL = f"unset {_LEVEL}"
# The extra of hashengine that installs each module.
EXTRAS = {"torchvision": "train", "sklearn": "train", "faiss": "bench", "h5py": "hdf5"}
STYLES = {"ok": "green", "warn": "yellow", "missing": "yellow", "broken": "bold red"}


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        name: the part that was checked.
        status: "ok"; "warn": hashengine works, but is slower or can do less; "missing": an optional part is not
            installed; "broken": hashengine raises errors or gives wrong answers until the part is repaired.
        found: what was found.
        remedy: what to do, usually a command to run; "" if there is nothing to do or no remedy is known.
    """

    name: str
    status: Literal["ok", "warn", "missing", "broken"]
    found: str
    remedy: str = ""


def examine() -> list[Check]:
    """Run every check."""
    return [
        Check("hashengine", "ok", f"{__version__} in {Path(__file__).parent}"),
        Check("Python", "ok", f"{_environment.versions()['python']} ({sys.executable})"),
        Check("processor", "ok", _environment.processor()),
        _torch(),
        *_onednn(),
        _native_module(),
        *_simd(),
        *_threads(),
        *_gpus(),
        _compiler(),
        *_nvcc(),
        *(_extra(module, extra) for module, extra in EXTRAS.items()),
    ]


def print_report() -> bool:
    """Print all checks as a table. Returns False if a part is broken."""
    checks = examine()
    table = Table("part", "status", Column("found", overflow="fold"), show_edge=False)
    for check in checks:
        found = Text(check.found)
        if check.remedy:
            found.append(f"\nremedy: {check.remedy}", style="bold")
        table.add_row(check.name, Text(check.status, style=STYLES[check.status]), found)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    return all(check.status != "broken" for check in checks)


def _torch() -> Check:
    found = f"{torch.__version__}, " + (f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA")
    if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH:
        return Check("torch", "broken", found, 'pip install "torch>={}.{}"'.format(*OLDEST_TORCH))
    return Check("torch", "ok", found)


def _onednn() -> Iterator[Check]:
    if not torch.backends.mkldnn.is_available():
        return
    from hashengine.models.memory_format import known_problem

    if problem := known_problem():
        remedy = "export ONEDNN_MAX_CPU_ISA=AVX2, which allows the faster channels_last layout"
        yield Check("oneDNN", "warn", problem, remedy)
    else:
        yield Check("oneDNN", "ok", "no known problem with this torch on this processor")


def _native_module() -> Check:
    name, record = "native module", _native.build_config()
    if not _native.available():
        return Check(
            name, "warn", f"not used, so the plain-torch references run: {_native.why_not()}", _native.rebuild_command()
        )
    parts = [record["build"].upper(), *record["arch_list"], f"for torch {record['torch']}, by {record['compiler']}"]
    found = " ".join(parts) + (f" and nvcc {record['nvcc']}" if record["nvcc"] else "") + f"; {record['reason']}"
    if record["version"] != __version__:
        return Check(name, "warn", f"{found}; built from hashengine {record['version']}", _native.rebuild_command())
    if problem := _wrong_answer("cpu"):
        remedy = _UNSET_LEVEL if _LEVEL in problem else _native.rebuild_command()
        return Check(name, "broken", f"{found}; {problem}", remedy)
    return Check(name, "ok", found)


def _wrong_answer(device: str) -> str:
    """Run `pack_bits` on the device and describe the failure, or return "" if its answer is right."""
    activations = torch.linspace(-1, 1, 64 * 17, dtype=torch.float32, device=device).view(17, 64)
    try:
        bits = unpack_bits(pack_bits(activations))
    except Exception as error:  # a kernel that does not fit the machine or the environment may raise anything
        return f"pack_bits fails on {device}: {(str(error) or repr(error)).splitlines()[0]}"
    return "" if torch.equal(bits, activations >= 0) else f"pack_bits gives wrong codes on {device}"


def _simd() -> Iterator[Check]:
    if not _native.available():
        return
    module = importlib.import_module("hashengine._C")
    levels = module.simd_levels()
    try:
        used = module.simd_level()
    except ValueError as error:
        yield Check("SIMD", "broken", str(error), _UNSET_LEVEL)
        return
    found = f"uses {used}; this processor supports {', '.join(levels)}"
    if used == levels[-1]:
        yield Check("SIMD", "ok", found)
    else:
        yield Check("SIMD", "warn", f"{found}; {_LEVEL} is set", _UNSET_LEVEL)


def _threads() -> Iterator[Check]:
    processors = _environment.logical_cpus()
    yield Check("threads", "ok", f"torch uses {torch.get_num_threads()} threads on {processors} logical processors")
    runtimes = openmp_runtimes()
    found = ", ".join(runtimes) or "none"
    if len(runtimes) > 1:
        found += "; their thread pools compete for the cores"
    yield Check("OpenMP", "ok" if len(runtimes) <= 1 else "warn", found)


def openmp_runtimes() -> list[str]:
    """The files of the OpenMP runtimes that this process has loaded."""
    paths = {line.split(maxsplit=5)[-1].strip() for line in Path("/proc/self/maps").read_text().splitlines()}
    return sorted(path for path in paths if re.match(r"lib(gomp|omp|iomp5)\b", os.path.basename(path)))


def _gpus() -> Iterator[Check]:
    if not torch.cuda.is_available():
        yield _unavailable_gpu()
        return
    rebuild = _native.rebuild_command("cuda")
    has_kernels = _native.available() and _native.build_config()["build"] == "cuda"
    for index in range(torch.cuda.device_count()):
        gpu = _environment.describe_gpu(torch.device("cuda", index))
        memory = torch.cuda.get_device_properties(index).total_memory / 2**30
        found = f"{gpu['gpu']}, {gpu['compute_capability']}, {memory:.0f} GiB, driver {gpu['driver']}"
        if not has_kernels:
            yield Check(
                f"GPU {index}",
                "warn",
                f"{found}; no CUDA kernels are loaded, so the plain-torch references run",
                rebuild,
            )
        elif problem := _wrong_answer(f"cuda:{index}"):
            yield Check(f"GPU {index}", "broken", f"{found}; {problem}", rebuild)
        else:
            yield Check(f"GPU {index}", "ok", found)


def _unavailable_gpu() -> Check:
    """The check of the GPU if torch finds none."""
    if not _has_gpu_device():
        return Check("GPU", "ok", "none; the CPU kernels are used")
    if not torch.version.cuda:
        return Check("GPU", "warn", "a GPU is present, but this torch has no CUDA", "pip install a CUDA build of torch")
    cause = _cuda_error()
    if "driver" in cause and "too old" in cause:
        remedy = "update the NVIDIA driver"
    elif "CUDA_VISIBLE_DEVICES" in os.environ:
        remedy = "unset CUDA_VISIBLE_DEVICES, which may hide the GPU"
    else:
        remedy = "run nvidia-smi, which tests the NVIDIA driver"
    return Check("GPU", "warn", f"a GPU is present, but torch cannot use it: {cause}", remedy)


def _has_gpu_device() -> bool:
    """Whether the NVIDIA driver presents a GPU: a device such as /dev/nvidia0."""
    return any(path.name.removeprefix("nvidia").isdigit() for path in Path("/dev").glob("nvidia*"))


def _cuda_error() -> str:
    """The first line of the error that torch raises when it initialises CUDA."""
    try:
        torch.cuda.init()
    except Exception as error:  # torch raises RuntimeError, AssertionError and others
        return (str(error) or repr(error)).splitlines()[0]
    return "torch reports no error"


def _compiler() -> Check:
    compiler = _toolchain.find_compiler(os.environ)
    if isinstance(compiler, _toolchain.Missing):
        return Check("C++ compiler", "missing", compiler.what, compiler.remedy)
    return Check("C++ compiler", "ok", _toolchain.version(compiler))


def _nvcc() -> Iterator[Check]:
    if not torch.version.cuda:
        return
    nvcc = _toolchain.find_nvcc(os.environ, torch.version.cuda, _toolchain.wheel_homes(torch.version.cuda))
    if isinstance(nvcc, _toolchain.Missing):
        yield Check("nvcc", "missing", nvcc.what, nvcc.remedy)
    else:
        yield Check("nvcc", "ok", f"{nvcc.release} in {nvcc.home}")


def _extra(module: str, extra: str) -> Check:
    try:
        imported = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == module:
            return Check(module, "missing", f"part of the extra {extra!r}", f'pip install "hashengine[{extra}]"')
        return Check(module, "warn", f"importing it fails: {error}", f"pip install {error.name}")
    except Exception as error:  # a library that was built for another torch or numpy may raise anything
        found = f"importing it fails: {(str(error) or repr(error)).splitlines()[0]}"
        return Check(
            module, "warn", found, f"reinstall it from the package index that torch {torch.__version__} came from"
        )
    return Check(module, "ok", getattr(imported, "__version__", "installed"))
