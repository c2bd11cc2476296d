"""Reads the fuzzer's initial inputs and the inputs in tests/fuzz/corpus. Each input of the corpus revealed a defect."""

import subprocess
import sys

import pytest

from hashengine.index import folder
from tests.fuzz import inputs, readers
from tests.helpers.paths import ROOT

CORPUS = {file.name: file.read_bytes() for file in sorted((ROOT / "tests" / "fuzz" / "corpus").iterdir())}
SEEDS = inputs.seeds()


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("name", [*SEEDS, *CORPUS])
def test_files_load_correctly_or_raise_an_error_of_one_line(tmp_path, name, mmap):
    data = bytearray((SEEDS | CORPUS)[name])
    data[1] |= inputs.MMAP if mmap else 0
    readers.check(bytes(data), tmp_path / "files")


@pytest.mark.parametrize(
    ("check", "name"),
    [
        ("_check_rows", "ids_twice"),
        ("_check_manifest", "bytes_not_an_integer"),
    ],
)
def test_a_missing_check_is_detected(tmp_path, monkeypatch, check, name):
    monkeypatch.setattr(folder, check, lambda *args: None)
    with pytest.raises((AssertionError, TypeError)):
        readers.check(CORPUS[name], tmp_path / "files")


@pytest.mark.slow
def test_the_fuzzer_finds_nothing_in_ten_seconds():
    pytest.importorskip("atheris", reason="atheris has wheels for Linux on x86-64 with Python 3.11 to 3.14")
    command = [sys.executable, "-m", "tests.fuzz", "--seconds", "10", "--seed", "1"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and "Done " in run.stderr, run.stderr[-4000:]
