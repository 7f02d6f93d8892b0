"""Checks, locks and replaces files, so that none is half written or written by two processes.

This module knows nothing about what the files hold.
"""

from __future__ import annotations

import fcntl
import io
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from specsampling.disk import pointer_problem, sync

UNFINISHED = ".unfinished"  # ends the name of a file until it is whole


class RecordsError(ValueError):
    """A failure to read, write or resume a file, in one line with the way out."""


def require_plain(path: Path) -> None:
    """Refuse an output that is no file, or whose companion files would replace a folder."""
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
    """Tell whether a path exists; raise an OSError if it could not even be made."""
    try:
        os.stat(path)
    except FileNotFoundError:
        return False
    return True


def require_writable_folder(path: Path) -> None:
    """Raise an OSError if a file's folder, or the first that exists above, takes no files."""
    folder = Path(os.path.realpath(path)).parent
    while not is_there(folder):
        folder = folder.parent
    tempfile.TemporaryFile(dir=folder).close()  # `os.access` allows root everything


def open_alone(path: Path, mode: str = "a+") -> io.FileIO:
    """Open a file at its start, for this process alone, or raise a RecordsError.

    Another process may put a new file at the path before the lock is taken. The lock would then
    be on a file that nobody sees any more, so the new file is opened instead.
    """
    while True:
        with ExitStack() as unless_kept:
            file = unless_kept.enter_context(io.FileIO(path, mode))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                raise RecordsError(
                    f"{path} is being written by another process; "
                    "wait for it to end, or choose another file with --output"
                ) from None
            with suppress(FileNotFoundError):
                if os.path.samestat(os.stat(path), os.fstat(file.fileno())):
                    file.seek(0)
                    unless_kept.pop_all()
                    return file


def state_of(file: Path | int) -> tuple[int, int, int, int] | None:
    """Return a file's device, number, size and time of writing; None if there is no file."""
    try:
        found = os.stat(file)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


@contextmanager
def replaced(path: Path, data: bytes) -> Iterator[io.FileIO]:
    """Write a whole file under another name, and move it into place after the block.

    At any moment either the old or the new file is at the path. The block runs only if the new file
    could be written. If the path is a link, the link stays, and its file is replaced. The new file
    is locked before others can see it. It is yielded, and stays open if the block ends well.
    """
    path = Path(os.path.realpath(path))
    scratch = scratch_path(path)
    _require_own(scratch)
    file = open_alone(scratch)
    try:
        file.truncate(0)
        write_all(file, data)
        os.fsync(file.fileno())
        yield file
        scratch.replace(path)
        sync(path.parent)
    except BaseException:
        file.close()
        scratch.unlink(missing_ok=True)
        raise


def replace_file(path: Path, data: bytes) -> None:
    """Replace a whole file in one step."""
    with replaced(path, data) as file:
        pass
    file.close()


def write_all(file: io.FileIO, data: bytes) -> None:
    """Write all of the data, even if the system takes it in parts."""
    while data:
        data = data[file.write(data) :]


def end_at(file: io.FileIO, num_bytes: int) -> None:
    """Cut the file to `num_bytes`, or add the newline that its last line lacks."""
    if num_bytes <= file.seek(0, os.SEEK_END):
        file.truncate(num_bytes)
    else:
        write_all(file, b"\n")


def scratch_path(path: Path) -> Path:
    """Name the file that is written until it is whole."""
    return path.with_name(path.name + UNFINISHED)


def clear_scratch(path: Path) -> None:
    """Delete the unfinished file that a killed process has left behind."""
    scratch = scratch_path(Path(os.path.realpath(path)))
    with suppress(FileNotFoundError, RecordsError):  # another process is writing it
        _require_own(scratch)
        with open_alone(scratch, "r+"):
            scratch.unlink()


def _require_own(scratch: Path) -> None:
    """Refuse to replace a file that is not ours. Our files begin with a JSON object."""
    with suppress(FileNotFoundError), scratch.open("rb") as file:
        if file.read(1) not in (b"", b"{"):
            raise RecordsError(
                f"{scratch} must be a file of this program, because it is replaced (got another "
                "file); move it, or choose another file with --output"
            )


@contextmanager
def one_line_errors(path: Path, done: str) -> Iterator[None]:
    """Turn an OSError of the block into a RecordsError: the file could not be read or written."""
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
    """Read a file's bytes, or raise a RecordsError."""
    with one_line_errors(path, "read"):
        if problem := pointer_problem(path):
            raise RecordsError(problem)
        return path.read_bytes()
