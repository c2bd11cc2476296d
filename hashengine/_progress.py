"""How the library reports to a person: progress and notes, on stderr.

By default, progress is shown as a bar if stderr is a terminal, and otherwise not at all. A note is a line of text.
`configure` changes both for the whole process; the options --quiet and --log-json of the commands call it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from hashengine._text import printable

T = TypeVar("T")

_JSON_SECONDS = 1.0  # the shortest time between two JSON lines of a task; only the last line may follow sooner

_quiet = False
_json = False


class Progress(Protocol):
    """A task whose steps are counted."""

    def update(self, steps: int = 1) -> object:
        """Count `steps` further steps as done."""

    def set_postfix(self, **values: Any) -> object:
        """Show values next to the count."""


def configure(*, quiet: bool = False, log_json: bool = False) -> None:
    """Choose how progress and notes appear.

    Args:
        quiet: show neither progress nor notes.
        log_json: write both as JSON objects, one per line: `{"event": "progress", "task": ..., "done": ..., "total":
            ..., "unit": ...}` at most once per second and at the end of a task, and `{"event": "note", "message":
            ...}`.
    """
    global _quiet, _json
    _quiet, _json = quiet, log_json


def note(message: str, **values: Any) -> None:
    """Write a line to stderr, above the progress bar if there is one, with unprintable characters escaped.

    `values` are written to JSON lines only.
    """
    if _quiet or sys.stderr is None:  # None: the program has no console
        return
    if _json:
        write_json("note", message=message, **values)
    else:
        from tqdm import tqdm

        tqdm.write(printable(message), file=sys.stderr)


def write_json(event: str, **values: Any) -> None:
    """Write one JSON object to stderr."""
    if sys.stderr is None:
        return
    print(json.dumps({"event": event} | values), file=sys.stderr, flush=True)


def logs_json() -> bool:
    """Whether progress and notes are JSON lines."""
    return _json


@contextmanager
def task(name: str, total: int, unit: str) -> Iterator[Progress]:
    """Show the progress of a task of `total` steps."""
    if _json and not _quiet:
        lines = _JsonLines(name, total, unit)
        try:
            yield lines
        finally:
            lines.close()
        return
    from tqdm import tqdm

    with tqdm(
        desc=name, total=total, unit=unit, leave=False, disable=True if _quiet or sys.stderr is None else None
    ) as bar:
        yield bar


def track(items: Iterable[T], name: str, total: int, unit: str) -> Iterator[T]:
    """Yield the items, and show the progress of a task that has one step per item."""
    with task(name, total, unit) as progress:
        for item in items:
            yield item
            progress.update()


class _JsonLines:
    def __init__(self, name: str, total: int, unit: str):
        self._name, self._total, self._unit = name, total, unit
        self._done, self._written = 0, time.monotonic()
        self._values: dict[str, Any] = {}

    def update(self, steps: int = 1) -> None:
        self._done += steps
        if time.monotonic() - self._written >= _JSON_SECONDS and self._done < self._total:
            self._write()

    def set_postfix(self, **values: Any) -> None:
        self._values = values

    def close(self) -> None:
        self._write()

    def _write(self) -> None:
        self._written = time.monotonic()
        write_json("progress", task=self._name, done=self._done, total=self._total, unit=self._unit, **self._values)
