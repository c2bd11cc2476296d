"""hamming_topk: every SIMD level against FAISS and numpy, on random, clustered and duplicate data, bit for bit."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from hashengine import _native
from hashengine.ops import hamming_topk
from hashengine.ops.hamming_topk import _reference as hamming_topk_reference
from tests.helpers.hamming_levels import (
    IS_ARM,
    LEVELS,
    ROOT,
    all_distances,
    assert_same,
    make_codes,
    native_levels,
    nearest,
)

# One byte, partial words, one block of planes that is just full (248) and two (256), more of them, and odd lengths.
WIDTHS = [8, 24, 64, 72, 128, 248, 256, 264, 512, 1000, 1024, 4096]


@pytest.mark.parametrize("kind", ["random", "clustered", "duplicate"])
def test_every_level_equals_the_definition(level_library, level, kind):
    rng = np.random.default_rng(3)
    for bits in WIDTHS:
        for count, query_count in ((1, 1), (31, 3), (33, 9), (700, 41)):
            codes, queries = make_codes(kind, count, bits, rng), make_codes("random", query_count, bits, rng)
            queries[0] = codes[-1]
            for k in {1, min(10, count), count}:
                for threads in (1, 3):
                    got = level_library.topk(level, threads, queries, codes, k)
                    assert_same(got, nearest(queries, codes, k))


def test_every_distance_up_to_all_bits(level_library, level):
    """Where bytes and 16 bits just hold the sums and where they do not; the last is longer than AVX2 and NEON take."""
    rng = np.random.default_rng(4)
    for bits in [*WIDTHS, 16, 32, 384, 768, 3968, 3976, 7944, 60_000, 65_528, 65_536]:
        share = np.linspace(0, 1, 150)[:, None]
        codes = np.packbits(rng.random((150, bits)) < share, axis=1)
        queries = np.ascontiguousarray(codes[[0, 149, 10, 75, 140, 148]])
        want = all_distances(queries, codes)
        assert want.max() == bits
        for k in (1, 20, 150):
            assert_same(level_library.topk(level, 1, queries, codes, k), nearest(queries, codes, k))
        counts = level_library.count(level, 1, queries, codes)[0]
        np.testing.assert_array_equal(counts, [np.bincount(row, minlength=bits + 1) for row in want])


@pytest.mark.parametrize("order", ["best last", "best first"])
def test_order_of_the_database_does_not_matter(level_library, level, order):
    """Best codes last: every code passes the bound, and selectors must be compacted again and again."""
    bits, count = 256, 5000
    query = np.zeros((1, bits // 8), np.uint8)
    ones = np.linspace(bits, 0, count).astype(int)
    codes = np.packbits(np.arange(bits) < ones[:, None], axis=1)
    codes = np.ascontiguousarray(codes if order == "best last" else codes[::-1])
    for k in (1, 7, 900):
        assert_same(level_library.topk(level, 1, query, codes, k), nearest(query, codes, k))


def test_chunks_of_a_long_database_merge_in_order(level_library):
    rng = np.random.default_rng(5)
    codes, queries = make_codes("clustered", 300_001, 16, rng), make_codes("random", 2, 16, rng)
    for k in (1, 100, 20_000):
        for threads in (1, 2, 5):
            assert_same(level_library.topk("scalar", threads, queries, codes, k), nearest(queries, codes, k))


@pytest.mark.parametrize("kind", ["random", "clustered", "duplicate"])
@pytest.mark.parametrize("level", LEVELS)
def test_equals_faiss(monkeypatch, level, kind):
    faiss = pytest.importorskip("faiss")
    if level not in native_levels():
        pytest.skip(f"needs the native module and a CPU with {level}")
    monkeypatch.setenv("HASHENGINE_SIMD_LEVEL", level)
    rng = np.random.default_rng(7)
    for bits in (8, 64, 128, 256, 264, 512, 1024):
        codes, queries = make_codes(kind, 9000, bits, rng), make_codes("random", 50, bits, rng)
        oracle = faiss.IndexBinaryFlat(bits)  # heap mode: ordered by (distance, position)
        oracle.add(codes)
        for k in (1, 10, 1000):
            got = hamming_topk(torch.from_numpy(queries), torch.from_numpy(codes), k)
            assert_same(got, oracle.search(queries, k))


def test_reference_equals_the_definition():
    rng = np.random.default_rng(11)
    for kind in ("random", "clustered", "duplicate"):
        for bits, count in ((8, 3), (64, 500), (1000, 77)):
            codes, queries = make_codes(kind, count, bits, rng), make_codes("random", 7, bits, rng)
            for k in {1, count}:
                got = hamming_topk_reference(torch.from_numpy(queries), torch.from_numpy(codes), k)
                assert_same(got, nearest(queries, codes, k))


def test_no_queries_and_non_contiguous_rows():
    codes = torch.randint(0, 256, (40, 16), dtype=torch.uint8)
    distances, positions = hamming_topk(codes[:0, :8], codes[:, :8], 3)
    assert distances.shape == positions.shape == (0, 3)
    got = hamming_topk(codes[:5, ::2], codes[:, ::2], 4)
    assert_same(got, nearest(codes[:5, ::2].numpy(), codes[:, ::2].numpy(), 4))


def test_same_answers_for_every_number_of_threads():
    codes = torch.randint(0, 256, (200_000, 8), dtype=torch.uint8)
    before = torch.get_num_threads()
    try:
        answers = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            answers.append(hamming_topk(codes[:3], codes, 50))
    finally:
        torch.set_num_threads(before)
    for other in answers[1:]:
        assert_same(other, answers[0])


@pytest.mark.parametrize(
    ("queries", "codes", "k", "error", "message"),
    [
        (
            torch.zeros(2, 8),
            torch.zeros(5, 8, dtype=torch.uint8),
            1,
            TypeError,
            "queries must be packed codes of uint8",
        ),
        (torch.zeros(2, 8, dtype=torch.uint8), torch.zeros(5, 8), 1, TypeError, "codes must be packed codes of uint8"),
        (torch.zeros(8, dtype=torch.uint8), torch.zeros(5, 8, dtype=torch.uint8), 1, ValueError, r"\[rows, bits / 8\]"),
        (torch.zeros(2, 4, dtype=torch.uint8), torch.zeros(5, 8, dtype=torch.uint8), 1, ValueError, "32 and 64 bits"),
        (torch.zeros(2, 8193, dtype=torch.uint8), torch.zeros(5, 8193, dtype=torch.uint8), 1, ValueError, "65536 bits"),
        (torch.zeros(2, 8, dtype=torch.uint8), torch.zeros(5, 8, dtype=torch.uint8), 0, ValueError, "k must be 1 to"),
        (torch.zeros(2, 8, dtype=torch.uint8), torch.zeros(5, 8, dtype=torch.uint8), 6, ValueError, r"\(5\), got 6"),
        (torch.zeros(2, 8, dtype=torch.uint8), torch.zeros(0, 8, dtype=torch.uint8), 1, ValueError, r"\(0\), got 1"),
    ],
)
def test_errors_are_one_line(queries, codes, k, error, message):
    with pytest.raises(error, match=message) as caught:
        hamming_topk(queries, codes, k)
    assert str(caught.value).startswith("hamming_topk: ")
    assert "\n" not in str(caught.value)


def test_devices_must_be_the_same():
    with pytest.raises(ValueError, match="one device, got cpu and meta"):
        hamming_topk(torch.zeros(2, 8, dtype=torch.uint8), torch.zeros(5, 8, dtype=torch.uint8, device="meta"), 1)


@pytest.mark.skipif(not _native.available(), reason="the native module is not built")
def test_simd_level_is_forced_by_the_environment():
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
