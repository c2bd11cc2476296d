"""`hamming` on the CPU: result rows, peers, bare loop, memory reads, the verification of answers, and wrong options."""

import shutil
import sys

import numpy as np
import pytest

from benchmarks.search import cpu, cpu_rates, peers
from benchmarks.search.cases import Task
from benchmarks.search.data import Data, make_codes
from hashengine import HammingIndex
from tests.helpers.benchmarks import assert_refused, invoke, read_lines, run_command

ONE_QUERY = ["--codes", 3000, "--queries", 1, "--bits", 64, "-k", 5, "--rounds", 2]
SMALL = [*ONE_QUERY[:3], 20, *ONE_QUERY[4:]]

needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A temporary current folder. The bare loop is still built in the checkout, so that it is compiled only once."""
    monkeypatch.setattr(cpu_rates, "BUILD", cpu_rates.BUILD.absolute())
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def faiss():
    return pytest.importorskip("faiss")


def measured(folder, *arguments: object) -> list[dict]:
    """The rows that `hamming` writes."""
    invoke("hamming", *arguments, "--output", folder / "rows.jsonl")
    return read_lines(folder / "rows.jsonl")


@pytest.mark.parametrize("data", ["random", "clustered"])
def test_hamming_prints_the_table_and_appends_the_results(tmp_path, faiss, data):
    output = tmp_path / "results" / "hamming.jsonl"
    tasks = [option for task in Task for option in ("--task", task.value)]
    for _ in range(2):
        options = ["--bits", 72, *tasks, "--data", data, "--threads", 1, "--output", output]
        assert "times FAISS" in invoke("hamming", *SMALL, *options)
    rows = read_lines(output)
    once = [(bits, task) for bits in (64, 72) for task in ("search", "filter", "range", "map", "count")]
    assert [(row["bits"], row["task"]) for row in rows] == 2 * once
    for row in rows:
        assert {"cpu", "commit", "torch", "faiss", "simd_level", "threads"} <= row.keys()
        assert all(len(times) == 2 and min(times) > 0 for times in row["seconds"].values())


def test_wrong_neighbours_fail_the_command_after_the_other_cases_are_measured(faiss, monkeypatch):
    def wrong_for_k_5(self, queries, k, **options):
        distances, ids = search(self, queries, k, **options)
        return distances, ids + (k == 5)

    search = HammingIndex.search
    monkeypatch.setattr(HammingIndex, "search", wrong_for_k_5)
    result = run_command("hamming", *SMALL, "-k", 6, "--output", "rows.jsonl")
    assert result.exit_code == 1 and "1 of 2 measurements failed" in result.output
    assert "k = 5: the answers must equal FAISS's before they are timed" in result.output
    with open("rows.jsonl") as file:
        assert len(file.readlines()) == 1


def test_a_wrong_mean_average_precision_fails_the_command(faiss, folder, monkeypatch):
    right = cpu.mean_average_precision
    assert measured(folder, *SMALL, "--task", "map")[0]["k"] is None
    monkeypatch.setattr(cpu, "mean_average_precision", lambda a, b, c, d: right(a, b, c + 1, d))
    result = run_command("hamming", *SMALL, "--task", "map")
    assert result.exit_code != 0 and "must equal numpy's before it is timed" in result.output


def test_counts_are_measured_with_and_without_labels(faiss, folder):
    (row,) = measured(folder, *SMALL, "--task", "count")
    assert row["k"] is None and {"hashengine", "hashengine with labels"} <= row["seconds"].keys()


@pytest.mark.parametrize("wrong_part", [0, 1])
def test_wrong_counts_fail_the_command(faiss, monkeypatch, wrong_part):
    def wrong_with_labels(self, queries, **options):
        answer = count(self, queries, **options)
        return tuple(part + (i == wrong_part) for i, part in enumerate(answer)) if options.get("labels") else answer

    count = HammingIndex.count
    monkeypatch.setattr(HammingIndex, "count", wrong_with_labels)
    result = run_command("hamming", *SMALL, "--task", "count")
    message = ("counts with and without labels must be equal", "the counts must equal numpy's")[wrong_part]
    assert result.exit_code != 0 and message in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bits", 63], "hamming: bits must be a multiple of 8, got 63"),
        (["-k", 9999], "hamming: k must be at most the number of codes, 3000, got 9999"),
        (["--device", "tpu9"], "hamming: device must be 'cpu', 'cuda', 'cuda:1' or a torch.device, got 'tpu9'"),
        (["--device", "cuda", "--threads", 2], "hamming: threads must be left out with --device cuda, got 2"),
        (
            ["--device", "cuda", "--task", "count"],
            "hamming: --task must be map, which also counts, with --device cuda, got count",
        ),
    ],
)
def test_wrong_options_give_an_error_of_one_line(options, message):
    assert_refused(message, "hamming", *SMALL, *options)


def test_a_missing_faiss_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert_refused("hamming: faiss must be installed, got no such package; pip install", "hamming", *SMALL)


@needs_compiler
def test_a_search_of_one_query_is_compared_with_the_bare_loop_and_with_two_memory_reads(faiss, folder):
    (row,) = measured(folder, *ONE_QUERY)
    assert {"bare loop", "read", "read beyond the cache"} <= row["seconds"].keys()
    assert row["of_bare_loop"] > 0 and row["bytes"]["read"] % (3000 * 8) == 0
    assert row["of_read"].keys() == {"read", "read beyond the cache"} and min(row["of_read"].values()) > 0


def test_peers_get_no_more_pairs_than_their_limit_and_a_missing_peer_is_reported(faiss, folder, monkeypatch):
    monkeypatch.setattr(peers, "MAKERS", peers.MAKERS | {"no-such-peer": None})
    monkeypatch.setattr(peers, "_MAX_PAIRS", 3000 * 7)
    assert "without no-such-peer, which is not installed" in invoke("hamming", *SMALL, "--output", "rows.jsonl")
    (row,) = read_lines(folder / "rows.jsonl")
    assert row["pairs"]["hashengine"] == row["pairs"]["faiss heap"] == 3000 * 20
    assert row["faiss_best"].startswith("faiss")
    for name in peers.installed():
        assert row["pairs"][name] == 3000 * 7 and name in row


@pytest.mark.parametrize("name", peers.MAKERS)
def test_a_peer_with_wrong_distances_raises_wrong_answer(monkeypatch, name):
    pytest.importorskip(name)
    codes = make_codes(Data.random, 5000, 3, 72, None)
    peer = peers.MAKERS[name](codes.database, codes.queries, 5, 2)
    peer.call()
    distances = peers.distances_to
    monkeypatch.setattr(peers, "distances_to", lambda codes, query: distances(codes, query) + 1)
    with pytest.raises(peers.WrongAnswer, match=f"distances of {name} must be right"):
        peers.MAKERS[name](codes.database, codes.queries, 5, 2)


@needs_compiler
@pytest.mark.parametrize("bits", [64, 72, 128, 256, 512, 1024])  # 72 has no loop and is rounded up to 128
def test_the_bare_loop_finds_codes_below_its_bound(bits):
    """It finds copies of a query with the bound 1, but not with the bound 0. It finds nothing among random codes."""
    assert cpu_rates.bare_loop(bits, 2).call() == 0
    words = 1 << (max(1, -(-bits // 64)) - 1).bit_length()  # the code length in 64-bit words, as a power of 2
    queries = np.random.default_rng(0).integers(0, 2**64, 8 * words, dtype=np.uint64)
    for query, bound, hit in ((0, 1, True), (7, 1, True), (7, 0, False)):
        code = queries[query * words : (query + 1) * words]
        lanes = {"avx512": 8, "avx2": 4, "scalar": 1}[cpu_rates.simd_level()]
        codes = np.tile(np.repeat(code, lanes), 8 // lanes)
        library = cpu_rates.load_library()
        found = library.bare_loop(codes.ctypes.data, 8, words, queries.ctypes.data, bound, 1, 1)
        assert bool(found) is hit


def test_without_a_compiler_the_bare_loop_and_the_memory_read_are_left_out(monkeypatch):
    monkeypatch.setattr(cpu_rates, "load_library", lambda: None)
    assert cpu_rates.bare_loop(64, 1) is None and cpu_rates.simd_level() == "none"
    assert cpu_rates.read_memory(np.zeros(64, np.uint8), 1) is None


@needs_compiler
def test_a_read_covers_the_first_a_middle_and_the_last_whole_word():
    for position in (0, 8 * 50, 8 * 101 - 1):  # of the only byte that is not 0
        buffer = np.zeros(8 * 101 + 3, np.uint8)
        buffer[position] = 1
        library = cpu_rates.load_library()
        assert [library.read_memory(buffer.ctypes.data, 101, 1, threads) != 0 for threads in (1, 2, 3)] == [True] * 3
