"""Handles a script's signals, streams, one-line errors and exit codes.

A script calls `catch_signals` before its imports, which take seconds, then `check_address_space`,
and ends with `exit_code`. This module imports little, because a signal may come meanwhile. It
imports nothing of the package before an error has to be reported.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from io import TextIOWrapper

MISTAKE = 2
# The package's errors that are a user's mistakes; all others are bugs.
MISTAKES = "ConfigError ModelError PromptError RanksError RecordsError SandboxError TaskError"
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}  # 128 + the signal's number, as a shell has it
BROKEN_PIPE = 141  # a shell's code for a program that SIGPIPE ended
PATIENCE_SECONDS = 2  # a second Ctrl-C must not soon interrupt the cleanup after the first
MAX_LINE = 2000
# Address space that the libraries take, measured with a margin, and what each thread adds to it.
DECODING_BYTES = 1_650_000_000
LIGHT_BYTES = 500_000_000  # without torch and transformers
THREAD_BYTES = 64_000_000
STOPPED = "stopped; finished rows are kept, and the same command goes on"
# The variables in which launchers tell each process the number of processes, and its rank.
LAUNCHED = {
    "WORLD_SIZE": "RANK",
    "PMI_SIZE": "PMI_RANK",
    "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK",
    "MV2_COMM_WORLD_SIZE": "MV2_COMM_WORLD_RANK",
    "SLURM_STEP_NUM_TASKS": "SLURM_PROCID",
}
MOST_DIGITS = 9


def launched_by() -> tuple[str, str] | None:
    """Return the variables that hold the rank and the number of ranks; None if there is one.

    Both must hold numbers. Under SLURM, only an `srun` of several tasks is a launch: batch scripts
    and `salloc` shells do not set SLURM_STEP_NUM_TASKS above 1. A shell of `srun --pty` sets
    SLURM_PTY_PORT. It counts as one process, because its other tasks end at once.
    """
    for size, index in LAUNCHED.items():
        if index == "SLURM_PROCID" and "SLURM_PTY_PORT" in os.environ:
            continue
        if all(_is_number(os.environ.get(name, "")) for name in (index, size)):
            return (index, size) if int(os.environ[size]) > 1 else None
    return None


def _is_number(text: str) -> bool:
    return text.isdecimal() and len(text) <= MOST_DIGITS


def rank() -> int:
    """Return this process's rank: 0 for a single process, or for the one that prints."""
    variables = launched_by()
    return int(os.environ[variables[0]]) if variables else 0


class Stopped(BaseException):
    """The request of a signal to end the script. It is no Exception, so no handler catches it."""


class _Signals:
    """The signal handler. `code` is the exit code that a signal asked for.

    `may_raise` says whether `exit_code` is running a script, which may have to clean up.
    """

    code: int | None = None
    may_raise = False
    since = 0.0

    def __call__(self, number: int, frame: object) -> None:
        code = CODES[signal.Signals(number)]
        if self.may_raise and self.code is None:
            self.code, self.since = code, time.monotonic()
            raise Stopped
        # Ending at once is safe while importing and at the very end: nothing is open.
        if not self.may_raise or time.monotonic() - self.since > PATIENCE_SECONDS:
            try:  # an exception could surface in any code
                os.write(2, f"{STOPPED}\n".encode())
            finally:
                os._exit(code)


_signals = _Signals()


def catch_signals() -> None:
    """Let Ctrl-C and SIGTERM end the process with one line, and with exit code 130 or 143.

    A script ends here with one line on Windows, which lacks what the package needs.
    """
    if sys.platform == "win32":
        _say("error: specsampling runs on Linux and macOS (got Windows); run it in WSL")
        raise SystemExit(MISTAKE)
    for number in CODES:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup and `&` ignore it
            signal.signal(number, _signals)


def check_address_space(scoring_bytes: int = LIGHT_BYTES) -> None:
    """End with one line if `ulimit -v` leaves too little room for the libraries.

    Without this check, their imports could end in a traceback, abort silently or hang. `--score`
    takes `scoring_bytes` of address space.
    """
    import resource

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")  # its own reserves 1 GB
    base_bytes = DECODING_BYTES
    for argument in sys.argv[1:]:
        if argument.startswith(("--score", "--help", "-h")):
            base_bytes = scoring_bytes if argument.startswith("--score") else LIGHT_BYTES
    thread_count = os.environ.get("OMP_NUM_THREADS", "")
    has_affinity = hasattr(os, "sched_getaffinity")  # macOS has none
    num_cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    threads = int(thread_count) if _is_number(thread_count) and int(thread_count) else num_cores
    needed = base_bytes + threads * THREAD_BYTES
    if limit < needed:
        fewer = ", or set OMP_NUM_THREADS=1" if limit >= base_bytes + THREAD_BYTES else ""
        _say(
            f"error: too little memory: `ulimit -v` must leave {needed / 1e9:.1f} GB to the "
            f"libraries and {threads} threads (got {limit / 1e9:.1f} GB); raise it{fewer}"
        )
        raise SystemExit(MISTAKE)


def exit_code(
    main: Callable[[Sequence[str] | None], int], arguments: Sequence[str] | None = None
) -> int:
    """Run a script and return its exit code. A user's mistake prints one line and returns 2."""
    _mend_streams()
    if rank():
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    _signals.code, _signals.may_raise = None, True
    try:
        code = main(arguments)
        sys.stdout.flush()
        return code
    except SystemExit:  # --help, which may be read by `head`
        _give_up_output()
        raise
    except BaseException as error:
        if _signals.code is None:
            return _code_of(error)
        _say(STOPPED)  # a library may have turned it into another error
        for number in CODES:  # a second signal has nothing to add while the interpreter ends
            if signal.getsignal(number) is _signals:
                signal.signal(number, signal.SIG_IGN)
        return _signals.code
    finally:
        _signals.may_raise = False


def _code_of(error: BaseException) -> int:
    """Say what went wrong, and return the exit code; raise the error again if it is a bug."""
    if isinstance(error, KeyboardInterrupt):
        _say(STOPPED)
        return CODES[signal.SIGINT]
    if isinstance(error, BrokenPipeError):  # the reader of the output, such as `head`, has ended
        _give_up_output()
        return BROKEN_PIPE
    name = type(error).__name__
    if type(error).__module__.startswith("specsampling."):
        line = f"error: {error}" if name in MISTAKES.split() else ""
        if rank() and name == "ConfigError":  # rank 0 reports the same
            return MISTAKE
    else:
        line = _of_memory(error)
    if not line and isinstance(error, OSError):
        _give_up_output()
        line = (
            f"error: the system refused an operation ({error}); check the paths, your rights to "
            "them, and the space on the disk"
        )
    if not line:
        if rank():
            sys.stderr = sys.__stderr__  # every rank reports a bug
        raise error
    _say(line)
    return MISTAKE


def _of_memory(error: BaseException) -> str:
    """Return the line for an error caused by a lack of memory; "" for any other error."""
    from specsampling.models.errors import is_out_of_memory, reason

    if type(error).__name__ == "OutOfMemoryError":  # torch's, which may not be imported yet
        return (
            "error: out of memory on the device; lower decoding.max_new_tokens, choose int8 or "
            "nf4 quantization, or smaller models"
        )
    if not is_out_of_memory(error):
        return ""
    return (
        f"error: out of memory ({reason(error)}); lower decoding.max_new_tokens, choose smaller "
        "models, or raise what `ulimit -v` shows"
    )


def one_line(text: str) -> str:
    """Return a text for the terminal: one line, no control characters, cut if it is long."""
    line = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
    return line if len(line) <= MAX_LINE else f"{line[: MAX_LINE - 3]}..."


def _say(message: str) -> None:
    """Print a line on stderr, if anybody is there to read it."""
    from contextlib import suppress

    stream = sys.stderr
    if rank():
        if message == STOPPED:
            return  # rank 0 says it
        message, stream = f"rank {rank()}: {message}", sys.__stderr__
    with suppress(OSError, ValueError):
        print(one_line(message), file=stream, flush=True)


def _mend_streams() -> None:
    """Make the streams take any text, even on an ASCII terminal or if the caller closed them.

    The next opened file would take a closed stream's number. What a library prints would then go
    into the rows.
    """
    if None in (sys.stdin, sys.stdout, sys.stderr):
        while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(number)
        sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
        sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _give_up_output() -> None:
    """Discard buffered output, on which the interpreter would fail again when it ends."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
