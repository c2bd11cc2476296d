"""The CUDA kernels on the host under AddressSanitizer and UndefinedBehaviorSanitizer."""

import os
import subprocess

import pytest

from tests.emulation.harness import EMULATION, compile_once

SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def run_sanitized(name: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"UBSAN_OPTIONS": "print_stacktrace=1"}
    program = compile_once("sanitized", SANITIZERS)
    return subprocess.run([program, name], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("op", [path.stem.removeprefix("sanitized_") for path in EMULATION.glob("sanitized_*.cpp")])
def test_the_kernels_run_without_sanitizer_errors(op):
    clean = run_sanitized(op)
    assert (clean.returncode, clean.stdout) == (0, "clean\n"), clean.stderr


@pytest.mark.parametrize(
    "mistake, complaint, kernel",
    [
        ("overrun", "heap-buffer-overflow", "overrun_kernel"),
        ("misaligned", "misaligned address", "misaligned_kernel"),
        ("dynamic_overrun", "heap-buffer-overflow", "dynamic_overrun_kernel"),
        ("exited_peer", "use-after-poison", "exited_peer_kernel"),
    ],
)
def test_mistakes_are_detected(mistake, complaint, kernel):
    found = run_sanitized(mistake)
    assert found.returncode != 0 and complaint in found.stderr and kernel in found.stderr
