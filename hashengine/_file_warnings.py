"""Names the file in the warnings of the decoder that reads it.

Pillow warns about a damaged image without its name, and Python shows equal warnings only once.
"""

from __future__ import annotations

import contextlib
import re
import threading
import warnings
from collections.abc import Iterator
from typing import Any

_FILTER: Any = ("always", None, Warning, re.compile(r"PIL\b|hashengine\._pixels"), 0)  # an entry of `warnings.filters`

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
    _thread.found = found
    _enter()
    try:
        yield found
    finally:
        _leave()
        _thread.found = None
    for text, category in found.items():
        warnings.warn(f"{file}: {text}", category, stacklevel=4)


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
        _readers += 1


def _leave() -> None:
    global _readers
    with _lock:
        _readers -= 1
        if _readers == 0:
            if warnings.showwarning is _collect:
                warnings.showwarning = _show
            with contextlib.suppress(ValueError):
                warnings.filters.remove(_FILTER)  # type: ignore[attr-defined]


def _collect(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    """Replaces `warnings.showwarning`."""
    found = getattr(_thread, "found", None)
    if found is None:
        _show(message, category, filename, lineno, file, line)
    else:
        found[" ".join(str(message).split())] = category
