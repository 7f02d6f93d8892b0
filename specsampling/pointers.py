"""Tells pointers of Git LFS from files: what a clone without git-lfs leaves in their place.

Knows nothing of what the files hold.
"""

from __future__ import annotations

from pathlib import Path

BEGINNING = b"version https://git-lfs.github.com/spec/"
MOST_BYTES = 1024  # no pointer is longer


def pointer_problem(path: Path) -> str:
    """What is wrong with a pointer in place of a file, and the way out; "" for a file."""
    if not path.is_file() or path.stat().st_size > MOST_BYTES:
        return ""
    with path.open("rb") as file:
        if file.read(len(BEGINNING)) != BEGINNING:
            return ""
    return f"{path} is a Git LFS pointer, not the file itself; fetch it with: git lfs pull"
