"""hashengine doctor: reports what was built, what this machine can run, what is missing and how to install it.

Most checks are functions that return or yield a `Check`. No check changes anything. Importing this module does not
import torch.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from hashengine import _environment, _native, _toolchain
from hashengine._threads import thread_pool
from hashengine._version import __version__

OLDEST_TORCH = (2, 11)
_LEVEL = "HASHENGINE_SIMD_LEVEL"
_UNSET_LEVEL = f"unset {_LEVEL}"
# For each optional module: the extra of hashengine that installs it, and the packages that may contain it.
EXTRAS = {
    "torchvision": ("train", ("torchvision",)),
    "sklearn": ("train", ("scikit-learn",)),
    "faiss": ("bench", ("faiss-cpu", "faiss-gpu", "faiss")),
    "h5py": ("hdf5", ("h5py",)),
}
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
    _, cuda = _environment.torch_release()
    with thread_pool() as pool:  # the compilers run while this thread imports torch
        tools = [pool.submit(_compiler), pool.submit(_nvcc, cuda)]
        return [
            *_installation(),
            *_with_torch(),
            *(check for tool in tools for check in tool.result()),
            *_extras(),
        ]


def _with_torch() -> Iterator[Check]:
    """The checks that import torch; none if there is no torch, which `_torch` reports."""
    if not _environment.torch_release()[0]:
        return
    try:
        importlib.import_module("torch")
    except Exception as error:  # an incomplete installation raises ImportError, OSError and others
        yield Check("import torch", "broken", f"fails: {_cause(error)}", "pip install --force-reinstall torch")
        return
    if problem := _native.damage(_native.record()):
        _native.refuse(problem)  # loading a damaged file may end the process
    yield from _onednn()
    yield _native_module()
    yield from _simd()
    yield from _threads()
    yield from _gpus()


def examine_files() -> list[Check]:
    """The checks that need only the files of the installation: nothing is run, and torch is not imported."""
    gpu = "a device of the NVIDIA driver is present" if _has_gpu_device() else "none"
    return [*_installation(), _recorded_module(), Check("GPU", "ok", gpu), *_extras()]


def print_report(quick: bool = False) -> bool:
    """Print all checks as a table, or with `quick` only those of `examine_files`. Returns False if a part is broken."""
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    from hashengine._text import printable

    checks = examine_files() if quick else examine()
    table = Table("part", "status", Column("found", overflow="fold"), show_edge=False)
    for check in checks:
        found = Text(printable(check.found))
        if check.remedy:
            found.append(f"\nremedy: {printable(check.remedy)}", style="bold")
        table.add_row(check.name, Text(check.status, style=STYLES[check.status]), found)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    if quick:
        print("Nothing was run. Without --quick, doctor runs torch, the native module and the compilers.")
    return all(check.status != "broken" for check in checks)


def _installation() -> list[Check]:
    return [
        Check("hashengine", "ok", f"{__version__} in {Path(__file__).parent}"),
        Check("Python", "ok", f"{_environment.versions()['python']} ({sys.executable})"),
        Check("processor", "ok", _environment.processor()),
        _torch(),
    ]


def _torch() -> Check:
    found, cuda = _environment.torch_release()
    remedy = 'pip install "torch>={}.{}"'.format(*OLDEST_TORCH)
    if not found:
        package = find_spec("torch")
        if package is not None and package.origin is not None:
            return Check("torch", "broken", f"{package.origin}, which is no torch", "rename or remove it")
        return Check("torch", "broken", "not installed", remedy)
    is_old = tuple(map(int, found.split(".")[:2])) < OLDEST_TORCH
    described = f"{found}, " + (f"CUDA {cuda}" if cuda else "no CUDA")
    return Check("torch", "broken", described, remedy) if is_old else Check("torch", "ok", described)


def _onednn() -> Iterator[Check]:
    import torch

    if not torch.backends.mkldnn.is_available():
        return
    from hashengine.models.memory_format import known_problem

    yield Check("oneDNN", "ok", known_problem() or "no known problem with this torch on this processor")


def _native_module() -> Check:
    record = _native.build_config()
    if not _native.available():
        problem = _native.damage(_native.record())
        return _damaged_module(problem) if problem == _native.why_not() else _unused_module(_native.why_not())
    found = _describe_build(record)
    if problem := _native.damage(record):
        return Check("native module", "broken", f"{found}; {problem}", _native.rebuild_command())
    if record.get("version") != __version__:
        return _outdated_module(record)
    if problem := _wrong_answer("cpu"):
        remedy = _UNSET_LEVEL if _LEVEL in problem else _native.rebuild_command()
        return Check("native module", "broken", f"{found}; {problem}", remedy)
    return Check("native module", "ok", found)


def _recorded_module() -> Check:
    """What the record of the build says about the native module, which is not loaded."""
    record, (torch_version, cuda) = _native.record(), _environment.torch_release()
    if reason := _native.mismatch(record, torch_version, cuda):
        return _unused_module(reason)
    if problem := _native.damage(record):
        return _damaged_module(problem)
    if record.get("version") != __version__:
        return _outdated_module(record)
    return Check("native module", "ok", f"{_describe_build(record)}; not loaded")


def _unused_module(reason: str | None) -> Check:
    found = f"not used, so the plain-torch references run: {reason}"
    return Check("native module", "warn", found, _native.rebuild_command())


def _damaged_module(problem: str | None) -> Check:
    found = f"{problem}; it was not loaded here, but other commands load it"
    return Check("native module", "broken", found, _native.rebuild_command())


def _outdated_module(record: dict[str, Any]) -> Check:
    found = f"{_describe_build(record)}; built from hashengine {record.get('version')}"
    return Check("native module", "warn", found, _native.rebuild_command())


def _describe_build(record: dict[str, Any]) -> str:
    arches = record.get("arch_list") or []
    parts = [record["build"].upper(), *map(str, arches), f"for torch {record['torch']}, by {record.get('compiler')}"]
    return " ".join(parts) + (f" and nvcc {record['nvcc']}" if record.get("nvcc") else "") + f"; {record['reason']}"


def _wrong_answer(device: str) -> str:
    """Run `pack_bits` on the device and describe the failure, or return "" if its answer is right."""
    import torch

    from hashengine.ops import pack_bits, unpack_bits

    activations = torch.linspace(-1, 1, 64 * 17, dtype=torch.float32, device=device).view(17, 64)
    try:
        bits = unpack_bits(pack_bits(activations))
    except Exception as error:  # a kernel that does not fit the machine or the environment may raise anything
        return f"pack_bits fails on {device}: {_cause(error)}"
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
    import torch

    processors = _environment.logical_cpus()
    yield Check("threads", "ok", f"torch uses {torch.get_num_threads()} threads on {processors} logical processors")
    runtimes = openmp_runtimes()
    found = ", ".join(runtimes) or "none"
    if len(runtimes) > 1:
        found += "; their thread pools compete for the cores"
    yield Check("OpenMP", "ok" if len(runtimes) <= 1 else "warn", found)


def openmp_runtimes() -> list[str]:
    """The files of the OpenMP runtimes that this process has loaded."""
    maps = Path("/proc/self/maps").read_bytes()  # names of mapped files need not be UTF-8
    paths = {os.fsdecode(line.split(maxsplit=5)[-1].strip()) for line in maps.splitlines()}
    return sorted(path for path in paths if re.match(r"lib(gomp|omp|iomp5)\b", os.path.basename(path)))


def _gpus() -> Iterator[Check]:
    import torch

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
    import torch

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
    import torch

    try:
        torch.cuda.init()
    except Exception as error:  # torch raises RuntimeError, AssertionError and others
        return _cause(error)
    return "torch reports no error"


def _cause(error: Exception) -> str:
    """The first line of an error's message, or its type if it has none."""
    return (str(error).splitlines() or [repr(error)])[0]


def _compiler() -> list[Check]:
    compiler = _toolchain.find_compiler(os.environ)
    if isinstance(compiler, _toolchain.Missing):
        return [Check("C++ compiler", "missing", compiler.what, compiler.remedy)]
    return [Check("C++ compiler", "ok", _toolchain.version(compiler))]


def _nvcc(cuda: str | None) -> list[Check]:
    if not cuda:
        return []
    nvcc = _toolchain.find_nvcc(os.environ, cuda, _toolchain.wheel_homes(cuda))
    if isinstance(nvcc, _toolchain.Missing):
        return [Check("nvcc", "missing", nvcc.what, nvcc.remedy)]
    return [Check("nvcc", "ok", f"{nvcc.release} in {nvcc.home}")]


def _extras() -> list[Check]:
    return [_extra(module, extra, packages) for module, (extra, packages) in EXTRAS.items()]


def _extra(module: str, extra: str, packages: tuple[str, ...]) -> Check:
    """The check of an optional module, which is not imported: that would take seconds."""
    if find_spec(module) is None:
        return Check(module, "missing", f"part of the extra {extra!r}", f'pip install "hashengine[{extra}]"')
    torch_version, _ = _environment.torch_release()
    for package in packages:
        try:
            found, required = version(package), requires(package) or []
        except PackageNotFoundError:
            continue
        for requirement in required:
            pinned = re.match(r"torch\s*\(?==\s*([\d.]+)", requirement)
            if pinned and torch_version.split("+")[0] != pinned[1]:
                needs = f"{found}, which needs torch {pinned[1]}"
                remedy = f"reinstall it from the package index that torch {torch_version} came from"
                return Check(module, "warn", needs, remedy)
        return Check(module, "ok", found)
    return Check(module, "ok", "installed")
