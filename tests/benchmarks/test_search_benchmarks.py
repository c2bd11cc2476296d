"""What the searches' benchmark puts beside them: peers, limits of the machine, codes of images, a file on the disk."""

import io
import json
import shutil
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from benchmarks import cgroup, harness, limits, mapped, peers, real_codes, systems
from benchmarks.__main__ import app
from benchmarks.codes import Data, make_codes

SMALL = ["--codes", "3000", "--queries", "20", "--bits", "64", "-k", "5", "--rounds", "2"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder of its own for what the benchmarks build, but for the bare loop, which is compiled once."""
    monkeypatch.setattr(limits, "BUILD", limits.BUILD.absolute())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def invoke(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def measured(*arguments: object) -> list[dict]:
    result = invoke(*arguments, "--output", "rows.jsonl")
    assert result.exit_code == 0, result.output
    with open("rows.jsonl") as file:
        return [json.loads(line) for line in file]


needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")


@needs_compiler
def test_one_query_is_put_beside_reads_and_the_bare_loop():
    pytest.importorskip("faiss")
    (row,) = measured("hamming", *SMALL, "--queries", 1)
    assert {"bare loop", "read", "read beyond the cache"} <= row["seconds"].keys()
    assert row["of_bare_loop"] > 0 and row["bytes"]["read"] % (3000 * 8) == 0
    assert row["of_read"].keys() == {"read", "read beyond the cache"} and min(row["of_read"].values()) > 0


def test_peers_have_rates_of_their_own_and_what_is_missing_is_said(monkeypatch):
    pytest.importorskip("faiss")
    monkeypatch.setattr(peers, "MAKERS", peers.MAKERS | {"no-such-peer": None})
    monkeypatch.setattr(peers, "_PAIRS", 3000 * 7)
    result = invoke("hamming", *SMALL, "--output", "rows.jsonl")
    assert "without no-such-peer, which is not installed" in result.output
    with open("rows.jsonl") as file:
        (row,) = map(json.loads, file)
    assert row["pairs"]["hashengine"] == row["pairs"]["faiss heap"] == 3000 * 20
    assert row["faiss_best"].startswith("faiss")
    for name in peers.installed():
        assert row["pairs"][name] == 3000 * 7 and name in row


@pytest.mark.parametrize("name", peers.MAKERS)
def test_a_peer_with_wrong_distances_is_not_timed(monkeypatch, name):
    pytest.importorskip(name)
    codes = make_codes(Data.random, 5000, 3, 72, None)
    peer = peers.MAKERS[name](codes.database, codes.queries, 5, 2)
    peer.call()
    distances = peers._distances
    monkeypatch.setattr(peers, "_distances", lambda codes, query: distances(codes, query) + 1)
    with pytest.raises(SystemExit, match=f"distances of {name} must be right"):
        peers.MAKERS[name](codes.database, codes.queries, 5, 2)


@needs_compiler
@pytest.mark.parametrize("bits", [64, 72, 128, 256, 512, 1024])
def test_the_bare_loop_computes_distances(bits):
    """It finds a query among copies of it, whichever of the eight it is, and nothing among random codes."""
    assert limits.bare_loop(bits, 2).call() == 0
    words = 1 << (max(1, -(-bits // 64)) - 1).bit_length()
    queries = np.random.default_rng(0).integers(0, 2**64, 8 * words, dtype=np.uint64)
    for query, limit, hit in ((0, 1, True), (7, 1, True), (7, 0, False)):
        code = queries[query * words : (query + 1) * words]
        lanes = {"avx512": 8, "avx2": 4, "scalar": 1}[limits.simd()]
        codes = np.tile(np.repeat(code, lanes), 8 // lanes)
        found = limits._library().bare_loop(codes.ctypes.data, 8, words, queries.ctypes.data, limit, 1, 1)
        assert bool(found) is hit


def test_the_bare_loop_is_left_out_where_it_cannot_be_compiled(monkeypatch):
    monkeypatch.setattr(limits, "_library", lambda: None)
    assert limits.bare_loop(64, 1) is None and limits.simd() == "none"
    assert limits.read_memory(np.zeros(64, np.uint8), 1) is None


@needs_compiler
def test_a_read_sees_every_word_of_whole_words():
    for place in (0, 8 * 50, 8 * 101 - 1):
        buffer = np.zeros(8 * 101 + 3, np.uint8)
        buffer[place] = 1
        library = limits._library()
        assert [library.read_memory(buffer.ctypes.data, 101, 1, threads) != 0 for threads in (1, 2, 3)] == [True] * 3


def test_average_precision_of_ties_is_the_mean_over_their_orders():
    distances, relevant = np.array([0, 1, 1, 1, 2]), np.array([1, 1, 0, 0, 1], bool)
    orders = ([1, 1, 0, 0, 1], [1, 0, 1, 0, 1], [1, 0, 0, 1, 1])
    precisions = [np.mean([sum(order[: i + 1]) / (i + 1) for i in range(5) if order[i]]) for order in orders]
    assert systems.average_precision(distances, relevant) == pytest.approx(np.mean(precisions))


def test_a_wrong_map_is_not_timed(monkeypatch):
    pytest.importorskip("faiss")
    right = systems.mean_average_precision
    assert measured("hamming", *SMALL, "--task", "map")[0]["k"] is None
    monkeypatch.setattr(systems, "mean_average_precision", lambda a, b, c, d: right(a, b + 1, c, d))
    result = invoke("hamming", *SMALL, "--task", "map")
    assert result.exit_code != 0 and "must equal numpy's before it is timed" in result.output


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def write_fashion_mnist(file, rng) -> None:
    with tarfile.open(file, "w:xz") as tar:
        for part, count in (("train", 40), ("t10k", 12)):
            pixels = rng.integers(0, 256, count * 28 * 28, dtype=np.uint8).tobytes()
            add(tar, f"fashion-mnist/FashionMNIST/raw/{part}-images-idx3-ubyte", bytes(16) + pixels)
            add(
                tar,
                f"fashion-mnist/FashionMNIST/raw/{part}-labels-idx1-ubyte",
                bytes(8) + bytes(i % 10 for i in range(count)),
            )


def write_cifar10(file, rng) -> None:
    with tarfile.open(file, "w:xz") as tar:
        add(tar, "cifar10-jpeg/official_order.csv", b"index,path\n")
        for part, count in (("train", 20), ("test", 6)):
            for i in range(2 * count):
                buffer = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(buffer, "jpeg")
                add(tar, f"cifar10-jpeg/{part}/{('cat', 'dog')[i % 2]}/{i // 2:04d}.jpg", buffer.getvalue())


@pytest.mark.parametrize(
    ("data", "write", "sizes", "classes"),
    [("fashion-mnist", write_fashion_mnist, (40, 12), 10), ("cifar10", write_cifar10, (40, 12), 2)],
)
def test_codes_are_learned_of_images_once(folder, monkeypatch, data, write, sizes, classes):
    archive = folder / real_codes.ARCHIVES[data]
    rng = np.random.default_rng(0)
    write(archive, rng)
    codes = real_codes.learned(data, 64, folder)
    assert codes.database.shape == (sizes[0], 8) and codes.queries.shape == (sizes[1], 8)
    assert codes.labels[:10].tolist() == [i % classes for i in range(10)]
    archive.unlink()
    for again, first in zip(real_codes.learned(data, 64, folder), codes, strict=True):
        assert np.array_equal(again, first)
    made = make_codes(Data(data), 3000, 5, 64, folder)
    assert made.database.shape == (3000, 8) and made.queries.shape == (5, 8)
    copies, source = made.database[40:].reshape(-1), np.resize(codes.database, (3000, 8))[40:].reshape(-1)
    assert np.array_equal(made.database[:40], codes.database)
    assert np.bitwise_count(copies ^ source).mean() / 8 == pytest.approx(1 / 64, rel=0.1)
    assert np.array_equal(made.labels, np.resize(codes.labels, 3000))


def test_images_that_are_not_there_are_asked_for_in_one_line():
    pytest.importorskip("faiss")
    result = invoke("hamming", *SMALL, "--data", "cifar10", "--images", "nowhere")
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: data cifar10 needs nowhere/cifar10-jpeg.tar.xz")


@pytest.mark.parametrize("limited", [True, False])
def test_a_mapped_index_is_read_from_the_disk(folder, monkeypatch, limited):
    if not limited:
        monkeypatch.setattr(cgroup, "make", lambda limit: None)
    options = ["--codes", 300_000, "--queries", 2, "--threads", 1, "--rounds", 2, "--folder", folder, "--cache", 64]
    (row,) = measured("mapped", *options)
    assert row["limit"] in ("cgroup", "eviction") and (limited or row["limit"] == "eviction")
    for name in ("search", "read"):
        assert len(row["seconds"][name]) == len(row["disk_bytes"][name]) == 2
    assert row["of_read"] > 0
    assert not list(folder.glob("mapped-*")), "the file must be gone"


def test_wrong_answers_of_a_mapped_index_are_not_reported(folder, monkeypatch):
    save = mapped.HammingIndex.save

    def save_another(self, path):
        self.update(np.arange(len(self)), np.zeros((len(self), 8), np.uint8))
        save(self, path)

    monkeypatch.setattr(mapped.HammingIndex, "save", save_another)
    result = invoke("mapped", "--codes", 1000, "--folder", folder, "--rounds", 1)
    assert result.exit_code != 0 and "the process that searches failed" in result.output


@pytest.mark.parametrize(
    ("option", "message"), [(["--bits", 63], "bits must be"), (["--codes", 5, "-k", 9], "k must be")]
)
def test_wrong_options_of_mapped_are_refused_in_one_line(option, message):
    result = invoke("mapped", *option)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {message}") and result.stderr.count("\n") == 1


def test_short_calls_are_timed_in_bursts(monkeypatch):
    """The first of which, that wakes threads, is one of many."""
    clock = SimpleNamespace(now=0.0, calls=0)

    def pass_time(seconds):
        clock.now += seconds

    def short():
        clock.calls += 1
        pass_time(0.03 if clock.calls % 5 == 1 else 0.0051)

    monkeypatch.setattr(harness, "time", SimpleNamespace(sleep=pass_time, perf_counter=lambda: clock.now))
    seconds = harness.time_in_rounds({"short": short, "long": lambda: pass_time(0.06)}, rounds=2)
    assert seconds == {"short": pytest.approx([0.0051] * 2), "long": pytest.approx([0.06] * 2)}
    assert clock.calls == 3 * 5
