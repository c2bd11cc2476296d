"""Searches while codes are appended, under ThreadSanitizer; see tests/cpu/concurrent_append.cpp."""

import ctypes
import os
import subprocess
from pathlib import Path

import pytest

from tests.helpers.hamming_levels import LEVELS, ROOT, build_searches

# ThreadSanitizer of GCC 12 does not start if Linux randomises more address bits than the sanitizer expects. This flag
# turns the randomisation off.
_ADDR_NO_RANDOMIZE = 0x0040000


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("concurrent_append") / "concurrent_append"
    flags = ["-fsanitize=thread", "-g"]
    build_searches(ROOT / "tests/cpu/concurrent_append.cpp", path, flags, flags)
    return path


def run(*command: object) -> subprocess.CompletedProcess:
    libc = ctypes.CDLL(None)
    return subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        env=os.environ | {"TSAN_OPTIONS": "halt_on_error=1"},
        preexec_fn=lambda: libc.personality(_ADDR_NO_RANDOMIZE),  # if this fails, the program may still start
    )


def test_searches_during_an_append_are_free_of_races(program: Path, level: str) -> None:
    clean = run(program, LEVELS.index(level))
    assert (clean.returncode, clean.stdout, clean.stderr) == (0, "same\n", "")


def test_codes_that_are_published_too_early_are_reported(program: Path) -> None:
    found = run(program, LEVELS.index("scalar"), "early")
    assert found.returncode != 0 and "ThreadSanitizer: data race" in found.stderr
