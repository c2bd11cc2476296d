"""Tests for 64-bit ARM that need no ARM machine: csrc/cpu compiles without warnings, and NEON is chosen at run time.

The tests with the fixture `level` of tests/helpers/hamming_levels.py also run the NEON kernels.
"""

import os
import subprocess
from pathlib import Path

import pytest

from tests.helpers.hamming_levels import (
    CROSS_COMPILER,
    FLAGS,
    IS_ARM,
    ROOT,
    WARNINGS,
    LevelLibrary,
    compile_all,
    require_arm,
)


def test_every_cpu_source_compiles_without_a_warning(tmp_path: Path) -> None:
    compiler = "g++" if IS_ARM else CROSS_COMPILER
    require_arm(compiler)
    sources = sorted(ROOT.glob("csrc/cpu/**/*.cpp"))
    compile_all([compiler, *FLAGS, "-O1", *WARNINGS, "-Werror"], sources, tmp_path)


@pytest.mark.skipif(IS_ARM, reason="tests/ops/test_hamming_topk.py tests this with the native module")
@pytest.mark.parametrize(
    ("requested", "chosen"), [("", "neon"), ("auto", "neon"), ("neon", "neon"), ("scalar", "scalar")]
)
def test_the_environment_variable_chooses_the_level(level_library: LevelLibrary, requested: str, chosen: str) -> None:
    assert choose(level_library, requested) == (0, chosen)


@pytest.mark.skipif(IS_ARM, reason="tests/ops/test_hamming_topk.py tests this with the native module")
def test_a_level_of_another_cpu_gives_an_error_of_one_line(level_library: LevelLibrary) -> None:
    message = "hashengine: HASHENGINE_SIMD_LEVEL must be one of auto, scalar, neon on this CPU, got avx2"
    assert choose(level_library, "avx2") == (1, message)


def choose(level_library: LevelLibrary, requested: str) -> tuple[int, str]:
    """The exit status and the output of the worker if HASHENGINE_SIMD_LEVEL is `requested`."""
    environment = os.environ | {"HASHENGINE_SIMD_LEVEL": requested}
    done = subprocess.run(
        [*level_library.arm_worker.command, "level"], env=environment, stdout=subprocess.PIPE, text=True
    )
    return done.returncode, done.stdout.strip()
