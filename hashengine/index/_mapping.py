"""A file's rows in memory without reading them, with room behind for more."""

import ctypes
import mmap
import os
import sys
from pathlib import Path

import numpy as np

_TIMES = 4  # of the file, the address space that is kept for it; rows that need more are copied elsewhere
_LEAST_ROOM = 1 << 26
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
_FIXED = 0x10
_FAILED = ctypes.c_void_p(-1).value


def map_rows(file: Path, count: int, width: int) -> np.ndarray:
    """uint8 [count or more, width]: the first ``count`` rows are the file's, its pages and so read when they are used.

    What is written stays in memory and never reaches the file. The room behind takes memory when it is written to. On
    Linux; elsewhere, and where so much address space is not to be had, there is no room.
    """
    room = _reserved(count, width) if sys.platform == "linux" else None
    if room is None:
        return np.memmap(file, np.uint8, mode="c", shape=(count, width))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | _FIXED
    with open(file, "rb") as source:
        # In the place of the first pages that `room` holds; it frees these with the others.
        placed = libc.mmap(room.ctypes.data, count * width, protection, flags, source.fileno(), 0)
    if placed == _FAILED:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), str(file))
    return room


def _reserved(count: int, width: int) -> np.ndarray | None:
    """Address space for rows, zeros until it is written to."""
    rows = max(_TIMES * count, count + _LEAST_ROOM // width)
    try:
        space = mmap.mmap(-1, rows * width, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE)
    except OSError:  # a limit on address space, or a system that promises no more memory than it has
        return None
    return np.frombuffer(space, np.uint8).reshape(rows, width)
