"""The codes of the search benchmarks, drawn at random or learned from images; average precision with tied codes."""

import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.search import image_codes, synthetic_codes
from benchmarks.search.data import Data, make_codes
from benchmarks.search.mean_precision import average_precision
from hashengine import ops
from tests.helpers.benchmarks import assert_refused, invoke

SMALL = ["--codes", 3000, "--queries", 20, "--bits", 64, "-k", 5, "--rounds", 2]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A temporary current folder, in which learned codes are cached. HASHENGINE_DATA is not set."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HASHENGINE_DATA", raising=False)
    return tmp_path


def test_clustered_codes_are_around_centres():
    drawn = synthetic_codes.draw_clustered(2000, 64, np.random.default_rng(1))
    distances = np.bitwise_count(drawn ^ drawn[:1]).sum(1)
    # Codes of the same centre differ in about 7.5 of the 64 bits, codes of different centres in about 32.
    same, other = distances[distances < 20], distances[distances >= 20]
    assert len(same) < 50 and 28 < other.mean() < 36


@pytest.mark.parametrize("data", [Data.best_last, Data.best_first])
def test_the_nearest_codes_are_at_the_end_or_at_the_start(data):
    codes = make_codes(data, 2000, 6, 64, None)
    positions = ops.hamming_topk(*map(torch.from_numpy, (codes.queries, codes.database)), 10)[1].double()
    assert positions.mean() > 1500 if data is Data.best_last else positions.mean() < 500


def test_equal_data_repeats_one_code():
    equal = make_codes(Data.equal, 100, 2, 64, None)
    assert (equal.database == equal.database[0]).all() and (equal.queries[0] != equal.queries[1]).any()


def test_average_precision_of_ties_is_the_mean_over_their_orders():
    distances, relevant = np.array([0, 1, 1, 1, 2]), np.array([1, 1, 0, 0, 1], bool)
    # The three codes at distance 1 can be ranked in three ways, which differ in the place of the relevant one.
    orders = ([1, 1, 0, 0, 1], [1, 0, 1, 0, 1], [1, 0, 0, 1, 1])
    precisions = [np.mean([sum(order[: i + 1]) / (i + 1) for i in range(5) if order[i]]) for order in orders]
    assert average_precision(distances, relevant) == pytest.approx(np.mean(precisions))


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def write_fashion_mnist(file, rng) -> None:
    with tarfile.open(file, "w:xz") as tar:
        for part, count in (("train", 40), ("t10k", 12)):
            pixels = rng.integers(0, 256, count * 28 * 28, dtype=np.uint8).tobytes()
            labels = bytes(i % 10 for i in range(count))
            add(tar, f"fashion-mnist/FashionMNIST/raw/{part}-images-idx3-ubyte", bytes(16) + pixels)
            add(tar, f"fashion-mnist/FashionMNIST/raw/{part}-labels-idx1-ubyte", bytes(8) + labels)


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
def test_codes_are_learned_from_images_then_cached_and_tiled(folder, data, write, sizes, classes):
    archive = folder / image_codes.ARCHIVES[data]
    write(archive, np.random.default_rng(0))
    codes = image_codes.load(data, 64, folder)
    assert codes.database.shape == (sizes[0], 8) and codes.queries.shape == (sizes[1], 8)
    assert codes.labels[:10].tolist() == [i % classes for i in range(10)]
    archive.unlink()
    for again, first in zip(image_codes.load(data, 64, None), codes, strict=True):
        assert np.array_equal(again, first)
    made = make_codes(Data(data), 3000, 5, 64, None)
    assert made.database.shape == (3000, 8) and made.queries.shape == (5, 8)
    copies, source = made.database[40:].reshape(-1), np.resize(codes.database, (3000, 8))[40:].reshape(-1)
    assert np.array_equal(made.database[:40], codes.database)
    assert np.bitwise_count(copies ^ source).mean() / 8 == pytest.approx(1 / 64, rel=0.1)
    assert np.array_equal(made.labels, np.resize(codes.labels, 3000))


def test_without_a_data_folder_learned_codes_are_skipped(folder):
    printed = invoke("hamming", *SMALL, "--data", "cifar10")
    assert (
        printed.startswith("hamming: skipped, because --data cifar10 needs image archives") and "\n" not in printed[:-1]
    )


@pytest.mark.parametrize("by_environment", [False, True])
def test_a_data_folder_without_the_archive_is_refused(folder, monkeypatch, by_environment):
    pytest.importorskip("faiss")
    monkeypatch.setenv("HASHENGINE_DATA", "nowhere" if by_environment else "elsewhere")
    options = [] if by_environment else ["--images", "nowhere"]
    message = "hamming: images must be a folder with cifar10-jpeg.tar.xz, for cifar10, got 'nowhere'"
    assert_refused(message, "hamming", *SMALL, "--data", "cifar10", *options)
