"""A memory cgroup of one's own, version 2 or 1, where the machine allows to make one."""

import os
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")


def make(limit: int) -> Path | None:
    """A cgroup below this process's own, of at most ``limit`` bytes, the page cache included; None where it cannot."""
    for parent, file in _parents():
        folder = parent / f"hashengine-{os.getpid()}"
        try:
            folder.mkdir()
        except OSError:
            continue
        try:
            (folder / file).write_text(str(limit))
            return folder
        except OSError:  # not delegated to us, or the controller is not enabled here
            folder.rmdir()
    return None


def enter(folder: Path) -> None:
    """Move this process there; what it holds already stays with the cgroup that it comes from."""
    (folder / "cgroup.procs").write_text(str(os.getpid()))


def _parents() -> list[tuple[Path, str]]:
    """Where a cgroup may be made, and the file of its limit."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if not controllers:
            found.append((ROOT / path.lstrip("/"), "memory.max"))
        elif controllers == "memory":
            found.append((ROOT / "memory" / path.lstrip("/"), "memory.limit_in_bytes"))
    return found
