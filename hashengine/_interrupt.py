"""Ctrl-C in a command: one line, status 130, within half a second.

Python handles a signal only between two steps of the main thread, and one step, such as a search or the work of a
network on a batch, may take seconds. Therefore a thread waits for the signal. If the main thread has not ended the
process within `GRACE_SECONDS`, the thread does.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

STATUS = 130
GRACE_SECONDS = 0.3

_kept = ""
_announced = threading.Lock()  # held once the line is written


def keeps(kept: str) -> None:
    """Say, for the line that an interrupt writes, what it keeps."""
    global _kept
    _kept = kept


def run(start: Callable[[], None]) -> None:
    """Call `start`, which imports and runs a command line. Ctrl-C ends the process with one line and status 130."""
    try:
        _open_closed_streams()
        _watch()
        start()
    except (KeyboardInterrupt, SystemExit) as end:  # typer turns a KeyboardInterrupt into a SystemExit
        if isinstance(end, SystemExit) and end.code != STATUS:
            raise
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one must not end the clean-up
        _announce()
        _exit()


def _open_closed_streams() -> None:
    """Connect stdin, stdout and stderr to the null device if the caller closed them.

    Otherwise Python has None in their places, and the next file that is opened gets their numbers.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            with contextlib.suppress(OSError):
                os.fstat(number)
                continue
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is that of the stream
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))


def _exit() -> None:
    """End the process. The interpreter is not taken down, which takes a second or more once torch is loaded."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(STATUS)


def _announce() -> None:
    """Write the line "interrupted" to stderr, if it was not written yet."""
    if not _announced.acquire(blocking=False):
        return
    message = "interrupted" + (f": {_kept}" if _kept else "")
    progress = sys.modules.get("hashengine._progress")
    if progress is not None and progress.logs_json():
        message = json.dumps({"event": "interrupted", "message": message})
    # Not by `print`: the main thread may hold the lock of `sys.stderr`.
    os.write(2, f"{message}\n".encode())


def _watch() -> None:
    """Start the thread that waits for the signal, unless the process ignores it, as background jobs of a shell do."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return
    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    signal.set_wakeup_fd(writable, warn_on_full_buffer=False)  # Python writes the number of each signal to it at once
    threading.Thread(target=_end_after_interrupt, args=(readable,), daemon=True).start()


def _end_after_interrupt(readable: int) -> None:
    while os.read(readable, 1)[0] != signal.SIGINT:
        pass
    time.sleep(GRACE_SECONDS)
    _announce()
    files = sys.modules.get("hashengine._files")
    if files is not None:
        files.remove_temporaries()
    os._exit(STATUS)
