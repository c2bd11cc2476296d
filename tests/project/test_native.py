"""Loading the native module: the checks before it is loaded, and the warnings and errors if it cannot be used."""

import json
import os
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hashengine import _native

HERE = f"{sys.version_info.major}.{sys.version_info.minor}"
RECORD = {
    "version": "0.1.0",
    "build": "cuda",
    "reason": "this machine has a GPU",
    "python": f"{HERE}.7",
    "torch": "2.13.1+cu132",
    "torch_cuda": "13.2",
    "arch_list": ["9.0a"],
}


@pytest.fixture
def never_built(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`_native` finds no build record. Its cached result of loading is dropped before the test and after it."""
    monkeypatch.setattr(_native, "_RECORD", Path("nowhere", "_build.json"))
    monkeypatch.delenv("HASHENGINE_REQUIRE_NATIVE", raising=False)
    _native._load.cache_clear()
    yield
    monkeypatch.undo()
    _native._load.cache_clear()


@pytest.mark.parametrize(
    ("changes", "running", "reason"),  # changes: to RECORD; running: the versions of torch and of torch's CUDA
    [
        ({}, ("2.13.0", "13.0"), None),  # other patch release of torch, other minor release of CUDA
        ({}, ("2.13.0+cu130", "13.0"), None),  # the same, with a suffix of torch's version
        ({"build": "cpu"}, ("2.13.0+cpu", None), None),  # a CPU module needs no CUDA
        ({}, ("2.14.0", "13.2"), "it was built for torch 2.13.1+cu132, this is torch 2.14.0"),
        ({"torch": "2.1.0"}, ("2.13.0", "13.2"), "it was built for torch 2.1.0, this is torch 2.13.0"),
        ({"python": "3.9.1"}, ("2.13.0", "13.2"), f"it was built for Python 3.9.1, this is Python {HERE}"),
        ({}, ("2.13.0+cpu", None), "it was built for CUDA 13.2, this torch has no CUDA"),
        ({}, ("2.13.0+cu126", "12.6"), "it was built for CUDA 13.2, this torch has 12.6"),
        ({"build": "none"}, ("2.13.0", "13.2"), "it was not built, because this machine has a GPU"),  # RECORD's reason
    ],
)
def test_the_reason_why_a_module_does_not_match_is_named(changes: dict, running: tuple, reason: str | None) -> None:
    assert _native.mismatch(RECORD | changes, *running) == reason


def test_a_module_that_was_never_built_warns_with_the_command(never_built: None) -> None:
    with pytest.warns(RuntimeWarning) as caught:
        _native.load()
    [warning] = caught
    message = str(warning.message)
    assert "\n" not in message
    assert "it was never built" in message and _native.rebuild_command() in message
    assert not _native.available()
    assert _native.why_not() == "it was never built"
    assert _native.build_config() == {}


@pytest.mark.parametrize("value", ["1", "yes"])
def test_a_missing_module_is_an_error_if_it_is_required(
    never_built: None, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("HASHENGINE_REQUIRE_NATIVE", value)
    with pytest.raises(ImportError, match="it was never built.*HASHENGINE_REQUIRE_NATIVE"):
        _native.load()


@pytest.mark.parametrize("value", ["", "0"])
def test_a_missing_module_is_a_warning_if_it_is_not_required(
    never_built: None, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("HASHENGINE_REQUIRE_NATIVE", value)
    with pytest.warns(RuntimeWarning):
        _native.load()


def test_a_loading_failure_is_reported_with_the_message_of_the_loader(
    never_built: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = RECORD | {"build": "cpu", "torch": torch.__version__}
    monkeypatch.setattr(_native, "record", lambda: record)

    def fail(name: str) -> None:
        raise ImportError("_C.so: undefined symbol: _ZN3c10\nsecond line")

    monkeypatch.setattr(_native.importlib, "import_module", fail)
    assert _native.why_not() == "it does not load (_C.so: undefined symbol: _ZN3c10)"


@pytest.mark.parametrize(
    "content",
    [
        b'{"version": ',
        b'{"torch": 3}',
        b"[1, 2]",
        b'"cpu"',
        b"null",
        b"\xff\xfe\0",
        b"",
        b"[" * 100_000,
        json.dumps({name: RECORD[name] for name in ("build", "torch")}).encode(),
        json.dumps(RECORD | {"python": 3.11}).encode(),
        json.dumps(RECORD | {"module": "a/b.so"}).encode(),
        json.dumps(RECORD | {"arch_list": 5}).encode(),
    ],
)
def test_a_damaged_record_gives_one_warning_and_plain_torch(
    never_built: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "_build.json"
    path.write_bytes(content)
    monkeypatch.setattr(_native, "_RECORD", path)
    with pytest.warns(RuntimeWarning) as caught:
        _native.load()
    [warning] = caught
    assert f"the record of its build, {path}, is damaged" in str(warning.message)
    assert not _native.available() and "\n" not in str(warning.message)


@pytest.mark.parametrize("fields", [{}, {"torch_cuda": None}, {"torch_cuda": 13}, {"torch_cuda": []}])
def test_a_cuda_record_without_the_release_of_cuda_does_not_match(fields: dict) -> None:
    record = {name: value for name, value in RECORD.items() if name != "torch_cuda"} | fields
    assert "it was built for CUDA" in (_native.mismatch(record, "2.13.0", "12.6") or "")


@pytest.mark.parametrize("size", [0, 999, 1001])
def test_an_incomplete_module_is_not_loaded(
    never_built: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, size: int
) -> None:
    record = RECORD | {"build": "cpu", "torch": torch.__version__, "module": "_C.so", "size": 1000}
    monkeypatch.setattr(_native, "_RECORD", tmp_path / "_build.json")
    (tmp_path / "_build.json").write_text(json.dumps(record))
    (tmp_path / "_C.so").write_bytes(bytes(size))
    monkeypatch.setattr(_native.importlib, "import_module", lambda name: pytest.fail("it was loaded"))
    assert _native.why_not() == f"its file has {size} bytes instead of 1000"


@pytest.mark.parametrize("folder", ["it's a dir", "a b", "$HOME; ls", "plain"])
def test_the_printed_command_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: str) -> None:
    checkout = tmp_path / folder
    (checkout / "hashengine").mkdir(parents=True)
    (checkout / "setup.py").touch()
    monkeypatch.setattr(_native, "__file__", str(checkout / "hashengine" / "_native.py"))
    monkeypatch.setattr(sys, "executable", f"/opt/{folder}/python")
    words = shlex.split(_native.rebuild_command("cuda"))
    assert words[:5] == ["cd", str(checkout), "&&", "HASHENGINE_BUILD=cuda", f"/opt/{folder}/python"]
    assert words[5:] == ["setup.py", "build_ext", "--inplace"]
    (checkout / "setup.py").unlink()
    assert shlex.split(_native.rebuild_command())[0] == f"/opt/{folder}/python"


@pytest.mark.skipif(not _native.available(), reason="the native module was not built")
def test_a_loaded_module_returns_its_record_and_does_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _native.load()
    config = _native.build_config()
    assert config["build"] in ("cpu", "cuda")
    assert config["torch"].split(".")[:2] == torch.__version__.split(".")[:2]
    assert _native.why_not() is None


@pytest.mark.skipif(not _native.available(), reason="the native module was not built")
def test_torch_and_the_module_share_one_openmp_runtime() -> None:
    # In a new process, because other libraries of the test environment load OpenMP runtimes of their own.
    script = "import hashengine.doctor as d; print(d._native.available(), *d.openmp_runtimes(), sep='\\n')"
    env = {**os.environ, "PYTHONPATH": str(Path(_native.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    available, *runtimes = done.stdout.splitlines()
    assert available == "True"
    assert len(runtimes) == 1, runtimes


def test_a_module_that_the_record_names_must_be_there():
    running = ("2.13.1", "13.2")
    assert _native.mismatch(RECORD, *running) is None
    reason = _native.mismatch(RECORD | {"module": "_C_other.so", "size": 1}, *running)
    assert reason is not None and reason.endswith("_C_other.so is missing")
