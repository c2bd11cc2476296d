"""python -m tests.fuzz --seconds 60, or with files of inputs to run those again.

A coverage-guided fuzzer, atheris, of the readers of files. It runs in a process of its own into which
AddressSanitizer's runtime is loaded first, so that every allocation is one of its own; Python's, numpy's and torch's
code is not instrumented, the searches of tests/hamming_levels.py are.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.helpers.paths import ROOT

CORPUS = Path(__file__).parent / "corpus"
KEPT = ROOT / "build" / "fuzz"
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all", "-g"]
LONGEST = 16384  # bytes of an input
_FOLDER = "HASHENGINE_FUZZ_FOLDER"  # tells the process under the runtime that it is that


def under_the_runtime() -> int:
    """This program again, with the sanitizer's runtime, in one library with the fuzzer's, before all others."""
    atheris = importlib.util.find_spec("atheris")
    if atheris is None:
        sys.exit("tests.fuzz needs atheris, which has wheels for Linux on x86-64 with Python 3.11 to 3.14")
    runtime = Path(atheris.origin).parents[1] / "asan_with_fuzzer.so"
    command = [os.environ.get("CXX", "g++"), "-print-file-name=libstdc++.so"]
    libstdcxx = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    settings = {
        "LD_PRELOAD": f"{runtime}:{libstdcxx}",  # the runtime looks for what it intercepts of libstdc++ at once
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONMALLOC": "malloc",  # Python's own pools would hide what lies in them
        "OMP_NUM_THREADS": "1",
    }
    # In memory where that is a folder: a save waits for the disk. And from here, since the fuzzer ends its process.
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        command = [sys.executable, "-m", "tests.fuzz", *sys.argv[1:]]
        return subprocess.run(command, env=os.environ | settings | {_FOLDER: folder}).returncode


class Heap:
    """Refuses calls that take much more memory than the files that they read."""

    TIMES = 16  # the text of a manifest and what it was parsed to
    BESIDES = 1 << 23  # numpy parses up to 10,000 characters of a header as Python, which takes some 400 bytes each

    def __init__(self, folder: Path):
        library, compiler = folder / "heap.so", os.environ.get("CXX", "g++")
        command = [compiler, "-std=c++17", "-O1", "-fPIC", "-shared", str(Path(__file__).with_name("heap.cpp"))]
        subprocess.run([*command, "-o", str(library)], check=True)
        self._library = ctypes.CDLL(str(library))
        for name in ("heap_used", "heap_peak"):
            getattr(self._library, name).restype = ctypes.c_int64
        assert self._library.heap_watch()

    def measured(self, call, size: int):
        self._library.heap_start()
        before = self._library.heap_used()
        try:
            return call()
        finally:
            taken = self._library.heap_peak() - before
            assert taken <= self.TIMES * size + self.BESIDES, f"{taken} bytes taken to read {size}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Fuzz the readers of files.")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers; 0: another each time")
    parser.add_argument("inputs", nargs="*", help="run these alone")
    options = parser.parse_args()
    if _FOLDER not in os.environ:
        sys.exit(under_the_runtime())
    del os.environ["LD_PRELOAD"]  # the compiler can do without

    import atheris

    with atheris.instrument_imports(include=["hashengine.index", "numpy.lib._format_impl"]):
        from tests.fuzz import inputs, readers
    from tests.helpers.hamming_levels import LevelLibrary, assert_same, native_levels, nearest

    folder = Path(os.environ[_FOLDER])
    library, heap = LevelLibrary(folder, SANITIZERS), Heap(folder)
    levels = native_levels() or ["scalar"]

    def search(queries, codes, live) -> None:
        for level in levels if len(codes) else ():
            found = library.topk(level, 1, queries, codes, len(codes), live)
            assert_same(found, nearest(queries, codes, len(codes), live))

    def check(data: bytes) -> None:
        readers.check(data, folder / "files", search, heap.measured)

    corpus = folder / "corpus"
    corpus.mkdir()
    for name, data in inputs.seeds().items():
        (corpus / name).write_bytes(data)
    KEPT.mkdir(parents=True, exist_ok=True)
    arguments = [sys.argv[0], f"-max_len={LONGEST}", f"-artifact_prefix={KEPT}/"]
    if options.inputs:
        arguments += options.inputs
    else:
        arguments += [f"-max_total_time={options.seconds}", f"-seed={options.seed}", "-timeout=20"]
        arguments += ["-print_final_stats=1", str(corpus), str(CORPUS)]
    atheris.Setup(arguments, check)
    atheris.Fuzz()


main()
