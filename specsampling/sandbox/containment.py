"""Contains a program's process where there is no namespace: in its process group, or in a job.

This module knows how to find and kill whatever a process has started, and nothing else.
"""

import os
import signal
import sys
import time
from contextlib import suppress

if sys.platform == "win32":
    import ctypes


class SandboxError(RuntimeError):
    """A failure of the sandbox itself, which says nothing about the program."""


if sys.platform == "win32":

    class _JobLimits(ctypes.Structure):
        """The JOBOBJECT_EXTENDED_LIMIT_INFORMATION, with its inner structures laid flat."""

        _fields_ = [
            ("process_time", ctypes.c_int64),
            ("job_time", ctypes.c_int64),
            ("flags", ctypes.c_uint32),
            ("working_set_range", ctypes.c_size_t * 2),
            ("active_processes", ctypes.c_uint32),
            ("affinity", ctypes.c_size_t),
            ("priority_and_scheduling", ctypes.c_uint32 * 2),
            ("io_counters", ctypes.c_uint64 * 6),
            ("process_memory", ctypes.c_size_t),
            ("job_memory", ctypes.c_size_t),
            ("peak_memory", ctypes.c_size_t * 2),
        ]

    def contain(pid: int, cpu_seconds: int, memory_bytes: int) -> int:
        """Put the process into a new job object with limits, and return the job's handle."""
        kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)
        kernel32.CreateJobObjectW.restype = kernel32.OpenProcess.restype = ctypes.c_void_p
        limits = _JobLimits(
            # kill on close | no crash dialog | memory | processes | CPU time in 100 ns
            flags=0x2000 | 0x400 | 0x200 | 0x8 | 0x4,
            job_memory=memory_bytes,
            active_processes=1,
            job_time=cpu_seconds * 10**7,
        )
        job = ctypes.c_void_p(kernel32.CreateJobObjectW(None, None))
        process = ctypes.c_void_p(kernel32.OpenProcess(0x101, False, pid))  # quota | terminate
        contained = kernel32.SetInformationJobObject(
            job, 9, ctypes.byref(limits), ctypes.sizeof(limits)
        ) and kernel32.AssignProcessToJobObject(job, process)
        error = ctypes.get_last_error()
        kernel32.CloseHandle(process)
        if not contained:
            kernel32.CloseHandle(job)
            raise SandboxError(f"the sandbox has no job object: {ctypes.FormatError(error)}")
        return job.value or 0

    def kill_left_overs(container: int, scratch: str) -> None:
        """Close the job, which kills whatever is still in it."""
        ctypes.WinDLL("kernel32").CloseHandle(ctypes.c_void_p(container))

else:

    def contain(pid: int, cpu_seconds: int, memory_bytes: int) -> int:
        """Return the process group of the new session. The process sets its own limits."""
        return pid

    def kill_left_overs(container: int, scratch: str) -> None:
        """Kill the process group. On Linux, also kill what left it, found by its environment.

        A namespace has no scratch folder and needs no search, because all in it end with it.
        """
        with suppress(ProcessLookupError, PermissionError):  # no process is left, or only zombies
            os.killpg(container, signal.SIGKILL)
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
