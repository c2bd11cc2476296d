"""Builds hashengine._C; everything else about the package is in pyproject.toml.

HASHENGINE_BUILD=auto (default)  What this machine can run: CUDA for the GPU it sees, where torch has CUDA and an nvcc
                                 is found; else CPU; without a C++ compiler nothing, and plain torch answers.
HASHENGINE_BUILD=cpu | cuda      That module, or a failure in one line. cuda needs no GPU.
TORCH_CUDA_ARCH_LIST             GPU architectures, as torch writes them: "8.0 9.0a 12.0+PTX".
CUDA_HOME, CXX, MAX_JOBS         As everywhere.
"""

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
from typing import NamedTuple

from setuptools import Extension, setup

try:
    import torch
except ModuleNotFoundError:
    raise SystemExit("hashengine: the build needs torch: pip install torch, or build with isolation") from None
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # at import it warns of a CUDA_HOME it guessed
from torch.utils import cpp_extension  # noqa: E402

ROOT = Path(__file__).resolve().parent
spec = spec_from_file_location("_toolchain", ROOT / "hashengine" / "_toolchain.py")
toolchain = module_from_spec(spec)  # by path: importing hashengine would load the module that is to be built
spec.loader.exec_module(toolchain)

ARCHES = ("8.0", "8.6", "8.9", "9.0a", "10.0", "12.0")
BYTES_PER_JOB = 2 << 30  # a binding takes about 1 GB to compile; the rest is for the other programs of the machine


class Plan(NamedTuple):
    build: str  # "none", "cpu" or "cuda"
    reason: str
    compiler: str = ""
    nvcc: toolchain.Nvcc | None = None
    arch_list: str = ""

    def line(self) -> str:
        what, otherwise = {
            "none": ("no native module", "HASHENGINE_BUILD=cpu makes this an error"),
            "cpu": ("the CPU module", "HASHENGINE_BUILD=cuda forces the CUDA module"),
            "cuda": (f"the CUDA module for {self.arch_list}", "HASHENGINE_BUILD=cpu forces the CPU module"),
        }[self.build]
        return f"hashengine: building {what}, because {self.reason}; {otherwise}"


def choose_arches(env: Mapping[str, str], nvcc: toolchain.Nvcc, capabilities: Sequence[tuple[int, int]]) -> str:
    """The user's list, else the GPUs', else all that this nvcc can make of ARCHES. (torch crashes on an empty list.)"""
    if given := env.get("TORCH_CUDA_ARCH_LIST", "").strip():
        return given
    names = [arch for arch in ARCHES if int(re.sub(r"\D", "", arch)) in nvcc.arches]
    seen = sorted({"9.0a" if gpu == (9, 0) else f"{gpu[0]}.{gpu[1]}" for gpu in capabilities})
    if seen and all(10 * major + minor in nvcc.arches for major, minor in capabilities):
        return " ".join(seen)
    # PTX for GPUs that come later; that of 9.0a runs on no other, so there plain 9.0 is added.
    later = names[-1].rstrip("a") + "+PTX"
    return " ".join([*(names if names[-1].endswith("a") else names[:-1]), later])


def give_up(asked: str, build: str, missing: toolchain.Missing, compiler: str = "") -> Plan:
    if asked != "auto":
        raise SystemExit(f"hashengine: HASHENGINE_BUILD={asked} cannot be done: {missing}")
    return Plan(build, str(missing), compiler)


def decide(env: Mapping[str, str], torch_cuda: str | None, gpus: Mapping[str, tuple[int, int]], wheels=()) -> Plan:
    """What to build. torch_cuda: torch.version.cuda; gpus: capability by name; wheels: see toolchain.wheel_homes."""
    asked = env.get("HASHENGINE_BUILD") or "auto"
    if asked not in ("auto", "cpu", "cuda"):
        raise SystemExit(f"hashengine: HASHENGINE_BUILD must be auto, cpu or cuda, got {asked!r}")
    compiler = toolchain.find_compiler(env)
    if isinstance(compiler, toolchain.Missing):
        return give_up(asked, "none", compiler)
    if asked == "cpu":
        return Plan("cpu", "HASHENGINE_BUILD=cpu asks for it", compiler)
    if torch_cuda is None:
        nvcc = toolchain.Missing("this torch has no CUDA", "pip install a CUDA build of torch")
    elif asked == "auto" and not gpus:
        nvcc = toolchain.Missing("torch sees no GPU")
    else:
        nvcc = toolchain.find_nvcc(env, torch_cuda, wheels)
    if isinstance(nvcc, toolchain.Missing):
        return give_up(asked, "cpu", nvcc, compiler)
    why = "HASHENGINE_BUILD=cuda asks for it" if asked == "cuda" else f"this machine has {' and '.join(gpus)}"
    arches = choose_arches(env, nvcc, () if asked == "cuda" else tuple(gpus.values()))
    return Plan("cuda", f"{why} (nvcc {nvcc.release} in {nvcc.home})", compiler, nvcc, arches)


def sources(build: str) -> list[str]:
    """The file list is the switch between the builds; no source asks which one it is in."""
    patterns = ["csrc/cpu/*.cpp", "csrc/binding/*.cpp"] + ["csrc/cuda/*.cu"] * (build == "cuda")
    files = sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))
    return [file for file in files if build == "cuda" or not file.endswith("_cuda.cpp")]


def cudart_folders(nvcc: toolchain.Nvcc, links: Path) -> list[str]:
    """The runtime wheel has libcudart.so.13 and no libcudart.so, so there -lcudart needs a link to it."""
    libraries = sorted(Path(nvcc.home).glob("lib*/libcudart.so*"))
    if not libraries or any(library.name == "libcudart.so" for library in libraries):
        return []
    links.mkdir(parents=True, exist_ok=True)
    (links / "libcudart.so").unlink(missing_ok=True)
    (links / "libcudart.so").symlink_to(libraries[0])
    return [str(links)]


def extension(plan: Plan) -> Extension:
    # -fopenmp to compile and not to link: the OpenMP runtime is the one that torch has loaded, under whatever name, so
    # that there is never a second pool of threads.
    options = {
        "sources": sources(plan.build),
        "include_dirs": [str(ROOT / "csrc" / "include")],
        "extra_compile_args": {
            # psabi: how vectors would be passed through calls; csrc/cpu/lanes.h inlines all of them.
            "cxx": ["-O3", "-fopenmp", "-fvisibility=hidden", "-g0", "-Wno-psabi"],
            "nvcc": ["-O3", "-lineinfo", "-Xcompiler=-fvisibility=hidden"],
        },
    }
    if plan.nvcc is None:
        return cpp_extension.CppExtension("hashengine._C", **options)
    library_dirs = cudart_folders(plan.nvcc, ROOT / "build" / f"cudart{plan.nvcc.release}")
    return cpp_extension.CUDAExtension("hashengine._C", library_dirs=library_dirs, **options)


def job_count() -> int:
    available = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    by_memory = int(available[1]) * 1024 // BYTES_PER_JOB if available else 1
    return max(1, min(len(os.sched_getaffinity(0)), by_memory))


class BuildNative(cpp_extension.BuildExtension):
    plan: Plan

    def run(self):
        print(self.plan.line(), file=sys.stderr, flush=True)
        if self.plan.build == "none":
            self.extensions = []
        # Kept between builds, also where pip would build in a folder of its own, so that ninja compiles only what
        # changed; but never shared between torch releases, whose headers may be older than an object file.
        name = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}-torch{torch.__version__}"
        self.build_temp = str(ROOT / "build" / name)
        super().run()
        module = Path(self.get_ext_fullpath("hashengine._C"))
        module.parent.mkdir(parents=True, exist_ok=True)
        for stale in module.parent.glob("_C.*so"):
            if self.plan.build == "none" or stale.name != module.name:
                stale.unlink()
        (module.parent / "_build.json").write_text(json.dumps(self.record(), indent=2) + "\n")

    def record(self) -> dict:
        """For hashengine/_native.py and `hashengine doctor`."""
        plan = self.plan
        return {
            "version": self.distribution.get_version(),
            "build": plan.build,
            "reason": plan.reason,
            "decision": plan.line(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torch_cuda": torch.version.cuda,
            "compiler": toolchain.version(plan.compiler) if plan.compiler else None,
            "nvcc": plan.nvcc.release if plan.nvcc else None,
            "arch_list": re.split(r"[ ;]+", plan.arch_list) if plan.arch_list else [],
        }


def main() -> None:
    torch_cuda, devices = torch.version.cuda, range(torch.cuda.device_count() if torch.version.cuda else 0)
    gpus = {torch.cuda.get_device_name(device): torch.cuda.get_device_capability(device) for device in devices}
    plan = BuildNative.plan = decide(os.environ, torch_cuda, gpus, toolchain.wheel_homes(torch_cuda))
    if plan.compiler:
        os.environ["CXX"] = plan.compiler
    if plan.nvcc:
        os.environ["CUDA_HOME"] = cpp_extension.CUDA_HOME = plan.nvcc.home
        os.environ["TORCH_CUDA_ARCH_LIST"] = plan.arch_list
    os.environ.setdefault("MAX_JOBS", str(job_count()))
    # ninja from a wheel is off PATH in an environment that is used without being activated.
    os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    setup(ext_modules=[extension(plan)], cmdclass={"build_ext": BuildNative})


if __name__ == "__main__":
    main()
