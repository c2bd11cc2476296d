"""Ctrl-C (SIGINT), SIGTERM and SIGHUP in a command: one line, status 130, 143 or 129, no temporary files.

This takes at most half a second.

Python handles a signal only between two steps of the main thread, and one step, such as a search or the work of a
network on a batch, may take seconds. Therefore a thread waits for the signal. If the main thread has not ended the
process within `GRACE_SECONDS`, the thread does. After SIGTERM and SIGHUP, the thread always does. SIGTERM is what
`kill`, service managers and batch systems send. SIGHUP is what a terminal sends when it is closed.
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
from typing import NoReturn

EVENTS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "terminated"}
GRACE_SECONDS = 0.3

_kept = ""
closed_streams: set[int] = set()  # the numbers of the streams that the caller closed
_announced = threading.Lock()  # held once the line is written


def keeps(kept: str) -> None:
    """Say, for the line that the signal writes, what the command keeps."""
    global _kept
    _kept = kept


def run(start: Callable[[], None]) -> None:
    """Call `start`, which imports and runs a command line. Each signal ends the process with one line."""
    try:
        _open_closed_streams()
        _watch()
        start()
    except (KeyboardInterrupt, SystemExit) as end:  # typer turns a KeyboardInterrupt into a SystemExit
        if isinstance(end, SystemExit) and end.code != status(signal.SIGINT):
            raise
        for number in EVENTS:
            signal.signal(number, signal.SIG_IGN)  # a second one must not end the clean-up
        _announce(signal.SIGINT)
        _exit(signal.SIGINT)


def status(number: signal.Signals) -> int:
    """The exit status of a process that ends because of a signal, as shells define it."""
    return 128 + number


def _open_closed_streams() -> None:
    """Connect stdin, stdout and stderr to the null device if the caller closed them.

    Otherwise Python has None in their places, and the next file that is opened gets their numbers.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            with contextlib.suppress(OSError):
                os.fstat(number)
                continue
            closed_streams.add(number)
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is that of the stream
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))


def _exit(number: signal.Signals) -> NoReturn:
    """End the process. The interpreter is not taken down, which takes a second or more once torch is loaded."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(status(number))


def _announce(number: signal.Signals) -> None:
    """Write the line of the signal to stderr, if none was written yet."""
    if not _announced.acquire(blocking=False):
        return
    event = EVENTS[number]
    message = event + (f": {_kept}" if _kept else "")
    progress = sys.modules.get("hashengine._progress")
    if progress is not None and progress.logs_json():
        message = json.dumps({"event": event, "message": message})
    # Not by `print`: the main thread may hold the lock of `sys.stderr`.
    with contextlib.suppress(OSError):  # the terminal may be closed
        os.write(2, f"{message}\n".encode())


def _watch() -> None:
    """Start the thread that waits for the signals that the process does not ignore.

    Background jobs of a shell ignore SIGINT, and commands under nohup ignore SIGHUP.
    """
    handled = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            # The handler raises nothing: an exception in the import of a native module can abort the process.
            signal.signal(number, lambda *_: None)
            handled = True
    if not handled:
        return
    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    signal.set_wakeup_fd(writable, warn_on_full_buffer=False)  # Python writes the number of each signal to it at once
    threading.Thread(target=_end_after_signal, args=(readable,), daemon=True).start()


def _end_after_signal(readable: int) -> None:
    while (number := os.read(readable, 1)[0]) not in EVENTS:
        pass
    number = signal.Signals(number)
    time.sleep(GRACE_SECONDS)
    _announce(number)
    files = sys.modules.get("hashengine._files")
    if files is not None:
        files.remove_temporaries()
    os._exit(status(number))
