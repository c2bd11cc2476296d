"""Many readers or one writer."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class ReadersWriterLock:
    """Readers share, a writer excludes; a waiting writer goes before readers that come later. Not reentrant."""

    def __init__(self):
        self._turnstile = threading.Lock()  # a writer holds it while it waits, so that no stream of readers starves it
        self._readers = 0
        self._left = threading.Condition()

    @contextmanager
    def reading(self) -> Iterator[None]:
        with self._turnstile, self._left:
            self._readers += 1
        try:
            yield
        finally:
            with self._left:
                self._readers -= 1
                self._left.notify_all()

    @contextmanager
    def writing(self) -> Iterator[None]:
        with self._turnstile, self._left:
            self._left.wait_for(lambda: self._readers == 0)
            yield
