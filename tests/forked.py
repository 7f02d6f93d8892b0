"""Starts the scripts in processes that have imported the libraries already.

A script takes ten seconds to import torch and transformers, and the tests start many. Here one
process imports both and then does nothing but fork: each child is a fresh process with descriptors,
environment, signals and an exit code of its own. What happens while a script imports, or before,
needs a process from nothing: `subprocess`.

`python tests/forked.py FD` is that process; `start` is its client.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
IMPORTED = (
    *("torch", "transformers.modeling_utils", "transformers.models.auto.tokenization_auto"),
    *("transformers.models.llama.modeling_llama", "transformers.models.gpt2.modeling_gpt2"),
    *("specsampling.runner", "specsampling.models.load", "specsampling.models.static"),
    *("specsampling.loading", "specsampling.tasks.humaneval", "specsampling.tasks.xsum"),
)
HAS_FORK = hasattr(os, "fork") and sys.platform != "darwin"


class Forked:
    """A started script, with what of `subprocess.Popen` the tests use."""

    def __init__(
        self, server: socket.socket, script: str, arguments: list[str], variables: dict[str, str]
    ):
        outputs, errors, report = os.pipe(), os.pipe(), os.pipe()
        environment = os.environ | variables
        request = {"argv": [script, *arguments], "cwd": str(PROJECT), "env": environment}
        ends = array.array("i", [outputs[1], errors[1], report[1]])
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, ends)]
        data = json.dumps(request).encode()
        server.sendmsg([len(data).to_bytes(8, "big")], ancillary)
        server.sendall(data)
        for end in ends:
            os.close(end)
        self.args = request["argv"]
        self.stdout = os.fdopen(outputs[0], encoding="utf-8", newline=None)
        self.stderr = os.fdopen(errors[0], encoding="utf-8", newline=None)
        self._report = os.fdopen(report[0])
        self.pid = int(self._report.readline())
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._report], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = int(self._report.readline())
        return self.returncode

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """All that comes on both streams until the script has ended."""
        found: dict[int, bytes] = {self.stdout.fileno(): b"", self.stderr.fileno(): b""}
        opened, end = list(found), time.monotonic() + timeout
        while opened:
            ready = select.select(opened, [], [], max(0, end - time.monotonic()))[0]
            if not ready:
                raise subprocess.TimeoutExpired(self.args, timeout)
            for descriptor in ready:
                if block := os.read(descriptor, 1 << 16):
                    found[descriptor] += block
                else:
                    opened.remove(descriptor)
        self.wait(max(0, end - time.monotonic()))
        output, errors = (text.decode().replace("\r\n", "\n") for text in found.values())
        return output, errors


_server: socket.socket | None = None


def start(script: str, *arguments: object, **variables: str) -> Forked | subprocess.Popen:
    """Start a script of the project; where there is no fork, from nothing.

    Args:
        script: its path from the project's folder.
        arguments: of its command line.
        variables: of its environment, besides those of this process.
    """
    global _server
    texts = [*map(str, arguments)]
    if not HAS_FORK:
        return subprocess.Popen(
            [sys.executable, script, *texts],
            cwd=PROJECT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | variables,
        )
    if _server is None:
        _server, theirs = socket.socketpair()
        command = [sys.executable, __file__, str(theirs.fileno())]
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(PROJECT)}
        environment["OMP_NUM_THREADS"] = "1"  # models are tiny, and threads wait busily
        process = subprocess.Popen(
            command, cwd=PROJECT, pass_fds=[theirs.fileno()], env=environment
        )
        theirs.close()
        atexit.register(process.wait)
        atexit.register(_server.close)
    return Forked(_server, script, texts, variables)


def _serve(server: socket.socket) -> None:
    """Fork a keeper for each request, which forks the script and reports how that ended."""
    import importlib

    for name in IMPORTED:
        importlib.import_module(name)
    sys.modules["specsampling.models.kernel_model"].why_no_kernel()  # compiles and loads it
    gc.collect()
    gc.freeze()  # else the first collection of each child copies all of this
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends pytest, and that ends this
    while True:
        length, ancillary, _, _ = server.recvmsg(8, socket.CMSG_LEN(3 * 4))
        if not length:
            return
        request = json.loads(_read(server, int.from_bytes(length, "big")))
        ends = array.array("i")
        ends.frombytes(ancillary[0][2])
        if not os.fork():
            server.close()
            _keep(request, *ends)
        for end in ends:
            os.close(end)


def _read(server: socket.socket, num_bytes: int) -> bytes:
    data = b""
    while len(data) < num_bytes:
        data += server.recv(num_bytes - len(data))
    return data


def _keep(request: dict, outputs: int, errors: int, report: int) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    child = os.fork()
    if not child:
        os.close(report)
        for end, number in ((os.open(os.devnull, os.O_RDONLY), 0), (outputs, 1), (errors, 2)):
            os.dup2(end, number)
            os.close(end)
        _run(request)
    os.write(report, f"{child}\n".encode())
    os.close(outputs)
    os.close(errors)
    _, status = os.waitpid(child, 0)
    os.write(report, f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def _run(request: dict) -> None:
    """Become the script, as if the interpreter had been started with it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.argv = request["argv"]
    sys.path[0] = request["cwd"]
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115
    sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr
    code = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)  # what else an interpreter does at its end takes a second or two


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
