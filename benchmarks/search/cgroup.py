"""Create a memory cgroup (version 2 or 1), and move a process into it. Not every machine permits this."""

import os
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")


def create(limit_bytes: int) -> Path | None:
    """Create a child of this process's cgroup, and limit the child's memory, with its page cache, to `limit_bytes`.

    Returns:
        The folder of the child; None if it cannot be created or its memory cannot be limited.
    """
    for parent, file in _parents():
        folder = parent / f"hashengine-{os.getpid()}"
        try:
            folder.mkdir()
        except OSError:
            continue
        try:
            (folder / file).write_text(str(limit_bytes))
            return folder
        except OSError:  # this process may not set the limit, or the cgroup has no memory controller
            folder.rmdir()
    return None


def enter(folder: Path) -> None:
    """Move this process into the cgroup. Memory that it already holds still counts towards its previous cgroup."""
    (folder / "cgroup.procs").write_text(str(os.getpid()))


def _parents() -> list[tuple[Path, str]]:
    """The cgroups of this process that can limit memory; for each, the name of the file that sets the limit."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if not controllers:  # version 2
            found.append((ROOT / path.lstrip("/"), "memory.max"))
        elif controllers == "memory":
            found.append((ROOT / "memory" / path.lstrip("/"), "memory.limit_in_bytes"))
    return found
