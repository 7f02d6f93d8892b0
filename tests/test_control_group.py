"""The control group around a program, with a folder in the place of the kernel's."""

import os
import subprocess
import sys

import pytest

from specsampling.sandbox import control_group as groups
from specsampling.sandbox import leases

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux's")

OTHER = 65534


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A tree of groups: /slice/scope, which this process is in, under a user's own /slice."""
    scope = tmp_path / "slice" / "scope"
    scope.mkdir(parents=True)
    (tmp_path / "cgroup.controllers").write_text("cpu memory pids\n")
    (tmp_path / "slice" / "cgroup.subtree_control").write_text("memory pids\n")
    (scope / "cgroup.subtree_control").write_text("\n")
    (tmp_path / "membership").write_text("0::/slice/scope\n")
    monkeypatch.setattr(groups, "MOUNT", str(tmp_path))
    monkeypatch.setattr(groups, "MEMBERSHIP", str(tmp_path / "membership"))
    monkeypatch.setattr(groups, "_remove", remove)
    user = os.geteuid() or OTHER  # root is refused
    monkeypatch.setattr(os, "geteuid", lambda: user)
    monkeypatch.setattr(groups, "owner_of", lambda path: user)
    groups.find_parent.cache_clear()
    yield tmp_path
    groups.find_parent.cache_clear()
    leases.clear_ownerless.cache_clear()


def remove(folder):
    """The kernel's rmdir takes a group's files with it."""
    for name in os.listdir(folder):
        os.unlink(f"{folder}/{name}")
    os.rmdir(folder)


def test_a_group_is_made_beside_ours_limited_entered_and_removed(tree):
    with groups.control_group(123 << 20) as start:
        (group,) = (tree / "slice").glob("specsampling-sandbox-*")
        assert (group / "memory.max").read_text() == str(123 << 20)
        assert (group / "memory.swap.max").read_text() == "0"
        done = subprocess.run([*start, "echo", "a b"], capture_output=True, text=True)
        assert done.stdout == "a b\n"
        assert (group / "cgroup.procs").read_text() == "0\n"  # means: whoever writes this
    assert sorted(path.name for path in (tree / "slice").iterdir()) == [
        "cgroup.subtree_control",
        "scope",
    ]


def test_a_group_is_made_in_ours_where_it_hands_memory_down(tree):
    (tree / "slice" / "scope" / "cgroup.subtree_control").write_text("memory\n")
    assert groups.find_parent() == str(tree / "slice" / "scope")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda tree, patch: (tree / "membership").write_text("4:memory:/a\n0::/\n"),
        lambda tree, patch: (tree / "membership").unlink(),
        lambda tree, patch: (tree / "cgroup.controllers").unlink(),  # version 1
        lambda tree, patch: (tree / "slice" / "cgroup.subtree_control").write_text("pids\n"),
        lambda tree, patch: patch.setattr(groups, "owner_of", lambda path: 12345),
        lambda tree, patch: patch.setattr(os, "geteuid", lambda: 0),  # may do all, shall not
    ],
    ids=["root", "unknown", "version 1", "not handed down", "another user's", "root's"],
)
def test_elsewhere_no_group_is_made(tree, monkeypatch, spoil):
    spoil(tree, monkeypatch)
    before = sorted(tree.rglob("*"))
    assert groups.find_parent() == ""
    with groups.control_group(1 << 20) as start:
        assert start == []
    assert sorted(tree.rglob("*")) == before


def test_a_group_that_cannot_be_entered_is_none(tree, monkeypatch):
    """Another session's group may be the user's own, and still out of reach."""
    monkeypatch.setattr(groups, "ENTER", "exit 1")
    assert groups.find_parent() == ""


def test_a_killed_scorers_group_is_removed_by_the_next(tree):
    left = tree / "slice" / "specsampling-sandbox-abcd_123"
    left.mkdir()
    os.chown(left, os.geteuid(), -1)
    with groups.control_group(1 << 20):
        assert not left.exists()
