"""The CUDA kernels compile with nvcc without warnings, register spills or stack frames."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

from hashengine import _toolchain
from tests.emulation.harness import KERNELS
from tests.helpers.paths import CSRC


def has_kernel(source: Path) -> bool:
    """Whether a source, or a header that it includes, defines a kernel. Other sources only call launchers."""
    text = source.read_text()
    included = (CSRC / name for name in re.findall(r'^#include "([^"]+)"', text, re.MULTILINE))
    return "__global__" in text or any(has_kernel(header) for header in included if header.exists())


# Each architecture takes about the same time to compile for, so the fast tests compile only for 9.0a.
ARCHITECTURES = ("90a", *(pytest.param(name, marks=pytest.mark.slow) for name in ("80", "100", "120")))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", KERNELS, ids=lambda source: str(source.relative_to(CSRC)))
def test_nvcc_compiles_without_warning_or_spill(source, architecture, tmp_path):
    torch_cuda = torch.version.cuda or "13.0"
    nvcc = _toolchain.find_nvcc(os.environ, torch_cuda, _toolchain.wheel_homes(torch_cuda))
    if isinstance(nvcc, _toolchain.Missing):
        pytest.skip(str(nvcc))
    if int(architecture.rstrip("a")) not in nvcc.arches:
        pytest.skip(f"nvcc {nvcc.release} does not support sm_{architecture}")
    command = [f"{nvcc.home}/bin/nvcc", "-O3", "-Werror", "all-warnings", "-Xptxas", "-v", "-cubin"]
    command += [f"-arch=sm_{architecture}", f"-I{CSRC / 'include'}", f"-I{CSRC}"]
    command += [str(source), "-o", str(tmp_path / "kernel.cubin")]
    compiled = subprocess.run(command, capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", compiled.stderr)
    assert bool(frames) == has_kernel(source), compiled.stderr
    assert set(frames) <= {("0", "0", "0")}, compiled.stderr
