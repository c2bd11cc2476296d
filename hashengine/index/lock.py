"""A lock for many readers or one writer."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

from hashengine.errors import InputError, invalid


class ReadersWriterLock:
    """Readers share the lock; a writer excludes all others. A waiting writer precedes later readers.

    Every thread has a lock of its own, which it holds while it reads. A writer holds the locks of all threads. An
    exception, such as that of Ctrl-C, always releases them: they are taken by `with` statements whose lock is written
    in C, which no signal can interrupt between taking the lock and entering the block. A number of readers could not be
    kept as safely.
    """

    def __init__(self) -> None:
        # Held by a writer, so that a stream of readers cannot starve it. It knows its owner, unlike threading.Lock.
        self._turnstile: Any = threading.RLock()
        self._own = threading.local()  # `lock`: that of the thread
        self._locks: weakref.WeakSet[Any] = weakref.WeakSet()  # those of all threads that are alive

    def reader(self) -> Any:
        """The lock to hold as a reader: `with lock.reader():`. A thread that is a reader may become one again.

        Raises:
            InputError: this thread is writing. That is possible in a handler of a signal only.
        """
        if self.is_read_here():
            if self._turnstile._is_owned():
                raise in_use("HammingIndex", "an update of this thread, which a signal has interrupted")
            return self._own.lock
        with self._turnstile:
            try:
                return self._own.lock
            except AttributeError:
                lock: Any = threading.RLock()
                self._locks.add(lock)
                self._own.lock = lock
                return lock

    def is_read_here(self) -> bool:
        """Whether this thread is a reader or the writer."""
        lock = getattr(self._own, "lock", None)
        return lock is not None and bool(lock._is_owned())

    def write(self, action: Callable[[], None]) -> None:
        """Call `action` as the only writer, after the readers have left. This thread must not be a reader."""
        self.reader()  # so that this thread has a lock of its own, too
        with self._turnstile:
            _holding(list(self._locks), action)


def in_use(where: str, actual: str) -> InputError:
    """The error for a call that would wait for its own thread."""
    advice = "make the call after the other one has returned"
    return invalid(where, "the index", "one that no other call of this thread uses", actual, advice)


def _holding(locks: list[Any], action: Callable[[], None]) -> None:
    """Call `action` while all locks are held."""
    if locks:
        with locks[-1]:
            _holding(locks[:-1], action)
    else:
        action()
