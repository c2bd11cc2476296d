"""Atomic and durable replacement of files and folders.

Every function makes the new content durable (fsync of each file and of the folder that names it) before the old content
disappears. A crash, a kill or a full disk therefore leaves either the complete old content or the complete new content.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from hashengine.errors import invalid

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


@contextmanager
def replace_file(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file for writing that replaces `path` when the block ends without an exception."""
    temporary = _temporary_beside(path)
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_file(path: Path, content: bytes | str) -> None:
    """Replace `path` with `content`; a string is encoded as UTF-8."""
    with replace_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_files(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Replace several files in `folder`, which is created if it does not exist.

    All new files are durable before the first one replaces its predecessor. Each replacement is atomic, the set of them
    is not: a crash between two replacements leaves files of two versions, which the reader must be able to detect.
    """
    folder.mkdir(parents=True, exist_ok=True)
    temporaries = {name: _temporary_beside(folder / name) for name in contents}
    try:
        for name, content in contents.items():
            with open(temporaries[name], "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for name, temporary in temporaries.items():
            os.replace(temporary, folder / name)
        sync_folder(folder)
    finally:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)


@contextmanager
def replace_folder(path: Path, *, marker: str, where: str) -> Iterator[Path]:
    """Create a temporary folder that replaces `path` when the block ends without an exception.

    Args:
        path: the folder to create or to replace.
        marker: a file whose presence in an existing `path` identifies it as an earlier output, which may be replaced.
            An empty folder may be replaced too.
        where: the function or command to name in an error.

    Raises:
        InputError: `path` holds something else, which is left alone.
    """
    path = path.resolve()
    is_output = (path / marker).is_file()
    if path.exists() and not is_output and not (path.is_dir() and not any(path.iterdir())):
        raise invalid(where, "output", f"a new folder or an earlier output that holds {marker}", path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_beside(path)
    temporary.mkdir()
    try:
        yield temporary
        _sync_tree(temporary)
        _move_into_place(temporary, path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # after a replacement, this is the old content


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable: files that were created, renamed or removed there."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary_beside(path: Path) -> Path:
    """A new name in the same folder, hence on the same file system, short enough for every valid `path`."""
    return path.with_name(f".{uuid.uuid4().hex}.partial")


def _sync_tree(folder: Path) -> None:
    for parent, _, names in os.walk(folder):
        for name in names:
            with open(Path(parent, name), "rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(parent))


def _move_into_place(temporary: Path, path: Path) -> None:
    """Rename `temporary` to `path`; an existing `path` becomes `temporary`, in one step where the system can do that."""
    if not path.exists():
        temporary.rename(path)
    elif not _exchange(temporary, path):
        old = _temporary_beside(path)
        path.rename(old)
        try:
            temporary.rename(path)
        except BaseException:
            old.rename(path)
            raise
        old.rename(temporary)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names atomically; False if the C library or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(second))
