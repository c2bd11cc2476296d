"""What the machine can do at most, beside which rates are put: a bare loop over cached codes, and a read of memory."""

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

SOURCE = Path(__file__).with_name("bare_loop.cpp")
BUILD = Path("build/bare-loop")

_QUERIES = 8
_WORDS = (1, 2, 4, 8, 16)  # the lengths of a code that the loop is compiled for
_CACHED_BYTES = 1 << 14  # half of a small first cache
_WORDS_OF_A_CALL = 1 << 27  # that a thread compares: about 50 ms
_READ_BYTES = 1 << 28  # at least, in one call


class Limit(NamedTuple):
    """A call to time, and what it gets through: pairs of a query and a code, or bytes."""

    call: Callable[[], object]
    amount: int


def bare_loop(bits: int, threads: int) -> Limit | None:
    """Xor, popcount, add and a comparison with a limit, for eight queries at once, over codes in the first cache.

    None without a C++ compiler that works, and for codes of more than 1024 bits. Lengths between those that the loop is
    compiled for count as the next one.
    """
    library = _library()
    words = next((words for words in _WORDS if 64 * words >= bits), None)
    if library is None or words is None:
        return None
    rng = np.random.default_rng(0)
    count = _CACHED_BYTES // (8 * words)
    codes = rng.integers(0, 2**64, count * words, dtype=np.uint64)
    queries = rng.integers(0, 2**64, _QUERIES * words, dtype=np.uint64)
    passes = max(1, _WORDS_OF_A_CALL // (count * words * _QUERIES))

    def call() -> int:
        limit = 8 * words  # an eighth of the bits: none is so near
        return library.bare_loop(codes.ctypes.data, count, words, queries.ctypes.data, limit, passes, threads)

    return Limit(call, threads * passes * count * _QUERIES)


def read_memory(buffer: np.ndarray, threads: int) -> Limit | None:
    """A read of the whole buffer, each thread its share, as often as makes up for starting the threads."""
    library = _library()
    if library is None:
        return None
    passes = max(1, -(-_READ_BYTES // buffer.nbytes))
    words = buffer.nbytes // 8
    return Limit(lambda: library.read_memory(buffer.ctypes.data, words, passes, threads), passes * 8 * words)


def simd() -> str:
    """The instructions that the bare loop was compiled to; "none" without a compiler."""
    library = _library()
    return library.simd().decode() if library else "none"


@cache
def _library() -> ctypes.CDLL | None:
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None:
        return None
    # For this machine's processor, and so named by it, too: the folder may be seen by several.
    key = hashlib.sha256(SOURCE.read_bytes() + f"{compiler} {_processor()}".encode()).hexdigest()[:16]
    file = BUILD / f"{key}.so"
    if not file.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}")
        native = "-mcpu=native" if platform.machine() == "aarch64" else "-march=native"
        command = [
            *compiler.split(),
            "-std=c++17",
            "-O3",
            native,
            "-shared",
            "-fPIC",
            "-pthread",
            "-o",
            partial,
            SOURCE,
        ]
        if subprocess.run(command).returncode:
            return None  # the compiler has said why
        os.replace(partial, file)
    library = ctypes.CDLL(str(file.resolve()))
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    library.simd.restype = ctypes.c_char_p
    library.bare_loop.restype = library.read_memory.restype = ctypes.c_uint64
    library.bare_loop.argtypes = [pointer, size, ctypes.c_int, pointer, ctypes.c_uint64, size, ctypes.c_int]
    library.read_memory.argtypes = [pointer, size, size, ctypes.c_int]
    return library


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
