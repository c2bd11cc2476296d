"""Runs a function in a forked child of the test."""

import ctypes
import os
import traceback
from collections.abc import Callable

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
    """Run `work` in a forked child without the rights of root, so that the permissions of files apply to it.

    What `work` raises fails the test.
    """

    def drop_rights_and_work() -> None:
        if os.geteuid() == 0:
            version, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
            assert ctypes.CDLL(None).capset(version, none) == 0
        work()

    assert os.waitpid(in_child(drop_rights_and_work), 0)[1] == 0
