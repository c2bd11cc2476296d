"""Builds the native module hashengine._C. pyproject.toml holds everything else about the package.

These environment variables control the build:

HASHENGINE_BUILD=auto (default)  Build what this machine can run: the CUDA module if torch has CUDA, a GPU is visible
                                 and an nvcc is found; otherwise the CPU module; without a C++ compiler, no module
                                 (the ops then run their plain-torch references).
HASHENGINE_BUILD=cpu | cuda      Build the CPU or the CUDA module, or fail with one line. cuda does not need a GPU.
TORCH_CUDA_ARCH_LIST             GPU architectures in torch's notation: "8.0 9.0a 12.0+PTX".
CUDA_HOME, CXX, MAX_JOBS         The CUDA toolkit, the C++ compiler, and the number of parallel compilations.
"""

import hashlib
import json
import logging
import os
import platform
import re
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, NamedTuple

from setuptools import Extension, setup

try:
    import torch
except ModuleNotFoundError:
    raise SystemExit("hashengine: the build needs torch; pip install torch, or build with isolation") from None
# On import, cpp_extension warns about the CUDA_HOME that it guesses. The guess is unused: main() sets CUDA_HOME.
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
from torch.utils import cpp_extension  # noqa: E402

ROOT = Path(__file__).resolve().parent
# Loaded by path, because `import hashengine` may find another installed version, or none.
spec = spec_from_file_location("_toolchain", ROOT / "hashengine" / "_toolchain.py")
toolchain = module_from_spec(spec)
spec.loader.exec_module(toolchain)

ARCHES = ("8.0", "8.6", "8.9", "9.0a", "10.0", "12.0")
BYTES_PER_JOB = 2 << 30  # compiling a binding takes about 1 GiB of memory; the rest is for other programs


class Plan(NamedTuple):
    """What to build, why, and with which tools."""

    build: str  # "none", "cpu" or "cuda"
    reason: str
    compiler: str = ""
    nvcc: toolchain.Nvcc | None = None
    arch_list: str = ""

    def summary(self) -> str:
        """One line: the decision, its reason, and how to change it."""
        what, otherwise = {
            "none": ("no native module", "HASHENGINE_BUILD=cpu makes this an error"),
            "cpu": ("the CPU module", "HASHENGINE_BUILD=cuda forces the CUDA module"),
            "cuda": (f"the CUDA module for {self.arch_list}", "HASHENGINE_BUILD=cpu forces the CPU module"),
        }[self.build]
        return f"hashengine: building {what}, because {self.reason}; {otherwise}"


def choose_arches(env: Mapping[str, str], nvcc: toolchain.Nvcc, capabilities: Sequence[tuple[int, int]]) -> str:
    """The architectures to compile for. The list is never empty, because an empty list crashes torch's build.

    TORCH_CUDA_ARCH_LIST decides if the user has set it. Otherwise, if there are GPUs and this nvcc supports all of
    them, the list contains their capabilities. Otherwise it contains every entry of ARCHES that this nvcc supports, and
    PTX for newer GPUs.
    """
    if given := env.get("TORCH_CUDA_ARCH_LIST", "").strip():
        return given
    names = [arch for arch in ARCHES if int(re.sub(r"\D", "", arch)) in nvcc.arches]
    seen = sorted({"9.0a" if gpu == (9, 0) else f"{gpu[0]}.{gpu[1]}" for gpu in capabilities})
    if seen and all(10 * major + minor in nvcc.arches for major, minor in capabilities):
        return " ".join(seen)
    # The driver can compile PTX for newer GPUs. PTX of 9.0a runs on 9.0 only, so the PTX of plain 9.0 is added.
    newest = names[-1].rstrip("a") + "+PTX"
    return " ".join([*(names if names[-1].endswith("a") else names[:-1]), newest])


def fall_back(requested: str, build: str, missing: toolchain.Missing, compiler: str = "") -> Plan:
    """Plan `build` because a tool is missing. Exit if the user requested a particular build."""
    if requested != "auto":
        raise SystemExit(f"hashengine: HASHENGINE_BUILD={requested} is not possible: {missing}")
    return Plan(build, str(missing), compiler)


def decide(
    env: Mapping[str, str],
    torch_cuda: str | None,
    gpus: Mapping[str, tuple[int, int]],
    wheels: Sequence[str] = (),
) -> Plan:
    """Decide what to build.

    Args:
        env: the environment variables.
        torch_cuda: torch.version.cuda.
        gpus: the compute capability of each GPU, by name.
        wheels: the result of toolchain.wheel_homes.
    """
    requested = env.get("HASHENGINE_BUILD") or "auto"
    if requested not in ("auto", "cpu", "cuda"):
        raise SystemExit(f"hashengine: HASHENGINE_BUILD must be auto, cpu or cuda, got {requested!r}")
    compiler = toolchain.find_compiler(env)
    if isinstance(compiler, toolchain.Missing):
        return fall_back(requested, "none", compiler)
    if requested == "cpu":
        return Plan("cpu", "HASHENGINE_BUILD=cpu requests it", compiler)
    if torch_cuda is None:
        nvcc = toolchain.Missing("this torch has no CUDA", "pip install a CUDA build of torch")
    elif requested == "auto" and not gpus:
        nvcc = toolchain.Missing("torch sees no GPU")
    else:
        nvcc = toolchain.find_nvcc(env, torch_cuda, wheels)
    if isinstance(nvcc, toolchain.Missing):
        return fall_back(requested, "cpu", nvcc, compiler)
    why = "HASHENGINE_BUILD=cuda requests it" if requested == "cuda" else f"this machine has {' and '.join(gpus)}"
    arches = choose_arches(env, nvcc, () if requested == "cuda" else tuple(gpus.values()))
    return Plan("cuda", f"{why} (nvcc {nvcc.release} in {nvcc.home})", compiler, nvcc, arches)


def sources(build: str) -> list[str]:
    """The source files of a build. No .cpp file has parts that are compiled in only one of the builds."""
    patterns = ["csrc/cpu/**/*.cpp", "csrc/binding/*.cpp"] + ["csrc/cuda/**/*.cu"] * (build == "cuda")
    files = sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))
    return [file for file in files if build == "cuda" or not file.endswith("_cuda.cpp")]


def cudart_folders(nvcc: toolchain.Nvcc, links: Path) -> list[str]:
    """Extra folders in which the linker finds libcudart.

    The wheel of the CUDA runtime has libcudart.so.13 but no libcudart.so, which -lcudart needs. In that case, a
    symbolic link libcudart.so is made in `links`, and `links` is returned.
    """
    libraries = sorted(Path(nvcc.home).glob("lib*/libcudart.so*"))
    if not libraries or any(library.name == "libcudart.so" for library in libraries):
        return []
    links.mkdir(parents=True, exist_ok=True)
    (links / "libcudart.so").unlink(missing_ok=True)
    (links / "libcudart.so").symlink_to(libraries[0])
    return [str(links)]


def extension(plan: Plan) -> Extension:
    """The extension module that a plan describes."""
    # -fopenmp is passed to the compiler but not to the linker: the module uses the OpenMP runtime that torch has
    # loaded. A second runtime would bring a second pool of threads.
    options = {
        "sources": sources(plan.build),
        "include_dirs": [str(ROOT / "csrc" / "include"), str(ROOT / "csrc")],
        "extra_compile_args": {
            # -Wpsabi warns that the instruction set determines how a function receives a vector type. That does not
            # matter here, because all functions in csrc/cpu/common/lanes.h are inlined.
            "cxx": ["-O3", "-fopenmp", "-fvisibility=hidden", "-g0", "-Wno-psabi"],
            "nvcc": ["-O3", "-lineinfo", "-Xcompiler=-fvisibility=hidden"],
        },
    }
    if plan.nvcc is None:
        return cpp_extension.CppExtension("hashengine._C", **options)
    library_dirs = cudart_folders(plan.nvcc, ROOT / "build" / f"cudart{plan.nvcc.release}")
    return cpp_extension.CUDAExtension("hashengine._C", library_dirs=library_dirs, **options)


def job_count() -> int:
    """How many files to compile in parallel: limited by the cores and by the available memory."""
    available = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    by_memory = int(available[1]) * 1024 // BYTES_PER_JOB if available else 1
    return max(1, min(len(os.sched_getaffinity(0)), by_memory))


class BuildNative(cpp_extension.BuildExtension):
    """Builds the module of a plan and writes _build.json next to it."""

    plan: Plan

    def run(self) -> None:
        print(self.plan.summary(), file=sys.stderr, flush=True)
        if self.plan.build == "none":
            self.extensions = []
        # Every build uses this folder, even if pip would use a temporary one, so that ninja compiles only what changed.
        # Each torch version has its own folder: ninja compares file times, and the headers of another version may be
        # older than an object file.
        name = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}-torch{torch.__version__}"
        self.build_temp = str(ROOT / "build" / name)
        super().run()
        module = Path(self.get_ext_fullpath("hashengine._C"))
        module.parent.mkdir(parents=True, exist_ok=True)
        for stale in module.parent.glob("_C.*so"):
            if self.plan.build == "none" or stale.name != module.name:
                stale.unlink()
        (module.parent / "_build.json").write_text(json.dumps(self.record(module), indent=2) + "\n")

    def record(self, module: Path) -> dict[str, Any]:
        """How the module was built, for hashengine/_native.py and `hashengine doctor`."""
        plan = self.plan
        content = module.read_bytes() if plan.build != "none" else b""
        return {
            "version": self.distribution.get_version(),
            "build": plan.build,
            "reason": plan.reason,
            "decision": plan.summary(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torch_cuda": torch.version.cuda,
            "compiler": toolchain.version(plan.compiler) if plan.compiler else None,
            "nvcc": plan.nvcc.release if plan.nvcc else None,
            "arch_list": re.split(r"[ ;]+", plan.arch_list) if plan.arch_list else [],
            "module": module.name,
            "size": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }


def main() -> None:
    """Decide what to build for this machine, and build it."""
    torch_cuda, devices = torch.version.cuda, range(torch.cuda.device_count() if torch.version.cuda else 0)
    gpus = {torch.cuda.get_device_name(device): torch.cuda.get_device_capability(device) for device in devices}
    plan = BuildNative.plan = decide(os.environ, torch_cuda, gpus, toolchain.wheel_homes(torch_cuda))
    if plan.compiler:
        os.environ["CXX"] = plan.compiler
    if plan.nvcc:
        os.environ["CUDA_HOME"] = cpp_extension.CUDA_HOME = plan.nvcc.home
        os.environ["TORCH_CUDA_ARCH_LIST"] = plan.arch_list
    os.environ.setdefault("MAX_JOBS", str(job_count()))
    # In an environment that is not activated, a ninja that was installed from a wheel is not on PATH.
    os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    setup(ext_modules=[extension(plan)], cmdclass={"build_ext": BuildNative})


if __name__ == "__main__":
    main()
