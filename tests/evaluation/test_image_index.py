"""An index of images: search, append, and what is refused."""

import copy
import json
import pickle
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest

from hashengine import HammingIndex, InputError, _progress
from hashengine.evaluation import (
    CodesFolder,
    ImageIndex,
    encode_folder,
    evaluate,
    evaluate_folders,
    index_codes,
    run_demo,
    search_images,
    write_report,
)
from hashengine.evaluation import encode as encode_module
from hashengine.evaluation import image_index as image_index_module
from hashengine.models import HashNet
from hashengine.training import report
from tests.helpers.children import as_user
from tests.helpers.tiny_images import CLASSES, make_model


def hamming(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.unpackbits(a[:, None] ^ b[None], axis=2).sum(axis=2)


def test_search_equals_brute_force(index, codes, queries):
    results = index.search(queries, k=len(codes.items))
    distances = hamming(queries.codes, codes.codes)
    order = np.argsort(distances, axis=1, kind="stable")
    for row, query in enumerate(results.queries):
        assert [hit.id for hit in query.hits] == order[row].tolist()
        assert [hit.distance for hit in query.hits] == distances[row, order[row]].tolist()
        assert [hit.path for hit in query.hits] == [codes.items[i].path for i in order[row]]
        assert [hit.rank for hit in query.hits] == list(range(1, len(codes.items) + 1))


def test_an_index_built_by_appends_answers_like_one_built_in_one_step(images, model, queries, codes, index, tmp_path):
    parts = [encode_folder(images / name, model) for name in CLASSES]
    grown = ImageIndex.build(parts[0], tmp_path / "grown")
    for part in parts[1:]:
        ImageIndex.load(tmp_path / "grown").append(part)
    grown = ImageIndex.load(tmp_path / "grown")
    assert [item.path for item in grown.items] == [item.path for item in codes.items]
    for ours, theirs in zip(grown.search(queries, 5).queries, index.search(queries, 5).queries, strict=True):
        assert [(hit.id, hit.distance, hit.path) for hit in ours.hits] == [
            (hit.id, hit.distance, hit.path) for hit in theirs.hits
        ]


def test_an_append_that_is_interrupted_during_its_save_changes_no_answer(index, queries, monkeypatch):
    before = index.search(queries, 3).queries

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(index.hamming), "save", killed)
    with pytest.raises(KeyboardInterrupt):
        ImageIndex.load(index.folder).append(queries)
    assert ImageIndex.load(index.folder).search(queries, 3).queries == before


@pytest.mark.parametrize("make", [copy.deepcopy, lambda index: pickle.loads(ForkingPickler.dumps(index))])
def test_a_copy_of_an_index_of_images_has_its_own_codes(index, queries, make):
    before = index.search(queries, 3).queries
    other = make(index)
    assert other.search(queries, 3).queries == before
    other.hamming.update(np.arange(3), ~other.hamming.codes[:3])
    assert index.search(queries, 3).queries == before


def test_an_index_contains_a_copy_of_its_model(index, images, model):
    assert encode_module.fingerprint(index.folder / "model") == encode_module.fingerprint(model)
    path = next(images.rglob("*.png"))
    results = index.search(encode_folder(path, index.folder / "model"), 1)
    assert results.queries[0].hits[0].distance == 0


@pytest.mark.parametrize(
    ("bits", "seed", "expected"),
    [
        (16, 0, "32 bits"),  # a model of another code length
        (32, 1, "another one"),  # a model of the same code length with other weights
    ],
)
def test_codes_of_another_model_are_refused(index, images, tmp_path, bits, seed, expected):
    foreign = encode_folder(images, make_model(tmp_path / "other", bits, seed))
    with pytest.raises(InputError, match=f"^search: query must be .*{expected}"):
        index.search(foreign, 1)
    with pytest.raises(InputError, match=f"^index: codes must be .*{expected}"):
        index.append(foreign)


def test_an_index_whose_record_has_other_bits_than_its_codes_is_refused(index, queries):
    file = index.folder / "index.json"
    file.write_text(file.read_text().replace('"bits": 32', '"bits": 64'))
    with pytest.raises(
        InputError, match=r"^search: index must be a folder with codes of 64 bits, as .*index\.json' says"
    ) as e:
        ImageIndex.load(index.folder, "search")
    assert "got codes of 32 bits; build it again" in str(e.value) and "\n" not in str(e.value)


def test_an_empty_path_is_refused(codes, model, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for call in (
        lambda: codes.save(""),
        lambda: ImageIndex.build(codes, ""),
        lambda: ImageIndex.load(""),
        lambda: HashNet.from_pretrained(model).save_pretrained(""),
        lambda: encode_folder("", model),
        lambda: encode_folder("images", ""),
        lambda: index_codes("codes", ""),
        lambda: search_images("index", ""),
        lambda: write_report("", "index", "results.json"),
        lambda: run_demo("", Path("demo"), 32),
        lambda: run_demo("images", "", 32),
        lambda: report([""]),
        lambda: report(["runs"], output=""),
    ):
        with pytest.raises(InputError, match=r" must be a path, got an empty string; '\.' is the working folder"):
            call()
    assert list((tmp_path / "empty").iterdir()) == []


@pytest.mark.parametrize("k", [0, -1, 22])
def test_k_out_of_range_is_refused(index, queries, k):
    with pytest.raises(InputError, match=f"^search: k must be 1 to 21 .* got {k}"):
        index.search(queries, k)


@pytest.mark.parametrize("failing", ["items.csv", "index.json", "codes"])
def test_a_failed_append_leaves_the_old_index_on_disk_and_in_memory(index, queries, monkeypatch, failing):
    before = index.search(queries, 21).queries
    record = index.record.model_copy(deep=True)

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if failing == "items.csv":
            patch.setattr(image_index_module, "write_items", full_disk)
        else:
            owner, name = {"index.json": (type(index.record), "write"), "codes": (type(index.hamming), "save")}[failing]
            patch.setattr(owner, name, full_disk)
        with pytest.raises(OSError, match="No space left"):
            index.append(queries)
    for old in (index, ImageIndex.load(index.folder)):
        assert len(old.hamming) == len(old.items) == 21 and old.record.sources == record.sources
        assert old.search(queries, 21).queries == before
    index.append(queries)
    for new in (index, ImageIndex.load(index.folder)):
        assert len(new.hamming) == len(new.items) == 27
        assert [source.count for source in new.record.sources] == [21, 6]
        assert new.search(queries, 1).queries[0].hits[0].distance == 0


def test_an_index_that_changed_on_disk_is_not_appended_to(index, queries):
    ImageIndex.load(index.folder).append(queries)
    with pytest.raises(
        InputError, match="^index: index must be a folder with the 21 images .* got 27 images in .*; load it"
    ):
        index.append(queries)
    assert len(ImageIndex.load(index.folder).items) == 27


def renamed(codes: CodesFolder) -> CodesFolder:
    """Codes of as many other images by the same model."""
    record = codes.record.model_copy(update={"source": "elsewhere", "codes_sha256": "other"})
    items = [item._replace(path=f"/elsewhere/{item.id}") for item in codes.items]
    return CodesFolder(~codes.codes, items, record)


@pytest.mark.parametrize("part", ["everything", "items", "codes"])
def test_an_index_that_was_built_again_with_as_many_images_is_not_appended_to(index, codes, queries, part):
    other = renamed(codes)
    if part == "items":
        other = CodesFolder(codes.codes, other.items, codes.record)
    elif part == "codes":
        other = CodesFolder(other.codes, codes.items, other.record)
    ImageIndex.build(other, index.folder)
    with pytest.raises(InputError, match="^index: index must be a folder with the 21 .* got other images .*; load it"):
        index.append(queries)
    found = ImageIndex.load(index.folder)
    assert found.items == other.items and np.array_equal(np.asarray(found.hamming.codes), other.codes)
    found.append(queries)
    assert len(ImageIndex.load(index.folder).items) == 27


def test_an_index_that_was_built_again_with_the_same_images_is_appended_to(index, codes, queries):
    ImageIndex.build(codes, index.folder)
    index.append(queries)
    assert len(ImageIndex.load(index.folder).items) == 27


def test_a_removed_index_is_not_appended_to(index, queries):
    shutil.rmtree(index.folder)
    with pytest.raises(InputError, match="^index: index must be a folder written by 'hashengine index'"):
        index.append(queries)


@pytest.mark.parametrize("change", ["build", "append", "remove and build"])
def test_a_load_beside_a_change_reads_one_state(index, codes, queries, monkeypatch, change):
    """The index changes after its record and codes were read, and before its items are read."""
    other, read_items = renamed(codes), image_index_module.read_items

    def change_first(path, *arguments):
        monkeypatch.setattr(image_index_module, "read_items", read_items)
        if change == "append":
            ImageIndex.append_to(index.folder, queries)
        else:
            if change == "remove and build":
                shutil.rmtree(index.folder)
            ImageIndex.build(other, index.folder)
        return read_items(path, *arguments)

    monkeypatch.setattr(image_index_module, "read_items", change_first)
    found = ImageIndex.load(index.folder)
    if change == "append":
        assert sum(source.count for source in found.record.sources) == len(found.hamming) == len(found.items) == 27
    else:
        assert found.items == other.items and np.array_equal(np.asarray(found.hamming.codes), other.codes)
        assert found.record.sources == [other.described()]


def test_an_index_has_no_copy_of_a_model_that_was_saved_during_the_build(codes, model, tmp_path, monkeypatch):
    shutil.copytree(model, tmp_path / "model")
    copy_model = image_index_module._copy_model

    def save_first(*folders):
        make_model(tmp_path / "model", seed=1)
        copy_model(*folders)

    monkeypatch.setattr(image_index_module, "_copy_model", save_first)
    with pytest.raises(InputError, match="^index: the model of the codes must be the one that made them, got another"):
        ImageIndex.build(codes, tmp_path / "index", tmp_path / "model")
    assert not (tmp_path / "index").exists()


def test_concurrent_appends_lose_nothing_and_keep_items_with_their_codes(index, queries):
    def part(number: int) -> CodesFolder:
        items = [item._replace(path=f"/{number}{item.path}", label=str(number)) for item in queries.items]
        return CodesFolder(queries.codes ^ np.uint8(number), items, queries.record)

    with ThreadPoolExecutor(8) as pool:
        appended = list(pool.map(lambda number: ImageIndex.append_to(index.folder, part(number)), range(8)))
    assert sorted(len(grown.items) for grown in appended) == [21 + 6 * count for count in range(1, 9)]
    found = ImageIndex.load(index.folder)
    blocks = [slice(first, first + 6) for first in range(21, 21 + 8 * 6, 6)]
    labels = [{item.label for item in found.items[block]} for block in blocks]
    assert sorted(labels, key=str) == [{str(number)} for number in range(8)]
    for block, (label,) in zip(blocks, labels, strict=True):
        assert np.array_equal(np.asarray(found.hamming.codes)[block], part(int(label)).codes)
    assert sum(source.count for source in found.record.sources) == len(found.items) == 21 + 8 * 6


def test_an_append_and_a_rebuild_wait_for_each_other(index, codes, queries, monkeypatch):
    waits, waiting = [], threading.Event()
    monkeypatch.setattr(_progress, "note", lambda line: waits.append(line) or waiting.set())
    with ThreadPoolExecutor() as pool:
        with image_index_module._locked(index.folder):
            changes = [pool.submit(ImageIndex.build, codes, index.folder)]
            assert waiting.wait(60)
            waiting.clear()
            changes.append(pool.submit(index.append, queries))
            assert waiting.wait(60)
            assert len(ImageIndex.load(index.folder).items) == 21  # readers do not wait
        for change in changes:
            change.result()
    assert waits == [f"waiting for another command that changes the index {index.folder}"] * 2
    assert len(ImageIndex.load(index.folder).items) in (21, 27)


def test_an_append_to_a_folder_without_an_index_leaves_no_lock(queries, tmp_path):
    with pytest.raises(InputError, match="^index: index must be a folder written by"):
        ImageIndex.append_to(tmp_path, queries)
    assert not list(tmp_path.iterdir())


def only(codes: CodesFolder, row: int) -> CodesFolder:
    """The codes of one image."""
    return CodesFolder(codes.codes[row : row + 1], [codes.items[row]._replace(id=0)], codes.record)


@pytest.mark.parametrize("locked", ["", "codes", "codes/codes-*.bin", "codes/lock"])
def test_an_append_writes_nothing_if_a_file_cannot_be_written(index, queries, locked):
    index.append(only(queries, 0))  # creates the locks
    (path,) = index.folder.glob(locked) if locked else [index.folder]
    mode = path.stat().st_mode
    path.chmod(0o555 if path.is_dir() else 0o444 if path.suffix else 0o000)
    before = {path: path.read_bytes() for path in index.folder.rglob("*") if path.is_file() and path.suffix}

    def append() -> None:
        with pytest.raises(InputError) as caught:
            ImageIndex.append_to(index.folder, only(queries, 1))
        expected = f"index: index must be a folder in which everything can be written to, got {str(index.folder)!r}"
        assert str(caught.value).startswith(f"{expected}, where {str(path)!r} cannot; ask its owner")

    as_user(append)
    assert {path: path.read_bytes() for path in before} == before
    path.chmod(mode)
    as_user(lambda: index.append(only(queries, 1)))
    assert len(ImageIndex.load(index.folder).items) == 23


def test_the_sources_must_describe_every_code(index):
    record = json.loads((index.folder / "index.json").read_text())
    (index.folder / "index.json").write_text(json.dumps(record | {"sources": []}))
    with pytest.raises(InputError, match="^ImageIndex.load: index must be .* index.json describes 21 codes"):
        ImageIndex.load(index.folder)


@pytest.mark.parametrize("change", ["other codes", "updated", "removed", "replaced", "all removed"])
def test_codes_that_were_changed_without_the_images_are_refused(index, queries, change):
    saved = HammingIndex.load(index.folder / "codes")
    if change == "other codes":
        saved = HammingIndex(saved.bits)
        saved.add(np.zeros((len(index.items), saved.bits // 8), np.uint8))
    elif change == "updated":
        saved.update(np.array([0]), ~saved.codes[:1])
    elif change == "all removed":
        saved.remove(saved.ids)
    else:
        saved.remove(np.array([0]))
        if change == "replaced":
            saved.add(np.zeros((1, saved.bits // 8), np.uint8))
    saved.save(index.folder / "codes")
    expected = "index must be a folder whose '.*codes' has the codes that index.json describes, got others, .*; build"
    with pytest.raises(InputError, match=f"^search: {expected}"):
        ImageIndex.load(index.folder, "search")
    with pytest.raises(InputError, match=f"^index: {expected}"):
        ImageIndex.append_to(index.folder, queries)


def test_codes_that_the_index_holds_are_not_appended_again(index, codes, queries, monkeypatch):
    notes = []
    monkeypatch.setattr(_progress, "note", notes.append)
    for _ in range(2):
        assert len(ImageIndex.append_to(index.folder, queries).items) == 27
    assert len(ImageIndex.append_to(index.folder, codes).items) == 27
    assert notes == [f"0 images added, {count} were there already: {index.folder}" for count in (6, 21)]
    moved = [item._replace(path=f"/moved{item.path}") for item in queries.items]
    assert len(ImageIndex.append_to(index.folder, CodesFolder(queries.codes, moved, queries.record)).items) == 33


def test_an_append_of_a_folder_that_grew_adds_the_new_images(index, codes, queries, monkeypatch):
    notes = []
    monkeypatch.setattr(_progress, "note", notes.append)
    items = [item._replace(id=row) for row, item in enumerate([*queries.items[:1], *codes.items, *queries.items[1:]])]
    both = np.concatenate([queries.codes[:1], codes.codes, queries.codes[1:]])
    ImageIndex.append_to(index.folder, CodesFolder(both, items, codes.record))
    assert notes == [f"6 images added, 21 were there already: {index.folder}"]
    found = ImageIndex.load(index.folder)
    assert [item.path for item in found.items] == [item.path for item in [*codes.items, *queries.items]]
    assert np.array_equal(np.asarray(found.hamming.codes), np.concatenate([codes.codes, queries.codes]))


def test_an_append_of_an_image_that_changed_is_refused(index, codes):
    changed = CodesFolder(codes.codes.copy(), codes.items, codes.record)
    changed.codes[3] ^= 1
    with pytest.raises(InputError, match=r"got another code of '.*\.png'; build the index again without --append$"):
        ImageIndex.append_to(index.folder, changed)
    assert len(ImageIndex.load(index.folder).items) == 21


def test_a_load_beside_the_save_of_an_append_reads_one_state(index, queries, monkeypatch):
    """The manifest of the codes is replaced after a reader has read index.json and the codes."""
    save, open_folder = HammingIndex.save, image_index_module.open_folder
    hamming, folder = [], index.folder / "codes"
    monkeypatch.setattr(HammingIndex, "save", lambda self, _: hamming.append(self))
    index.append(queries)  # writes the images and the record, and no codes
    monkeypatch.setattr(HammingIndex, "save", save)

    def save_first(path):
        monkeypatch.setattr(image_index_module, "open_folder", open_folder)
        hamming[0].save(folder)
        return open_folder(path)

    monkeypatch.setattr(image_index_module, "open_folder", save_first)
    assert len(ImageIndex.load(index.folder).items) == 27


def _inconsistent(codes: CodesFolder, fault: str) -> CodesFolder:
    items, record = codes.items, codes.record
    other = {
        "fewer codes": (codes.codes[:5], items, record),
        "fewer items": (codes.codes, items[:5], record),
        "ids of other rows": (codes.codes[5:], items[5:], record),
        "bits": (codes.codes, items, record.model_copy(update={"bits": 64})),
        "bits without bytes": (codes.codes, items, record.model_copy(update={"bits": 33})),
        "dtype": (codes.codes.astype(np.int16), items, record),
        "dimensions": (codes.codes.reshape(-1), items, record),
        "list": (codes.codes.tolist(), items, record),
    }
    return CodesFolder(*other[fault])


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("fewer codes", "5 codes with one item each, got 21 items"),
        ("fewer items", "21 codes with one item each, got 5 items"),
        ("ids of other rows", "codes whose items have their rows, counted from 0, as ids, got the id 5"),
        ("bits", r"\[rows, 8\], for 64 bits, got \[21, 4\]"),
        ("bits without bytes", "codes of a positive multiple of 8 bits, in the record too, got 33"),
        ("dtype", "uint8, got int16"),
        ("dimensions", r"\[rows, 4\], for 32 bits, got \[84\]"),
        ("list", "codes in a numpy array, got list"),
    ],
)
def test_codes_whose_parts_do_not_belong_together_are_refused_before_anything_is_written(
    index, codes, tmp_path, fault, expected
):
    bad = _inconsistent(codes, fault)
    codes.save(tmp_path / "codes")
    before = index.search(codes, 3).queries
    for where, argument, call in (
        ("index", "codes", lambda: index.append(bad)),
        ("index", "codes", lambda: ImageIndex.append_to(index.folder, bad)),
        ("index", "codes", lambda: ImageIndex.build(bad, index.folder)),
        ("search", "query", lambda: index.search(bad, 1)),
        ("evaluate", "queries", lambda: evaluate(index, bad)),
        ("encode", "codes", lambda: bad.save(tmp_path / "codes")),
        ("CodesFolder.described", "codes", bad.described),
    ):
        with pytest.raises(InputError, match=f"^{where}: {argument} must be {expected}") as caught:
            call()
        assert "\n" not in str(caught.value)
    assert ImageIndex.load(index.folder).search(CodesFolder.load(tmp_path / "codes"), 3).queries == before


def test_a_path_is_no_codes(index):
    with pytest.raises(InputError, match="^search: query must be a CodesFolder, got str; CodesFolder.load reads one"):
        index.search("codes")


def test_an_empty_codes_folder_is_refused_and_changes_no_index(index, codes, tmp_path):
    CodesFolder(codes.codes[:0], [], codes.record).save(tmp_path / "empty")
    identity = index.record.identity
    for where, argument, call in (
        ("index", "codes", lambda: index_codes(tmp_path / "empty", tmp_path / "other")),
        ("index", "codes", lambda: index_codes(tmp_path / "empty", index.folder, append=True)),
        ("search", "query", lambda: search_images(index.folder, tmp_path / "empty")),
        ("evaluate", "queries", lambda: evaluate_folders(index.folder, tmp_path / "empty")),
        ("index", "codes", lambda: index.append(CodesFolder.load(tmp_path / "empty"))),
    ):
        with pytest.raises(InputError, match=f"^{where}: {argument} must be at least one code, got none$"):
            call()
    assert ImageIndex.load(index.folder).record.identity == identity


@pytest.mark.parametrize("change", [lambda index: index.items.pop(), lambda index: index.hamming.remove(np.array([0]))])
def test_an_index_whose_items_or_codes_were_changed_alone_is_refused_in_one_line(index, queries, change):
    changed = ImageIndex.load(index.folder)
    change(changed)
    complaint = r": the index must be one with an item for each of its \d+ codes, got \d+ items; load it again$"
    for where, call in {"search": changed.search, "index": changed.append}.items():
        with pytest.raises(InputError, match="^" + where + complaint):
            call(queries)
    with pytest.raises(InputError, match="^evaluate" + complaint):
        evaluate(changed, queries)
