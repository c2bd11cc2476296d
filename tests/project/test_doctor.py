"""`hashengine doctor` checks every part of an installation, and reports each problem with its remedy."""

import hashlib
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from hashengine import __version__, _environment, _native, _toolchain, cli, doctor
from tests.helpers.paths import ROOT

needs_native = pytest.mark.skipif(not _native.available(), reason="the native module was not built")


def check(name: str) -> doctor.Check:
    [found] = [check for check in doctor.examine() if check.name == name]
    return found


def test_every_part_is_checked_and_nothing_is_broken() -> None:
    checks = doctor.examine()
    names = [check.name for check in checks]
    assert len(set(names)) == len(names)
    expected = {
        "hashengine",
        "Python",
        "torch",
        "oneDNN",
        "native module",
        "threads",
        "OpenMP",
        "C++ compiler",
        "faiss",
    }
    assert expected <= set(names)
    assert [check for check in checks if check.status == "broken"] == []
    assert all(check.found and "\n" not in check.found for check in checks)


def test_the_command_prints_the_checks_and_succeeds() -> None:
    result = CliRunner().invoke(cli.app, ["doctor"])
    assert result.exit_code == 0
    assert torch.__version__ in result.output and "native module" in result.output


def test_a_broken_part_fails_the_command_and_shows_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = doctor.Check("native module", "broken", "pack_bits gives wrong codes on cpu", "rebuild it")
    monkeypatch.setattr(doctor, "examine", lambda: [broken])
    result = CliRunner().invoke(cli.app, ["doctor"])
    assert result.exit_code == 1
    assert "wrong codes" in result.output and "rebuild it" in result.output


def test_an_old_torch_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    assert check("torch").status == "broken"
    assert check("torch").remedy == 'pip install "torch>=2.11"'


def test_a_known_problem_of_onednn_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    from hashengine.models import memory_format

    monkeypatch.setattr(memory_format, "known_problem", lambda: "oneDNN can corrupt memory")
    assert (check("oneDNN").status, check("oneDNN").found) == ("ok", "oneDNN can corrupt memory")  # HashNet avoids it
    monkeypatch.setattr(memory_format, "known_problem", lambda: None)
    assert check("oneDNN").found.startswith("no known problem")


def test_the_remedy_for_a_missing_native_module_is_the_build_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "_load", lambda: (None, "it was never built"))
    found = check("native module")
    assert (found.status, found.remedy) == ("warn", _native.rebuild_command())
    assert "it was never built" in found.found


@needs_native
def test_a_module_of_another_version_must_be_rebuilt(monkeypatch: pytest.MonkeyPatch) -> None:
    record = _native.build_config() | {"version": "0.0.1"}
    monkeypatch.setattr(_native, "build_config", lambda: record)
    assert check("native module").status == "warn"
    assert "built from hashengine 0.0.1" in check("native module").found


@needs_native
def test_a_module_that_packs_wrong_codes_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "hashengine.ops.pack_bits", lambda u: torch.zeros(u.shape[0], u.shape[1] // 8, dtype=torch.uint8)
    )
    assert check("native module").status == "broken"
    assert "gives wrong codes on cpu" in check("native module").found


@needs_native
@pytest.mark.parametrize("error", [ValueError("a check"), RuntimeError("a failure\nof two lines"), OSError()])
def test_a_module_that_raises_is_broken(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(u: torch.Tensor) -> torch.Tensor:
        raise error

    monkeypatch.setattr("hashengine.ops.pack_bits", fail)
    found = check("native module")
    assert (found.status, found.remedy) == ("broken", _native.rebuild_command())
    assert "pack_bits fails on cpu: " in found.found and "\n" not in found.found


@needs_native
def test_the_simd_level_is_reported_and_an_unknown_one_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HASHENGINE_SIMD_LEVEL", raising=False)
    assert check("SIMD").status == "ok"
    monkeypatch.setenv("HASHENGINE_SIMD_LEVEL", "mmx")
    assert check("SIMD").status == "broken"
    assert check("SIMD").remedy == check("native module").remedy == "unset HASHENGINE_SIMD_LEVEL"
    assert check("native module").status == "broken"
    result = CliRunner().invoke(cli.app, ["doctor"])
    assert result.exit_code == 1 and "must be one of auto, scalar" in " ".join(result.output.split())
    monkeypatch.setenv("HASHENGINE_SIMD_LEVEL", "scalar")
    assert "uses scalar; this processor supports scalar" in check("SIMD").found


@pytest.mark.parametrize("module", doctor.EXTRAS)
def test_the_remedy_for_a_missing_extra_is_its_install_command(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    found = check(module)
    assert (found.status, found.remedy) == ("missing", f'pip install "hashengine[{doctor.EXTRAS[module][0]}]"')


@pytest.mark.parametrize("requirement", ["torch==2.1.0", "torch (==2.1.0)"])
def test_an_extra_for_another_torch_is_reported(monkeypatch: pytest.MonkeyPatch, requirement: str) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda module: module)
    monkeypatch.setattr(doctor, "version", lambda package: "0.16.0")
    monkeypatch.setattr(doctor, "requires", lambda package: ["numpy", requirement])
    found = check("torchvision")
    assert (found.status, found.found) == ("warn", "0.16.0, which needs torch 2.1.0")


@needs_native
def test_a_module_with_another_checksum_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    (module,) = Path(_native.__file__).parent.glob("_C.*so")
    record = _native.build_config() | {"module": module.name, "sha256": hashlib.sha256(module.read_bytes()).hexdigest()}
    monkeypatch.setattr(_native, "build_config", lambda: record)
    assert check("native module").status == "ok"
    record["sha256"] = "0" * 64
    assert check("native module").status == "broken"
    assert "is not that of the module that was built" in check("native module").found


def test_the_quick_doctor_says_that_a_module_with_another_checksum_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    record = _native.record() | {"sha256": "0" * 64}
    monkeypatch.setattr(_native, "record", lambda: record)
    [found] = [check for check in doctor.examine_files() if check.name == "native module"]
    assert found.status == "broken" and found.found.endswith("it was not loaded here, but other commands load it")


def modules_after(*arguments: str) -> set[str]:
    """The packages that a doctor in a new process has imported."""
    script = f"""
import sys
from hashengine.cli import app
app({list(arguments)!r}, standalone_mode=False)
print("imported", *sorted({{name.partition(".")[0] for name in sys.modules}}))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def test_the_doctor_imports_torch_but_no_optional_package() -> None:
    imported = modules_after("doctor")
    assert "torch" in imported and not imported & {*doctor.EXTRAS, "scipy", "sklearn"}


def test_the_quick_doctor_runs_nothing_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not modules_after("doctor", "--quick") & {"torch", "numpy", *doctor.EXTRAS}
    monkeypatch.setattr(_toolchain, "run", lambda *arguments: pytest.fail("a program was run"))
    result = CliRunner().invoke(cli.app, ["doctor", "--quick"])
    assert result.exit_code == 0 and "Nothing was run." in result.output
    names = {check.name for check in doctor.examine_files()}
    assert {"hashengine", "Python", "torch", "native module", "faiss"} <= names


def test_the_quick_doctor_reports_a_missing_module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    record = {"build": "cpu", "reason": "asked", "python": platform.python_version(), "torch": torch.__version__}
    (tmp_path / "_build.json").write_text(json.dumps(record | {"version": __version__, "module": "_C.so", "size": 1}))
    monkeypatch.setattr(_native, "_RECORD", tmp_path / "_build.json")
    [found] = [check for check in doctor.examine_files() if check.name == "native module"]
    assert found.status == "warn" and f"its file {tmp_path / '_C.so'} is missing" in found.found


def test_the_release_of_torch_is_found_with_and_without_importing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = _environment.torch_release()
    assert imported == (torch.__version__, torch.version.cuda)
    with monkeypatch.context() as patched:
        patched.delitem(sys.modules, "torch")
        assert _environment.torch_release() == imported
    monkeypatch.setattr(_environment, "find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "torch")
    assert _environment.torch_release() == ("", None)


def test_missing_tools_are_reported_with_their_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    monkeypatch.setenv("CUDA_HOME", "/nonexistent")
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    assert (check("C++ compiler").status, check("C++ compiler").remedy) == ("missing", "apt-get install g++")
    assert check("nvcc").status == "missing"
    assert 'pip install "nvidia-cuda-nvcc==13.2.*"' in check("nvcc").remedy


def test_a_gpu_without_kernels_is_reported_with_the_build_command(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, total_memory=141 << 30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(_native, "_load", lambda: (None, "it was never built"))
    found = check("GPU 0")
    assert found.status == "warn" and "NVIDIA H200" in found.found
    assert "HASHENGINE_BUILD=cuda" in found.remedy


@pytest.mark.parametrize(
    ("error", "visible", "remedy"),
    [
        ("The NVIDIA driver on your system is too old\nPlease update it", None, "update the NVIDIA driver"),
        ("No CUDA GPUs are available", "", "unset CUDA_VISIBLE_DEVICES, which may hide the GPU"),
        ("CUDA unknown error", None, "run nvidia-smi, which tests the NVIDIA driver"),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_reported_with_the_cause(
    monkeypatch: pytest.MonkeyPatch, error: str, visible: str | None, remedy: str
) -> None:
    def fail() -> None:
        raise RuntimeError(error)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", fail)
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.setattr(doctor, "_has_gpu_device", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = check("GPU")
    assert (found.status, found.remedy) == ("warn", remedy)
    assert found.found == f"a GPU is present, but torch cannot use it: {error.splitlines()[0]}"


def test_a_gpu_with_a_torch_without_cuda_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(doctor, "_has_gpu_device", lambda: True)
    found = check("GPU")
    assert (found.status, found.found) == ("warn", "a GPU is present, but this torch has no CUDA")
    assert "CUDA build of torch" in found.remedy


def test_a_tool_that_fails_is_not_reported_as_working(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_toolchain, "run", lambda command, stdin="": (1, "fatal error: cannot execute cc1plus"))
    assert check("C++ compiler").status == "missing"
    assert "cc1plus" in check("C++ compiler").found


@needs_native
def test_a_damaged_module_is_not_loaded_by_the_doctor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (module,) = Path(_native.__file__).parent.glob("_C.*so")
    content = bytearray(module.read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / module.name).write_bytes(content)
    record = _native.build_config() | {"module": module.name, "size": len(content)}
    record["sha256"] = hashlib.sha256(module.read_bytes()).hexdigest()
    (tmp_path / "_build.json").write_text(json.dumps(record))
    script = f"""
import sys
from pathlib import Path
from hashengine import _native, doctor
_native._RECORD = Path({str(tmp_path / "_build.json")!r})
[found] = [check for check in doctor.examine() if check.name == "native module"]
assert "hashengine._C" not in sys.modules
print(found.status, found.found)
"""
    environment = {name: value for name, value in os.environ.items() if name != "HASHENGINE_REQUIRE_NATIVE"}
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert "is not that of the module that was built" in done.stdout, done.stderr


LOADER_ERROR = "raise OSError('libtorch.so: cannot open')"
RELEASE = "__version__ = '2.15.0'; cuda = None"


@pytest.mark.parametrize("options", [[], ["--quick"]])
@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({"torch.py": "x = 1"}, "torch.py, which is no torch"),
        ({"torch/__init__.py": LOADER_ERROR, "torch/version.py": "x = 1"}, "__init__.py, which is no torch"),
        ({"torch/__init__.py": LOADER_ERROR, "torch/version.py": RELEASE}, "fails: libtorch.so: cannot open"),
    ],
)
def test_a_module_in_place_of_torch_or_a_broken_torch_is_reported(
    tmp_path: Path, files: dict[str, str], found: str, options: list[str]
) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, "-m", "hashengine", "doctor", *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert "Traceback" not in done.stderr
    if options and "fails" in found:  # found only by importing torch
        assert done.returncode == 0 and found not in done.stdout
    else:
        assert done.returncode == 1 and "broken" in done.stdout and found in done.stdout


@pytest.mark.parametrize("compiler", ["it's", " ", "'"])
def test_a_compiler_that_is_no_command_is_reported(monkeypatch: pytest.MonkeyPatch, compiler: str) -> None:
    monkeypatch.setenv("CXX", compiler)
    assert check("C++ compiler").status == "missing"
    assert check("C++ compiler").found == f"CXX is {compiler!r}, which is no command"


def test_programs_may_print_any_bytes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "c++"
    program.write_bytes(b"#!/bin/sh\nprintf 'error: \\351 \\033[1m\\n'; exit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("CXX", str(program))
    assert "error: \\xe9 " in check("C++ compiler").found
    monkeypatch.setattr(doctor, "examine", lambda: [doctor.Check("C++ compiler", "missing", "\x1b[1m \u2028")])
    output = CliRunner().invoke(cli.app, ["doctor"]).output
    assert "\x1b" not in output and "\\x1b[1m \\u2028" in output
