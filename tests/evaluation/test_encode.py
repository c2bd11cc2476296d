"""Encoding a folder of images, and folders of codes."""

import json
import os

import numpy as np
import pytest

from hashengine import InputError
from hashengine.evaluation import CodesFolder, ImageIndex, encode_folder, index_codes
from hashengine.evaluation import encode as encode_module
from hashengine.evaluation.records import Item
from hashengine.images import read_image
from hashengine.models import HashNet
from tests.helpers.hand_made_codes import hand_made
from tests.helpers.tiny_images import make_images, make_model


def test_codes_equal_those_of_the_model_and_are_in_the_order_of_the_paths(images, model, codes):
    paths = sorted(images.rglob("*.png"))
    assert [item.path for item in codes.items] == [str(path) for path in paths]
    assert [item.label for item in codes.items] == [path.parent.name for path in paths]
    network = HashNet.from_pretrained(model)
    for path, code in zip(paths, codes.codes, strict=True):
        assert np.array_equal(network.encode(network.preprocess(read_image(path))[None]).numpy()[0], code)


def test_batches_do_not_change_the_codes(images, model, codes):
    assert np.array_equal(encode_folder(images, model, batch_size=2).codes, codes.codes)


def test_a_load_of_codes_beside_a_save_reads_one_state(codes, queries, tmp_path, monkeypatch):
    """The codes are saved again after their record was read, and before their items are read."""
    codes.save(tmp_path / "codes")
    read_items = encode_module.read_items

    def save_first(*arguments):
        monkeypatch.setattr(encode_module, "read_items", read_items)
        queries.save(tmp_path / "codes")
        return read_items(*arguments)

    monkeypatch.setattr(encode_module, "read_items", save_first)
    found = CodesFolder.load(tmp_path / "codes")
    assert found.record == queries.record and found.items == queries.items
    assert np.array_equal(found.codes, queries.codes)


def test_the_fingerprint_is_that_of_the_network_if_the_model_is_saved_meanwhile(images, tmp_path, monkeypatch):
    model = make_model(tmp_path / "model")
    fingerprint = encode_module.fingerprint

    def save_afterwards(*arguments):
        monkeypatch.setattr(encode_module, "fingerprint", fingerprint)
        found = fingerprint(*arguments)
        make_model(model, seed=1)
        return found

    monkeypatch.setattr(encode_module, "fingerprint", save_afterwards)
    found = encode_folder(images, model)
    assert found.record.fingerprint == fingerprint(model)
    assert np.array_equal(found.codes, encode_folder(images, model).codes)


def test_unreadable_images_are_skipped_reported_and_recorded(tmp_path, model):
    images = make_images(tmp_path / "images", per_class=2)
    broken = images / "checks" / "0.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n, or so it says")
    reported = []
    codes = encode_folder(images, model, batch_size=1, warn=reported.append)
    assert [item.path for item in codes.items] == [
        str(path) for path in sorted(images.rglob("*.png")) if path != broken
    ]
    assert [item.id for item in codes.items] == list(range(5))
    assert [error.path for error in codes.record.errors] == [str(broken)]
    assert len(reported) == 1 and str(broken) in reported[0]


def test_a_folder_without_a_readable_image_is_refused(tmp_path, model):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(InputError, match="^encode: folder must be a folder with a readable image"):
        encode_folder(tmp_path, model, warn=lambda line: None)


def test_a_loaded_codes_folder_equals_the_saved_one(codes, tmp_path):
    codes.save(tmp_path / "codes")
    loaded = CodesFolder.load(tmp_path / "codes")
    assert np.array_equal(loaded.codes, codes.codes)
    assert (loaded.items, loaded.record) == (codes.items, codes.record)
    assert {path.name for path in (tmp_path / "codes").iterdir()} == {"codes.npy", "items.csv", "encode.json"}


def test_names_with_commas_quotes_and_line_breaks_survive(tmp_path):
    codes = hand_made([1, 2], "ab")
    codes.items[1] = Item(1, '/photos/"Rome, \n2019".png', "a,b")
    codes.save(tmp_path / "codes")
    assert CodesFolder.load(tmp_path / "codes").items == codes.items


def test_a_byte_order_mark_in_a_table_or_a_record_is_accepted(codes, tmp_path):
    codes.save(tmp_path / "codes")
    for name in ("items.csv", "encode.json"):
        path = tmp_path / "codes" / name
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    loaded = CodesFolder.load(tmp_path / "codes")
    assert (loaded.items, loaded.record) == (codes.items, codes.record)


def test_a_batch_may_be_larger_than_any_number_of_images(images, model, codes):
    assert np.array_equal(encode_folder(images, model, batch_size=1 << 70).codes, codes.codes)


def test_a_failed_save_leaves_the_old_codes_intact(codes, tmp_path, monkeypatch):
    codes.save(tmp_path / "codes")

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(encode_module, "write_items", full_disk)
    with pytest.raises(OSError, match="No space left"):
        hand_made([1], "a").save(tmp_path / "codes")
    assert np.array_equal(CodesFolder.load(tmp_path / "codes").codes, codes.codes)
    assert [path.name for path in tmp_path.iterdir()] == ["codes"]


def test_a_folder_with_other_files_is_not_replaced(codes, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "novel.txt").write_text("call me")
    with pytest.raises(InputError, match="^encode: output must be a new folder or an earlier output"):
        codes.save(tmp_path / "precious")
    assert (tmp_path / "precious" / "novel.txt").read_text() == "call me"


@pytest.mark.parametrize("shape", ["(10000000000000, 1)", "(-1, 1)", f"({10**30}, 1)", "()"])
def test_codes_whose_header_has_another_shape_give_an_error_of_one_line(codes, tmp_path, shape):
    codes.save(tmp_path / "codes")
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + codes.codes.tobytes()
    (tmp_path / "codes" / "codes.npy").write_bytes(content)
    with pytest.raises(InputError, match="^CodesFolder.load: codes must be ") as error:
        CodesFolder.load(tmp_path / "codes")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "damage", ["truncate", "shape", "header", "bit", "zip", "pipe", "csv", "semicolons", "json", "digits", "missing"]
)
def test_damaged_codes_give_an_error_of_one_line(codes, tmp_path, damage):
    folder = tmp_path / "codes"
    codes.save(folder)
    array, items, record = (folder / name for name in ("codes.npy", "items.csv", "encode.json"))
    {
        "truncate": lambda: array.write_bytes(array.read_bytes()[:-1]),
        "shape": lambda: np.save(array, codes.codes[:-1]),
        "header": lambda: array.write_bytes(array.read_bytes().replace(b"}", b" ", 1)),
        "bit": lambda: array.write_bytes(array.read_bytes()[:-1] + bytes([array.read_bytes()[-1] ^ 1])),
        "zip": lambda: np.savez(array.open("wb"), codes.codes),
        "pipe": lambda: (array.unlink(), os.mkfifo(array)),
        "semicolons": lambda: items.write_text(items.read_text().replace(",", ";")),
        "digits": lambda: record.write_text(record.read_text().replace('"count": ', '"count": 1' + 400 * "0")),
        "csv": lambda: items.write_text("id,path,label\n0,a.png,a\n2,b.png,b\n"),
        "json": lambda: record.write_text('{"bits": "many"}'),
        "missing": array.unlink,
    }[damage]()
    with pytest.raises(InputError, match="^CodesFolder.load: codes must be ") as error:
        CodesFolder.load(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_pipe_in_place_of_a_file_of_the_model_is_refused_and_not_opened(images, tmp_path, name):
    model = make_model(tmp_path / "model")
    (model / name).unlink()
    os.mkfifo(model / name)
    with pytest.raises(InputError, match="model must be"):
        encode_folder(images, model)


@pytest.mark.parametrize("damage", ["cut", "label", "path"])
def test_other_images_than_those_that_were_encoded_are_refused(codes, tmp_path, damage):
    codes.save(tmp_path / "codes")
    index = ImageIndex.build(codes, tmp_path / "index").folder
    for folder in (tmp_path / "codes", index):
        text = (folder / "items.csv").read_bytes()
        last = text.splitlines()[-1]
        other = {"cut": last[:-3], "label": last + b"x", "path": last.replace(b".png", b".jpg")}[damage]
        (folder / "items.csv").write_bytes(text.replace(last, other))
    expected = "must be a folder whose items.csv has the images that were encoded, got others in .*; encode"
    with pytest.raises(InputError, match=f"^CodesFolder.load: codes {expected}"):
        CodesFolder.load(tmp_path / "codes")
    with pytest.raises(InputError, match=f"^ImageIndex.load: index {expected}"):
        ImageIndex.load(index)


def test_a_folder_has_one_name(images, model):
    spelled = images / ".." / images.name
    assert encode_folder(spelled, model).items == encode_folder(images, model).items


def test_a_folder_behind_a_link_keeps_its_name(images, model, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to(images / "bars")
    through = tmp_path / "link" / ".." / images.name  # not tmp_path / images.name
    with pytest.raises(InputError, match="folder must be a folder of images"):
        encode_folder(through, model)
    assert encode_folder(tmp_path / "link" / "..", model).record.count == encode_folder(images, model).record.count


def test_a_model_whose_path_no_file_system_has_is_refused(codes, tmp_path):
    codes.save(tmp_path / "codes")
    record = json.loads((tmp_path / "codes" / "encode.json").read_text())
    (tmp_path / "codes" / "encode.json").write_text(json.dumps(record | {"model": "\ud800"}))
    with pytest.raises(InputError, match="^index: the model of the codes must be a path that a file system can have"):
        index_codes(tmp_path / "codes", tmp_path / "index")


def test_a_record_with_another_count_is_refused(codes, tmp_path):
    codes.save(tmp_path / "codes")
    record = json.loads((tmp_path / "codes" / "encode.json").read_text())
    (tmp_path / "codes" / "encode.json").write_text(json.dumps(record | {"count": 3, "items_sha256": ""}))
    with pytest.raises(InputError, match="must be a codes folder with 3 images in items.csv, as encode.json says"):
        CodesFolder.load(tmp_path / "codes")


@pytest.mark.parametrize("bits", [0, -8, 33])
def test_a_record_with_bits_that_no_codes_have_is_refused(codes, tmp_path, bits):
    codes.save(tmp_path / "codes")
    record = json.loads((tmp_path / "codes" / "encode.json").read_text())
    (tmp_path / "codes" / "encode.json").write_text(json.dumps(record | {"bits": bits, "codes_sha256": ""}))
    np.save(tmp_path / "codes" / "codes.npy", codes.codes[:, : max(bits, 0) // 8])
    with pytest.raises(InputError, match=f"must be .* in the record too, got {bits}|as items.csv and encode.json say"):
        CodesFolder.load(tmp_path / "codes")


@pytest.mark.parametrize(
    "change",
    [{"id": 0.0}, {"id": False}, {"label": 3}, {"label": None}, {"label": b"a"}, {"label": "\ud800"}, {"path": "a\0b"}],
    ids=repr,
)
def test_items_that_a_file_cannot_hold_are_refused_before_anything_is_written(codes, tmp_path, change):
    wrong = CodesFolder(codes.codes, [codes.items[0]._replace(**change), *codes.items[1:]], codes.record)
    with pytest.raises(InputError, match="^encode: codes must be codes whose items have an integer id, and text that"):
        wrong.save(tmp_path / "new")
    assert not (tmp_path / "new").exists()
