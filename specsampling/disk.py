"""Checks files on a disk: whether they are real, unchanged and written for good."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

POINTER = b"version https://git-lfs.github.com/spec/"
MOST_POINTER_BYTES = 1024
BLOCK = 1 << 20
STEP, SAMPLE = 16 << 20, 1 << 12  # of a large file, SAMPLE bytes are read in every STEP bytes
LENGTH_BYTES = 8  # a safetensors file begins with its header's length, in so many bytes
MOST_HEADER_BYTES = 16 << 20


def pointer_problem(path: Path) -> str:
    """Say that a path holds a Git LFS pointer instead of its file; "" for a real file.

    A clone without git-lfs has a pointer in place of each large file.
    """
    if not path.is_file() or path.stat().st_size > MOST_POINTER_BYTES:
        return ""
    if not path.read_bytes().startswith(POINTER):
        return ""
    return f"{path} is a Git LFS pointer, not the file itself; fetch it with: git lfs pull"


def sha256_of(path: Path) -> str:
    """Return a file's hash in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def sampled_sha256(paths: Iterable[Path]) -> str:
    """Return one hash of several files: names, sizes, small files whole, and parts of large files.

    The parts are evenly spaced. A safetensors file adds its header and each tensor's beginning.
    Reading all of a large checkpoint would take longer than loading it.
    """
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            if size <= BLOCK:
                digest.update(file.read())
                continue
            starts = {*range(0, size, STEP), size - SAMPLE}
            if path.suffix == ".safetensors":
                header, tensors = _safetensors_header(file)
                digest.update(header)
                starts |= tensors
            for start in sorted(starts):
                file.seek(start)
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()


def _safetensors_header(file: BinaryIO) -> tuple[bytes, set[int]]:
    """Return a file's header, and where its tensors begin if the header can be read."""
    length = int.from_bytes(file.read(LENGTH_BYTES), "little")
    header = file.read(min(length, MOST_HEADER_BYTES))
    try:
        entries = json.loads(header)
        begins = [int(entry["data_offsets"][0]) for entry in entries.values() if "dtype" in entry]
        return header, {LENGTH_BYTES + length + begin for begin in begins if begin >= 0}
    except (ValueError, TypeError, AttributeError, LookupError):
        return header, set()


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk; do nothing on an OSError."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
