"""A script's edge: signals, streams, one line for a mistake, exit codes.

A script calls `catch_signals` before its imports, which take seconds, then `check_address_space`,
and ends with `exit_code`. This module imports next to nothing, since a signal may come while it
does, and nothing of the package before something went wrong.
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
BROKEN_PIPE = 141  # as of a program that SIGPIPE ended
PATIENCE_SECONDS = 2  # an impatient second Ctrl-C must not tear the tidying up of the first
MAX_LINE = 2000
# Address space that the libraries take, measured with a margin, and what each thread adds to it.
DECODING_BYTES = 1_650_000_000
LIGHT_BYTES = 500_000_000  # without torch and transformers
THREAD_BYTES = 64_000_000
STOPPED = "stopped; finished rows are kept, and the same command goes on"
# The variables in which launchers tell each process how many there are, and which one it is.
LAUNCHED = {
    "WORLD_SIZE": "RANK",
    "PMI_SIZE": "PMI_RANK",
    "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK",
    "MV2_COMM_WORLD_SIZE": "MV2_COMM_WORLD_RANK",
    "SLURM_STEP_NUM_TASKS": "SLURM_PROCID",
}
MOST_DIGITS = 9


def launched_by() -> tuple[str, str] | None:
    """Return the variables of this process's rank and of the number of ranks; None if it is alone.

    Both must be numbers. Under SLURM, only an `srun` of several tasks is a launch: batch scripts
    and `salloc` shells do not set SLURM_STEP_NUM_TASKS above 1. A shell of `srun --pty`, which sets
    SLURM_PTY_PORT, is one process too, since its other tasks end at once.
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
    """Return this process's rank. Rank 0 is the only process, or the one that speaks."""
    variables = launched_by()
    return int(os.environ[variables[0]]) if variables else 0


class Stopped(BaseException):
    """A signal asked the script to end. It is no Exception, so that nobody handles it as one."""


class _Signals:
    """The signal handler. `code` is the exit code that a signal asked for.

    `may_raise` says whether a script runs that has things to tidy up, and `exit_code` around it.
    """

    code: int | None = None
    may_raise = False
    since = 0.0

    def __call__(self, number: int, frame: object) -> None:
        code = CODES[signal.Signals(number)]
        if self.may_raise and self.code is None:
            self.code, self.since = code, time.monotonic()
            raise Stopped
        # Nothing is open while importing and at the very end.
        if not self.may_raise or time.monotonic() - self.since > PATIENCE_SECONDS:
            try:  # an exception would run through anyone's code
                os.write(2, f"{STOPPED}\n".encode())
            finally:
                os._exit(code)


_signals = _Signals()


def catch_signals() -> None:
    """From here on Ctrl-C and SIGTERM end the process with one line, 130 and 143."""
    for number in CODES:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup and `&` have it
            signal.signal(number, _signals)


def check_address_space(scoring_bytes: int = LIGHT_BYTES) -> None:
    """End with one line if `ulimit -v` leaves too little room for the libraries.

    Their imports would end in a traceback, in an abort without a word of ours, or not at all.

    Args:
        scoring_bytes: what `--score` takes.
    """
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")  # its own reserves a gigabyte
    alone = DECODING_BYTES
    for argument in sys.argv[1:]:
        if argument.startswith(("--score", "--help", "-h")):
            alone = scoring_bytes if argument.startswith("--score") else LIGHT_BYTES
    told = os.environ.get("OMP_NUM_THREADS", "")
    has_affinity = hasattr(os, "sched_getaffinity")
    num_cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    threads = int(told) if _is_number(told) and int(told) else num_cores
    needed = alone + threads * THREAD_BYTES
    if limit < needed:
        fewer = ", or set OMP_NUM_THREADS=1" if limit >= alone + THREAD_BYTES else ""
        _say(
            f"error: too little memory: `ulimit -v` must leave {needed / 1e9:.1f} GB to the "
            f"libraries and {threads} threads (got {limit / 1e9:.1f} GB); raise it{fewer}"
        )
        raise SystemExit(MISTAKE)


def exit_code(
    main: Callable[[Sequence[str] | None], int], arguments: Sequence[str] | None = None
) -> int:
    """Run a script; a user's mistake is one line and exit code 2, Ctrl-C is 130, SIGTERM 143."""
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
        _say(STOPPED)  # a library may have made another error of it
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
    if isinstance(error, BrokenPipeError):  # whoever read the output has seen enough
        _give_up_output()
        return BROKEN_PIPE
    name = type(error).__name__
    if type(error).__module__.startswith("specsampling."):  # raised from memory, maybe
        line = f"error: {error}" if name in MISTAKES.split() else ""
        if rank() and name == "ConfigError":  # every rank reads the same
            return MISTAKE
    else:
        line = _of_memory(error)
    if not line and isinstance(error, OSError):
        _give_up_output()
        line = (
            f"error: the system refused something ({error}); check the paths, your rights to "
            "them, and the space on the disk"
        )
    if not line:
        if rank():
            sys.stderr = sys.__stderr__  # a bug is told on every rank
        raise error
    _say(line)
    return MISTAKE


def _of_memory(error: BaseException) -> str:
    """Return what to say of an error if memory is its cause. Little is imported into little."""
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
    """Print anything anywhere: to an ASCII terminal, or where the caller closed the stream.

    With a stream closed, the next file opened would take its number, and whatever a library
    prints would go into the rows.
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
    """Let what is still buffered go nowhere: the interpreter would fail on it once more."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
