"""Makes a control group around a program's process. Its memory limit counts kernel memory, too.

A group can be made only where version 2 of Linux's control groups allows this user to: inside
this process's own group, if that group hands the memory controller down, or beside the own group,
if the parent folder is the user's. A desktop session and `systemd-run --user --scope` have such
folders. Nothing is made beside root's group, and only the program's process is moved.
"""

import functools
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from specsampling.sandbox.leases import owned_folder
from specsampling.sandbox.namespace import MAX_THREADS

MOUNT = "/sys/fs/cgroup"
MEMBERSHIP = "/proc/self/cgroup"
NAME = "specsampling-sandbox"
ENTER = 'echo 0 > "$0" && exec "$@"'  # 0 stands for the writing process


@functools.cache
def find_parent() -> str:
    """Return the folder in which groups may be made, "" for none; tried once per process."""
    for parent in _candidates() if sys.platform == "linux" else []:
        with suppress(OSError), control_group(64 << 20, parent) as start:
            if subprocess.run([*start, "true"], capture_output=True).returncode == 0:
                return parent
    return ""


@contextmanager
def control_group(memory_bytes: int, parent: str | None = None) -> Iterator[list[str]]:
    """Make a group in `parent`, by default in `find_parent`'s, and remove it at the end.

    It yields the words that start a command in the group; none if there is no group.
    """
    parent = find_parent() if parent is None else parent
    if not parent:
        yield []
        return
    with owned_folder(parent, NAME, _remove) as folder:
        Path(folder, "memory.max").write_text(str(memory_bytes))
        for name, limit in (("memory.swap.max", 0), ("pids.max", MAX_THREADS)):
            with suppress(OSError):  # this controller is not handed down
                Path(folder, name).write_text(str(limit))
        yield ["/bin/sh", "-c", ENTER, f"{folder}/cgroup.procs"]


def _candidates() -> list[str]:
    """Return the own group and its parent, where the memory controller is handed down."""
    with suppress(OSError):
        for line in Path(MEMBERSHIP).read_text().splitlines():
            if line.startswith("0::/") and os.path.exists(f"{MOUNT}/cgroup.controllers"):
                own = Path(MOUNT + line.removeprefix("0::").rstrip("/"))
                is_ours = os.geteuid() != 0 and owner_of(own.parent) == os.geteuid()
                places = [own, own.parent] if is_ours and str(own) != MOUNT else [own]
                return [
                    str(place)
                    for place in places
                    if "memory" in (place / "cgroup.subtree_control").read_text().split()
                ]
    return []


def owner_of(place: Path) -> int:
    return place.stat().st_uid


def _remove(folder: str) -> None:
    for _ in range(100):
        try:
            return os.rmdir(folder)
        except OSError:  # a process is still ending
            time.sleep(0.01)
