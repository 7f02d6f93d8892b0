"""Finds and kills whatever a program's process has started, and knows nothing else."""

import os
import signal
import sys
import time
from contextlib import suppress


class SandboxError(RuntimeError):
    """A failure of the sandbox itself, which says nothing about the program."""


def kill_left_overs(group: int, scratch: str) -> None:
    """Kill the process group. On Linux, also kill what left it, found by its environment.

    A namespace has no scratch folder and needs no search, because all in it end with it.
    """
    with suppress(ProcessLookupError, PermissionError):  # no process is left, or only zombies
        os.killpg(group, signal.SIGKILL)
    marker = f"TMPDIR={scratch}\0".encode()
    for _ in range(1000 if sys.platform == "linux" and scratch else 0):
        strays = [int(name) for name in os.listdir("/proc") if _carries(marker, name)]
        if not strays:
            break
        for stray in strays:
            with suppress(ProcessLookupError):
                os.kill(stray, signal.SIGKILL)
        time.sleep(0.001)


def _carries(marker: bytes, process_name: str) -> bool:
    """Tell whether a process was started with `marker` in its environment."""
    try:
        with open(f"/proc/{process_name}/environ", "rb") as environ_file:
            return process_name.isdigit() and marker in environ_file.read()
    except OSError:  # not a process, or ended, or another user's
        return False
