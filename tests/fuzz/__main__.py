"""`python -m tests.fuzz --seconds 60` fuzzes the functions that read files.

`python -m tests.fuzz FILE...` runs only the inputs in these files, such as the failing inputs that the fuzzer saved.

The fuzzer is atheris, which is guided by coverage. It runs in a process of its own, in which AddressSanitizer's runtime
is loaded before all other libraries, so that it intercepts every call of malloc. The C++ searches that
tests/helpers/hamming_levels.py builds are instrumented; the native code of Python, numpy and torch is not.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.helpers.paths import ROOT

if TYPE_CHECKING:  # at run time, main() imports numpy while atheris instruments imports
    import numpy as np

CORPUS = Path(__file__).parent / "corpus"
FAILURES = ROOT / "build" / "fuzz"  # the folder where the fuzzer saves each failing input
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all", "-g"]
LONGEST = 16384  # the fuzzer makes no input of more bytes
# This environment variable is set only in the process with the sanitizer. It names the folder for temporary files.
_FOLDER = "HASHENGINE_FUZZ_FOLDER"


def run_with_sanitizer() -> int:
    """Run this program again with a preloaded library that has the sanitizer and the fuzzer; return the exit status."""
    atheris = importlib.util.find_spec("atheris")
    if atheris is None:
        sys.exit("tests.fuzz needs atheris, which has wheels for Linux on x86-64 with Python 3.11 to 3.14")
    runtime = Path(atheris.origin).parents[1] / "asan_with_fuzzer.so"
    command = [os.environ.get("CXX", "g++"), "-print-file-name=libstdc++.so"]
    libstdcxx = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    settings = {
        "LD_PRELOAD": f"{runtime}:{libstdcxx}",  # the runtime looks up functions of libstdc++
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONMALLOC": "malloc",  # the sanitizer would not see allocations in Python's own pools
        "OMP_NUM_THREADS": "1",
    }
    # The folder is in memory if possible, because a save to a disk waits for the disk. This process creates and removes
    # the folder, because the fuzzer ends its own process without cleaning up.
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        command = [sys.executable, "-m", "tests.fuzz", *sys.argv[1:]]
        return subprocess.run(command, env=os.environ | settings | {_FOLDER: folder}).returncode


class Heap:
    """Measures the memory that a call allocates. Fails if that is much more than the size of the files it reads."""

    # A call may allocate FACTOR * size + CONSTANT bytes to read files of `size` bytes.
    FACTOR = 16  # the text of a manifest and its parsed values take several times the size of the file
    CONSTANT = 1 << 23  # numpy parses up to 10,000 characters of a header as Python code: 400 bytes per character

    def __init__(self, folder: Path) -> None:
        library, compiler = folder / "heap.so", os.environ.get("CXX", "g++")
        command = [compiler, "-std=c++17", "-O1", "-fPIC", "-shared", str(Path(__file__).with_name("heap.cpp"))]
        subprocess.run([*command, "-o", str(library)], check=True)
        self._library = ctypes.CDLL(str(library))
        for name in ("heap_used", "heap_peak"):
            getattr(self._library, name).restype = ctypes.c_int64
        assert self._library.heap_watch()

    def measure(self, call: Callable[[], Any], size: int) -> Any:
        """Return the result of `call`, which reads files of `size` bytes in total; fail if it allocates too much."""
        self._library.heap_start()
        before = self._library.heap_used()
        try:
            return call()
        finally:
            taken = self._library.heap_peak() - before
            assert taken <= self.FACTOR * size + self.CONSTANT, f"allocated {taken} bytes to read {size} bytes"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Fuzz the readers of files.")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0, help="the seed of the random inputs (0: a random seed)")
    parser.add_argument("inputs", nargs="*", help="files with one input each; only these inputs are run")
    options = parser.parse_args()
    if _FOLDER not in os.environ:
        sys.exit(run_with_sanitizer())
    del os.environ["LD_PRELOAD"]  # the compiler must run without it

    import atheris

    with atheris.instrument_imports(include=["hashengine.index", "numpy.lib._format_impl"]):
        from tests.fuzz import inputs, readers
    from tests.helpers.hamming_levels import LevelLibrary, assert_same, native_levels, nearest

    folder = Path(os.environ[_FOLDER])
    library, heap = LevelLibrary(folder, SANITIZERS), Heap(folder)
    levels = native_levels() or ["scalar"]

    def search(queries: np.ndarray, codes: np.ndarray, live: np.ndarray) -> None:
        for level in levels if len(codes) else ():
            found = library.topk(level, 1, queries, codes, len(codes), live)
            assert_same(found, nearest(queries, codes, len(codes), live))

    def check(data: bytes) -> None:
        readers.check(data, folder / "files", search, heap.measure)

    corpus = folder / "corpus"
    corpus.mkdir()
    for name, data in inputs.seeds().items():
        (corpus / name).write_bytes(data)
    FAILURES.mkdir(parents=True, exist_ok=True)
    arguments = [sys.argv[0], f"-max_len={LONGEST}", f"-artifact_prefix={FAILURES}/"]
    if options.inputs:
        arguments += options.inputs
    else:
        arguments += [f"-max_total_time={options.seconds}", f"-seed={options.seed}", "-timeout=20"]
        arguments += ["-print_final_stats=1", str(corpus), str(CORPUS)]
    atheris.Setup(arguments, check)
    atheris.Fuzz()


main()
