"""Files that are never half written, nor written by two: checks, locks, whole replacements.

Knows nothing of what stands in them.
"""

from __future__ import annotations

import io
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from specsampling.pointers import pointer_problem


class RecordsError(ValueError):
    """A file that cannot be read, written or resumed, in one line with the way out."""


def require_plain(path: Path) -> None:
    """Refuse an output that is no file, or that has a folder where its companions go."""
    if path.suffix != ".jsonl" or (is_there(path) and not path.is_file()):
        raise RecordsError(
            f"--output must be a file that ends in .jsonl (got {path}); "
            "for example Results/results.jsonl"
        )
    for companion in (path.with_suffix(".meta.json"), path.with_suffix(".scores.jsonl")):
        if companion.is_dir():
            raise RecordsError(
                f"{companion} must be a file beside the rows (got a folder); move it away, or "
                "choose another file with --output"
            )


def is_there(path: Path) -> bool:
    """Whether a path can be opened; an OSError where it could not be made either."""
    try:
        os.stat(path)
    except FileNotFoundError:
        return False
    return True


def require_writable_folder(path: Path) -> None:
    """Raise the OSError of writing into the folder of a file, which may still have to be made."""
    folder = Path(os.path.realpath(path)).parent
    while not is_there(folder):
        folder = folder.parent
    tempfile.TemporaryFile(dir=folder).close()  # `os.access` says yes to root everywhere


def lock_alone(path: Path, file: io.FileIO) -> None:
    """Lock a file that was just opened, and go to its start."""
    try:
        _lock(file)
    except (BlockingIOError, PermissionError):
        raise RecordsError(
            f"{path} is being written by another process; "
            "wait for it to end, or choose another file with --output"
        ) from None
    file.seek(0)


@contextmanager
def replaced(path: Path, text: str) -> Iterator[None]:
    """Write a whole file aside, and move it into place after the block.

    At any moment either the old or the new one is there, and the block runs only if the new one
    could be written.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        yield
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def replace_file(path: Path, text: str) -> None:
    """Write a whole file in one step."""
    with replaced(path, text):
        pass


@contextmanager
def one_line_errors(path: Path, done: str) -> Iterator[None]:
    """Say an OSError of the block as a RecordsError: which file could not be read or written."""
    try:
        yield
    except RecordsError:
        raise
    except (OSError, ValueError) as error:  # ValueError: NUL in a path
        problem = getattr(error, "strerror", None) or error
        raise RecordsError(
            f"{path} cannot be {done} ({problem}); "
            "check the path, your rights to it, and the space on the disk"
        ) from None


def read_file(path: Path) -> bytes:
    """A file's bytes, or a RecordsError in one line."""
    with one_line_errors(path, "read"):
        if problem := pointer_problem(path):
            raise RecordsError(problem)
        return path.read_bytes()


if sys.platform == "win32":
    import msvcrt

    def _lock(file: io.FileIO) -> None:
        """Lock a byte beyond any row, so that others can still read the rows."""
        file.seek(2**30)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def _lock(file: io.FileIO) -> None:
        """Lock the file; the system lets go of it when the process ends, however it ends."""
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
