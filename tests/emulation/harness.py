"""Builds the emulation with all kernels of csrc/cuda, once a change of any source, and calls it through ctypes."""

import ctypes
import functools
import hashlib
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hashengine import _toolchain

ROOT = Path(__file__).resolve().parents[2]
EMULATION = ROOT / "tests" / "emulation"
CSRC = ROOT / "csrc"
KERNELS = sorted((CSRC / "cuda").glob("*.cu"))
FLAGS = [
    *("-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
    *(f"-I{folder}" for folder in (EMULATION, CSRC / "include", CSRC / "cuda")),
]

FORWARD, REVERSE = 0, 1
SCHEDULES = (FORWARD, REVERSE, 7, 8)  # the others seed a random order

DTYPE_NUMBERS = {torch.float64: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3, torch.bool: 4}


def compile_once(name: str, sources: list[str], flags: list[str]) -> Path:
    """Compile sources of this folder with all kernels; skips the test where no C++ compiler is."""
    compiler = _toolchain.find_compiler(os.environ)
    if sys.platform != "linux" or isinstance(compiler, _toolchain.Missing):
        pytest.skip(f"the emulation needs Linux and a C++ compiler: {compiler}")
    inputs = [*(str(EMULATION / source) for source in sources), "-x", "c++", *map(str, KERNELS)]
    command = [*shlex.split(compiler), *FLAGS, *flags, *inputs]
    digest = hashlib.sha256(" ".join(command).encode())
    for folder, pattern in ((CSRC / "cuda", "*"), (CSRC / "include", "**/*.h"), (EMULATION, "*.[ch]*")):
        for file in sorted(folder.glob(pattern)):
            digest.update(file.read_bytes())
    output = ROOT / "build" / "emulation" / f"{name}-{digest.hexdigest()[:16]}"
    if not output.exists():
        output.parent.mkdir(parents=True, exist_ok=True)
        unfinished = output.with_suffix(f".{os.getpid()}")  # another test process may be at it too
        built = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True)
        assert built.returncode == 0, f"{' '.join(command)}\n{built.stderr}"
        unfinished.replace(output)
    return output


class Emulation:
    """The launchers of emulation/kernels.cpp and the toys of emulation/toys.cpp."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.emulation_take_error.restype = ctypes.c_char_p
        self.library.workspace_bytes.restype = ctypes.c_int64

    def call(self, function: str, *arguments, schedule: int = FORWARD, first_block: int = 0) -> None:
        """Run one launcher under a schedule, from block `first_block` on; raise what the emulator complains of."""
        self.library.emulation_set_schedule(schedule)
        self.library.emulation_set_first_block(ctypes.c_uint64(first_block))
        getattr(self.library, function)(*map(_to_c, arguments))
        if error := self.library.emulation_take_error().decode():
            raise RuntimeError(error)

    def workspace_bytes(self, numel: int) -> int:
        return self.library.workspace_bytes(ctypes.c_int64(numel))


def _to_c(argument):
    if argument is None or isinstance(argument, torch.Tensor):
        return ctypes.c_void_p(argument.data_ptr() if argument is not None else None)
    if isinstance(argument, torch.dtype):
        return ctypes.c_int(DTYPE_NUMBERS[argument])
    return {bool: ctypes.c_bool, int: ctypes.c_int64, float: ctypes.c_double}[type(argument)](argument)


@functools.cache
def load_emulation() -> Emulation:
    return Emulation(compile_once("library", ["emulator.cpp", "kernels.cpp", "toys.cpp"], ["-fPIC", "-shared"]))


def array(numel: int, dtype: torch.dtype, offset: int = 0) -> torch.Tensor:
    """[numel], `offset` elements past a 16-byte boundary, poisoned: NaN in a floating-point dtype."""
    raw = torch.full(((numel + offset) * dtype.itemsize + 16,), 255, dtype=torch.uint8)
    aligned = -raw.data_ptr() % 16
    return raw[aligned : aligned + (numel + offset) * dtype.itemsize].view(dtype)[offset:]


def random_array(numel: int, dtype: torch.dtype, offset: int = 0, seed: int = 0) -> torch.Tensor:
    values = torch.randn(numel, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return array(numel, dtype, offset).copy_(values)
