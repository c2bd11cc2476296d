"""How a folder is made durable: if it has many files, by one flush of the file system; otherwise file by file."""

import os

import pytest

from hashengine import _files


@pytest.mark.parametrize(
    ("many_files", "has_syncfs", "fsyncs"),
    [
        pytest.param(10, True, 6, id="few files"),
        pytest.param(2, True, 1, id="many files"),
        pytest.param(2, False, 6, id="many files without syncfs"),
    ],
)
def test_files_are_made_durable_by_one_fsync_each_or_by_one_flush(
    tmp_path, monkeypatch, many_files, has_syncfs, fsyncs
):
    """3 files in 2 folders need 5 fsyncs or one flush of the file system. The parent folder needs one more fsync.

    "Many" is more than `many_files`.
    """
    calls = []
    fsync, flush = os.fsync, _files._sync_file_system
    monkeypatch.setattr(os, "fsync", lambda descriptor: calls.append("fsync") or fsync(descriptor))
    monkeypatch.setattr(_files, "_MANY_FILES", many_files)
    monkeypatch.setattr(_files, "_sync_file_system", lambda folder: has_syncfs and flush(folder))
    with _files.replace_folder(tmp_path / "out", marker="a", where="test") as temporary:
        (temporary / "sub").mkdir()
        for name in ("a", "b", "sub/c"):
            (temporary / name).write_text(name)
        assert calls == [] and not (tmp_path / "out").exists()
    assert len(calls) == fsyncs
    assert (tmp_path / "out" / "sub" / "c").read_text() == "sub/c"


def test_every_new_folder_is_synchronised_in_its_parent(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(_files, "sync_folder", synced.append)
    _files.make_folder(tmp_path / "a" / "b")
    assert synced == [tmp_path, tmp_path / "a"]
    _files.make_folder(tmp_path / "a" / "b")
    assert len(synced) == 2 and (tmp_path / "a" / "b").is_dir()
