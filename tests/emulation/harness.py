"""Build the CUDA emulator together with all kernels of csrc/cuda, and call the result with ctypes."""

import ctypes
import fcntl
import functools
import hashlib
import mmap
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from hashengine import _toolchain
from tests.helpers.paths import CSRC, ROOT

EMULATION = ROOT / "tests" / "emulation"
KERNELS = sorted((CSRC / "cuda").rglob("*.cu"))
FLAGS = [
    *("-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
    *(f"-I{folder}" for folder in (EMULATION, CSRC / "include", CSRC)),
]

FORWARD, REVERSE = 0, 1
SCHEDULES = (FORWARD, REVERSE, 7, 8)  # 7 and 8 are seeds of random orders
LARGEST_CLUSTER = 16  # blocks; an H200 has groups of at least as many multiprocessors
FEW_MULTIPROCESSORS = 4  # so that small inputs fill the emulated device

DTYPE_NUMBERS = {torch.float64: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3, torch.bool: 4}

EMULATOR = ["emulator.cpp", "synchronisation.cpp", "shared_memory.cpp", "matrix.cpp", "toys.cpp", "toys_matrix.cpp"]


def compile_once(prefix: str, flags: list[str]) -> Path:
    """Build the emulator, all kernels and `prefix`*.cpp of this folder as one program or library.

    Each object is cached until its source, a header or a flag changes. The calling test is skipped if the system is not
    Linux or has no C++ compiler.
    """
    compiler = _toolchain.find_compiler(os.environ)
    if sys.platform != "linux" or isinstance(compiler, _toolchain.Missing):
        pytest.skip(f"the emulation needs Linux and a C++ compiler: {compiler}")
    command = [*shlex.split(compiler), *FLAGS, *flags]
    headers = [*(CSRC / "include").rglob("*.h"), *(CSRC / "cuda").rglob("*.*h"), *EMULATION.glob("*.h")]
    common = [" ".join(command).encode(), *(header.read_bytes() for header in sorted(headers))]
    sources = [*(EMULATION / name for name in EMULATOR), *sorted(EMULATION.glob(f"{prefix}*.cpp")), *KERNELS]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda source: _compile(source, command, common), sources))
    return _build(prefix, [*command, *map(str, objects)], [str(path).encode() for path in objects])


def _compile(source: Path, command: list[str], common: list[bytes]) -> Path:
    return _build(f"{source.name}.o", [*command, "-c", "-x", "c++", str(source)], [*common, source.read_bytes()])


def _build(name: str, command: list[str], contents: list[bytes]) -> Path:
    """Run the command unless its output for these contents is cached, and return the path of the output."""
    digest = hashlib.sha256(b"".join(hashlib.sha256(content).digest() for content in contents)).hexdigest()
    output = ROOT / "build" / "emulation" / f"{name}-{digest[:16]}"
    output.parent.mkdir(parents=True, exist_ok=True)
    with open(output.with_suffix(".lock"), "w") as lock:  # another test process may need the same output
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not output.exists():
            unfinished = output.with_suffix(".unfinished")
            built = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True)
            assert built.returncode == 0, f"{' '.join(command)}\n{built.stderr}"
            unfinished.replace(output)
    return output


class Emulation:
    """Calls the functions of kernels_<op>.cpp and toys*.cpp. The emulator runs their kernels on host memory.

    The kernels of toys*.cpp test the emulator itself.
    """

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.emulation_take_error.restype = ctypes.c_char_p
        self.code: int | None = None  # None: code for the emulated compute capability
        self.largest_cluster = LARGEST_CLUSTER

    def call(
        self,
        function: str,
        *arguments: Any,
        schedule: int = FORWARD,
        first_block: int = 0,
        end_block: int = 2**64 - 1,
        capability: int = 90,
        multiprocessors: int = FEW_MULTIPROCESSORS,
    ) -> None:
        """Run one function under a schedule, on an emulated device with these properties.

        Each kernel skips the blocks before `first_block`, and those from `end_block` on.

        Raises:
            RuntimeError: the emulator detected a mistake.
        """
        self.library.emulation_set_schedule(schedule)
        self.set_device(capability, multiprocessors)
        self.library.emulation_set_blocks(ctypes.c_uint64(first_block), ctypes.c_uint64(end_block))
        getattr(self.library, function)(*map(to_c, arguments))
        if error := self.library.emulation_take_error().decode():
            raise RuntimeError(error)

    @contextmanager
    def device(self, code: int | None = None, largest_cluster: int = LARGEST_CLUSTER) -> Iterator[None]:
        """In the `with` block, the device runs code for the architecture `code`, by default its own.

        A cluster has at most `largest_cluster` blocks there.
        """
        self.code, self.largest_cluster = code, largest_cluster
        try:
            yield
        finally:
            self.code, self.largest_cluster = None, LARGEST_CLUSTER

    def set_device(self, capability: int = 90, multiprocessors: int = FEW_MULTIPROCESSORS) -> None:
        self.library.emulation_set_capability(capability)
        self.library.emulation_set_code_architecture(self.code or capability)
        self.library.emulation_set_largest_cluster(self.largest_cluster)
        self.library.emulation_set_multiprocessors(multiprocessors)

    def workspace(
        self, op: str, *arguments: Any, capability: int = 90, multiprocessors: int = FEW_MULTIPROCESSORS
    ) -> torch.Tensor:
        """Return memory of the size that workspace_bytes_of_<op> returns; see `array` for its contents."""
        self.set_device(capability, multiprocessors)
        function = getattr(self.library, f"workspace_bytes_of_{op}")
        function.restype = ctypes.c_int64
        return array(function(*map(to_c, arguments)), torch.uint8)


@dataclass(frozen=True)
class Host:
    """Marks an argument that the launcher itself reads or writes on the host. Only kernels access the other tensors."""

    tensor: torch.Tensor


def to_c(argument: Any) -> Any:
    """Convert an argument to its ctypes type: tensors to pointers, dtypes to their number in hashengine::Dtype."""
    if isinstance(argument, Host):
        argument = argument.tensor
    if argument is None or isinstance(argument, torch.Tensor):
        return ctypes.c_void_p(argument.data_ptr() if argument is not None else None)
    if isinstance(argument, torch.dtype):
        return ctypes.c_int(DTYPE_NUMBERS[argument])
    return {bool: ctypes.c_bool, int: ctypes.c_int64, float: ctypes.c_double}[type(argument)](argument)


@functools.cache
def load_emulation() -> Emulation:
    return Emulation(compile_once("kernels", ["-fPIC", "-shared"]))


def array(numel: int, dtype: torch.dtype, offset: int = 0) -> torch.Tensor:
    """Return a 1-D tensor, `offset` elements after a 16-byte boundary. All bytes are 255: floats are NaN."""
    raw = torch.full(((numel + offset) * dtype.itemsize + 16,), 255, dtype=torch.uint8)
    aligned = -raw.data_ptr() % 16
    return raw[aligned : aligned + (numel + offset) * dtype.itemsize].view(dtype)[offset:]


def random_array(numel: int, dtype: torch.dtype, offset: int = 0, seed: int = 0) -> torch.Tensor:
    values = torch.randn(numel, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return array(numel, dtype, offset).copy_(values)


def sparse_array(numel: int, dtype: torch.dtype) -> torch.Tensor:
    """Return a 1-D tensor of zeros. Only the pages that are accessed take memory."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    return torch.frombuffer(mmap.mmap(-1, numel * dtype.itemsize, flags=flags), dtype=dtype)
