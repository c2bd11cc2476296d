"""The Hamming searches of every SIMD level, compiled without torch and called through ctypes or a pipe.

Also functions that make codes and filters, and that compute the expected answers from the definition of a search.
"""

import ctypes
import functools
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hashengine import _native
from tests.helpers.paths import ROOT

LEVELS = ["scalar", "avx2", "avx512", "neon"]
FUNCTIONS = ["topk", "range", "pushed", "count"]  # in the order of their numbers in tests/cpu/hamming_bridge.cpp
IS_ARM = platform.machine() in ("aarch64", "arm64")
CROSS_COMPILER = "aarch64-linux-gnu-g++"
FLAGS = ["-std=c++17", "-Wno-psabi", f"-I{ROOT}/csrc", f"-I{ROOT}/csrc/include"]
WARNINGS = ["-Wall", "-Wextra", "-Wshadow", "-Wconversion"]  # csrc/cpu compiles without any of these warnings


def hamming_sources() -> list[Path]:
    """The CPU sources of the Hamming searches of all levels."""
    return sorted((ROOT / "csrc/cpu/hamming").rglob("*.cpp"))


def native_levels() -> list[str]:
    """The levels that the native module and this CPU support; an empty list if the module is not built."""
    if not _native.available():
        return []
    from hashengine import _C

    return _C.simd_levels()


def require_arm(*programs: str) -> None:
    """Skips the test if one of the programs is missing; fails it instead if HASHENGINE_REQUIRE_ARM is set."""
    for program in programs:
        if shutil.which(program) is None:
            report = pytest.fail if os.environ.get("HASHENGINE_REQUIRE_ARM") else pytest.skip
            report(f"{program} is not installed: run apt-get install g++-aarch64-linux-gnu qemu-user")


def compile_all(
    command: list[str],
    sources: list[Path],
    folder: Path,
    extra_flags: Callable[[Path], Sequence[str]] = lambda source: (),
) -> list[str]:
    """Compiles each source and returns the paths of the objects. `extra_flags` returns the extra flags for a source."""

    def compile_one(source: Path) -> str:
        output = str(folder / f"{source.parent.name}_{source.stem}.o")  # isa/ and bitsliced/ have the same file names
        subprocess.run([*command, *extra_flags(source), "-c", str(source), "-o", output], check=True)
        return output

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, sources))


class ArmWorker:
    """Runs the searches in an aarch64 program under qemu. The program answers one call after another."""

    def __init__(self, folder: Path) -> None:
        require_arm(CROSS_COMPILER, "qemu-aarch64")
        sources = [*hamming_sources(), ROOT / "csrc/cpu/common/simd_level.cpp"]
        sources += ROOT.glob("tests/cpu/hamming_*.cpp")
        objects = compile_all([CROSS_COMPILER, *FLAGS, "-O2", "-pthread"], sources, folder)
        self.command = ["qemu-aarch64", str(folder / "worker")]
        subprocess.run([CROSS_COMPILER, "-static", "-pthread", *objects, "-o", self.command[1]], check=True)
        self._process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._calls, self._answers = self._process.stdin, self._process.stdout

    def call(self, numbers: np.ndarray, inputs: list, outputs: list[np.ndarray]) -> None:
        buffers = [b"" if array is None else array.tobytes() for array in inputs + outputs]
        sizes = np.array([len(buffer) for buffer in buffers] + [0] * (8 - len(buffers)), np.int64)
        self._calls.write(b"".join([numbers.tobytes(), sizes.tobytes(), *buffers]))
        self._calls.flush()
        for output in outputs:
            got = self._answers.read(output.nbytes)
            assert len(got) == output.nbytes, f"the worker exited with status {self._process.wait()}"
            output.flat = np.frombuffer(got, output.dtype)

    def close(self) -> None:
        self._process.communicate()


def build_searches(caller: Path, output: Path, flags: Sequence[str] = (), link_flags: Sequence[str] = ()) -> None:
    """Compiles and links the searches of every level and the source `caller` into a program or library.

    The AVX-512 kernels are compiled with plain C++ functions in place of the intrinsics, so that they run on any CPU.
    Their flag is -O0, because the compiler needs minutes and gigabytes to optimize code for vectors that the target
    does not have.
    """
    compiler = os.environ.get("CXX", "g++")
    twins = [f"-I{ROOT}/tests/cpu/avx512_twins", "-DHE_TARGET_AVX512=", "-O0"]
    objects = compile_all(
        [compiler, *FLAGS, "-O1", "-pthread", *flags],
        [*hamming_sources(), caller],
        output.parent,
        lambda source: twins if source.stem == "avx512" else (),
    )
    subprocess.run([compiler, "-pthread", *link_flags, *objects, "-o", str(output)], check=True)


class LevelLibrary:
    """The searches of every level, called through ctypes. On x86, the NEON searches run in qemu behind a pipe."""

    def __init__(self, folder: Path, flags: Sequence[str] = ()) -> None:
        build_searches(ROOT / "tests/cpu/hamming_bridge.cpp", folder / "levels.so", ["-fPIC", *flags], ["-shared"])
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

    def topk(
        self,
        level: str,
        threads: int,
        queries: np.ndarray,
        codes: np.ndarray,
        k: int,
        filter: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Distances and positions, both [queries, k]. filter: bool, [codes] or [queries, codes]."""
        distances = np.full((len(queries), k), -7, np.int32)
        positions = np.full((len(queries), k), -7, np.int64)
        self._call("topk", level, threads, queries, codes, filter, (k, 0), [distances, positions])
        return distances, positions

    def range(
        self,
        level: str,
        threads: int,
        queries: np.ndarray,
        codes: np.ndarray,
        radius: int,
        max_results: int,
        filter: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Lims, distances and positions. The results of query q are entries lims[q] to lims[q + 1] - 1."""
        lims = np.full(len(queries) + 1, -7, np.int64)
        distances = np.full(len(queries) * len(codes), -7, np.int32)
        positions = np.full(len(queries) * len(codes), -7, np.int64)
        outputs = [lims, distances, positions]
        self._call("range", level, threads, queries, codes, filter, (radius, max_results), outputs)
        return lims, distances[: lims[-1]], positions[: lims[-1]]

    def count(
        self,
        level: str,
        threads: int,
        queries: np.ndarray,
        codes: np.ndarray,
        filter: np.ndarray | None = None,
        labels: tuple[np.ndarray, np.ndarray] | None = None,
        any_shared: bool = False,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of all codes and of relevant codes at each distance: both [queries, bits + 1].

        labels: those of the queries and those of the codes, uint64 [rows, words]. A code is relevant if its label
        equals the query's label. With any_shared, it is relevant if the two labels have a common bit.
        """
        counts, relevant = np.full((2, len(queries), 8 * codes.shape[1] + 1), -7, np.int64)
        arguments = (0 if labels is None else labels[0].shape[1], int(any_shared))
        self._call("count", level, threads, queries, codes, filter, arguments, [counts, relevant], labels)
        return counts, relevant

    def pushed(self, level: str, queries: np.ndarray, codes: np.ndarray, radius: int) -> np.ndarray:
        """Per query, the number of hits of a bit-sliced scan that are within `radius` of the query's complement.

        The scan looks for codes within `radius` of the query. A false hit is a code beyond the radius. The results of a
        search do not show false hits, because the search drops them after it has computed their exact distances.

        Here the exact distances are computed from the complement of the query instead of the query. Each is the number
        of bits minus the distance from the query. If the radius is half the bits, all false hits are counted, and those
        true hits whose distance is exactly the radius.
        """
        counts = np.full(len(queries), -7, np.int64)
        self._call("pushed", level, 1, queries, codes, None, (radius, 0), [counts], (~queries, None))
        return counts

    def _call(
        self,
        name: str,
        level: str,
        threads: int,
        queries: np.ndarray,
        codes: np.ndarray,
        filter: np.ndarray | None,
        arguments: tuple[int, int],
        outputs: list[np.ndarray],
        labels: tuple[np.ndarray | None, np.ndarray | None] | None = None,
    ) -> None:
        bitmap = None if filter is None else np.packbits(filter, axis=-1, bitorder="little")
        stride = bitmap.shape[1] if bitmap is not None and bitmap.ndim == 2 else 0
        sizes = [len(queries), *codes.shape, stride]
        numbers = np.array([FUNCTIONS.index(name), LEVELS.index(level), threads, *sizes, *arguments], np.int64)
        inputs = [queries, codes, bitmap, *(labels or (None, None))]
        if level == "neon" and not IS_ARM:
            return self.arm_worker.call(numbers, inputs, outputs)
        pointers = [None if array is None else array.ctypes.data for array in inputs + outputs]
        self._library.hamming_call(ctypes.c_void_p(numbers.ctypes.data), (ctypes.c_void_p * 8)(*pointers))


@pytest.fixture(scope="session")
def level_library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LevelLibrary]:
    library = LevelLibrary(tmp_path_factory.mktemp("levels"))
    yield library
    library.close()


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> str:
    if request.param == "avx2" and "avx2" not in native_levels():
        pytest.skip("this CPU has no AVX2, or the native module is not built")
    if request.param == "avx512" and IS_ARM:
        pytest.skip("the x86 kernels are not compiled on ARM")
    return request.param


def make_codes(kind: str, count: int, bits: int, rng: np.random.Generator) -> np.ndarray:
    """Packed codes, [count, bits / 8]. kind: "random"; "clustered", with many ties; or "duplicate", all equal."""
    codes = rng.integers(0, 256, (count, bits // 8), dtype=np.uint8)
    if kind == "clustered":
        codes = codes[rng.integers(0, max(count // 50, 1), count)]
    if kind == "duplicate":
        codes[:] = codes[:1]
    return codes


def make_filter(rng: np.random.Generator, count: int, queries: int, share: float, own: bool) -> np.ndarray:
    """A random filter, which about `share * count` codes pass. If `own`, each query has a filter of its own."""
    return rng.random((queries, count) if own else count) < share


def all_distances(queries: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Distances, [queries, codes]. Their type is the smallest that holds bits + 1; numpy sorts small types faster."""
    kind = np.min_scalar_type(8 * codes.shape[1] + 1)
    padding = [(0, 0), (0, -codes.shape[1] % 8)]
    queries, codes = (np.pad(rows, padding).view(np.uint64) for rows in (queries, codes))
    return np.stack([np.bitwise_count(codes ^ query).sum(1, dtype=kind) for query in queries])


def nearest(
    queries: np.ndarray, codes: np.ndarray, k: int, filter: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """A top-k by definition: a stable sort. Excluded codes come last, with distance bits + 1 and position -1."""
    absent = 8 * codes.shape[1] + 1
    distances = all_distances(queries, codes)
    if filter is not None:
        distances = np.where(filter, distances, absent)
    positions = np.stack([np.argsort(row, kind="stable")[:k] for row in distances])
    distances = np.take_along_axis(distances, positions, 1)
    return distances, np.where(distances == absent, -1, positions)


def within(
    queries: np.ndarray, codes: np.ndarray, radius: int, max_results: int, filter: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A range search by definition, query by query: lims, distances, positions."""
    lists = []
    for q, distances in enumerate(all_distances(queries, codes)):
        passing = distances <= radius
        if filter is not None:
            passing &= filter[q] if filter.ndim == 2 else filter
        positions = np.flatnonzero(passing)
        order = np.argsort(distances[positions], kind="stable")[:max_results]
        lists.append((distances[positions][order], positions[order]))
    lims = np.cumsum([0, *(len(distances) for distances, _ in lists)])
    distances, positions = (np.concatenate(parts) for parts in zip(*lists, strict=True))
    return lims, distances, positions


def counts_by_distance(
    queries: np.ndarray,
    codes: np.ndarray,
    filter: np.ndarray | None = None,
    is_relevant: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The number of codes at each distance, and that of relevant codes, by definition: both [queries, bits + 1].

    is_relevant: bool, [queries, codes]. Default: no code is relevant.
    """
    distances, distance_count = all_distances(queries, codes), 8 * codes.shape[1] + 1
    passing = np.ones_like(distances, bool) if filter is None else np.broadcast_to(filter, distances.shape)
    relevant = np.zeros_like(passing) if is_relevant is None else is_relevant
    masks = (passing, passing & relevant)
    counts = [
        [np.bincount(row[m], minlength=distance_count) for row, m in zip(distances, mask, strict=True)]
        for mask in masks
    ]
    return np.stack(counts[0]), np.stack(counts[1])


def assert_same(got: Sequence[Any], want: Sequence[Any]) -> None:
    """Asserts that the arrays or tensors in `got` equal those in `want`."""
    for actual, expected in zip(got, want, strict=True):
        np.testing.assert_array_equal(np.asarray(actual), np.asarray(expected))
