"""hamming_topk: the op is compared with FAISS; the op and its reference with the definition. Errors have one line."""

import os
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch

from hashengine import _native, ops
from hashengine.ops.hamming_topk import _reference
from tests.helpers.hamming_levels import (
    IS_ARM,
    LEVELS,
    assert_same,
    make_codes,
    make_filter,
    native_levels,
    nearest,
)
from tests.helpers.paths import ROOT

KINDS = ["random", "clustered", "duplicate"]
BYTES = torch.zeros(5, 8, dtype=torch.uint8)
MASK = torch.zeros(1, dtype=torch.bool)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", LEVELS)
def test_results_equal_those_of_faiss(monkeypatch: pytest.MonkeyPatch, level: str, kind: str) -> None:
    faiss = pytest.importorskip("faiss")
    if level not in native_levels():
        pytest.skip(f"needs the native module and a CPU with {level}")
    monkeypatch.setenv("HASHENGINE_SIMD_LEVEL", level)
    rng = np.random.default_rng(7)
    for bits in (8, 64, 128, 256, 264, 512, 1024):
        codes, queries = make_codes(kind, 9000, bits, rng), make_codes("random", 50, bits, rng)
        oracle = faiss.IndexBinaryFlat(bits)  # its results are ordered by (distance, position)
        oracle.add(codes)
        for k in (1, 10, 1000):
            got = ops.hamming_topk(torch.from_numpy(queries), torch.from_numpy(codes), k)
            assert_same(got, oracle.search(queries, k))


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_equals_the_definition(kind: str) -> None:
    rng = np.random.default_rng(11)
    for bits, count in ((8, 3), (64, 500), (1000, 77)):
        codes, queries = make_codes(kind, count, bits, rng), make_codes("random", 7, bits, rng)
        for k in {1, count}:
            got = _reference(torch.from_numpy(queries), torch.from_numpy(codes), k)
            assert_same(got, nearest(queries, codes, k))


@pytest.mark.parametrize("topk", [ops.hamming_topk, _reference])
@pytest.mark.parametrize("own_filters", [None, False, True], ids=["no filter", "shared filter", "filter per query"])
def test_filtered_results_equal_the_definition(topk: Callable, own_filters: bool | None) -> None:
    rng = np.random.default_rng(5)
    codes, queries = make_codes("clustered", 900, 40, rng), make_codes("random", 6, 40, rng)
    filter = None if own_filters is None else make_filter(rng, 900, 6, 0.3, own_filters)
    bitmap = None if filter is None else ops.pack_filter(torch.from_numpy(filter))
    got = topk(torch.from_numpy(queries), torch.from_numpy(codes), 900, filter=bitmap)
    assert_same(got, nearest(queries, codes, 900, filter))


def test_a_filter_is_packed_least_significant_bit_first() -> None:
    mask = torch.zeros(2, 11, dtype=torch.bool)
    mask[0, [0, 9]] = True
    assert ops.pack_filter(mask).tolist() == [[1, 2], [0, 0]]
    assert ops.pack_filter(mask[0]).tolist() == [1, 2]


def test_empty_queries_and_non_contiguous_rows_are_allowed() -> None:
    codes = torch.randint(0, 256, (40, 16), dtype=torch.uint8)
    distances, positions = ops.hamming_topk(codes[:0, :8], codes[:, :8], 3)
    assert distances.shape == positions.shape == (0, 3)
    got = ops.hamming_topk(codes[:5, ::2], codes[:, ::2], 4)
    assert_same(got, nearest(codes[:5, ::2].numpy(), codes[:, ::2].numpy(), 4))


def test_answers_do_not_depend_on_the_number_of_threads() -> None:
    codes = torch.randint(0, 256, (200_000, 8), dtype=torch.uint8)
    before = torch.get_num_threads()
    try:
        answers = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            answers.append(ops.hamming_topk(codes[:3], codes, 50))
    finally:
        torch.set_num_threads(before)
    for other in answers[1:]:
        assert_same(other, answers[0])


@pytest.mark.parametrize("query_count", [1, 5])
def test_a_search_over_several_chunks_of_the_longest_codes_equals_the_definition(query_count: int) -> None:
    """The CPU kernels store a candidate as a key of 32 bits (`KeyFormat` in csrc/cpu/hamming/selector.h).

    For codes of 65,536 bits, the distance occupies 17 bits of the key. The other 15 bits are the position in the chunk,
    so a chunk has at most 32,768 codes.
    """
    codes = np.zeros((70_000, 8192), np.uint8)  # pages without marked codes are not written and take no memory
    marked = [3, 32_767, 32_768, 65_535, 65_536, 69_999]
    codes[marked] = 255
    codes[marked[::2], 0] = 127
    queries = torch.full((query_count, 8192), 255, dtype=torch.uint8)
    order, distances = marked[1::2] + marked[::2] + [0, 1], [0] * 3 + [1] * 3 + [65_536] * 2
    got = ops.hamming_topk(queries, torch.from_numpy(codes), 8)
    assert got[0].tolist() == [distances] * query_count and got[1].tolist() == [order] * query_count
    lims, got_distances, positions = ops.hamming_range(queries, torch.from_numpy(codes), 1)
    assert lims.tolist() == [6 * q for q in range(query_count + 1)]
    assert got_distances.tolist() == distances[:6] * query_count and positions.tolist() == order[:6] * query_count


@pytest.mark.parametrize(
    ("queries", "codes", "k", "message"),
    [
        (torch.zeros(2, 8), BYTES, 1, "queries must be uint8"),
        (BYTES, torch.zeros(5, 8), 1, "codes must be uint8"),
        (BYTES[0], BYTES, 1, r"\[rows, bits / 8\]"),
        (BYTES[:, :4], BYTES, 1, "32 and 64 bits"),
        (torch.zeros(2, 8193, dtype=torch.uint8), torch.zeros(5, 8193, dtype=torch.uint8), 1, "65536 bits"),
        (BYTES, BYTES, 0, "k must be 1 to"),
        (BYTES, BYTES, 6, r"\(5\), got 6"),
        (BYTES, BYTES[:0], 1, r"\(0\), got 1"),
        (BYTES, BYTES.to("meta"), 1, "one device, got cpu and meta"),
    ],
)
def test_errors_are_one_line(queries: torch.Tensor, codes: torch.Tensor, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        ops.hamming_topk(queries, codes, k)
    assert str(caught.value).startswith("hamming_topk: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("filter", "message"),
    [
        (MASK, "filter must be a bitmap of uint8"),
        (BYTES[0], r"filter must be \[1\], or \[5, 1\]"),
        (BYTES[:2, :1], r"for 5 codes, got \[2, 1\]"),
    ],
)
def test_errors_for_a_filter_are_one_line(filter: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        ops.hamming_topk(BYTES, BYTES, 1, filter=filter)
    assert str(caught.value).startswith("hamming_topk: ")
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not _native.available(), reason="the native module is not built")
def test_the_environment_chooses_the_simd_level() -> None:
    code = (
        "import torch, hashengine; from hashengine import _C; print(_C.simd_level());"
        "c = torch.zeros(3, 8, dtype=torch.uint8); hashengine.ops.hamming_topk(c, c, 1)"
    )

    def run(level: str) -> subprocess.CompletedProcess:
        environment = os.environ | {"HASHENGINE_SIMD_LEVEL": level}
        return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT)

    assert run("scalar").stdout.strip() == "scalar"
    assert run("auto").stdout.strip() == native_levels()[-1]
    for other in ("sse9", "avx2" if IS_ARM else "neon"):
        failed = run(other)
        assert failed.returncode != 0
        assert "HASHENGINE_SIMD_LEVEL must be one of auto, scalar" in failed.stderr.splitlines()[-1]
