"""The launchers of the Hamming search, which the emulation runs on the host, compiled for the GPU that is here."""

import ctypes
import functools
import os
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

from hashengine import _toolchain
from tests.emulation.harness import CSRC, EMULATION, FORWARD, KERNELS, array, to_c


class OnGpu:
    """Called as the emulation is, with memory of the host: what kernels read and write is copied there and back."""

    def __init__(self, library: Path, capability: int) -> None:
        self._library, self._capability = ctypes.CDLL(str(library)), capability

    def call(self, function: str, *arguments, schedule: int = FORWARD, capability: int = 90) -> None:
        if schedule != FORWARD:
            pytest.skip("a GPU keeps to no order of threads")
        if capability != self._capability:
            pytest.skip(f"the GPU is of compute capability {self._capability / 10}")
        placed = [self._placed(value) if isinstance(value, torch.Tensor) else value for value in arguments]
        getattr(self._library, function)(*map(to_c, placed))
        torch.cuda.synchronize()
        for value, on_gpu in zip(arguments, placed, strict=True):
            if isinstance(value, torch.Tensor):
                value.copy_(on_gpu)

    def workspace(self, op: str, *arguments, capability: int = 90) -> torch.Tensor:
        function = getattr(self._library, f"workspace_bytes_of_{op}")
        function.restype = ctypes.c_int64
        return array(function(*map(to_c, arguments)), torch.uint8)

    @staticmethod
    def _placed(value: torch.Tensor) -> torch.Tensor:
        """On the GPU, as far past a 16-byte boundary as here."""
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
    """The launchers as a library; skips the test where nvcc is missing."""
    nvcc = _toolchain.find_nvcc(os.environ, torch.version.cuda or "13.0", _toolchain.wheel_homes(torch.version.cuda))
    if isinstance(nvcc, _toolchain.Missing):
        pytest.skip(str(nvcc))
    library = folder / "hamming.so"
    sources = [EMULATION / "kernels_hamming.cpp", *(file for file in KERNELS if file.name.startswith("hamming_"))]
    command = [f"{nvcc.home}/bin/nvcc", "-O3", "-shared", "-Xcompiler=-fPIC", "-cudart=shared", "-t0", "-x", "cu"]
    command += [f"-arch=sm_{architecture}", f"-I{CSRC / 'include'}", f"-I{CSRC / 'cuda'}", *map(str, sources)]
    subprocess.run([*command, "-o", str(library)], check=True)
    return library
