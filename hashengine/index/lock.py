"""A lock for many readers or one writer."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class ReadersWriterLock:
    """Readers share the lock; a writer excludes all others. A waiting writer precedes later readers. Not reentrant."""

    def __init__(self) -> None:
        self._turnstile = threading.Lock()  # held by a waiting writer, so that a stream of readers cannot starve it
        self._readers = 0
        self._reader_left = threading.Condition()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Hold the lock as one of its readers."""
        with self._turnstile, self._reader_left:
            self._readers += 1
        try:
            yield
        finally:
            with self._reader_left:
                self._readers -= 1
                self._reader_left.notify_all()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the lock as its only writer, after the readers that hold it have left."""
        with self._turnstile, self._reader_left:
            self._reader_left.wait_for(lambda: self._readers == 0)
            yield
