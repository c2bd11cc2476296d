"""The decisions of setup.py on simulated machines with shell scripts as compilers, and builds of a small module."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.helpers.paths import ROOT

pytest.importorskip("setuptools")

TOY_MODULE = """
#include <pybind11/pybind11.h>
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { m.def("answer", [] { return 42; }); }
"""
# Releases of CUDA and the architectures for which their nvcc compiles.
CUDA_12_6 = ("12.6", (75, 80, 86, 87, 89, 90))
CUDA_13_0 = ("13.0", (75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121))


@pytest.fixture(scope="module")
def setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hashengine_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_script(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def make_toolkit(
    home: Path, release: str = "13.0", arches: tuple[int, ...] = CUDA_13_0[1], compiles: bool = True
) -> Path:
    """A CUDA toolkit with an nvcc that answers the queries of setup.py."""
    listing = "\\n".join(f"compute_{arch}" for arch in arches)
    write_script(
        home / "bin" / "nvcc",
        f"""case "$1" in
            --dryrun) echo '#$ _HERE_={home}/bin' >&2;;
            --version) echo 'Cuda compilation tools, release {release}, V{release}.88';;
            --list-gpu-arch) printf '{listing}\\n';;
            *) {"exit 0" if compiles else "echo 'ptxas fatal : Unsupported .version 9.5'; exit 255"};;
        esac""",
    )
    return home


class Machine:
    """A simulated machine: a PATH with a C++ compiler. A test adds the other tools that it needs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.env = {"PATH": str(self.bin)}
        write_script(self.bin / "c++", "exit 0")

    def toolkit(self, name: str = "cuda", **options: Any) -> Path:
        return make_toolkit(self.folder / name, **options)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert message.startswith("hashengine: ") and "\n" not in message
    return message


# HASHENGINE_BUILD


@pytest.mark.parametrize("requested", ["gpu", "CUDA", "1"])
def test_an_unknown_build_is_refused(setup: ModuleType, machine: Machine, requested: str) -> None:
    with pytest.raises(SystemExit) as error:
        setup.decide({**machine.env, "HASHENGINE_BUILD": requested}, None, {})
    assert f"must be auto, cpu or cuda, got {requested!r}" in one_line(error)


def test_cpu_can_be_requested_on_a_machine_with_a_gpu(setup: ModuleType, machine: Machine) -> None:
    env = {**machine.env, "HASHENGINE_BUILD": "cpu", "CUDA_HOME": str(machine.toolkit())}
    plan = setup.decide(env, "13.2", {"NVIDIA H200": (9, 0)})
    assert (plan.build, plan.compiler, plan.nvcc) == ("cpu", "c++", None)
    assert "HASHENGINE_BUILD=cuda" in plan.summary()


@pytest.mark.parametrize(
    ("torch_cuda", "gpus", "reason"),
    [
        (None, {}, "this torch has no CUDA"),
        ("13.2", {}, "torch sees no GPU"),
        ("13.2", {"NVIDIA H200": (9, 0)}, "no nvcc is found"),
    ],
)
def test_auto_builds_for_the_cpu_and_reports_why(
    setup: ModuleType, machine: Machine, torch_cuda: str | None, gpus: dict, reason: str
) -> None:
    env = {**machine.env, "CUDA_HOME": str(machine.folder / "nowhere")}
    plan = setup.decide(env, torch_cuda, gpus)
    assert plan.build == "cpu"
    assert reason in plan.summary() and "HASHENGINE_BUILD=cuda" in plan.summary() and "\n" not in plan.summary()


def test_auto_builds_for_the_gpus_of_the_machine(setup: ModuleType, machine: Machine) -> None:
    plan = setup.decide({**machine.env, "CUDA_HOME": str(machine.toolkit())}, "13.2", {"NVIDIA H200": (9, 0)})
    assert (plan.build, plan.arch_list) == ("cuda", "9.0a")
    assert "NVIDIA H200" in plan.summary() and "HASHENGINE_BUILD=cpu" in plan.summary()


def test_cuda_can_be_built_without_a_gpu(setup: ModuleType, machine: Machine) -> None:
    env = {**machine.env, "HASHENGINE_BUILD": "cuda", "CUDA_HOME": str(machine.toolkit())}
    plan = setup.decide(env, "13.2", {})
    assert (plan.build, plan.arch_list) == ("cuda", "8.0 8.6 8.9 9.0a 10.0 12.0+PTX")


def test_requested_cuda_fails_if_torch_has_none(setup: ModuleType, machine: Machine) -> None:
    env = {**machine.env, "HASHENGINE_BUILD": "cuda", "CUDA_HOME": str(machine.toolkit())}
    with pytest.raises(SystemExit) as error:
        setup.decide(env, None, {})
    assert "HASHENGINE_BUILD=cuda is not possible: this torch has no CUDA" in one_line(error)


# The C++ compiler


@pytest.mark.parametrize("cxx", [None, "/nonexistent/g++"])
def test_without_a_compiler_auto_builds_nothing_and_a_request_fails(
    setup: ModuleType, tmp_path: Path, cxx: str | None
) -> None:
    env = {"PATH": str(tmp_path)} | ({"CXX": cxx} if cxx else {})
    plan = setup.decide(env, "13.2", {"NVIDIA H200": (9, 0)})
    assert plan.build == "none" and "no C++ compiler is found" in plan.summary()
    for requested in ("cpu", "cuda"):
        with pytest.raises(SystemExit) as error:
            setup.decide({**env, "HASHENGINE_BUILD": requested}, "13.2", {})
        assert f"HASHENGINE_BUILD={requested} is not possible: no C++ compiler is found" in one_line(error)


def test_missing_python_headers_are_reported_with_their_package(setup: ModuleType, machine: Machine) -> None:
    write_script(machine.bin / "c++", "echo '<stdin>:1:10: fatal error: Python.h: No such file' >&2; exit 1")
    plan = setup.decide(machine.env, None, {})
    assert plan.build == "none"
    assert "fatal error: Python.h" in plan.reason and "apt-get install python3-dev" in plan.reason


def test_the_compiler_may_be_a_command_with_arguments(setup: ModuleType, machine: Machine) -> None:
    write_script(machine.bin / "ccache", '[ "$1" = c++ ]')
    assert setup.toolchain.find_compiler({**machine.env, "CXX": "ccache c++"}) == "ccache c++"


# nvcc


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
def test_nvcc_is_found_through_the_environment_variable(setup: ModuleType, machine: Machine, variable: str) -> None:
    home = machine.toolkit()
    nvcc = setup.toolchain.find_nvcc({**machine.env, variable: str(home)}, "13.2", [])
    assert nvcc == (str(home), *CUDA_13_0)


def test_nvcc_on_path_may_be_a_link(setup: ModuleType, machine: Machine) -> None:
    home = machine.toolkit()
    (machine.bin / "nvcc").symlink_to(home / "bin" / "nvcc")
    assert setup.toolchain.find_nvcc(machine.env, "13.2", []).home == str(home)


def test_nvcc_on_path_may_be_a_wrapper_script(setup: ModuleType, machine: Machine) -> None:
    home = machine.toolkit()
    write_script(machine.bin / "nvcc", f'exec {home}/bin/nvcc "$@"')
    assert setup.toolchain.find_nvcc(machine.env, "13.2", []).home == str(home)


def test_nvcc_in_the_wheels_is_found_if_path_has_none(setup: ModuleType, machine: Machine) -> None:
    home = machine.toolkit("site-packages/nvidia/cu13")
    assert setup.toolchain.find_nvcc(machine.env, "13.2", [str(home)]).home == str(home)


def test_nvcc_in_the_wheels_is_preferred_to_one_of_another_major_version_on_path(
    setup: ModuleType, machine: Machine
) -> None:
    (machine.bin / "nvcc").symlink_to(machine.toolkit("old", release="12.6") / "bin" / "nvcc")
    home = machine.toolkit("site-packages/nvidia/cu13")
    assert setup.toolchain.find_nvcc(machine.env, "13.2", [str(home)]).home == str(home)


def test_cuda_home_is_not_overridden_by_an_nvcc_on_path(setup: ModuleType, machine: Machine) -> None:
    (machine.bin / "nvcc").symlink_to(machine.toolkit() / "bin" / "nvcc")
    old = machine.toolkit("old", release="12.6")
    env = {**machine.env, "CUDA_HOME": str(old), "HASHENGINE_BUILD": "cuda"}
    with pytest.raises(SystemExit) as error:
        setup.decide(env, "13.2", {})
    assert f"the nvcc in {old} is CUDA 12.6, but torch is built for 13.2" in one_line(error)
    assert 'pip install "nvidia-cuda-nvcc==13.2.*"' in one_line(error)


def test_an_nvcc_that_cannot_compile_counts_as_missing(setup: ModuleType, machine: Machine) -> None:
    home = machine.toolkit(compiles=False)
    missing = setup.toolchain.find_nvcc({**machine.env, "CUDA_HOME": str(home)}, "13.2", [])
    assert isinstance(missing, setup.toolchain.Missing)
    assert "ptxas fatal : Unsupported .version 9.5" in missing.what


def test_wheel_homes_are_those_of_the_major_cuda_version_of_torch(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path / "nvidia")])
    monkeypatch.setattr(setup.toolchain, "find_spec", lambda name: spec if name == "nvidia" else None)
    assert setup.toolchain.wheel_homes(None) == []
    assert setup.toolchain.wheel_homes("13.2") == [str(tmp_path / "nvidia" / "cu13")]


def test_cudart_in_the_wheel_gets_a_link_without_a_version(setup: ModuleType, machine: Machine, tmp_path: Path) -> None:
    home = machine.toolkit()
    library = home / "lib" / "libcudart.so.13"
    library.parent.mkdir()
    library.touch()
    nvcc = setup.toolchain.Nvcc(str(home), *CUDA_13_0)
    for _ in range(2):  # the second build finds the link of the first
        [folder] = setup.cudart_folders(nvcc, tmp_path / "links")
        assert Path(folder, "libcudart.so").resolve() == library
    (home / "lib" / "libcudart.so").touch()
    assert setup.cudart_folders(nvcc, tmp_path / "links") == []


# Architectures


@pytest.mark.parametrize(
    ("toolkit", "capabilities", "expected"),
    [
        (CUDA_13_0, [], "8.0 8.6 8.9 9.0a 10.0 12.0+PTX"),  # no GPU: all architectures
        # PTX of 9.0a runs on 9.0 only, so PTX is made for plain 9.0.
        (CUDA_12_6, [], "8.0 8.6 8.9 9.0a 9.0+PTX"),
        (CUDA_13_0, [(9, 0)], "9.0a"),  # one GPU
        (CUDA_13_0, [(8, 0), (9, 0), (8, 0)], "8.0 9.0a"),  # three GPUs, two of them alike
        # This nvcc does not know the GPU, so it makes PTX, which the driver compiles for the GPU.
        (CUDA_12_6, [(12, 0)], "8.0 8.6 8.9 9.0a 9.0+PTX"),
    ],
)
def test_arch_list_of_a_toolkit_and_gpus(setup: ModuleType, toolkit: tuple, capabilities: list, expected: str) -> None:
    assert setup.choose_arches({}, setup.toolchain.Nvcc("", *toolkit), capabilities) == expected


def test_the_arch_list_of_the_user_is_kept(setup: ModuleType) -> None:
    env = {"TORCH_CUDA_ARCH_LIST": "8.0 9.0a"}
    assert setup.choose_arches(env, setup.toolchain.Nvcc("", *CUDA_13_0), [(12, 0)]) == "8.0 9.0a"


def test_torch_accepts_every_arch_list(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.cpp_extension import _get_cuda_arch_flags

    for toolkit in (CUDA_12_6, CUDA_13_0):
        arches = setup.choose_arches({}, setup.toolchain.Nvcc("", *toolkit), [])
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", arches)
        flags = _get_cuda_arch_flags()
        assert len(flags) == len(arches.split()) + arches.count("+PTX")


# The extension


def test_the_cuda_build_adds_only_cuda_sources(setup: ModuleType) -> None:
    cpu, cuda = setup.sources("cpu"), setup.sources("cuda")
    assert "csrc/binding/module.cpp" in cpu and set(cpu) < set(cuda)
    assert all(file.endswith(("_cuda.cpp", ".cu")) for file in set(cuda) - set(cpu))
    assert not [file for file in cpu if "cuda" in file]


def test_flags_choose_no_language_standard_no_instruction_set_and_no_openmp_library(setup: ModuleType) -> None:
    extension = setup.extension(setup.Plan("cpu", "", "c++"))
    flags = " ".join(extension.extra_compile_args["cxx"] + extension.extra_compile_args["nvcc"])
    assert not re.search(r"-std|-march|-mavx|fast-math", flags)
    assert "-fopenmp" not in extension.extra_link_args and "-lgomp" not in extension.extra_link_args


def test_cores_and_memory_limit_the_number_of_jobs(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 <= setup.job_count() <= len(os.sched_getaffinity(0))
    monkeypatch.setattr(setup, "BYTES_PER_JOB", 1 << 60)
    assert setup.job_count() == 1


# Real builds of a small module, in a copy of the project


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout"
    ignore = shutil.ignore_patterns("_C*", "_build.json", "__pycache__")
    shutil.copytree(ROOT / "hashengine", folder / "hashengine", ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "csrc" / "binding").mkdir(parents=True)
    (folder / "csrc" / "binding" / "module.cpp").write_text(TOY_MODULE)
    return folder


def build(checkout: Path, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name not in ("HASHENGINE_BUILD", "CXX")}
    return subprocess.run(
        [sys.executable, *command], cwd=checkout, env={**clean, **env}, capture_output=True, text=True, timeout=600
    )


@pytest.mark.slow
def test_a_wheel_contains_the_module_and_its_record(checkout: Path) -> None:
    pytest.importorskip("pip")
    command = ["-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", "dist", "."]
    done = build(checkout, *command, HASHENGINE_BUILD="cpu")
    assert done.returncode == 0, done.stderr
    [wheel] = (checkout / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        record = json.loads(archive.read("hashengine/_build.json"))
    assert [name for name in names if re.fullmatch(r"hashengine/_C\..*\.so", name)]
    assert (record["build"], record["python"].split(".")[:2]) == ("cpu", [str(part) for part in sys.version_info[:2]])


@pytest.mark.slow
def test_a_build_in_place_leaves_no_stale_module(checkout: Path) -> None:
    in_place = ["setup.py", "build_ext", "--inplace"]
    done = build(checkout, *in_place, HASHENGINE_BUILD="cpu")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("hashengine: building the CPU module, because HASHENGINE_BUILD=cpu requests it") == 1
    assert len(list((checkout / "hashengine").glob("_C.*so"))) == 1

    done = build(checkout, *in_place, CXX="/nonexistent/c++")
    assert done.returncode == 0, done.stderr
    assert not list((checkout / "hashengine").glob("_C.*so"))
    assert json.loads((checkout / "hashengine" / "_build.json").read_text())["build"] == "none"

    done = build(checkout, *in_place, CXX="/nonexistent/c++", HASHENGINE_BUILD="cpu")
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1].startswith("hashengine: HASHENGINE_BUILD=cpu is not possible: no C++")
