"""Measures how much memory is free, and whether it suffices, before minutes of loading."""

from __future__ import annotations

import gc
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from specsampling.models.errors import ModelError

if TYPE_CHECKING:
    import torch

CGROUP = Path("/sys/fs/cgroup")  # a container's own limit, on Linux


def require_memory(purpose: str, needed: int, way_out: str) -> None:
    """Raise a ModelError if a purpose needs more bytes than the machine's memory can hold now."""
    available = available_bytes()
    if available < needed:
        raise ModelError(
            f"{purpose} needs {gigabytes(needed)} of memory (available: "
            f"{gigabytes(available)}); {way_out}{limit_way_out()}"
        )


def available_bytes() -> int:
    """Return the bytes that can still be taken, swap and reclaimable caches included.

    A container's limit counts, and so does the limit of this process's memory (`ulimit -v`).
    """
    machine = min(_machine_bytes(), _address_space())
    try:
        limit, used = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        lines = (CGROUP / "memory.stat").read_text().splitlines()
        statistics = dict(line.split() for line in lines)
    except (OSError, ValueError):  # no such limit: not Linux, no container, or "max"
        return machine
    return min(machine, limit - used + int(statistics.get("inactive_file", 0)))


def _machine_bytes() -> int:
    return psutil.virtual_memory().available + psutil.swap_memory().free


def _address_space() -> int:
    """Return the bytes that this process may still map; `sys.maxsize` without a limit."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return sys.maxsize
    return max(limit - int(psutil.Process().memory_info().vms), 0)


def limit_way_out() -> str:
    """Name one more way out if `ulimit -v` allows less memory than the machine has."""
    return ", or raise what `ulimit -v` shows" if _address_space() < _machine_bytes() else ""


def free_bytes(device: torch.device) -> int:
    """Return the bytes that a device can still give: a GPU's own memory, else the machine's."""
    import torch

    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_bytes()


def resident_bytes() -> int:
    """Return the bytes that this process has now of the machine's memory."""
    return int(psutil.Process().memory_info().rss)


def peak_bytes() -> int:
    """Return the most bytes that this process has had so far of the machine's memory."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024  # Linux counts in KiB


def release_memory() -> None:
    """Give back memory that only torch's caches and unreachable objects hold."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB"
