"""Makes folders that last as long as their owner; a killed owner's folder is cleared by the next.

The owner holds a lock on its folder. The lock ends with the process, however the process ends.
The contents do not matter here.
"""

import fcntl
import functools
import glob
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

Remove = Callable[[str], object]


@contextmanager
def owned_folder(parent: str, name: str, remove: Remove) -> Iterator[str]:
    """Make a folder `name`-XXXXXXXX in `parent`, and remove it at the end.

    Folders of dead owners are removed first, once per process.
    """
    clear_ownerless(parent, name, remove)
    folder, holder = _make_locked(parent, name)
    try:
        yield folder
    finally:
        remove(folder)
        os.close(holder)


@functools.cache
def clear_ownerless(parent: str, name: str, remove: Remove) -> None:
    """Remove this user's folders that nobody has locked."""
    for path in glob.glob(f"{glob.escape(parent)}/{name}-{'[a-z0-9_]' * 8}"):
        with suppress(OSError):  # a link, another user's, locked, or gone
            holder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if os.fstat(holder).st_uid == os.geteuid():
                    fcntl.flock(holder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    remove(path)
            finally:
                os.close(holder)


def _make_locked(parent: str, name: str) -> tuple[str, int]:
    while True:
        folder = tempfile.mkdtemp(prefix=f"{name}-", dir=parent)
        holder = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        with suppress(OSError):  # on a file system without locks, nothing is cleared
            fcntl.flock(holder, fcntl.LOCK_EX)
        if os.path.exists(folder):  # nobody cleared it before it was locked
            return folder, holder
        os.close(holder)
