"""The Hamming searches of every SIMD level, compiled for themselves and called through ctypes or a pipe."""

import ctypes
import functools
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from hashengine import _native
from tests.helpers.paths import ROOT

LEVELS = ["scalar", "avx2", "avx512", "neon"]
FUNCTIONS = ["topk", "range", "offered", "count"]
IS_ARM = platform.machine() in ("aarch64", "arm64")
CROSS_COMPILER = "aarch64-linux-gnu-g++"
INCLUDE = [f"-I{ROOT}/csrc/include", f"-I{ROOT}/csrc/cpu", "-std=c++17", "-Wno-psabi"]


def native_levels() -> list[str]:
    if not _native.available():
        return []
    from hashengine import _C

    return _C.simd_levels()


def require_arm(*programs: str) -> None:
    """Skips the test where these programs, for a CPU that this machine is not, are missing."""
    for program in programs:
        if shutil.which(program) is None:
            # Where every test must run, as in .ci/run, a missing program is an error.
            report = pytest.fail if os.environ.get("HASHENGINE_REQUIRE_ARM") else pytest.skip
            report(f"no {program}: apt-get install g++-aarch64-linux-gnu qemu-user")


def compile_all(command: list[str], sources: list[Path], folder: Path, extra=lambda source: ()) -> list[str]:
    """An object of each source; `extra` tells what options a source needs beside the command's."""

    def compile_one(source: Path) -> str:
        output = str(folder / f"{source.parent.name}_{source.stem}.o")
        subprocess.run([*command, *extra(source), "-c", str(source), "-o", output], check=True)
        return output

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, sources))


class ArmWorker:
    """The searches as an aarch64 program in qemu, which answers call after call."""

    def __init__(self, folder: Path):
        require_arm(CROSS_COMPILER, "qemu-aarch64")
        sources = [*ROOT.glob("csrc/cpu/hamming_*.cpp"), ROOT / "csrc/cpu/simd_level.cpp"]
        sources += ROOT.glob("tests/emulation/hamming*.cpp")
        objects = compile_all([CROSS_COMPILER, *INCLUDE, "-O2", "-pthread"], sources, folder)
        self.command = ["qemu-aarch64", str(folder / "worker")]
        subprocess.run([CROSS_COMPILER, "-static", "-pthread", *objects, "-o", self.command[1]], check=True)
        self._process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def call(self, numbers: np.ndarray, inputs: list, outputs: list[np.ndarray]) -> None:
        buffers = [b"" if array is None else array.tobytes() for array in inputs + outputs]
        sizes = np.array([len(buffer) for buffer in buffers] + [0] * (8 - len(buffers)), np.int64)
        self._process.stdin.write(b"".join([numbers.tobytes(), sizes.tobytes(), *buffers]))
        self._process.stdin.flush()
        for output in outputs:
            got = self._process.stdout.read(output.nbytes)
            assert len(got) == output.nbytes, f"the worker ended with {self._process.wait()}"
            output.flat = np.frombuffer(got, output.dtype)

    def close(self) -> None:
        self._process.communicate()


def build_searches(caller: Path, output: Path, flags: Sequence[str] = (), link_flags: Sequence[str] = ()) -> None:
    """The searches of every level with what calls them, as a program or library.

    AVX-512's kernels are compiled against plain C++ twins of its intrinsics, to run anywhere; not optimised, as vectors
    that the CPU lacks take minutes and gigabytes.
    """
    compiler = os.environ.get("CXX", "g++")
    twin = [f"-I{ROOT}/tests/emulation/avx512", "-DHE_TARGET_AVX512=", "-O0"]
    objects = compile_all(
        [compiler, *INCLUDE, "-O1", "-pthread", "-Wno-psabi", *flags],
        [*ROOT.glob("csrc/cpu/hamming_*.cpp"), caller],
        output.parent,
        lambda source: twin if source.stem.endswith("avx512") else (),
    )
    subprocess.run([compiler, "-pthread", *link_flags, *objects, "-o", str(output)], check=True)


class LevelLibrary:
    """Every level, called through ctypes; on another CPU, NEON's through a pipe to qemu."""

    def __init__(self, folder: Path, flags: Sequence[str] = ()):
        build_searches(ROOT / "tests/emulation/hamming.cpp", folder / "levels.so", ["-fPIC", *flags], ["-shared"])
        self._library = ctypes.CDLL(str(folder / "levels.so"))
        self._folder = folder

    @functools.cached_property
    def arm_worker(self) -> ArmWorker:
        folder = self._folder / "arm"
        folder.mkdir(exist_ok=True)
        return ArmWorker(folder)

    def close(self) -> None:
        if "arm_worker" in vars(self):
            self.arm_worker.close()

    def topk(self, level: str, threads: int, queries: np.ndarray, codes: np.ndarray, k: int, filter=None):
        distances = np.full((len(queries), k), -7, np.int32)
        positions = np.full((len(queries), k), -7, np.int64)
        self._call("topk", level, threads, queries, codes, filter, (k, 0), [distances, positions])
        return distances, positions

    def range(self, level: str, threads: int, queries, codes, radius: int, max_results: int, filter=None):
        lims = np.full(len(queries) + 1, -7, np.int64)
        distances = np.full(len(queries) * len(codes), -7, np.int32)
        positions = np.full(len(queries) * len(codes), -7, np.int64)
        outputs = [lims, distances, positions]
        self._call("range", level, threads, queries, codes, filter, (radius, max_results), outputs)
        return lims, distances[: lims[-1]], positions[: lims[-1]]

    def count(self, level: str, threads: int, queries, codes, filter=None, labels=None, any_shared: bool = False):
        """labels: of the queries and of the codes, uint64 [rows, words]."""
        counts, relevant = np.full((2, len(queries), 8 * codes.shape[1] + 1), -7, np.int64)
        numbers = (0 if labels is None else labels[0].shape[1], any_shared)
        self._call("count", level, threads, queries, codes, filter, numbers, [counts, relevant], labels)
        return counts, relevant

    def offered(self, level: str, queries, codes, radius: int) -> np.ndarray:
        """How many of the codes that the block kernel offers each query, within a radius, its opposite is near to too.

        Codes that are offered in vain, which their exact distance hides otherwise, would be among them.
        """
        counts = np.full(len(queries), -7, np.int64)
        self._call("offered", level, 1, queries, codes, None, (radius, 0), [counts], (~queries, None))
        return counts

    def _call(self, name, level, threads, queries, codes, filter, own_numbers, outputs, labels=None) -> None:
        bitmap = None if filter is None else np.packbits(filter, axis=-1, bitorder="little")
        stride = bitmap.shape[1] if bitmap is not None and bitmap.ndim == 2 else 0
        numbers = [FUNCTIONS.index(name), LEVELS.index(level), threads, len(queries), *codes.shape, stride]
        numbers = np.array([*numbers, *own_numbers], np.int64)
        inputs = [queries, codes, bitmap, *(labels or (None, None))]
        if level == "neon" and not IS_ARM:
            return self.arm_worker.call(numbers, inputs, outputs)
        pointers = [None if array is None else array.ctypes.data for array in inputs + outputs]
        self._library.hamming_call(ctypes.c_void_p(numbers.ctypes.data), (ctypes.c_void_p * 8)(*pointers))


@pytest.fixture(scope="session")
def level_library(tmp_path_factory):
    library = LevelLibrary(tmp_path_factory.mktemp("levels"))
    yield library
    library.close()


@pytest.fixture(params=LEVELS)
def level(request) -> str:
    if request.param == "avx2" and "avx2" not in native_levels():
        pytest.skip("this CPU has no AVX2")
    if request.param == "avx512" and IS_ARM:
        pytest.skip("the kernels of x86 are not compiled on ARM")
    return request.param


def make_codes(kind: str, count: int, bits: int, rng: np.random.Generator) -> np.ndarray:
    codes = rng.integers(0, 256, (count, bits // 8), dtype=np.uint8)
    if kind == "clustered":  # huge groups of ties
        codes = codes[rng.integers(0, max(count // 50, 1), count)]
    if kind == "duplicate":
        codes[:] = codes[:1]
    return codes


def make_filter(rng: np.random.Generator, count: int, queries: int, share: float, own: bool) -> np.ndarray:
    return rng.random((queries, count) if own else count) < share


def all_distances(queries: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """In the smallest type that holds them and one more: numpy sorts 8 and 16 bits by radix."""
    kind = np.min_scalar_type(8 * codes.shape[1] + 1)
    padding = [(0, 0), (0, -codes.shape[1] % 8)]
    queries, codes = (np.pad(rows, padding).view(np.uint64) for rows in (queries, codes))
    return np.stack([np.bitwise_count(codes ^ query).sum(1, dtype=kind) for query in queries])


def nearest(queries: np.ndarray, codes: np.ndarray, k: int, filter=None) -> tuple[np.ndarray, np.ndarray]:
    """By definition: every distance, then a stable sort; what the filter leaves out stands last, as absent."""
    absent = 8 * codes.shape[1] + 1
    distances = all_distances(queries, codes)
    if filter is not None:
        distances = np.where(filter, distances, absent)
    positions = np.stack([np.argsort(row, kind="stable")[:k] for row in distances])
    distances = np.take_along_axis(distances, positions, 1)
    return distances, np.where(distances == absent, -1, positions)


def within(queries, codes, radius: int, max_results: int, filter=None):
    """By definition: a query at a time."""
    lists = []
    for q, distances in enumerate(all_distances(queries, codes)):
        passing = distances <= radius
        if filter is not None:
            passing &= filter[q] if filter.ndim == 2 else filter
        positions = np.flatnonzero(passing)
        order = np.argsort(distances[positions], kind="stable")[:max_results]
        lists.append((distances[positions][order], positions[order]))
    lims = np.cumsum([0, *(len(distances) for distances, _ in lists)])
    return lims, *(np.concatenate(parts) for parts in zip(*lists, strict=True))


def assert_same(got, want) -> None:
    for mine, theirs in zip(got, want, strict=True):
        np.testing.assert_array_equal(np.asarray(mine), np.asarray(theirs))
