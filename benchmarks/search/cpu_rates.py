"""Measured rates to compare a CPU search with: of a bare distance loop over cached codes, and of a read of memory.

The bare loop counts the bits of each code separately. A search that counts bits in another way can exceed its rate.

`bare_loop.cpp` is compiled for the processor of this machine when it is first used.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hashengine import _environment

SOURCE = Path(__file__).with_name("bare_loop.cpp")
BUILD = Path("build/bare-loop")

_QUERIES = 8
_COMPILED_WORDS = (1, 2, 4, 8, 16)  # the code lengths, in 64-bit words, for which bare_loop.cpp has a loop
_CODES_BYTES = 1 << 14  # half of a small first-level cache
_WORDS_PER_CALL = 1 << 27  # pairs of 64-bit words that each thread compares
_MIN_READ_BYTES = 1 << 28  # bytes that a call reads at least


class Reference(NamedTuple):
    """A call to time, and the work that it does: the number of (query, code) pairs, or of bytes."""

    call: Callable[[], object]
    amount: int


def bare_loop(bits: int, threads: int) -> Reference | None:
    """A loop that compares eight queries at a time with codes in the first-level cache: XOR, popcount, add, compare.

    None if there is no working C++ compiler, or if codes have more than 1024 bits. A shorter length for which there is
    no loop is rounded up to the next length that has one.
    """
    library = load_library()
    words = next((words for words in _COMPILED_WORDS if 64 * words >= bits), None)
    if library is None or words is None:
        return None
    rng = np.random.default_rng(0)
    count = _CODES_BYTES // (8 * words)
    codes = rng.integers(0, 2**64, count * words, dtype=np.uint64)
    queries = rng.integers(0, 2**64, _QUERIES * words, dtype=np.uint64)
    passes = max(1, _WORDS_PER_CALL // (count * words * _QUERIES))

    def call() -> int:
        bound = 8 * words  # an eighth of the bits: none of these random codes is that near
        return library.bare_loop(codes.ctypes.data, count, words, queries.ctypes.data, bound, passes, threads)

    return Reference(call, threads * passes * count * _QUERIES)


def read_memory(buffer: np.ndarray, threads: int) -> Reference | None:
    """A read of the buffer, one part per thread, in enough passes that the time to start the threads is negligible.

    None if there is no working C++ compiler.
    """
    library = load_library()
    if library is None:
        return None
    passes = max(1, -(-_MIN_READ_BYTES // buffer.nbytes))
    words = buffer.nbytes // 8
    return Reference(lambda: library.read_memory(buffer.ctypes.data, words, passes, threads), passes * 8 * words)


def simd_level() -> str:
    """The instruction set for which the bare loop was compiled; "none" without a working compiler."""
    library = load_library()
    return library.simd().decode() if library else "none"


@cache
def load_library() -> ctypes.CDLL | None:
    """Load the library compiled from bare_loop.cpp; compile it first if necessary. None without a working compiler."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None:
        return None
    # The name of the file includes the processor, because machines that share the folder need different code.
    processor = _environment.processor() + " ".join(sorted(_environment.cpu_flags()))
    key = hashlib.sha256(SOURCE.read_bytes() + f"{compiler} {processor}".encode()).hexdigest()[:16]
    file = BUILD / f"{key}.so"
    if not file.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}")
        native = "-mcpu=native" if platform.machine() == "aarch64" else "-march=native"
        options = ["-std=c++17", "-O3", native, "-shared", "-fPIC", "-pthread"]
        if subprocess.run([*compiler.split(), *options, "-o", partial, SOURCE]).returncode:
            return None  # the compiler has printed the reason
        os.replace(partial, file)
    library = ctypes.CDLL(str(file.resolve()))
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    library.simd.restype = ctypes.c_char_p
    library.bare_loop.restype = library.read_memory.restype = ctypes.c_uint64
    library.bare_loop.argtypes = [pointer, size, ctypes.c_int, pointer, ctypes.c_uint64, size, ctypes.c_int]
    library.read_memory.argtypes = [pointer, size, size, ctypes.c_int]
    return library
