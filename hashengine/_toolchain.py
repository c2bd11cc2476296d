"""Finds a working C++ compiler and a working nvcc, for setup.py (which loads this file by path) and for the doctor."""

import os
import re
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

# The wheels that nvcc needs in addition to those that torch installs. All must be of one release. pip does not ensure
# that, because the wheel of nvcc requires some of the others without a version.
NVCC_WHEELS = ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-cccl")


class Missing(NamedTuple):
    """A tool that was not found or does not work, and the command or advice that helps."""

    what: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.what}: {self.remedy}" if self.remedy else self.what


class Nvcc(NamedTuple):
    """A working nvcc."""

    home: str
    release: str  # "13.0"
    arches: tuple[int, ...]  # ascending; 90 stands for compute_90


def run(command: Sequence[str], stdin: str = "") -> tuple[int, str]:
    """The exit status of a command and everything that it prints; the status is 127 if it cannot be started."""
    try:
        done = subprocess.run(command, input=stdin.encode(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except OSError as error:
        return 127, str(error)
    return done.returncode, done.stdout.decode(errors="backslashreplace")  # a compiler may print any bytes


def version(program: str) -> str:
    """The first line that `program --version` prints."""
    return run([*shlex.split(program), "--version"])[1].partition("\n")[0]


def find_compiler(env: Mapping[str, str]) -> str | Missing:
    """The command of a C++ compiler that finds Python.h, OpenMP and the C++ library; CXX if that variable is set."""
    names = [env["CXX"]] if env.get("CXX") else ["c++", "g++"]
    for compiler in names:
        try:
            program, *arguments = shlex.split(compiler)
        except ValueError:  # an open quotation mark, or only blanks
            return Missing(f"CXX is {compiler!r}, which is no command", "unset CXX, or set it to a C++ compiler")
        if path := shutil.which(program, path=env.get("PATH")):
            break
    else:
        return Missing(f"no C++ compiler is found (tried {', '.join(names)})", "apt-get install g++")
    options = ["-x", "c++", "-fsyntax-only", "-fopenmp", f"-I{sysconfig.get_path('include')}", "-"]
    source = "#include <Python.h>\n#include <omp.h>\n#include <vector>\n"
    status, output = run([path, *arguments, *options], source)
    if status:
        remedy = "apt-get install python3-dev" if "Python.h" in output else ""
        return Missing(f"{compiler} fails ({first_error(output)})", remedy)
    return compiler


def first_error(output: str) -> str:
    """The first line of a compiler's output that reports an error, or the last line if none does."""
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["it prints nothing"]
    return next((line for line in lines if re.search(r"\b(error|fatal)\b", line)), lines[-1])


def query_nvcc(program: str) -> Nvcc | None:
    """Run nvcc to find out its home, release and architectures; None if it does not print its home and its release.

    The program on PATH is often a link or a wrapper script. Therefore home is the folder that nvcc itself reports.
    """
    here = re.search(r"_HERE_=(.+)", run([program, "--dryrun", "-v", "any.cu"])[1])
    release = re.search(r"release (\d+\.\d+)", run([program, "--version"])[1])
    if not here or not release:
        return None
    arches = sorted(map(int, re.findall(r"compute_(\d+)", run([program, "--list-gpu-arch"])[1])))
    return Nvcc(os.path.dirname(os.path.realpath(here[1].strip())), release[1], tuple(arches))


def nvcc_fault(nvcc: Nvcc) -> str:
    """Why nvcc cannot compile a small kernel, or "" if it can.

    nvcc fails, for example, if wheels are missing, if their releases differ, or if the host compiler is too new.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cu")
        source.write_text("#include <cuda_fp16.h>\n__global__ void store(int* p) { *p = 1; }\n")
        status, output = run([f"{nvcc.home}/bin/nvcc", "-cubin", str(source), "-o", f"{folder}/probe.cubin"])
    return f"fails ({first_error(output)})" if status else ""


def wheel_homes(torch_cuda: str | None) -> list[str]:
    """The folders where the nvidia-* wheels install the toolkit of torch's CUDA, such as site-packages/nvidia/cu13."""
    spec = find_spec("nvidia")
    if spec is None or torch_cuda is None:
        return []
    return [os.path.join(folder, f"cu{torch_cuda.split('.')[0]}") for folder in spec.submodule_search_locations or ()]


def find_nvcc(env: Mapping[str, str], torch_cuda: str, wheels: Sequence[str]) -> Nvcc | Missing:
    """A working nvcc of the major version of `torch_cuda`.

    If CUDA_HOME or CUDA_PATH is set, only the nvcc there is tried. Otherwise the one on PATH, those in the folders
    `wheels` and the one in /usr/local/cuda are tried in this order.
    """
    home = env.get("CUDA_HOME") or env.get("CUDA_PATH")
    programs = [os.path.join(folder, "bin", "nvcc") for folder in ([home] if home else [*wheels, "/usr/local/cuda"])]
    if not home:
        programs.insert(0, shutil.which("nvcc", path=env.get("PATH")) or "")
    major = torch_cuda.split(".")[0]
    faults = []
    for nvcc in filter(None, map(query_nvcc, filter(None, programs))):
        if nvcc.release.split(".")[0] != major:
            fault = f"is CUDA {nvcc.release}, but torch is built for {torch_cuda}"
        else:
            fault = nvcc_fault(nvcc)
        if not fault:
            return nvcc
        faults.append(f"the nvcc in {nvcc.home} {fault}")
    what = faults[0] if faults else f"no nvcc is found in {home or 'PATH, the nvidia wheels or /usr/local/cuda'}"
    remedy = f"set CUDA_HOME to a CUDA {major} toolkit"
    if int(major) >= 13:  # the wheels of CUDA 12 do not contain nvcc
        packages = " ".join(f'"{name}=={torch_cuda}.*"' for name in NVCC_WHEELS)
        remedy += f", or pip install {packages} and build with --no-build-isolation"
    return Missing(what, remedy)
