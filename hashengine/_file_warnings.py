"""Names the file in the warnings of the decoder that reads it.

Pillow warns about a damaged image without its name, and Python shows equal warnings only once. Pillow also logs errors,
and libtiff, which decodes TIFF files for Pillow, writes errors to stderr.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_FILTER: Any = ("always", None, Warning, re.compile(r"PIL\b|hashengine\._pixels"), 0)  # an entry of `warnings.filters`

_LIBTIFF = "libtiff: "  # how the texts of its errors begin
_HARMLESS = re.compile(rf"{_LIBTIFF}(Warning|Bad value -?\d+ for )")  # errors that concern no pixels

_lock = threading.Lock()
_readers = 0  # threads that are reading a file
_thread = threading.local()  # `found`: the warnings for the file that the thread is reading
_show = warnings.showwarning


@contextlib.contextmanager
def named_warnings(file: str) -> Iterator[dict[str, type[Warning]]]:
    """Collect the warnings about an image in this thread, and issue each once at the end, after "<file>: ".

    Yields a dictionary that receives the texts of the warnings and their categories. If the block raises an exception,
    no warning is issued. Several threads may be in such a block at the same time.
    """
    found: dict[str, type[Warning]] = {}
    with _lock:
        _collect_from_libtiff()  # in one thread, because what it caches must be what libtiff calls
    _thread.found = found
    _enter()
    try:
        yield found
    finally:
        _leave()
        _thread.found = None
    for text, category in found.items():
        warnings.warn(f"{file}: {text}", category, stacklevel=4)


def is_damage(text: str) -> bool:
    """Whether a warning that `named_warnings` collected is an error of libtiff, after which pixels may be wrong."""
    return text.startswith(_LIBTIFF) and not _HARMLESS.match(text)


def _enter() -> None:
    """Make Python pass every warning about an image to `_collect`.

    `warnings.catch_warnings` is not used, because it changes what other threads see. The filter is inserted without
    `warnings.filterwarnings`, which makes Python forget which warnings it has shown.
    """
    global _readers, _show
    with _lock:
        if _readers == 0:
            if warnings.showwarning is not _collect:  # the end of a `catch_warnings` elsewhere may have restored it
                _show, warnings.showwarning = warnings.showwarning, _collect
            warnings.filters.insert(0, _FILTER)  # type: ignore[attr-defined]
            logging.getLogger("PIL").addHandler(_log)
        _readers += 1


def _leave() -> None:
    global _readers
    with _lock:
        _readers -= 1
        if _readers == 0:
            logging.getLogger("PIL").removeHandler(_log)
            if warnings.showwarning is _collect:
                warnings.showwarning = _show
            with contextlib.suppress(ValueError):
                warnings.filters.remove(_FILTER)  # type: ignore[attr-defined]


def _after_fork() -> None:
    """In a forked process: other threads of the parent may hold the lock, and do not read here."""
    global _lock, _readers
    _lock = threading.Lock()
    if getattr(_thread, "found", None) is not None:
        _readers = 1
    elif _readers > 0:
        _readers = 1
        _leave()


os.register_at_fork(after_in_child=_after_fork)


def _collect(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    """Replaces `warnings.showwarning`."""
    found = getattr(_thread, "found", None)
    if found is None:
        _show(message, category, filename, lineno, file, line)
    else:
        found[" ".join(str(message).split())] = category


class _Log(logging.Handler):
    """Collects what Pillow logs while a thread reads a file. Without any handler, logging writes it to stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        """Collect a record."""
        found = getattr(_thread, "found", None)
        if found is not None:
            found[" ".join(record.getMessage().split())] = UserWarning


_log = _Log(logging.WARNING)


# The type of libtiff's handlers: the name of a function or file, the format of printf, and its arguments, a va_list. On
# the ABIs of x86-64 and Arm64, a function gets a va_list as a pointer.
_Handler = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p)


@functools.cache
def _collect_from_libtiff() -> Any:
    """Make libtiff pass its errors to `_thread.found` while a thread reads a file. Returns what must stay alive."""
    try:
        loaded = [os.fsdecode(line.split(maxsplit=5)[-1]) for line in Path("/proc/self/maps").read_bytes().splitlines()]
        library = ctypes.CDLL(next(path for path in loaded if re.search(r"/libtiff[^/]*$", path)))
        set_handler = library.TIFFSetErrorHandler
    except (OSError, StopIteration, AttributeError):  # another system, or a Pillow without libtiff
        return None
    earlier: list[Callable[..., None]] = []  # the handler that was set before, if any

    def handle(name: bytes, template: bytes, values: int) -> None:
        found = getattr(_thread, "found", None)
        if found is not None:
            text = ctypes.create_string_buffer(1000)
            ctypes.CDLL(None).vsnprintf(text, ctypes.c_size_t(len(text)), template, ctypes.c_void_p(values))
            line = text.value.decode(errors="backslashreplace")
            found[_LIBTIFF + line.replace("tempfile.tif: ", "")] = UserWarning  # Pillow gives this name to every file
        elif earlier:
            earlier[0](name, template, values)

    handler = _Handler(handle)
    set_handler.restype = ctypes.c_void_p
    if address := set_handler(handler):
        earlier.append(_Handler(address))
    return handler, earlier
