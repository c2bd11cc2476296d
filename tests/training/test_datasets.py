"""`prepare` divides a data set into the folders `database` and `query`, each with one folder per class."""

import json
import os
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hashengine.errors import InputError
from hashengine.training import FitConfig, fit, prepare
from hashengine.training import datasets as datasets_module
from tests.helpers.tiny_images import write_noise


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*.*") if path.is_file()}


def test_digits_are_split_into_300_stratified_queries_and_the_rest(digits):
    from sklearn.datasets import load_digits

    record = json.loads((digits / "split.json").read_text())
    database, query = names(digits / "database"), names(digits / "query")
    assert (len(database), len(query)) == (1497, 300) == (record["database"]["images"], record["query"]["images"])
    source = load_digits()
    assert database | query == {f"{label}/{i:05d}.png" for i, label in enumerate(source.target)}
    for label, total in enumerate(np.bincount(source.target)):
        assert abs(record["query"]["classes"][str(label)] - 300 * total / 1797) < 1
    path = sorted(query)[0]
    pixels = np.asarray(Image.open(digits / "query" / path))
    assert np.array_equal(np.rint(pixels / 255 * 16), source.images[int(Path(path).stem)])


def test_the_seed_decides_the_split_and_the_same_split_is_not_written_again(digits, tmp_path):
    again, other = prepare("digits", tmp_path / "again"), prepare("digits", tmp_path / "other", seed=1)
    first = json.loads((digits / "split.json").read_text())
    assert again == first and other["query"]["sha256"] != first["query"]["sha256"]
    before = (tmp_path / "again" / "split.json").stat().st_mtime_ns
    assert prepare("digits", tmp_path / "again") == first
    assert (tmp_path / "again" / "split.json").stat().st_mtime_ns == before
    with pytest.raises(InputError, match="^train prepare: output must be .*remove it"):
        prepare("digits", tmp_path / "again", seed=1)


def test_a_folder_of_class_folders_keeps_its_names_and_no_query_has_a_copy(tmp_path):
    source = write_noise(tmp_path / "photos", {"a": 30, "b": 20})
    for number in range(15):  # a copy of every second image of "a"
        (source / "a" / f"copy {number}.png").write_bytes((source / "a" / f"{2 * number}.png").read_bytes())
    record = prepare(str(source), tmp_path / "split")
    database, query = names(tmp_path / "split" / "database"), names(tmp_path / "split" / "query")
    assert database | query == names(source) and not database & query
    assert len(query) == round(0.1 * 65) and record["queries_identical_to_a_database_image"] == 0
    assert all(path.startswith("b/") or int(Path(path).stem) % 2 for path in query)


def test_a_failed_preparation_leaves_nothing_behind(tmp_path, monkeypatch):
    source = write_noise(tmp_path / "photos", {"a": 9, "b": 9})

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", full_disk)
    with pytest.raises(OSError, match="No space left"):
        prepare(str(source), tmp_path / "split")
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_official_sets_come_from_torchvision_with_the_test_images_as_queries(tmp_path, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets")

    class Stub:
        classes = ["T-shirt/top", "Bag"]

        def __init__(self, root, train, download):
            assert root == tmp_path / "root" and download
            self.targets = torch.arange(40 if train else 20) % 2
            self.data = torch.randint(0, 256, (len(self.targets), 28, 28), dtype=torch.uint8)

    monkeypatch.setattr(datasets, "FashionMNIST", Stub)
    record = prepare("fashion-mnist", tmp_path / "all", root=tmp_path / "root")
    assert record["database"]["classes"] == {"Bag": 20, "T-shirt-top": 20} and record["query"]["images"] == 20
    assert prepare("fashion-mnist", tmp_path / "some", queries=6, root=tmp_path / "root")["query"]["classes"] == {
        "Bag": 3,
        "T-shirt-top": 3,
    }


@pytest.mark.parametrize(("source", "package"), [("digits", "sklearn"), ("cifar10", "torchvision")])
def test_the_error_for_a_missing_package_names_the_extra(tmp_path, monkeypatch, source, package):
    for module in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=r"must be installed, .*pip install 'hashengine\[train\]'"):
        prepare(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"seed": "a"}, "seed must be an integer of at least 0, got 'a'"),
        ({"queries": 0}, "queries must be at least 1, got 0"),
        ({"queries": 1.5}, "queries must be an integer of at least 1, got 1.5"),
        ({"root": 3}, "root must be a path, got int"),
        ({"output": None}, "output must be a path, got NoneType"),
        ({"source": ["digits"]}, "source must be a path, got list"),
    ],
)
def test_invalid_arguments_are_refused(tmp_path, arguments, complaint):
    with pytest.raises(InputError, match=f"^train prepare: {complaint}$"):
        prepare(**({"source": "digits", "output": tmp_path / "out"} | arguments))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("database", None),
        ("query", []),
        ("database.images", "many"),
        ("query.classes", [1]),
        ("query.sha256", 3),
        ("queries_identical_to_a_database_image", "x"),
    ],
)
def test_a_split_with_a_damaged_record_is_not_kept(tmp_path, path, value):
    images = write_noise(tmp_path / "images", {"a": 12, "b": 12})
    prepare(images, tmp_path / "split")
    record = json.loads((tmp_path / "split" / "split.json").read_text())
    *parents, last = path.split(".")
    (record if not parents else record[parents[0]])[last] = value
    (tmp_path / "split" / "split.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="^train prepare: output must be a new folder, or one with this very split"):
        prepare(images, tmp_path / "split")


def test_files_that_are_no_images_are_left_out_and_unreadable_ones_are_refused(tmp_path, monkeypatch):
    images = write_noise(tmp_path / "images", {"a": 12, "b": 12})
    (images / "a" / "0.png").rename(images / "a" / "photo")
    (images / "a" / "notes.txt").write_text("no image")
    notes = []
    monkeypatch.setattr("hashengine._progress.note", notes.append)
    record = prepare(images, tmp_path / "split")
    assert record["database"]["images"] + record["query"]["images"] == 24
    assert notes == [f"skipped: 1 file in {images} is no image"]
    os.mkfifo(images / "a" / "pipe.png")
    with pytest.raises(InputError, match="pipe.png: the file must be readable, got a named pipe"):
        prepare(images, tmp_path / "other")


def test_the_default_number_of_queries_is_at_most_the_number_of_images_without_a_copy(tmp_path):
    images = write_noise(tmp_path / "images", {"a": 3, "b": 3})
    for path in list(images.glob("a/*.png"))[:1]:
        for number in range(60):
            shutil.copyfile(path, path.with_name(f"copy-{number}.png"))
    record = prepare(images, tmp_path / "split")
    assert record["query"]["images"] == 3  # of the 5 images without a copy, one of each class is kept
    assert record["queries_identical_to_a_database_image"] == 0


def test_too_many_queries_are_counted_among_all_images(tmp_path):
    for number in range(15):
        image = Image.new("L", (4, 4), number if number < 6 else 200)
        path = tmp_path / "images" / f"class{number % 3}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    expected = "at most 3 of these 15 images, because one of each class must remain and 9 have identical copies"
    with pytest.raises(InputError, match=f"queries must be {expected}, got 4$"):
        prepare(tmp_path / "images", tmp_path / "split", queries=4)


def test_a_user_without_a_home_folder_is_told_to_name_the_root(tmp_path, monkeypatch):
    pytest.importorskip("torchvision")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    with pytest.raises(InputError, match="root must be given with --root, got nothing, and this user has no home"):
        prepare("fashion-mnist", tmp_path / "split")


def test_a_split_of_other_contents_is_not_kept(tmp_path):
    for label in "ab":
        for number in range(6):
            path = tmp_path / "images" / label / f"{number}.bmp"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (4, 4), 10 * number + (label == "b")).save(path)
    record = prepare(tmp_path / "images", tmp_path / "split", queries=2)
    assert prepare(tmp_path / "images", tmp_path / "split", queries=2) == record
    (tmp_path / "images" / "a").rename(tmp_path / "images" / "c")
    (tmp_path / "images" / "b").rename(tmp_path / "images" / "a")
    (tmp_path / "images" / "c").rename(tmp_path / "images" / "b")  # the same names and sizes
    with pytest.raises(InputError, match="output must be a new folder, or one with this very split"):
        prepare(tmp_path / "images", tmp_path / "split", queries=2)
    older = json.loads((tmp_path / "split" / "split.json").read_text())
    (tmp_path / "split" / "split.json").write_text(
        json.dumps({name: value for name, value in older.items() if name != "contents_sha256"})
    )
    assert prepare(tmp_path / "images", tmp_path / "split", queries=2)["seed"] == record["seed"]


@pytest.mark.parametrize("change", ["removed", "added"])
def test_a_split_whose_images_are_missing_is_not_confirmed(tmp_path, change):
    write_noise(tmp_path / "images", {"a": 9, "b": 9})
    prepare(tmp_path / "images", tmp_path / "split", queries=2)
    if change == "removed":
        shutil.rmtree(tmp_path / "split" / "database")
    else:
        (tmp_path / "split" / "database" / "a" / "added.png").write_bytes(b"")
    (tmp_path / "split" / "query" / ".DS_Store").touch()
    with pytest.raises(InputError, match="output must be a split with 16 images in 'database', as its split.json says"):
        prepare(tmp_path / "images", tmp_path / "split", queries=2)


def test_a_missing_source_is_named_before_the_output(tmp_path):
    write_noise(tmp_path / "images", {"a": 9, "b": 9})
    prepare(tmp_path / "images", tmp_path / "split", queries=2)
    with pytest.raises(InputError, match="source must be digits, .*nowhere"):
        prepare(tmp_path / "nowhere", tmp_path / "split", queries=2)


def test_a_class_folder_that_is_a_link_is_named(tmp_path):
    write_noise(tmp_path / "images", {"a": 3, "b": 3})
    (tmp_path / "images" / "c").symlink_to(tmp_path / "images" / "a")
    with pytest.raises(InputError, match="every class folder must be a folder, because links .* got the link '.*/c'"):
        prepare(tmp_path / "images", tmp_path / "split", queries=2)


def test_files_that_are_no_images_do_not_change_a_split(tmp_path):
    write_noise(tmp_path / "images", {"a": 9, "b": 9})
    (tmp_path / "split").mkdir()
    (tmp_path / "split" / ".DS_Store").touch()
    record = prepare(tmp_path / "images", tmp_path / "split", queries=2)
    (tmp_path / "split" / "query" / ".DS_Store").touch()
    (tmp_path / "split" / "query" / "results.json").write_text("{}")
    assert prepare(tmp_path / "images", tmp_path / "split", queries=2) == record


def test_a_hidden_link_among_class_folders_is_skipped(tmp_path):
    write_noise(tmp_path / "images", {"a": 9, "b": 9})
    (tmp_path / "images" / ".cache").symlink_to(tmp_path)
    assert prepare(tmp_path / "images", tmp_path / "split", queries=2)["query"]["images"] == 2


def test_two_preparations_of_one_folder_cannot_both_succeed(tmp_path):
    source = write_noise(tmp_path / "photos", {"a": 60, "b": 60})
    started = threading.Barrier(2)

    def start(seed: int) -> str:
        started.wait()
        try:
            return prepare(str(source), tmp_path / "split", seed=seed)["query"]["sha256"]
        except InputError as error:
            return str(error)

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(start, range(2)))
    refused = [result for result in results if result.startswith("train prepare: output must be")]
    kept = json.loads((tmp_path / "split" / "split.json").read_text())["query"]["sha256"]
    assert len(refused) == 1 and kept in results


def test_a_folder_with_the_name_of_a_data_set_is_mentioned(tmp_path, monkeypatch):
    notes = []
    monkeypatch.setattr("hashengine._progress.note", notes.append)
    monkeypatch.chdir(tmp_path)
    write_noise(tmp_path / "digits", {"a": 9, "b": 9})
    assert prepare("digits", tmp_path / "split")["query"]["images"] == 300
    assert "'digits' is the data set of this name; the folder of this name is './digits'" in notes
    assert prepare("./digits", tmp_path / "own")["query"]["images"] == 2


def test_a_split_is_no_folder_of_class_folders(tmp_path):
    source = write_noise(tmp_path / "photos", {"a": 9, "b": 9})
    prepare(str(source), tmp_path / "split")
    with pytest.raises(InputError, match="^fit: images must be in a folder of class folders, .*sides of a split"):
        fit(FitConfig(images=tmp_path / "split", output=tmp_path / "model"))


def test_a_foreign_file_with_the_name_of_the_record_of_a_split_does_not_matter(tmp_path):
    source = write_noise(tmp_path / "photos", {"a": 9, "b": 9})
    (source / "split.json").write_text('{"train": [], "database": [], "query": []}')
    assert prepare(str(source), tmp_path / "split")["query"]["images"] == 2


def test_a_split_that_appears_while_the_source_is_read_is_kept(tmp_path, monkeypatch):
    source = write_noise(tmp_path / "photos", {"a": 9, "b": 9})
    read = datasets_module._class_folders

    def prepare_first(*arguments):
        monkeypatch.setattr(datasets_module, "_class_folders", read)
        prepare(str(source), tmp_path / "split", seed=5)
        (tmp_path / "split" / "mine").write_text("mine")
        return read(*arguments)

    monkeypatch.setattr(datasets_module, "_class_folders", prepare_first)
    with pytest.raises(InputError, match="^train prepare: output must be a new or an empty folder"):
        prepare(str(source), tmp_path / "split", seed=6)
    assert (tmp_path / "split" / "mine").read_text() == "mine"
