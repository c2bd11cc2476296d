"""Compile the launchers of hamming_topk for the machine's GPU, so that test_hamming_topk.py can also run on it."""

import ctypes
import functools
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from hashengine import _toolchain
from tests.emulation.harness import CSRC, EMULATION, FORWARD, KERNELS, array, to_c


class OnGpu:
    """Runs the launchers on the GPU, with the methods of `Emulation` that test_hamming_topk.py uses.

    All tensors are in host memory. A tensor that is wrapped in `Host` (harness.py) stays there. The others are copied
    to the GPU before a call and back after it.
    """

    def __init__(self, library: Path, capability: int) -> None:
        self._library, self._capability = ctypes.CDLL(str(library)), capability

    def call(self, function: str, *arguments: Any, schedule: int = FORWARD, capability: int = 90) -> None:
        if schedule != FORWARD:
            pytest.skip("a GPU runs threads in no particular order")
        if capability != self._capability:
            pytest.skip(f"the GPU has compute capability {self._capability / 10}")
        copies = [self._to_gpu(value) if isinstance(value, torch.Tensor) else value for value in arguments]
        getattr(self._library, function)(*map(to_c, copies))
        torch.cuda.synchronize()
        for value, copy in zip(arguments, copies, strict=True):
            if isinstance(value, torch.Tensor):
                value.copy_(copy)

    def workspace(self, op: str, *arguments: Any, capability: int = 90) -> torch.Tensor:
        function = getattr(self._library, f"workspace_bytes_of_{op}")
        function.restype = ctypes.c_int64
        return array(function(*map(to_c, arguments)), torch.uint8)

    @staticmethod
    def _to_gpu(value: torch.Tensor) -> torch.Tensor:
        """Return a copy on the GPU, with the same offset from a 16-byte boundary."""
        offset = value.data_ptr() % 16
        memory = torch.empty(offset + value.nbytes, dtype=torch.uint8, device="cuda")
        return memory[offset:].view(value.dtype).view(value.shape).copy_(value)


@functools.cache
def load_on_gpu() -> OnGpu:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    major, minor = torch.cuda.get_device_capability()
    return OnGpu(build_for(f"{major}{minor}" + "a" * (major == 9), Path(tempfile.mkdtemp())), 10 * major + minor)


def build_for(architecture: str, folder: Path) -> Path:
    """Compile the launchers to a library and return its path. Skips the test if there is no nvcc."""
    nvcc = _toolchain.find_nvcc(os.environ, torch.version.cuda or "13.0", _toolchain.wheel_homes(torch.version.cuda))
    if isinstance(nvcc, _toolchain.Missing):
        pytest.skip(str(nvcc))
    library = folder / "hamming.so"
    sources = [EMULATION / "kernels_hamming_topk.cpp", *(file for file in KERNELS if file.parent.name == "hamming")]
    command = [f"{nvcc.home}/bin/nvcc", "-O3", "-shared", "-Xcompiler=-fPIC", "-cudart=shared", "-t0", "-x", "cu"]
    command += [f"-arch=sm_{architecture}", f"-I{CSRC / 'include'}", f"-I{CSRC}", *map(str, sources)]
    subprocess.run([*command, "-o", str(library)], check=True)
    return library
