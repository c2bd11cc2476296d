"""The native searches beside a writer, under ThreadSanitizer; tests/emulation/growing.cpp says what they do."""

import ctypes
import os
import subprocess
from pathlib import Path

import pytest

from tests.helpers.hamming_levels import LEVELS, ROOT, build_searches

_ADDR_NO_RANDOMIZE = 0x0040000  # with more random bits than the runtime of GCC 12 knows, it does not start


@pytest.fixture(scope="module")
def growing(tmp_path_factory) -> Path:
    program = tmp_path_factory.mktemp("growing") / "growing"
    flags = ["-fsanitize=thread", "-g"]
    build_searches(ROOT / "tests/emulation/growing.cpp", program, flags, flags)
    return program


def run(*command: object) -> subprocess.CompletedProcess:
    libc = ctypes.CDLL(None)
    return subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        env=os.environ | {"TSAN_OPTIONS": "halt_on_error=1"},
        preexec_fn=lambda: libc.personality(_ADDR_NO_RANDOMIZE),  # where that is forbidden, it may start all the same
    )


def test_searches_beside_a_writer_race_with_nothing(growing, level):
    clean = run(growing, LEVELS.index(level))
    assert (clean.returncode, clean.stdout, clean.stderr) == (0, "same\n", "")


def test_codes_that_are_published_early_are_noticed(growing):
    found = run(growing, LEVELS.index("scalar"), "early")
    assert found.returncode != 0 and "ThreadSanitizer: data race" in found.stderr
