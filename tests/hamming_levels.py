"""The Hamming searches of every SIMD level, compiled for themselves and called through ctypes."""

import ctypes
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from hashengine import _native

ROOT = Path(__file__).parents[1]
LEVELS = ["scalar", "avx2", "avx512"]


class _Search(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("queries", "codes")]
    _fields_ += [(name, ctypes.c_int64) for name in ("query_count", "code_count", "code_bytes")]
    _fields_ += [("filter", ctypes.c_void_p), ("filter_stride", ctypes.c_int64)]


class _Labels(ctypes.Structure):
    _fields_ = [("queries", ctypes.c_void_p), ("codes", ctypes.c_void_p)]
    _fields_ += [("words", ctypes.c_int64), ("any", ctypes.c_bool)]


def native_levels() -> list[str]:
    if not _native.available():
        return []
    from hashengine import _C

    return _C.simd_levels()


class LevelLibrary:
    """AVX-512's kernels are compiled against plain C++ twins of its intrinsics, to run anywhere."""

    def __init__(self, folder: Path):
        compiler = os.environ.get("CXX", "g++")
        include = [f"-I{ROOT}/csrc/include", f"-I{ROOT}/csrc/cpu", "-std=c++17", "-O1", "-fPIC", "-pthread"]
        twin = [f"-I{ROOT}/tests/emulation/avx512", "-DHE_TARGET_AVX512="]
        objects = []
        for source in [*ROOT.glob("csrc/cpu/hamming_*.cpp"), ROOT / "tests/emulation/hamming.cpp"]:
            objects.append(str(folder / f"{source.parent.name}_{source.stem}.o"))
            extra = twin if source.stem == "hamming_avx512" else []
            subprocess.run([compiler, *extra, *include, "-c", str(source), "-o", objects[-1]], check=True)
        subprocess.run([compiler, "-shared", "-pthread", *objects, "-o", str(folder / "levels.so")], check=True)
        self._library = ctypes.CDLL(str(folder / "levels.so"))

    def topk(self, level: str, threads: int, queries: np.ndarray, codes: np.ndarray, k: int, filter=None):
        distances = np.full((len(queries), k), -7, np.int32)
        positions = np.full((len(queries), k), -7, np.int64)
        self._call("hamming_topk", level, threads, queries, codes, filter, ctypes.c_int64(k), distances, positions)
        return distances, positions

    def range(self, level: str, threads: int, queries, codes, radius: int, max_results: int, filter=None):
        lims = np.full(len(queries) + 1, -7, np.int64)
        distances = np.full(len(queries) * len(codes), -7, np.int32)
        positions = np.full(len(queries) * len(codes), -7, np.int64)
        limits = (ctypes.c_int64(radius), ctypes.c_int64(max_results))
        self._call("hamming_range", level, threads, queries, codes, filter, *limits, lims, distances, positions)
        return lims, distances[: lims[-1]], positions[: lims[-1]]

    def count(self, level: str, threads: int, queries, codes, filter=None, labels=None, any_shared: bool = False):
        """labels: of the queries and of the codes, uint64 [rows, words]."""
        counts, relevant = np.full((2, len(queries), 8 * codes.shape[1] + 1), -7, np.int64)
        words = None
        if labels is not None:
            words = ctypes.byref(_Labels(labels[0].ctypes.data, labels[1].ctypes.data, labels[0].shape[1], any_shared))
        self._call("hamming_count", level, threads, queries, codes, filter, words, counts, relevant)
        return counts, relevant

    def _call(self, name: str, level: str, threads: int, queries, codes, filter, *rest) -> None:
        bitmap = None if filter is None else np.packbits(filter, axis=-1, bitorder="little")
        stride = bitmap.shape[1] if bitmap is not None and bitmap.ndim == 2 else 0
        search = _Search(
            queries.ctypes.data, codes.ctypes.data, len(queries), len(codes), codes.shape[1],
            None if bitmap is None else bitmap.ctypes.data, stride,
        )  # fmt: skip
        arguments = [ctypes.c_void_p(item.ctypes.data) if isinstance(item, np.ndarray) else item for item in rest]
        getattr(self._library, name)(ctypes.byref(search), LEVELS.index(level), threads, *arguments)


@pytest.fixture(scope="session")
def level_library(tmp_path_factory) -> LevelLibrary:
    return LevelLibrary(tmp_path_factory.mktemp("levels"))


@pytest.fixture(params=LEVELS)
def level(request) -> str:
    if request.param == "avx2" and "avx2" not in native_levels():
        pytest.skip("this CPU has no AVX2")
    return request.param


def make_codes(kind: str, count: int, bits: int, rng: np.random.Generator) -> np.ndarray:
    codes = rng.integers(0, 256, (count, bits // 8), dtype=np.uint8)
    if kind == "clustered":  # huge groups of ties
        codes = codes[rng.integers(0, max(count // 50, 1), count)]
    if kind == "duplicate":
        codes[:] = codes[:1]
    return codes


def all_distances(queries: np.ndarray, codes: np.ndarray) -> np.ndarray:
    return np.stack([np.bitwise_count(codes ^ query).sum(1, dtype=np.int32) for query in queries])


def nearest(queries: np.ndarray, codes: np.ndarray, k: int, filter=None) -> tuple[np.ndarray, np.ndarray]:
    """By definition: every distance, then a stable sort; what the filter leaves out stands last, as absent."""
    absent = 8 * codes.shape[1] + 1
    distances = all_distances(queries, codes)
    if filter is not None:
        distances = np.where(filter, distances, absent)
    positions = np.argsort(distances, axis=1, kind="stable")[:, :k]
    distances = np.take_along_axis(distances, positions, 1)
    return distances, np.where(distances == absent, -1, positions)


def assert_same(got, want) -> None:
    for mine, theirs in zip(got, want, strict=True):
        np.testing.assert_array_equal(np.asarray(mine), np.asarray(theirs))
