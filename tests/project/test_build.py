"""What setup.py decides to build, on machines made of shell scripts; and, marked slow, what it really builds."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

pytest.importorskip("setuptools")

TOY_MODULE = """
#include <pybind11/pybind11.h>
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { m.def("answer", [] { return 42; }); }
"""
CUDA_12_6 = ("12.6", (75, 80, 86, 87, 89, 90))
CUDA_13_0 = ("13.0", (75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121))


@pytest.fixture(scope="module")
def setup():
    spec = importlib.util.spec_from_file_location("hashengine_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_script(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def make_toolkit(home: Path, release="13.0", arches=CUDA_13_0[1], compiles=True) -> Path:
    """A CUDA toolkit whose nvcc answers what setup.py asks."""
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
    """A PATH with a C++ compiler, to which a test adds what it needs."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.bin = folder / "bin"
        self.env = {"PATH": str(self.bin)}
        write_script(self.bin / "c++", "exit 0")

    def toolkit(self, name="cuda", **options) -> Path:
        return make_toolkit(self.folder / name, **options)


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def one_line(error) -> str:
    message = str(error.value)
    assert message.startswith("hashengine: ") and "\n" not in message
    return message


# What is asked for


@pytest.mark.parametrize("asked", ["gpu", "CUDA", "1"])
def test_unknown_build_is_refused(setup, machine, asked):
    with pytest.raises(SystemExit) as error:
        setup.decide({**machine.env, "HASHENGINE_BUILD": asked}, None, {})
    assert f"must be auto, cpu or cuda, got {asked!r}" in one_line(error)


def test_cpu_is_built_when_asked_for_beside_a_gpu(setup, machine):
    env = {**machine.env, "HASHENGINE_BUILD": "cpu", "CUDA_HOME": str(machine.toolkit())}
    plan = setup.decide(env, "13.2", {"NVIDIA H200": (9, 0)})
    assert (plan.build, plan.compiler, plan.nvcc) == ("cpu", "c++", None)
    assert "HASHENGINE_BUILD=cuda" in plan.line()


@pytest.mark.parametrize(
    ("torch_cuda", "gpus", "reason"),
    [
        (None, {}, "this torch has no CUDA"),
        ("13.2", {}, "torch sees no GPU"),
        ("13.2", {"NVIDIA H200": (9, 0)}, "no nvcc is found"),
    ],
)
def test_auto_builds_for_the_cpu_and_says_why(setup, machine, torch_cuda, gpus, reason):
    env = {**machine.env, "CUDA_HOME": str(machine.folder / "nowhere")}
    plan = setup.decide(env, torch_cuda, gpus)
    assert plan.build == "cpu"
    assert reason in plan.line() and "HASHENGINE_BUILD=cuda" in plan.line() and "\n" not in plan.line()


def test_auto_builds_for_the_gpu_that_is_seen(setup, machine):
    plan = setup.decide({**machine.env, "CUDA_HOME": str(machine.toolkit())}, "13.2", {"NVIDIA H200": (9, 0)})
    assert (plan.build, plan.arch_list) == ("cuda", "9.0a")
    assert "NVIDIA H200" in plan.line() and "HASHENGINE_BUILD=cpu" in plan.line()


def test_cuda_needs_no_gpu(setup, machine):
    env = {**machine.env, "HASHENGINE_BUILD": "cuda", "CUDA_HOME": str(machine.toolkit())}
    plan = setup.decide(env, "13.2", {})
    assert (plan.build, plan.arch_list) == ("cuda", "8.0 8.6 8.9 9.0a 10.0 12.0+PTX")


def test_forced_cuda_fails_where_torch_has_none(setup, machine):
    env = {**machine.env, "HASHENGINE_BUILD": "cuda", "CUDA_HOME": str(machine.toolkit())}
    with pytest.raises(SystemExit) as error:
        setup.decide(env, None, {})
    assert "HASHENGINE_BUILD=cuda cannot be done: this torch has no CUDA" in one_line(error)


# The C++ compiler


@pytest.mark.parametrize("cxx", [None, "/nonexistent/g++"])
def test_without_a_compiler_auto_builds_nothing_and_the_others_fail(setup, tmp_path, cxx):
    env = {"PATH": str(tmp_path)} | ({"CXX": cxx} if cxx else {})
    plan = setup.decide(env, "13.2", {"NVIDIA H200": (9, 0)})
    assert plan.build == "none" and "no C++ compiler is found" in plan.line()
    for asked in ("cpu", "cuda"):
        with pytest.raises(SystemExit) as error:
            setup.decide({**env, "HASHENGINE_BUILD": asked}, "13.2", {})
        assert f"HASHENGINE_BUILD={asked} cannot be done: no C++ compiler is found" in one_line(error)


def test_a_compiler_without_python_headers_names_their_package(setup, machine):
    write_script(machine.bin / "c++", "echo '<stdin>:1:10: fatal error: Python.h: No such file' >&2; exit 1")
    plan = setup.decide(machine.env, None, {})
    assert plan.build == "none"
    assert "fatal error: Python.h" in plan.reason and "apt-get install python3-dev" in plan.reason


def test_the_compiler_may_be_a_command_with_arguments(setup, machine):
    write_script(machine.bin / "ccache", '[ "$1" = c++ ]')
    assert setup.toolchain.find_compiler({**machine.env, "CXX": "ccache c++"}) == "ccache c++"


# nvcc


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
def test_nvcc_of_the_environment_variable(setup, machine, variable):
    home = machine.toolkit()
    nvcc = setup.toolchain.find_nvcc({**machine.env, variable: str(home)}, "13.2", [])
    assert nvcc == (str(home), *CUDA_13_0)


def test_nvcc_on_path_is_followed_through_a_link(setup, machine):
    home = machine.toolkit()
    (machine.bin / "nvcc").symlink_to(home / "bin" / "nvcc")
    assert setup.toolchain.find_nvcc(machine.env, "13.2", []).home == str(home)


def test_nvcc_on_path_is_followed_through_a_script(setup, machine):
    home = machine.toolkit()
    write_script(machine.bin / "nvcc", f'exec {home}/bin/nvcc "$@"')
    assert setup.toolchain.find_nvcc(machine.env, "13.2", []).home == str(home)


def test_nvcc_of_the_wheels_is_found_without_one_on_path(setup, machine):
    home = machine.toolkit("site-packages/nvidia/cu13")
    assert setup.toolchain.find_nvcc(machine.env, "13.2", [str(home)]).home == str(home)


def test_nvcc_of_another_major_on_path_yields_to_the_wheels(setup, machine):
    (machine.bin / "nvcc").symlink_to(machine.toolkit("old", release="12.6") / "bin" / "nvcc")
    home = machine.toolkit("site-packages/nvidia/cu13")
    assert setup.toolchain.find_nvcc(machine.env, "13.2", [str(home)]).home == str(home)


def test_cuda_home_is_an_order(setup, machine):
    (machine.bin / "nvcc").symlink_to(machine.toolkit() / "bin" / "nvcc")
    old = machine.toolkit("old", release="12.6")
    env = {**machine.env, "CUDA_HOME": str(old), "HASHENGINE_BUILD": "cuda"}
    with pytest.raises(SystemExit) as error:
        setup.decide(env, "13.2", {})
    assert f"the nvcc in {old} is CUDA 12.6 and torch is built for 13.2" in one_line(error)
    assert 'pip install "nvidia-cuda-nvcc==13.2.*"' in one_line(error)


def test_an_nvcc_that_cannot_compile_is_no_nvcc(setup, machine):
    home = machine.toolkit(compiles=False)
    missing = setup.toolchain.find_nvcc({**machine.env, "CUDA_HOME": str(home)}, "13.2", [])
    assert isinstance(missing, setup.toolchain.Missing)
    assert "ptxas fatal : Unsupported .version 9.5" in missing.what


def test_wheel_homes_are_of_torchs_major(setup):
    assert setup.toolchain.wheel_homes(None) == []
    assert all(home.endswith("nvidia/cu13") for home in setup.toolchain.wheel_homes("13.2"))


def test_cudart_of_the_wheel_gets_its_plain_name(setup, machine, tmp_path):
    home = machine.toolkit()
    library = home / "lib" / "libcudart.so.13"
    library.parent.mkdir()
    library.touch()
    nvcc = setup.toolchain.Nvcc(str(home), *CUDA_13_0)
    for _ in range(2):  # a second build finds the first one's link
        [folder] = setup.cudart_folders(nvcc, tmp_path / "links")
        assert Path(folder, "libcudart.so").resolve() == library
    (home / "lib" / "libcudart.so").touch()
    assert setup.cudart_folders(nvcc, tmp_path / "links") == []


# Architectures


@pytest.mark.parametrize(
    ("toolkit", "capabilities", "expected"),
    [
        (CUDA_13_0, [], "8.0 8.6 8.9 9.0a 10.0 12.0+PTX"),
        # PTX of 9.0a runs on 9.0 alone, so the last one's PTX is plain.
        (CUDA_12_6, [], "8.0 8.6 8.9 9.0a 9.0+PTX"),
        (CUDA_13_0, [(9, 0)], "9.0a"),
        (CUDA_13_0, [(8, 0), (9, 0), (8, 0)], "8.0 9.0a"),
        # Newer than this nvcc knows: PTX is compiled by the driver.
        (CUDA_12_6, [(12, 0)], "8.0 8.6 8.9 9.0a 9.0+PTX"),
    ],
)
def test_arch_list(setup, toolkit, capabilities, expected):
    assert setup.choose_arches({}, setup.toolchain.Nvcc("", *toolkit), capabilities) == expected


def test_arch_list_of_the_user_wins(setup):
    env = {"TORCH_CUDA_ARCH_LIST": "8.0 9.0a"}
    assert setup.choose_arches(env, setup.toolchain.Nvcc("", *CUDA_13_0), [(12, 0)]) == "8.0 9.0a"


def test_torch_takes_every_arch_list(setup, monkeypatch):
    from torch.utils.cpp_extension import _get_cuda_arch_flags

    for toolkit in (CUDA_12_6, CUDA_13_0):
        arches = setup.choose_arches({}, setup.toolchain.Nvcc("", *toolkit), [])
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", arches)
        flags = _get_cuda_arch_flags()
        assert len(flags) == len(arches.split()) + arches.count("+PTX")


# The extension


def test_the_file_list_is_the_switch(setup):
    cpu, cuda = setup.sources("cpu"), setup.sources("cuda")
    assert "csrc/binding/module.cpp" in cpu and set(cpu) < set(cuda)
    assert all(file.endswith(("_cuda.cpp", ".cu")) for file in set(cuda) - set(cpu))
    assert not [file for file in cpu if "cuda" in file]


def test_flags_leave_the_standard_and_the_instruction_set_alone(setup):
    extension = setup.extension(setup.Plan("cpu", "", "c++"))
    flags = " ".join(extension.extra_compile_args["cxx"] + extension.extra_compile_args["nvcc"])
    assert not re.search(r"-std|-march|-mavx|fast-math", flags)
    assert "-fopenmp" not in extension.extra_link_args and "-lgomp" not in extension.extra_link_args


def test_jobs_are_bounded_by_cores_and_memory(setup, monkeypatch):
    assert 1 <= setup.job_count() <= len(os.sched_getaffinity(0))
    monkeypatch.setattr(setup, "BYTES_PER_JOB", 1 << 60)
    assert setup.job_count() == 1


# Real builds, of a module of two lines in a copy of the project


@pytest.fixture
def checkout(tmp_path):
    folder = tmp_path / "checkout"
    ignore = shutil.ignore_patterns("_C*", "_build.json", "__pycache__")
    shutil.copytree(ROOT / "hashengine", folder / "hashengine", ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "csrc" / "binding").mkdir(parents=True)
    (folder / "csrc" / "binding" / "module.cpp").write_text(TOY_MODULE)
    return folder


def build(checkout: Path, *command: str, **env: str) -> subprocess.CompletedProcess:
    clean = {name: value for name, value in os.environ.items() if name not in ("HASHENGINE_BUILD", "CXX")}
    return subprocess.run(
        [sys.executable, *command], cwd=checkout, env={**clean, **env}, capture_output=True, text=True, timeout=600
    )


@pytest.mark.slow
def test_a_wheel_holds_the_module_and_its_record(checkout):
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
def test_a_build_in_place_leaves_no_stale_module(checkout):
    in_place = ["setup.py", "build_ext", "--inplace"]
    done = build(checkout, *in_place, HASHENGINE_BUILD="cpu")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("hashengine: building the CPU module, because HASHENGINE_BUILD=cpu asks for it") == 1
    assert len(list((checkout / "hashengine").glob("_C.*so"))) == 1

    done = build(checkout, *in_place, CXX="/nonexistent/c++")
    assert done.returncode == 0, done.stderr
    assert not list((checkout / "hashengine").glob("_C.*so"))
    assert json.loads((checkout / "hashengine" / "_build.json").read_text())["build"] == "none"

    done = build(checkout, *in_place, CXX="/nonexistent/c++", HASHENGINE_BUILD="cpu")
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1].startswith("hashengine: HASHENGINE_BUILD=cpu cannot be done: no C++")
