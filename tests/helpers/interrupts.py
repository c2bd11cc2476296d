"""Runs a command in another process until it blocks in a chosen function, and sends it a signal there.

No part of this depends on how fast the machine is: the function blocks until the process has ended.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import NamedTuple

from tests.helpers.paths import ROOT

# Replaces a function by one that reports that it was called and then never returns. "signal" is a wait that a signal
# ends, as that of Python code. "native" is a wait that no signal ends, as that of a kernel.
DRIVER = """
import ctypes, importlib, os, sys, threading

module, attribute, wait, report, *arguments = sys.argv[1:]

def block(*_, **__):
    os.write(int(report), b"x")
    if wait == "signal":
        threading.Event().wait()
    mutex = ctypes.create_string_buffer(64)  # a pthread_mutex_t
    libc = ctypes.CDLL(None)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)

class Importing:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            block()

if attribute == "import":
    sys.meta_path.insert(0, Importing())
else:
    *path, name = attribute.split(".")
    owner = importlib.import_module(module)
    for part in path:
        owner = getattr(owner, part)
    setattr(owner, name, block)
sys.argv = ["hashengine", *arguments]
from hashengine.__main__ import main
main()
"""


class Ended(NamedTuple):
    """How a command ended: its status and what it wrote to stderr."""

    status: int
    errors: str


def interrupt(
    module: str, attribute: str, *arguments: object, wait: str = "native", number: signal.Signals = signal.SIGINT
) -> Ended:
    """Run `hashengine arguments` and send it a signal in a function.

    Args:
        module: the module of the function.
        attribute: the function's name in the module, such as "Class.method"; "import" for the import of the module.
        arguments: the arguments of the command.
        wait: how the function blocks, as `DRIVER` describes.
        number: the signal; SIGINT is that of Ctrl-C.
    """
    reports, report = os.pipe()
    command = [sys.executable, "-c", DRIVER, module, attribute, wait, str(report), *map(str, arguments)]

    def take_signals() -> None:
        """A shell starts background jobs with SIGINT ignored, and nohup with SIGHUP; their children inherit that."""
        for ignored in (signal.SIGINT, signal.SIGHUP):
            signal.signal(ignored, signal.SIG_DFL)

    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        pass_fds=[report],
        preexec_fn=take_signals,
    )
    os.close(report)
    blocked = os.read(reports, 1)
    os.close(reports)
    if blocked:
        process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert blocked, f"the function was not called: {errors}"
    return Ended(process.returncode, errors)
