"""edge.py: one line and a sane exit code, whatever happens and wherever the output goes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import shipped_profile
from helpers import mistake

import main_exp1
import main_exp2
from specsampling import edge
from specsampling.config import ConfigError
from specsampling.edge import STOPPED, exit_code, one_line

PROJECT = Path(__file__).parents[1]

START = """
from specsampling.edge import catch_signals, exit_code
catch_signals()
import sys, tempfile, time
def main(arguments):
    {body}
{after}
sys.exit(exit_code(main))
"""


def start(body: str, after: str = "", shell: str = "") -> subprocess.Popen:
    """A script of its own; `shell` comes behind it on a shell's command line."""
    command = [sys.executable, "-c", START.format(body=body, after=after)]
    if shell:
        command = ["bash", "-c", f'"$0" -c "$1" {shell}', sys.executable, command[2]]
    return subprocess.Popen(
        command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run(body: str, shell: str = "") -> tuple[int, str, str]:
    process = start(body, shell=shell)
    output, errors = process.communicate(timeout=60)
    return process.returncode, output, errors


@pytest.mark.parametrize("main", [main_exp1.main, main_exp2.main], ids=["exp1", "exp2"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nope"], "unrecognized arguments: --nope; --help"),
        (["extra"], "unrecognized arguments: extra"),
        (["--limit"], "argument --limit: expected one argument"),
        (["--set"], "argument --set: expected one argument"),
        (["--s", "1"], "ambiguous option: --s could match"),
        (["--fresh=1"], "argument --fresh: ignored explicit argument"),
        (["--limit", ""], 'null or an integer >= 1 and <= 1000000000 (got "")'),
        (["--limit", "٣"], '(got "٣")'),
        (["--limit", "1" * 20], "null or an integer >= 1 and <= 1000000000 (got 1111"),
        (["--limit", "9" * 5000], "--set run.limit must be valid YAML (got Exceeds the limit"),
        (["--seed", str(2**63)], "a seed has 63 bits"),
        (["--device", "cuda:99999999999999999999"], "N counts this machine's GPUs"),
        (["--device", "cuda:٣"], "cuda:N, mps, auto-split or auto-split-offload"),
        (["--device", "cpu\n"], 'cuda:N, mps, auto-split or auto-split-offload (got "cpu\\n")'),
        (["--dtype", "float16 # half"], 'one of auto, float32, float16, bfloat16 (got "float16 #'),
        (["--methods", "a]: b"], '@block, at least one, none twice (got ["a]: b"])'),
        (["--methods", ""], "run.methods must be a list"),
        (["--methods", "speculative,"], "run.methods must be a list"),
        (["--profile", "a\nb\x1b[31m"], 'profile must be one of: smollm2-cpu'),
        (["--config", "a\0b"], "embedded null byte"),
        (["--config", "x" * 300], "File name too long"),
        (["--config", "/dev/zero"], "not a file"),
        (["--config", "/proc/self/mem"], "config must be a YAML file"),
        (["--set", "decoding.max_new_tokens=99999999999"], "no model's context is longer"),
        (["--set", "run.warmup=1000000"], "decoded and thrown away"),
        (["--set", "xsum.num_shots=99999"], "stands in every prompt"),
        (["--set", "a\nb=1"], "a\\nb is not a known key"),
        (["--set", "x" * 100_000 + "=1"], "xxx... is not a known key"),
        (["--set", "speculation.k =5", "--limit", "x"], "run.limit must be"),
        (["--output", "a\0b.jsonl"], "embedded null byte"),
        (["--output", ""], "must be a file that ends in .jsonl (got .)"),
        (["--output", "a\nb"], "must be a file that ends in .jsonl (got a\\nb)"),
        (["--output", "x" * 300 + ".jsonl"], "File name too long"),
        (["--output", "README.md/a.jsonl"], "Not a directory"),
        (["--output", "/proc/none/a.jsonl", "--fresh"], "cannot be written"),
    ],
    ids=lambda value: "",
)  # fmt: skip
def test_an_odd_option_is_one_line_and_exit_code_2_at_once(main, arguments, message, capsys):
    """YAML in options, argparse's two lines, values of 100,000 characters, control characters."""
    start = time.process_time()
    line = mistake(main, arguments, capsys)
    assert message in line and len(line) < 2100 and line.isprintable()
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    ("arguments", "path"),
    [
        ([], "Results/results2.jsonl"),
        (["--profile", "qwen-coder-cpu"], "Results/qwen-coder-cpu/results2.jsonl"),
        (["--profile", "qwen-coder-cpu", "--output", "a.jsonl"], "a.jsonl"),
    ],
)
def test_a_profile_that_is_named_has_rows_of_its_own(arguments, path):
    """The shipped rows are another profile's: a new clone's first run was refused."""
    options, _ = main_exp1.read_experiment("", "humaneval", "results2.jsonl", arguments)
    assert options.output == Path(path)


@pytest.mark.parametrize("name", ["../../up", ".hidden", "a/b:c"])
def test_a_profiles_name_is_no_path(name, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({"default": name, "profiles": {name: shipped_profile("demo")}}))
    arguments = ["--config", str(config), "--profile", name]
    options, _ = main_exp1.read_experiment("", "xsum", "results1.jsonl", arguments)
    assert len(options.output.parts) == 3
    assert re.fullmatch(r"[\w-][\w.-]*", options.output.parts[1])


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("plain", "plain"),
        ("two\nlines\r\n", "two\\nlines\\r\\n"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("\x9b31m\x7f\0", "\\x9b31m\\x7f\\x00"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("a\udcff", "a\\udcff"),
        ("é東🦊", "é東🦊"),
        ("x" * 3000, "x" * 1997 + "..."),
    ],
)
def test_a_message_cannot_steer_the_terminal(text, line):
    assert one_line(text) == line


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ConfigError("a\nb"), 2, "error: a\\nb"),
        (KeyboardInterrupt(), 130, STOPPED),
        (OSError(28, "No space left on device"), 2, "No space left on device"),
        (FileNotFoundError(2, "No such file or directory", "x"), 2, "directory: 'x'"),
        (OSError(36, "File name too long", "x" * 5000), 2, "File name too long"),
        (MemoryError(), 2, "error: out of memory (MemoryError); lower"),
        (OSError(12, "Cannot allocate memory"), 2, "error: out of memory ([Errno 12]"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "error: out of memory (D"),
        (ImportError("a.so: failed to map segment from shared object"), 2, "error: out of memory"),
        (BrokenPipeError(32, "Broken pipe"), 141, ""),
        (TypeError("a bug of ours"), None, ""),
    ],
    ids=lambda value: "",
)
def test_what_can_go_wrong_outside_is_one_line_and_a_bug_a_traceback(error, code, said, capsys):
    def main(arguments):
        raise error

    if code is None:
        with pytest.raises(TypeError):
            exit_code(main)
        return
    assert exit_code(main) == code
    errors = capsys.readouterr().err
    assert said in errors and errors.count("\n") == bool(said)


def start_under(limit: int, script: str, *arguments: object) -> subprocess.CompletedProcess:
    """A script under `ulimit -v`, here in bytes."""
    import resource

    return subprocess.run(
        [sys.executable, script, *map(str, arguments)],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )


@pytest.mark.parametrize(
    ("script", "arguments", "limit"),
    [
        ("main_exp1.py", ["--score", "a.jsonl"], 1 << 30),
        ("main_exp2.py", [], 1_200_000_000),
        ("main_exp2.py", ["--score=a.jsonl"], 200_000_000),
        ("speculative.py", ["--prompt", "a"], 100_000_000),
    ],
)
def test_too_little_address_space_is_one_line_before_the_libraries(script, arguments, limit):
    """Imports ended in "failed to map segment", in std::bad_alloc, or ran for ever."""
    done = start_under(limit, script, *arguments)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: too little memory: `ulimit -v` must leave")
    assert f"(got {limit / 1e9:.1f} GB); raise it" in line


@pytest.mark.parametrize(
    ("arguments", "threads", "limit", "way_out"),
    [
        ([], "1", 1.75e9, None),
        ([], "16", 1.75e9, "16 threads (got 1.8 GB); raise it, or set OMP_NUM_THREADS=1"),
        ([], "16", 1.5e9, "16 threads (got 1.5 GB); raise it"),
        ([], "many", 1e12, None),
        *((arguments, "1", 0.6e9, None) for arguments in (["--score", "a.jsonl"], ["--help"])),
        ([], "1", -1, None),
    ],
)
def test_how_much_memory_is_asked_for(arguments, threads, limit, way_out, monkeypatch, capsys):
    import resource

    monkeypatch.setattr(sys, "argv", ["main_exp2.py", *arguments])
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (int(limit), -1))
    if way_out is None:
        return edge.check_address_space()
    with pytest.raises(SystemExit, match="2"):
        edge.check_address_space()
    assert capsys.readouterr().err.rstrip().endswith(way_out)


@pytest.mark.parametrize(
    ("body", "shell", "code", "printed"),
    [
        ("print('é東'); return 0", "| cat", 0, "\\xe9\\u6771"),
        ("print('a\\udcff'); return 0", "| cat", 0, "a\\udcff"),
        ("raise OSError(2, 'é')", "2>&1 >/dev/null", 2, "[Errno 2] \\xe9)"),
        ("print(1); return 0", ">&-", 0, ""),
        ("print(1); print(2, file=sys.stderr); return 0", ">&- 2>&-", 0, ""),
        ("print(1); return 0", "<&-", 0, "1"),
        ("raise MemoryError", "2>&-", 2, ""),
        ("print('x\\n' * 100000); return 0", "| head -1", 141, "x"),
        ("print('x' * 10); return 0", "| true; exit ${PIPESTATUS[0]}", None, ""),
        ("print(1); return 0", ">/dev/full", 2, ""),
        ("print(1, file=sys.stderr); return 0", "2>/dev/full", None, ""),
    ],
)  # fmt: skip
def test_output_that_nobody_can_take_is_no_traceback(body, shell, code, printed, monkeypatch):
    """A table for an ASCII terminal, `| head -1` and a full disk were tracebacks."""
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    shell = f"{shell}; exit ${{PIPESTATUS[0]}}" if shell.startswith("| ") else shell
    found, output, errors = run(body, shell)
    assert found == code or code is None
    assert printed in output if printed else output == ""
    assert "Traceback" not in errors and "Exception ignored" not in errors


def test_with_stderr_closed_a_file_does_not_take_its_place(tmp_path):
    """The rows' file became number 2, and a library's warnings went into it."""
    path = tmp_path / "rows"
    body = f"file = open({str(path)!r}, 'w'); import os; os.write(2, b'warning'); return 0"
    assert run(body, "2>&-")[0] == 0
    assert path.read_bytes() == b""


KINDS = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]


def stop(process: subprocess.Popen, number: int, times: int = 1) -> tuple[int, str]:
    """Wait for its first line, signal it, and see how it ends."""
    process.stdout.readline()
    for _ in range(times):
        os.kill(process.pid, number)
        time.sleep(0.05)
    _, errors = process.communicate(timeout=30)
    return process.returncode, errors


READY = "print('ready', flush=True); time.sleep(60)"
STOPPED_IN = {  # what a script does when the signal comes; {folder} is for temporary files
    "a folder of its own": f"with tempfile.TemporaryDirectory(dir={{folder!r}}): {READY}",
    # A library makes another error of what stops it.
    "an import": f"try: {READY}\n    except BaseException: raise ImportError('no C') from None",
}


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("what", STOPPED_IN)
@pytest.mark.parametrize(("number", "code"), KINDS)
def test_a_signal_is_one_line_and_leaves_no_temporary_files(number, code, what, times, tmp_path):
    """SIGTERM ended the process where it stood; an impatient second Ctrl-C was a traceback."""
    process = start(STOPPED_IN[what].format(folder=str(tmp_path)))
    assert stop(process, number, times) == (code, f"{STOPPED}\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("number", "code"), KINDS)
def test_a_signal_while_importing_is_one_line(number, code):
    """Torch alone takes seconds, and Ctrl-C in them was a traceback of its modules."""
    assert stop(start("return 0", after=READY), number) == (code, f"{STOPPED}\n")


@pytest.mark.parametrize("script", ["main_exp1.py", "speculative.py"])
def test_the_scripts_catch_signals_before_their_imports(script):
    text = (PROJECT / script).read_text()
    guard = text.index("catch_signals()")
    assert guard < text.index("import annotations\n") + 200
    assert "import" not in text[: text.index("from __future__")].replace("important", "")


def test_windows_ends_with_one_line(monkeypatch, capsys):
    """Nobody has run the package there: its locks and its sandbox are those of Linux and macOS."""
    monkeypatch.setattr(edge.sys, "platform", "win32")
    with pytest.raises(SystemExit) as ended:
        edge.catch_signals()
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith("(got Windows); run it in WSL\n")
