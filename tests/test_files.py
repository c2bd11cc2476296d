"""How a folder is made durable: if it has many files, by one flush of the file system; otherwise file by file."""

import fcntl
import os
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from hashengine import _files
from hashengine.errors import InputError
from tests.helpers.children import as_user, in_child


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
    with _files.replace_folder(tmp_path / "out", marker=_files.Marker("a"), where="test") as temporary:
        (temporary / "sub").mkdir()
        for name in ("a", "b", "sub/c"):
            (temporary / name).write_text(name)
        assert calls == [] and not (tmp_path / "out").exists()
    assert len(calls) == fsyncs
    assert (tmp_path / "out" / "sub" / "c").read_text() == "sub/c"


def test_files_that_do_not_change_are_read_once_and_their_error_is_raised(tmp_path):
    calls = []

    def damaged():
        calls.append("read")
        raise InputError("damaged")

    with pytest.raises(InputError, match="damaged"):
        _files.read_unchanged([tmp_path / "missing"], damaged)
    with pytest.raises(FileNotFoundError):
        _files.read_unchanged([tmp_path / "missing"], (tmp_path / "missing").read_text)
    assert calls == ["read"]


@pytest.mark.parametrize("change", ["replace", "remove", "create"])
def test_files_are_read_again_after_a_change(tmp_path, change):
    file = tmp_path / "file"
    if change != "create":
        file.write_text("old")
    calls = []

    def read():
        calls.append("read")
        if len(calls) == 1:
            if change == "remove":
                file.unlink()
            else:
                _files.write_file(file, "new")
            raise InputError("a mix")
        return file.exists()

    assert _files.read_unchanged([file], read) is (change != "remove")
    assert len(calls) == 2


def test_every_new_folder_is_synchronised_in_its_parent(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(_files, "sync_folder", synced.append)
    _files.make_folder(tmp_path / "a" / "b")
    assert synced == [tmp_path, tmp_path / "a"]
    _files.make_folder(tmp_path / "a" / "b")
    assert len(synced) == 2 and (tmp_path / "a" / "b").is_dir()


def test_a_link_is_followed_when_its_target_is_replaced_or_created(tmp_path):
    (tmp_path / "there").mkdir()
    for name in ("old", "new"):
        (tmp_path / name).symlink_to(tmp_path / "there" / name)
    (tmp_path / "there" / "old").write_text("before")
    for name in ("old", "new"):
        _files.write_file(tmp_path / name, "after")
        assert (tmp_path / name).is_symlink() and (tmp_path / "there" / name).read_text() == "after"
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == ["new", "old"]


def test_a_pipe_is_written_into(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    _files.check_output("test", tmp_path / "pipe")
    _files.write_file(tmp_path / "pipe", "text")
    reader.join()
    assert read == [b"text"] and (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
@pytest.mark.parametrize("is_file", [False, True])
def test_stdout_is_written_into_after_what_was_printed(tmp_path, name, is_file):
    script = f"""
from pathlib import Path
from hashengine import _files
print("before")
_files.check_output("test", Path({name!r}))
_files.write_file(Path({name!r}), "written\\n")
print("after")
"""
    with open(tmp_path / "out", "wb") as out:
        done = subprocess.run([sys.executable, "-c", script], stdout=out if is_file else subprocess.PIPE, check=True)
    assert ((tmp_path / "out").read_bytes() if is_file else done.stdout) == b"before\nwritten\nafter\n"


def test_a_device_is_written_into_and_stays_a_device():
    _files.write_file(_files.Path("/dev/null"), "text")
    assert _files.Path("/dev/null").is_char_device()
    if _files.Path("/dev/full").exists():
        with pytest.raises(OSError, match="No space left"):
            _files.write_file(_files.Path("/dev/full"), "text")
        assert _files.Path("/dev/full").is_char_device()


@pytest.mark.parametrize(
    ("output", "complaint"),
    [
        ("index", "must be a file, got .*index', which is a folder"),
        ("index/a.json", "must be a path that destroys no input, got .*a.json', which is in the input .*index'"),
        ("index/new/a.json", "must be a path that destroys no input, got .*a.json', which is in the input .*index'"),
        ("photo", "must be a path that destroys no input, got .*photo', which is the input .*photo'"),
        ("link", "must be a path that destroys no input, got .*link', which is the input .*photo'"),
        ("way/a.json", "must be a path that destroys no input, got .*way/a.json', which is in the input .*index'"),
        ("file/a.json", "must be a path in a folder, got .*, and .*file' is a file"),
    ],
)
def test_an_output_that_cannot_be_written_or_destroys_an_input_is_refused(tmp_path, output, complaint):
    (tmp_path / "index").mkdir()
    for name in ("index/a.json", "photo", "file"):
        (tmp_path / name).touch()
    (tmp_path / "link").symlink_to(tmp_path / "photo")
    (tmp_path / "way").symlink_to(tmp_path / "index")
    inputs = (tmp_path / "index", str(tmp_path / "photo"), None)
    with pytest.raises(InputError, match=f"^test: output {complaint}") as caught:
        _files.check_output("test", tmp_path / output, outside=inputs)
    assert "\n" not in str(caught.value)
    for accepted in ("new.json", "new/folder/new.json", "file"):
        _files.check_output("test", tmp_path / accepted, outside=inputs)


def test_a_folder_that_is_replaced_may_contain_no_input(tmp_path):
    (tmp_path / "codes" / "model").mkdir(parents=True)
    (tmp_path / "codes" / "encode.json").touch()
    with pytest.raises(InputError, match="got .*codes', which is around the input .*model'; choose another path$"):
        _files.check_output(
            "test",
            tmp_path / "codes",
            keeps=[tmp_path / "codes" / "model"],
            is_folder=True,
            marker=_files.Marker("encode.json"),
        )
    with pytest.raises(InputError, match="must be a folder, got .*encode.json', which is a file"):
        _files.check_output("test", tmp_path / "codes" / "encode.json", is_folder=True)


def test_a_lock_is_held_by_one_thread_and_belongs_to_the_folder_that_replaced_the_old_one(tmp_path):
    folder, waits, order = tmp_path / "folder", threading.Event(), []
    folder.mkdir()

    def second():
        with _files.locked(folder, waits.set):
            order.append((folder / "new").exists())

    thread = threading.Thread(target=second)
    with _files.locked(folder, lambda: None):
        thread.start()
        assert waits.wait(60)
        folder.rename(tmp_path / "old")
        (folder / "new").mkdir(parents=True)
        order.append("first")
    thread.join()
    assert order == ["first", True] and (folder / "lock").is_file()


def test_the_temporary_files_and_folders_of_running_writes_can_be_removed(tmp_path):
    """As a command does that is interrupted, in a process that then ends."""
    script = f"""
from pathlib import Path
from hashengine import _files
folder = Path({str(tmp_path)!r})
(folder / "old").write_text("old")
replacing = _files.replace_folder(folder / "new", marker=_files.Marker("a"), where="test")
writing = replacing.__enter__()
(writing / "a").write_text("half")
with _files.replace_file(folder / "old") as file:
    file.write(b"half")
    assert len(list(folder.glob(".*.partial"))) == 2
    _files.remove_temporaries()
    print(sorted(path.name for path in folder.iterdir()), flush=True)
    import os
    os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "['old']\n", done.stderr
    assert (tmp_path / "old").read_text() == "old"


@pytest.mark.parametrize("is_folder", [False, True])
def test_a_loop_of_links_is_refused(tmp_path, is_folder):
    (tmp_path / "loop").symlink_to("loop")
    for output in ("loop", "loop/x"):
        with pytest.raises(InputError, match="^test: output must be a path without a loop of links"):
            _files.check_output("test", tmp_path / output, is_folder=is_folder)
    with (
        pytest.raises(InputError, match="^test: output must be a path without a loop of links"),
        _files.replace_folder(tmp_path / "loop", marker=_files.Marker("made"), where="test"),
    ):
        pass
    assert (tmp_path / "loop").is_symlink()


@pytest.mark.parametrize("output", [".", "..", "../../working"])
def test_the_working_folder_is_not_replaced(tmp_path, monkeypatch, output):
    (tmp_path / "working" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "working" / "here")
    with pytest.raises(InputError, match="^test: output must be a folder that is not the working folder or around it"):
        _files.check_output("test", _files.Path(output), is_folder=True, marker=_files.Marker("made"))


def test_a_descriptor_for_reading_or_of_the_command_itself_is_refused(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "hashengine._interrupt", raising=False)
    readable = os.open(tmp_path, os.O_RDONLY)
    pipe = os.pipe()
    try:
        with pytest.raises(InputError, match="^f: output must be a file that this process has opened for writing, got"):
            _files.check_output("f", Path(f"/dev/fd/{readable}"))
        _files.check_output("f", Path(f"/dev/fd/{pipe[1]}"))
        monkeypatch.setitem(
            sys.modules, "hashengine._interrupt", SimpleNamespace(closed_streams={1})
        )  # as in a command
        with pytest.raises(
            InputError, match="^f: output must be a file that the caller of the command has opened, got"
        ):
            _files.check_output("f", Path(f"/dev/fd/{pipe[1]}"))
        with pytest.raises(InputError, match="^f: output must be a file that the caller .* got '/dev/stdout'"):
            _files.check_output("f", Path("/dev/stdout"))
        os.set_inheritable(pipe[1], True)  # as those that a shell passes on
        _files.check_output("f", Path(f"/dev/fd/{pipe[1]}"))
    finally:
        for descriptor in (readable, *pipe):
            os.close(descriptor)


@pytest.mark.parametrize("path", ["/dev/fd/999", "/proc/self/fd/999"])
def test_a_descriptor_that_is_not_open_is_refused(path):
    with pytest.raises(InputError, match="^test: output must be a file that this process has opened"):
        _files.check_output("test", _files.Path(path))


MARKER = _files.Marker("record.json", ("ours",), ("record.json", "data"))


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({"record.json": '{"ours": 1}'}, None),
        ({"record.json": '{"ours": 1, "more": 2}', "data": "x", ".DS_Store": "x"}, None),
        ({"record.json": '{"name": "a site"}', "data": "x"}, ", whose record.json is another file"),
        ({"record.json": '["ours"]'}, ", whose record.json is another file"),
        ({"record.json": "{"}, ", whose record.json is another file"),
        ({"record.json": '{"ours": 1}', "thesis.txt": "x"}, ", which also holds 'thesis.txt'"),
        ({"data": "x"}, ""),
    ],
)
def test_an_earlier_output_is_recognised_by_its_record_and_its_contents(tmp_path, files, problem):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert MARKER.problem(tmp_path) == problem
    if problem is not None:
        with pytest.raises(InputError, match="^test: output must be a new folder or an earlier output that holds"):
            _files.check_replaceable(tmp_path, marker=MARKER, where="test")
        assert {path.name for path in tmp_path.iterdir()} == set(files)


def test_every_name_of_stdout_is_known():
    names = ("/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")
    assert all(_files.is_stdout(_files.Path(name)) for name in names)
    others = ("/dev/stderr", "/dev/fd/2", "/dev/fd/11", "out", "/dev/fd/" + 30 * "1")
    assert not any(_files.is_stdout(_files.Path(name)) for name in others)


def test_the_folder_itself_must_be_writable_if_files_are_written_into_it(tmp_path, monkeypatch):
    inner = tmp_path / "folder"
    inner.mkdir()
    may_write = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(inner) and may_write(path, mode))
    with pytest.raises(InputError, match="^fit: output must be in a folder that can be written to, got '.*folder'"):
        _files.check_output("fit", inner, is_folder=True)
    with pytest.raises(InputError, match="^fit: output must be in a folder that can be written to, got '.*new'"):
        _files.check_output("fit", inner / "new", is_folder=True)
    _files.check_output(
        "encode", inner, is_folder=True, marker=_files.Marker("encode.json")
    )  # it is replaced, in tmp_path


def test_the_target_of_a_link_gets_its_folder(tmp_path):
    (tmp_path / "file").symlink_to("missing/file.json")
    (tmp_path / "folder").symlink_to("also/missing")
    _files.make_parent(tmp_path / "file")
    _files.write_file(tmp_path / "file", "{}")
    assert (tmp_path / "missing" / "file.json").read_text() == "{}"
    _files.make_folder(tmp_path / "folder")
    assert (tmp_path / "also" / "missing").is_dir()


def test_a_replaced_folder_that_was_read_only_leaves_nothing(tmp_path):
    """As root, permissions do not matter; then this checks only that nothing is left."""
    for folder in ("codes", "codes/inner"):
        (tmp_path / folder).mkdir()
    for file in ("codes/encode.json", "codes/inner/file"):
        (tmp_path / file).write_text("{}")
    for folder in ("codes/inner", "codes"):
        (tmp_path / folder).chmod(0o555)
    with _files.replace_folder(tmp_path / "codes", marker=_files.Marker("encode.json"), where="encode") as temporary:
        (temporary / "encode.json").write_text("{}")
    assert [path.name for path in tmp_path.iterdir()] == ["codes"]
    assert [path.name for path in (tmp_path / "codes").iterdir()] == ["encode.json"]


@pytest.mark.parametrize(
    ("path", "is_known"),
    [
        ("codes.npy", True),
        (".DS_Store", True),
        (f".{'0' * 32}.partial/anything", True),
        ("part/one.bin", True),
        ("part/.notes", False),
        ("part/notes.txt", False),
        ("part/deep/one.bin", False),
        ("part/codes.npy", False),
        ("codes.npy.old", False),
        (".git/HEAD", False),
        (".notes", False),
        ("._mine/notes", False),
        ("._resource", True),
    ],
)
def test_every_file_in_an_earlier_output_must_be_known(tmp_path, path, is_known):
    marker = _files.Marker("codes.npy", (), ("codes.npy", "part/*.bin"))
    (tmp_path / "part").mkdir()
    (tmp_path / "codes.npy").touch()
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).touch()
    problem = marker.problem(tmp_path)
    assert (problem is None) == is_known
    assert is_known or problem in (f", which also holds {path!r}", f", which also holds {path.rpartition('/')[0]!r}")


def test_a_folder_of_temporary_files_alone_counts_as_empty(tmp_path):
    (tmp_path / f".{'a' * 32}.partial").touch()
    _files.check_replaceable(tmp_path, marker=_files.Marker("record"), where="test")


def test_a_mount_point_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == str(tmp_path))
    with pytest.raises(InputError, match="^test: output must be a folder that can be replaced, got the mount point"):
        _files.check_replaceable(tmp_path, marker=_files.Marker("record"), where="test")


CODES = _files.Marker("encode.json")


@pytest.mark.parametrize("old", [None, "empty", "earlier"])
@pytest.mark.parametrize("change", ["a file", "another output", "a changed file", "a file in place of the folder"])
@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_folder_that_changes_while_it_is_replaced_is_kept(tmp_path, monkeypatch, old, change, can_exchange):
    if not can_exchange:
        monkeypatch.setattr(_files, "_exchange", lambda *_: False)
    folder = tmp_path / "codes"
    if old is not None:
        folder.mkdir()
    if old == "earlier":
        (folder / "encode.json").write_text("{}")
    with pytest.raises(InputError, match="^test: output must be a folder that no other program changes at the same"):
        with _files.replace_folder(folder, marker=CODES, where="test") as temporary:
            (temporary / "encode.json").write_text("[]")
            if change == "another output":
                with _files.replace_folder(folder, marker=CODES, where="test") as other:
                    (other / "encode.json").write_text("[2]")
            elif change == "a file in place of the folder":
                shutil.rmtree(folder, ignore_errors=True)
                folder.write_text("mine")
            else:
                folder.mkdir(exist_ok=True)
                (folder / ("photo.jpg" if change == "a file" else "encode.json")).write_text("mine")
    found = {"a file": "photo.jpg", "a file in place of the folder": ""}.get(change, "encode.json")
    assert (folder / found).read_text() == ("[2]" if change == "another output" else "mine")
    assert [path.name for path in tmp_path.iterdir()] == ["codes"]


def test_a_folder_that_is_removed_while_it_is_replaced_or_gets_files_of_systems_is_written(tmp_path):
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir(mode=0o750)
        (folder / "encode.json").write_text("{}")
        with _files.replace_folder(folder, marker=CODES, where="test") as temporary:
            (temporary / "encode.json").write_text("[]")
            if number:
                (folder / ".DS_Store").write_text("")
            else:
                shutil.rmtree(folder)
        assert (folder / "encode.json").read_text() == "[]" and stat.S_IMODE(folder.stat().st_mode) == 0o750


def test_what_replaces_an_output_has_its_permissions(tmp_path):
    (tmp_path / "codes").mkdir()
    (tmp_path / "codes").chmod(0o700)
    for name in ("file", "other"):
        (tmp_path / name).write_text("old")
        (tmp_path / name).chmod(0o600)
    _files.write_file(tmp_path / "file", "new")
    _files.write_files(tmp_path, {"other": b"new"})
    with _files.replace_folder(tmp_path / "codes", marker=CODES, where="test") as temporary:
        (temporary / "encode.json").write_text("{}")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {"codes": 0o700, "file": 0o600, "other": 0o600}


def test_the_parts_of_what_replaces_a_folder_have_their_permissions(tmp_path):
    """A file with a new name has those of the folder around it. Root can also give groups."""
    group = 12345 if os.geteuid() == 0 else os.getegid()
    modes = {"index": 0o2770, "index/codes": 0o2750, "index/encode.json": 0o600, "index/x": 0o755}
    (tmp_path / "index" / "codes").mkdir(parents=True)
    for name, mode in modes.items():
        if not (tmp_path / name).is_dir():
            (tmp_path / name).touch()
        os.chown(tmp_path / name, -1, group)
        (tmp_path / name).chmod(mode)
    with _files.replace_folder(tmp_path / "index", marker=CODES, where="test") as temporary:
        for name in ("codes", "new"):
            (temporary / name).mkdir()
        for name in ("codes/b", "encode.json", "x", "new/c"):
            (temporary / name).touch()
    found = {str(path.relative_to(tmp_path)): path.stat() for path in tmp_path.rglob("*")}
    assert {name: stat.S_IMODE(status.st_mode) for name, status in found.items()} == {
        "index": 0o2770,
        "index/codes": 0o2750,
        "index/codes/b": 0o640,
        "index/encode.json": 0o600,
        "index/new": 0o2770,
        "index/new/c": 0o660,
        "index/x": 0o755,
    }
    assert {status.st_gid for status in found.values()} == {group}


def _write_folder(path, text):
    with _files.replace_folder(path, marker=CODES, where="test") as temporary:
        (temporary / "codes").mkdir()
        _files.write_file(temporary / "codes" / "encode.json", text)


def _save_array(path, text):
    with _files.replace_folder(path, marker=CODES, where="test") as temporary:
        np.save(temporary / "codes.npy", np.frombuffer(text.encode(), np.uint8))


@pytest.mark.parametrize(
    ("write", "named"),
    [
        (_files.write_file, "output"),
        (lambda path, text: _files.write_files(path, {"part": text.encode()}), "output/part"),
        (_write_folder, "output"),
        (_save_array, "output"),
    ],
)
def test_an_error_of_the_system_names_the_output(tmp_path, write, named):
    """A limit on the size of a file stands in for a full disk."""

    def write_much() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        with pytest.raises(OSError) as caught:
            write(tmp_path / "output", "text" * 10_000)
        reason = r"\[Errno \d+\] (File too large|Incomplete write \(.*\))"
        assert re.fullmatch(f"{reason}: {str(tmp_path / named)!r}", str(caught.value))

    assert os.waitpid(in_child(write_much), 0)[1] == 0
    assert not list(tmp_path.glob("**/*.partial"))


def test_an_error_names_the_input_that_is_missing_or_the_output_that_is_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"directory: '.*/input'$"):
        with _files.replace_folder(tmp_path / "output", marker=CODES, where="test"):
            (tmp_path / "input").read_text()
    (tmp_path / "output").mkdir()
    with pytest.raises(IsADirectoryError, match=r"^\[Errno 21\] Is a directory: '[^']*/output'$"):
        _files.write_file(tmp_path / "output", "text")


def test_a_lock_that_cannot_be_created_is_an_error_about_the_permission(tmp_path):
    tmp_path.chmod(0o555)

    def lock() -> None:
        with pytest.raises(PermissionError, match="Permission denied: '.*/lock'"), _files.locked(tmp_path, print):
            pass

    as_user(lock)


def test_what_cannot_be_removed_is_named(tmp_path, monkeypatch):
    (tmp_path / "codes").mkdir()
    (tmp_path / "codes" / "encode.json").write_text("{}")
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    with pytest.warns(UserWarning, match="partial is left from a replaced output and cannot be removed"):
        with _files.replace_folder(tmp_path / "codes", marker=CODES, where="test") as temporary:
            (temporary / "encode.json").write_text("[]")
    assert (tmp_path / "codes" / "encode.json").read_text() == "[]"


def test_a_lock_that_is_not_kept_is_removed_and_still_held_by_one_thread(tmp_path):
    held, most = [0], []

    def hold():
        with _files.locked(tmp_path, lambda: None, ".lock", keep=False):
            held[0] += 1
            most.append(held[0])
            time.sleep(0.01)
            held[0] -= 1

    threads = [threading.Thread(target=hold) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 8 and list(tmp_path.iterdir()) == []


def test_a_file_system_that_refuses_permissions_and_groups_gets_its_files(tmp_path, monkeypatch):
    (tmp_path / "codes").mkdir()
    (tmp_path / "codes" / "encode.json").write_text("{}")
    (tmp_path / "file").write_text("old")
    for name in ("codes", "file"):
        (tmp_path / name).chmod(0o705)

    def refuse(*_, **__):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "chmod", refuse)
    monkeypatch.setattr(os, "chown", refuse)
    _files.write_file(tmp_path / "file", "new")
    with _files.replace_folder(tmp_path / "codes", marker=CODES, where="test") as temporary:
        (temporary / "encode.json").write_text("[]")
    assert (tmp_path / "file").read_text() == "new" and (tmp_path / "codes" / "encode.json").read_text() == "[]"


def test_the_group_of_an_output_is_kept_or_gets_the_rights_of_others(tmp_path, monkeypatch):
    folder = tmp_path / "codes"
    folder.mkdir()
    (folder / "encode.json").write_text("{}")
    folder.chmod(0o2775)
    wanted = os.stat(folder)
    if os.geteuid() == 0:  # another user may belong to a single group
        os.chown(folder, -1, 12345)
        folder.chmod(0o2775)
        wanted = os.stat(folder)
    with _files.replace_folder(folder, marker=CODES, where="test") as temporary:
        (temporary / "encode.json").write_text("[]")
    found = os.stat(folder)
    assert (found.st_gid, stat.S_IMODE(found.st_mode)) == (wanted.st_gid, 0o2775)
    if os.geteuid() != 0:
        return
    monkeypatch.setattr(os, "chown", lambda *_: (_ for _ in ()).throw(PermissionError(1, "Operation not permitted")))
    (tmp_path / "file").write_text("old")
    os.system(f"chgrp 12345 '{tmp_path / 'file'}'")
    (tmp_path / "file").chmod(0o664)
    _files.write_file(tmp_path / "file", "new")
    assert stat.S_IMODE(os.stat(tmp_path / "file").st_mode) == 0o644


@pytest.mark.parametrize("mode", [0o700, 0o755])
def test_a_folder_that_may_hold_private_files_is_private_while_it_is_written(tmp_path, mode):
    (tmp_path / "codes").mkdir(mode=mode)
    with _files.replace_folder(tmp_path / "codes", marker=CODES, where="test") as temporary:
        assert stat.S_IMODE(temporary.stat().st_mode) == 0o700


def test_an_output_in_a_lower_layer_is_refused_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "codes").mkdir()
    (tmp_path / "codes" / "encode.json").write_text("{}")

    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(_files, "_move_into_place", refuse)
    with pytest.raises(InputError, match="^test: output must be a folder that can be replaced, .*; remove it first"):
        with _files.replace_folder(tmp_path / "codes", marker=CODES, where="test") as temporary:
            (temporary / "encode.json").write_text("[]")
    assert (tmp_path / "codes" / "encode.json").read_text() == "{}"


def test_a_file_system_without_locks_is_accepted_where_the_lock_is_a_courtesy(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(_files.fcntl, "flock", refuse)
    with _files.locked(tmp_path, lambda: None, ".lock", keep=False):
        pass
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="Function not implemented .the lock of the folder.*lock"):
        with _files.locked(tmp_path, lambda: None):
            pass


def test_the_lock_of_another_user_can_be_held_by_reading_it(tmp_path, monkeypatch):
    (tmp_path / "lock").write_text("")
    system_open = os.open

    def refuse_to_write(path, flags, *mode):
        if flags & os.O_RDWR:
            raise PermissionError(13, "Permission denied", str(path))
        return system_open(path, flags, *mode)

    monkeypatch.setattr(_files.os, "open", refuse_to_write)
    with _files.locked(tmp_path, lambda: None), open(tmp_path / "lock") as other:
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_without_a_marker_only_an_empty_folder_is_replaced(tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / _files.TEMPORARY_LOCK).write_text("")  # of a command that was killed
    with _files.replace_folder(tmp_path / "new", marker=None, where="test") as temporary:
        (temporary / "a").write_text("a")
    with pytest.raises(InputError, match="^test: output must be a new or an empty folder, got"):
        with _files.replace_folder(tmp_path / "new", marker=None, where="test"):
            pass
    assert (tmp_path / "new" / "a").read_text() == "a"


def test_a_folder_with_a_held_lock_is_not_replaced(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    with _files.locked(folder, lambda: None, _files.TEMPORARY_LOCK, keep=False):
        with pytest.raises(InputError, match="^test: output must be a new or an empty folder"):
            with _files.replace_folder(folder, marker=None, where="test"):
                pass
    with pytest.raises(InputError, match="^test: output must be a folder that no other program changes"):
        with _files.replace_folder(folder, marker=None, where="test") as temporary, ExitStack() as stack:
            (temporary / "a").write_text("a")
            lock = _files.locked(folder, lambda: None, _files.TEMPORARY_LOCK, keep=False)
            stack.enter_context(lock)
            stack.pop_all()  # still held when the folder is about to be replaced
    lock.__exit__(None, None, None)
    assert list(folder.iterdir()) == []
