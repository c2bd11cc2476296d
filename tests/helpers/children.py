"""Runs a function in a forked child of the test, which may be another user."""

import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


def in_child(work: Callable[[], None]) -> int:
    """Run `work` in a forked child, and return the child's process id."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # the child does not have the threads of the parent's pool
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return child


def as_user(work: Callable[[], None]) -> None:
    """Run `work` in a forked child that has no rights of root: if the tests run as root, it becomes the user `nobody`.

    What `work` raises fails the test.
    """

    def change_and_work() -> None:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        work()

    assert os.waitpid(in_child(change_and_work), 0)[1] == 0


@contextmanager
def shared_folder() -> Iterator[Path]:
    """A temporary folder that every user may read; those of pytest are private."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)
