"""Atomic and durable replacement of files and folders.

Every new file is made durable (fsync) before it replaces the old content. After the replacement, the folder that
contains the new name is made durable, too. Therefore a crash, a kill or a full disk leaves either the complete old
content or the complete new content. There are two exceptions: `write_files` replaces several files one after the other,
and `replace_folder` needs two steps if the system cannot exchange two names.

`check_output` refuses an output before the work that makes it begins. `read_unchanged` reads several files of one
state.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import fnmatch
import json
import os
import re
import shutil
import stat
import sys
import threading
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

from hashengine.errors import InputError, invalid

T = TypeVar("T")

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_MANY_FILES = 1000  # for more files, one flush of the file system is assumed to be faster than one fsync per file

TEMPORARY_LOCK = ".hashengine-lock"  # the name of a lock that is not kept

# Names of files that systems leave in every folder, and of our temporary files and folders.
_OF_SYSTEMS = re.compile(r"\.DS_Store|\._.*|Thumbs\.db|desktop\.ini|\.nfs[0-9a-f]+")
_PARTIAL = re.compile(r"\.[0-9a-f]{32}\.partial")

_temporaries: set[Path] = set()  # the temporary files and folders that exist at the moment
_moving = threading.Lock()  # held while one of them is renamed to its final name


def _after_fork() -> None:
    """In a forked process: other threads of the parent own the temporary files, and may hold the lock."""
    global _moving
    _moving = threading.Lock()
    _temporaries.clear()


os.register_at_fork(after_in_child=_after_fork)


@contextmanager
def replace_file(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file for writing. The file replaces `path` when the `with` block ends without an exception.

    A link is followed: its target is replaced. A pipe or a device, such as /dev/stdout, is written into instead.
    """
    if _is_stream(path):
        with naming(path), _open_stream(path) as file:
            yield file
        return
    given, path = path, Path(os.path.realpath(path))
    with naming(given), _temporary_beside(path) as temporary:
        with open(temporary, "xb") as file:
            copy_permissions(path, temporary)
            yield file
            sync_file(file)
        with _moving:
            os.replace(temporary, path)
        sync_folder(path.parent)


def write_file(path: Path, content: bytes | str) -> None:
    """Replace `path` with `content`; a string is encoded as UTF-8, and the bytes of names that are no UTF-8 return."""
    with replace_file(path) as file:
        file.write(content.encode(errors="surrogateescape") if isinstance(content, str) else content)


def read_file(path: Path) -> bytes:
    """The content of a file that belongs to a folder of ours.

    Raises:
        OSError: there is no file, or a pipe or a device is in its place; opening a pipe would wait for a writer.
    """
    if stat.S_ISREG(mode := path.stat().st_mode) or stat.S_ISDIR(mode):  # reading a folder raises IsADirectoryError
        return path.read_bytes()
    raise OSError(errno.EINVAL, "Not a regular file", str(path))


def write_files(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Replace several files in `folder`, which is created if it does not exist.

    All new files are durable before the first one replaces its predecessor. Each replacement is atomic, but all of them
    together are not: a crash between two replacements leaves files of two versions, and the reader must detect that.
    """
    make_folder(folder)
    with ExitStack() as stack:
        temporaries = {name: stack.enter_context(_temporary_beside(folder / name)) for name in contents}
        for name, content in contents.items():
            with naming(folder / name), open(temporaries[name], "xb") as file:
                copy_permissions(folder / name, temporaries[name])
                file.write(content)
                sync_file(file)
        with _moving:
            for name, temporary in temporaries.items():
                with naming(folder / name):
                    os.replace(temporary, folder / name)
        sync_folder(folder)


@contextmanager
def naming(output: Path) -> Iterator[None]:
    """Let an `OSError` that names no file, as that of a write does, or a temporary file of ours, name `output`."""
    try:
        yield
    except OSError as error:
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        if names and not any(map(_PARTIAL.search, names)):
            raise
        reason = error.strerror or f"Incomplete write ({error})"  # numpy gives no reason
        raise OSError(error.errno or errno.EIO, reason, str(output)) from None


class Marker(NamedTuple):
    """How an earlier output, a folder that may be replaced, is recognised.

    Attributes:
        name: a file that the folder contains.
        fields: fields of that file, which is a JSON object; if empty, its content does not matter.
        contents: everything that the folder may contain, as patterns of paths in it; if empty, anything. Files that
            systems leave in every folder, and temporary ones of interrupted writes, are allowed as well.
    """

    name: str
    fields: tuple[str, ...] = ()
    contents: tuple[str, ...] = ()

    def problem(self, folder: Path) -> str | None:
        """Why `folder` is no such output, in words that follow its name; None if it is one."""
        if not (folder / self.name).is_file():
            return ""
        if self.fields:
            try:
                found = json.loads((folder / self.name).read_bytes())
            except (OSError, ValueError, RecursionError):
                found = None
            if not isinstance(found, dict) or not found.keys() >= set(self.fields):
                return f", whose {self.name} is another file"
        other = next(self._others(folder), None) if self.contents else None
        return None if other is None else f", which also holds {other!r}"

    def _others(self, folder: Path) -> Iterator[str]:
        """The paths in `folder` that are not among `contents`."""
        patterns = [pattern.split("/") for pattern in self.contents]
        for parent, folders, files in os.walk(folder):
            inside = Path(parent).relative_to(folder).parts
            for name in sorted(folders + files):
                depth, parts = len(inside) + 1, [*inside, name]
                known = [
                    pattern
                    for pattern in patterns
                    if len(pattern) >= depth and all(map(fnmatch.fnmatchcase, parts, pattern))
                    and (name in folders or len(pattern) == depth)
                ]  # fmt: skip
                if not known and not _is_of_systems(Path(parent, name)):
                    yield "/".join(parts)
            folders[:] = [name for name in folders if not _PARTIAL.fullmatch(name)]


@contextmanager
def replace_folder(path: Path, *, marker: Marker | None, where: str) -> Iterator[Path]:
    """Create a temporary folder. The folder replaces `path` when the `with` block ends without an exception.

    It keeps the permissions and the groups of the folder that it replaces and of the parts of that folder. A part whose
    name is new gets those of the folder around it. If `path` has changed meanwhile, because another program has
    created, replaced or written to it, the temporary folder is removed instead, and `path` stays as it is.

    Args:
        path: the folder to create or to replace.
        marker: how an existing `path` is recognised as an earlier output, which may be replaced. An empty folder may be
            replaced too, and nothing else if there is no marker.
        where: the function or command to name in an error.

    Raises:
        InputError: `path` exists, but is neither an empty folder nor an earlier output, or has changed meanwhile; it is
            not changed.
    """
    check_replaceable(path, marker=marker, where=where)
    given, path = path, path.resolve()
    make_folder(path.parent)
    before = _versions(path)
    with naming(given), _temporary_beside(path) as temporary:  # after a replacement, it contains the old content
        temporary.mkdir()
        copy_permissions(path, temporary)
        mode = stat.S_IMODE(os.stat(temporary).st_mode)
        if path.exists():  # it may hold a private file, whose successor stays private while it is written
            with suppress(OSError):
                os.chmod(temporary, mode & stat.S_ISGID | stat.S_IRWXU)
        yield temporary
        _sync_tree(temporary)
        _copy_permissions_of_tree(path, temporary)
        if not path.exists():
            with suppress(OSError):
                os.chmod(temporary, mode)
        with _moving:
            try:
                _move_into_place(temporary, path)
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
                actual = f"{str(path)!r}, which is in a lower layer of an overlay file system"
                raise invalid(where, "output", "a folder that can be replaced", actual, "remove it first") from None
            if temporary.exists() and _versions(temporary) != before:
                _move_into_place(temporary, path)
                expected, actual = (
                    "a folder that no other program changes at the same time",
                    f"{str(path)!r}, which was",
                )
                raise invalid(where, "output", expected, actual, "it is kept as it is; run the command again")
        sync_folder(path.parent)


def _versions(path: Path) -> dict[str, tuple[int, ...] | None]:
    """What distinguishes the files at `path` from others; {} if it is missing or a folder that `is_empty` accepts."""
    if not path.is_dir():
        return {"": version_of(path)} if path.exists() else {}
    files = [Path(parent, name) for parent, _, names in os.walk(path) for name in names]
    return {str(file.relative_to(path)): version_of(file) for file in files if not _is_of_systems(file)}


def _copy_permissions_of_tree(path: Path, temporary: Path) -> None:
    """Call `copy_permissions` for the folder `temporary`, which will replace `path`, and everything in it.

    What `path` does not hold gets the permissions of the folder around it.
    """
    for parent, _, names in os.walk(temporary, topdown=False):
        for part in (*(Path(parent, name) for name in names), Path(parent)):
            replaced, is_there = path / part.relative_to(temporary), os.path.isdir if part.is_dir() else os.path.exists
            while replaced != path and not is_there(replaced):
                replaced = replaced.parent
            copy_permissions(replaced, part)


def copy_permissions(path: Path, temporary: Path) -> None:
    """Give `temporary` the group and the permissions of `path`, which it will replace, as far as the system allows.

    A file gets from a folder the permissions to read and to write. If the group cannot be given, the new group may do
    what others may.
    """
    try:
        wanted, found = os.stat(path), os.stat(temporary)
    except FileNotFoundError:
        return
    is_folder = stat.S_ISDIR(wanted.st_mode), stat.S_ISDIR(found.st_mode)
    mode = wanted.st_mode & {(True, True): 0o3777, (True, False): 0o666}.get(is_folder, 0o777)
    if wanted.st_gid != found.st_gid:
        try:
            os.chown(temporary, -1, wanted.st_gid)
        except OSError:
            mode = mode & ~0o2070 | (mode & 0o007) << 3
    if mode != stat.S_IMODE(found.st_mode):
        with suppress(OSError):  # of a file system without permissions
            os.chmod(temporary, mode)


def check_replaceable(path: Path, *, marker: Marker | None, where: str) -> None:
    """Require that `path` does not exist, is an empty folder, or is an earlier output, which `marker` recognises.

    It must not be the working folder or a folder around it, because replacing it would remove the working folder.
    """
    _check_links(path, where)
    if Path.cwd().is_relative_to(os.path.realpath(path)):
        expected = "a folder that is not the working folder or around it"
        raise invalid(where, "output", expected, repr(str(path)), "the folder would be replaced")
    if os.path.ismount(path):
        advice = "choose a folder in it"
        raise invalid(where, "output", "a folder that can be replaced", f"the mount point {str(path)!r}", advice)
    if not path.exists() or (path.is_dir() and is_empty(path)):
        return
    if marker is None:
        raise invalid(where, "output", "a new or an empty folder", repr(str(path)))
    problem = marker.problem(path)
    if problem is not None:
        expected = f"a new folder or an earlier output that holds {marker.name}"
        raise invalid(where, "output", expected, f"{str(path)!r}{problem}")


def is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing but files of systems and our own temporary files and folders."""
    return all(_is_of_systems(folder / name) for name in os.listdir(folder))


def _is_of_systems(path: Path) -> bool:
    if _PARTIAL.fullmatch(path.name):
        return True
    if path.name == TEMPORARY_LOCK:
        return not _is_held(path)  # otherwise a command is about to write into the folder
    return _OF_SYSTEMS.fullmatch(path.name) is not None and not path.is_dir()


def _check_links(path: Path, where: str) -> None:
    try:
        os.stat(path)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise invalid(where, "output", "a path without a loop of links", repr(str(path))) from None


def check_output(
    where: str,
    path: Path,
    *,
    outside: Iterable[str | os.PathLike[str] | None] = (),
    keeps: Iterable[str | os.PathLike[str] | None] = (),
    is_folder: bool = False,
    marker: Marker | None = None,
) -> None:
    """Require, before the work begins, that `path` can be written and that writing it destroys no input.

    Args:
        where: the function or command to name in an error.
        path: the output. A pipe or a device is always accepted in place of a file.
        outside: inputs that must be neither `path` nor a folder around it; None is ignored.
        keeps: inputs that must not be in the folder `path`, because the output replaces the folder; None is ignored.
        is_folder: whether the output is a folder.
        marker: as for `check_replaceable`, which is called if there is a marker.
    """
    if is_folder and str(path) == "-":
        raise invalid(where, "output", "a folder", "'-', which stands for stdout", "choose another path")
    _check_links(path, where)
    if marker is not None:
        check_replaceable(path, marker=marker, where=where)
    if _is_stream(path) and not is_folder:
        _check_descriptor(path, where)
        return
    if path.exists() and path.is_dir() != is_folder:
        kinds = ("a file", "a folder")
        raise invalid(where, "output", kinds[is_folder], f"{str(path)!r}, which is {kinds[not is_folder]}")
    target = Path(os.path.realpath(path))
    for relation, inputs in (("in", outside), ("around", keeps)):
        for given in inputs:
            source = target if given is None else Path(os.path.realpath(given))
            inner, outer = (target, source) if relation == "in" else (source, target)
            if given is not None and inner.is_relative_to(outer):
                found = f"{str(path)!r}, which is {'' if inner == outer else f'{relation} '}the input {str(given)!r}"
                raise invalid(where, "output", "a path that destroys no input", found, "choose another path")
    existing = next(parent for parent in target.parents if parent.exists())
    if not existing.is_dir():
        raise invalid(where, "output", "a path in a folder", f"{str(path)!r}, and {str(existing)!r} is a file")
    is_written_into = is_folder and marker is None and target.is_dir()
    if not os.access(target if is_written_into else existing, os.W_OK | os.X_OK):
        raise invalid(where, "output", "in a folder that can be written to", repr(str(path)))


def check_writable(where: str, argument: str, folder: Path, paths: Iterable[Path]) -> None:
    """Require, before the first of several writes, that each of `paths` in `folder` can be written to.

    Raises:
        InputError: one of them cannot; the error names `where` and `argument`.
    """
    for path in paths:
        if not os.access(path, os.W_OK | (os.X_OK if path.is_dir() else 0)):
            expected = "a folder in which everything can be written to"
            actual = f"{str(folder)!r}, where {str(path)!r} cannot"
            raise invalid(where, argument, expected, actual, "ask its owner for the permission to write")


@contextmanager
def locked(folder: Path, waiting: Callable[[], None], name: str = "lock", *, keep: bool = True) -> Iterator[None]:
    """Hold the lock of an existing folder, the file `name` in it; one process or thread at a time does.

    The system unlocks it if the process dies.

    Args:
        folder: the folder.
        waiting: called once if another process or thread holds the lock. After that, this function waits.
        name: the name of the file.
        keep: whether the file stays in the folder. If it does not, the lock is a courtesy: a file system that has no
            locks is accepted.
    """
    path = folder / name
    while True:
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except PermissionError as error:  # the file of another user; on most file systems, reading it suffices
            try:
                lock = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                raise error from None
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waiting()
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError as error:
                if keep or error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                    raise OSError(error.errno, f"{error.strerror} (the lock of the folder)", str(path)) from None
            if _is_same_file(lock, path):  # otherwise the folder was replaced, or the file removed, during the wait
                with nullcontext() if keep else _removed(path):
                    yield
                return
        finally:
            with suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_UN)  # closing alone does not unlock if a forked child has a copy of it
            os.close(lock)


def _is_held(path: Path) -> bool:
    """Whether another process or thread holds the lock `path`."""
    try:
        lock = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(lock, fcntl.LOCK_UN)
        return False
    except OSError as error:
        return isinstance(error, BlockingIOError)
    finally:
        os.close(lock)


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def read_unchanged(files: Iterable[Path], read: Callable[[], T]) -> T:
    """The result of `read`, which reads several files that another process or thread may replace at any time.

    `read` is called again if one of `files` was replaced, created or removed during the call. After such a call, its
    error is ignored, too.

    Args:
        files: files of which every change that `read` must notice replaces at least one.
        read: called without arguments.
    """
    files = tuple(files)
    while True:
        before = [version_of(file) for file in files]
        try:
            result = read()
        except (InputError, OSError):
            if [version_of(file) for file in files] == before:
                raise
            continue
        if [version_of(file) for file in files] == before:
            return result


def version_of(path: Path) -> tuple[int, ...] | None:
    """What distinguishes the file from one that replaces it; None if there is no file."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size


def make_parent(path: Path) -> None:
    """Create the folder in which `replace_file` creates the file `path`, or the target of the link `path`."""
    make_folder(Path(os.path.realpath(path)).parent)


def make_folder(path: Path) -> None:
    """Create a folder and its missing parents durably; an existing folder is left as it is. A link is followed."""
    path = Path(os.path.realpath(path))
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in reversed(missing):
        sync_folder(folder.parent)


def sync_file(file: BinaryIO) -> None:
    """Make the contents of an open file durable. `replace_file` and `write_files` call this for each file."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make the creation, renaming and removal of files in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with naming(folder):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


_OWN_DESCRIPTOR = re.compile(r"/dev/(?:(?P<name>stdout|stderr)|fd/(?P<fd>\d+))|/proc/self/fd/(?P<proc>\d+)")


def _is_stream(path: Path) -> bool:
    """Whether `path` is a pipe, a device, or a name of an open file of this process, such as /dev/stdout."""
    return bool(_OWN_DESCRIPTOR.fullmatch(str(path))) or (path.exists() and not path.is_file() and not path.is_dir())


def is_stdout(path: Path) -> bool:
    """Whether `path` is a name of this process's standard output, such as /dev/stdout or /dev/fd/1."""
    found = _OWN_DESCRIPTOR.fullmatch(str(path))
    return found is not None and len(str(path)) < 20 and _descriptor(found) == 1


def _check_descriptor(path: Path, where: str) -> None:
    found = _OWN_DESCRIPTOR.fullmatch(str(path))
    if not found:
        return
    expected, actual = "a file that this process has opened for writing", repr(str(path))
    try:
        descriptor = _descriptor(found)
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise invalid(where, "output", expected, actual)
        # A command has opened no file for its caller. Descriptors that Python opens are not inheritable.
        command = sys.modules.get("hashengine._interrupt")
        is_foreign = descriptor > 2 and not os.get_inheritable(descriptor)
        if command is not None and (is_foreign or descriptor in command.closed_streams):
            raise invalid(where, "output", "a file that the caller of the command has opened", actual)
    except (OSError, OverflowError):
        raise invalid(where, "output", expected, actual) from None


def _descriptor(found: re.Match[str]) -> int:
    return {"stdout": 1, "stderr": 2}.get(found["name"]) or int(found["fd"] or found["proc"])


@contextmanager
def _open_stream(path: Path) -> Iterator[BinaryIO]:
    found = _OWN_DESCRIPTOR.fullmatch(str(path))
    if not found:
        with open(path, "wb") as file:
            yield file
        return
    sys.stdout.flush()  # what is written here follows what was printed before
    with os.fdopen(os.dup(_descriptor(found)), "wb") as file:
        yield file


def remove_temporaries() -> None:
    """Remove all temporary files and folders because the process is about to exit. They cannot be used after that."""
    _moving.acquire(timeout=1)  # not released: what is removed must not get its final name
    for temporary in list(_temporaries):
        _remove(temporary)


@contextmanager
def _temporary_beside(path: Path) -> Iterator[Path]:
    """A new random path beside `path`. Whatever is there is removed at the end of the block."""
    temporary = _random_name_beside(path)
    with _removed(temporary):
        yield temporary


@contextmanager
def _removed(temporary: Path) -> Iterator[None]:
    """Remove what is at the path `temporary` at the end of the block, or if the process exits before."""
    _temporaries.add(temporary)
    try:
        yield
    finally:
        _remove(temporary)
        _temporaries.discard(temporary)
        if os.path.lexists(temporary):  # for example a file of another user, or one that is marked as immutable
            warnings.warn(f"{temporary} is left from a replaced output and cannot be removed", stacklevel=2)


def _random_name_beside(path: Path) -> Path:
    """A new random path in the folder of `path`. The name has 41 characters, even if that of `path` is longer."""
    return path.with_name(f".{uuid.uuid4().hex}.partial")


def _remove(path: Path) -> None:
    if path.is_dir():
        for folder, _, _ in os.walk(path):  # files of a folder that may not be written to cannot be removed
            with suppress(OSError):
                os.chmod(folder, stat.S_IRWXU)
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync_tree(folder: Path) -> None:
    """Make a folder and its contents durable: one fsync per file, or for many files one flush of the file system."""
    tree = list(os.walk(folder))
    if sum(len(names) for _, _, names in tree) > _MANY_FILES and _sync_file_system(folder):
        return
    for parent, _, names in tree:
        for name in names:
            with open(Path(parent, name), "rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(parent))


def _sync_file_system(folder: Path) -> bool:
    """Make all files on the file system of `folder` durable. Returns False if that fails or is not supported."""
    syncfs = getattr(ctypes.CDLL(None, use_errno=True), "syncfs", None)
    if syncfs is None:
        return False
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        return syncfs(descriptor) == 0
    finally:
        os.close(descriptor)


def _move_into_place(temporary: Path, path: Path) -> None:
    """Rename `temporary` to `path`. If `path` exists, the two exchange names, in one step if the system can do that."""
    try:
        temporary.rename(path)  # also replaces an empty folder
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EISDIR):
            raise
    if not _exchange(temporary, path):
        old = _random_name_beside(path)
        path.rename(old)
        try:
            temporary.rename(path)
        except BaseException:
            old.rename(path)
            raise
        old.rename(temporary)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names atomically. Returns False if the C library or the file system does not support it."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(second))
