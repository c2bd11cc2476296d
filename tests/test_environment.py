"""The description of the machine, also if /proc/cpuinfo, a package or the native module is missing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from hashengine import _environment, _native
from hashengine._version import __version__

CPUINFO = "model name\t: A Processor\ncpu family\t: 25\nmodel\t\t: 1\nflags\t\t: fpu avx2\n\nmodel name\t: Another\n"


def test_the_processor_and_its_flags_are_those_of_the_first_logical_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda path: CPUINFO)
    assert _environment.processor() == "A Processor family 25 model 1"
    assert _environment.cpu_flags() == {"fpu", "avx2"}


def test_a_system_without_cpuinfo_is_described_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", fail)
    assert _environment.processor() and " family " not in _environment.processor()
    assert _environment.cpu_flags() == frozenset()


def test_versions_are_those_in_use_and_leave_out_packages_that_are_not_installed() -> None:
    found = _environment.versions("pillow", "no-such-package")
    assert found["hashengine"] == __version__ and found["torch"] == torch.__version__
    assert {"python", "numpy", "pillow"} <= set(found) and "no-such-package" not in found


def test_the_machine_is_described_by_processor_gpu_system_and_versions() -> None:
    machine = _environment.describe_machine()
    assert machine["processor"].endswith(f", {len(os.sched_getaffinity(0))} threads")
    assert all(machine[name] for name in ("GPU", "system", "python", "torch"))


def test_the_name_of_the_cpu_contains_the_number_of_threads_of_torch() -> None:
    assert _environment.device_name(torch.device("cpu")) == f"cpu, {torch.get_num_threads()} threads"


def test_the_simd_level_is_none_without_the_native_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "available", lambda: False)
    assert _environment.simd_level() == "none"
