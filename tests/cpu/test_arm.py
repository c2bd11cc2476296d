"""ARM's 64-bit CPUs, from any machine: csrc/cpu compiles for them, and they choose NEON.

What the NEON kernel computes is tested where every level's is; see tests/hamming_levels.py.
"""

import os
import subprocess

import pytest

from tests.helpers.hamming_levels import CROSS_COMPILER, INCLUDE, IS_ARM, ROOT, compile_all, require_arm


def test_every_cpu_source_compiles_without_a_warning(tmp_path):
    compiler = "g++" if IS_ARM else CROSS_COMPILER
    require_arm(compiler)
    sources = sorted(ROOT.glob("csrc/cpu/*.cpp"))
    compile_all([compiler, *INCLUDE, "-O1", "-Wall", "-Wextra", "-Werror"], sources, tmp_path)


@pytest.mark.skipif(IS_ARM, reason="tests/ops/test_hamming_topk.py asks the native module")
@pytest.mark.parametrize(("asked", "answer"), [("", "neon"), ("auto", "neon"), ("neon", "neon"), ("scalar", "scalar")])
def test_the_level_is_chosen(level_library, asked, answer):
    assert choose(level_library, asked) == (0, answer)


@pytest.mark.skipif(IS_ARM, reason="tests/ops/test_hamming_topk.py asks the native module")
def test_a_level_of_another_cpu_is_an_error_of_one_line(level_library):
    message = "HASHENGINE_SIMD_LEVEL must be one of auto, scalar, neon on this CPU, got avx2"
    assert choose(level_library, "avx2") == (1, message)


def choose(level_library, asked: str) -> tuple[int, str]:
    environment = os.environ | {"HASHENGINE_SIMD_LEVEL": asked}
    done = subprocess.run(
        [*level_library.arm_worker.command, "level"], env=environment, stdout=subprocess.PIPE, text=True
    )
    return done.returncode, done.stdout.strip()
