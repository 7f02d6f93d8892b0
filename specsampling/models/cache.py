"""The cache of models that were fetched or converted: a damaged folder in it is made anew.

A model's folder holds a manifest with the sizes and hashes of its files. Sizes are compared at
each start. Hashes are compared at the first start after the machine was booted, and if a file was
written since they last agreed. A folder that does not agree is reported and made anew.

This module knows nothing of torch, nor of what the files hold.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from specsampling.disk import sha256_of, sync
from specsampling.models.errors import ModelError, is_out_of_memory, model_error, say
from specsampling.models.memory import gigabytes

CACHE_VARIABLE = "SPECSAMPLING_CACHE"
MANIFEST = "manifest.json"  # each file's size and hash
VERIFIED = "verified.json"  # when sizes and hashes last agreed
SCRATCH = ".making"  # ends the name of a folder that is being made
LOCK_SECONDS = 5  # the wait for a lock before its file is checked
BOOT_SECONDS = 60  # a boot time that differs by less is the same boot: clocks are set


def cache_folder() -> Path:
    """Return the folder of kept models: $SPECSAMPLING_CACHE, or one in the user's cache.

    A user without a home folder gets a ModelError.
    """
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen)
    is_mac = sys.platform == "darwin"
    if not is_mac and (base := os.environ.get("XDG_CACHE_HOME")):
        return Path(base, "specsampling")
    try:
        return Path.home() / ("Library/Caches" if is_mac else ".cache") / "specsampling"
    except RuntimeError as error:  # no HOME, and an account without a folder of its own
        raise ModelError(
            "models that are fetched or converted are kept in a folder, and this user has no home; "
            f"set {CACHE_VARIABLE} to a folder"
        ) from error


def forget_verified() -> None:
    """Have the hashes of every cached model compared when it is next used (`--verify-cache`)."""
    for mark in cache_folder().glob(f"*/{VERIFIED}"):
        mark.unlink(missing_ok=True)


@contextmanager
def made_once(folder: Path) -> Iterator[Path | None]:
    """Yield where to make a folder of the cache, or None if the folder is whole.

    The folder is made aside and then moved into place. So a killed process leaves no half-made
    folder, and the next process clears its scratch files. A second process waits. A ModelError says
    that the cache cannot be written.
    """
    if not problem_of(folder):
        yield None
        return
    scratch = folder.with_name(folder.name + SCRATCH)
    with _one_line(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            if not (problem := problem_of(folder)):  # another process has made it
                yield None
                return
            if folder.exists():
                say(f"{folder} is damaged ({problem}): it is made anew ...")
            shutil.rmtree(scratch, ignore_errors=True)  # a killed process may have left it
            try:
                scratch.mkdir()
                made = scratch / "folder"
                yield made
                _publish(made, folder)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)


def problem_of(folder: Path) -> str:
    """Say what keeps a cached folder from being used; "" if it is whole."""
    if not folder.is_dir():
        return "it is not there"
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        expected = {name: (int(size), str(digest)) for name, (size, digest) in manifest.items()}
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"its {MANIFEST} cannot be read: {error}"
    written = {}
    for name, (size, _) in expected.items():
        try:
            found = (folder / name).stat()
        except OSError:
            return f"{name} is missing"
        if found.st_size != size:
            return f"{name} has {found.st_size} bytes, and had {size}"
        written[name] = found.st_mtime_ns
    if _is_verified(folder, written):
        return ""
    total = sum(size for size, _ in expected.values())
    say(f"  verifying {folder.name} ({gigabytes(total)}) ...")
    for name, (_, digest) in expected.items():
        try:
            found_digest = sha256_of(folder / name)
        except OSError as error:
            return f"{name} cannot be read: {error}"
        if found_digest != digest:
            return f"{name} has another hash than when it was made"
    _mark_verified(folder, written)
    return ""


def _is_verified(folder: Path, written: dict[str, int]) -> bool:
    """Say whether the hashes agreed since the last boot, and no file was written since."""
    try:
        mark: Any = json.loads((folder / VERIFIED).read_bytes())
        return abs(mark["boot"] - psutil.boot_time()) < BOOT_SECONDS and mark["written"] == written
    except (OSError, ValueError, TypeError, LookupError):
        return False


def _mark_verified(folder: Path, written: dict[str, int]) -> None:
    """Note that the hashes agree. If the note is missing or torn, the next start compares again."""
    note = {"boot": psutil.boot_time(), "written": written}
    with suppress(OSError):  # the cache may not be writable
        (folder / VERIFIED).write_text(json.dumps(note))


def _publish(made: Path, folder: Path) -> None:
    """Write the manifest of a folder that was made, and put the folder into its place.

    If a damaged folder is in its place, the files in it are replaced one by one, and the manifest
    last. A user's own files in it stay.
    """
    for name in (MANIFEST, VERIFIED):  # they may be copies from another folder of the cache
        (made / name).unlink(missing_ok=True)
    files = sorted(path for path in made.rglob("*") if path.is_file())
    names = [path.relative_to(made).as_posix() for path in files]
    manifest = {n: [path.stat().st_size, sha256_of(path)] for n, path in zip(names, files)}
    (made / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    for path in (*files, made / MANIFEST, made):
        sync(path)
    if folder.exists():
        for name in (MANIFEST, VERIFIED):
            (folder / name).unlink(missing_ok=True)
        for name in (*names, MANIFEST):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (made / name).replace(folder / name)
        sync(folder)
    else:
        made.rename(folder)
    sync(folder.parent)
    _mark_verified(folder, {name: (folder / name).stat().st_mtime_ns for name in names})


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes from making the folder meanwhile."""
    path = folder.with_name(folder.name + ".lock")
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        if path.exists():
            say(f"Another process is making {folder}: waiting for it ...")
        try:
            lock.acquire(timeout=LOCK_SECONDS)
        except Timeout:
            path.open("r+").close()  # fails if the lock cannot be made at all
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _one_line(cache: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        place = error.filename if isinstance(error.filename, str) else ""
        is_elsewhere = place and not Path(place).absolute().is_relative_to(cache.absolute())
        if is_elsewhere and not is_out_of_memory(error):
            way_out = "see that it is there, and that you may use it"
            raise model_error(f"cannot use {place}", error, way_out) from error
        if error.errno is None:  # an error of a library, of the network for example
            raise
        way_out = f"set {CACHE_VARIABLE} to a folder that can be written, with room for the models"
        raise model_error(f"cannot write the model cache {cache}", error, way_out) from error
