"""Compiles the C files of this folder, once for each processor, into one of the user's folders.

It uses the system's compiler, or else the compiler in the package `ziglang`. This module knows no
models.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import secrets
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

SOURCES = ("step.c", "pack.c", "race.c")
HEADERS = ("vectors.h", "linear.h")
# If products were contracted, two copies of one loop could round differently.
FLAGS = ("-std=gnu11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
NATIVE = ("-march=native",)
FLAGS_VARIABLE = "SPECSAMPLING_KERNEL_FLAGS"  # replaces NATIVE, to test other processors
SYSTEMS = ("linux", "darwin")
ARITHMETIC = 2  # rises with each change of a row's bits, so that no run mixes two of them
SECONDS = 300  # the most that a compiler may take


class KernelError(Exception):
    """The error, in one line, for a machine on which the kernel cannot be used."""


def find_compiler() -> list[str]:
    """Find the command of a C compiler.

    Raises:
        KernelError: there is no compiler, or `CC` names none.
    """
    if named := os.environ.get("CC", "").split():
        if not shutil.which(named[0]):
            raise KernelError(f"CC must name a C compiler (got {named[0]}); correct or unset it")
        return named
    for command in ("cc", "gcc", "clang"):
        if shutil.which(command):
            return [command]
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "cc", "-fno-sanitize=undefined"]
    raise KernelError('there is no C compiler; install gcc, or pip install "specsampling[kernel]"')


def build(folder: Path) -> Path:
    """Find the shared library for this processor, or compile it.

    The library's name ends with its hash, so a damaged file is noticed and compiled again.

    Args:
        folder: where the libraries are kept.

    Raises:
        KernelError: the system has no POSIX threads, or the compiler is missing or fails.
        OSError: the folder cannot be written.
    """
    if sys.platform not in SYSTEMS:
        raise KernelError(f"the kernel needs Linux or macOS (got {sys.platform})")
    chosen = os.environ.get(FLAGS_VARIABLE)
    flags = [*FLAGS, *(NATIVE if chosen is None else chosen.split())]
    source_folder = Path(__file__).parent
    key = hashlib.sha256()
    for name in (*SOURCES, *HEADERS):
        key.update((source_folder / name).read_bytes())
    key.update(repr((flags, processor())).encode())
    name = f"step-{key.hexdigest()[:16]}"
    for existing in folder.glob(f"{name}-*.so"):
        with suppress(FileNotFoundError):  # another process has removed it
            if existing.stem == f"{name}-{digest_of(existing)}":
                return existing
            existing.unlink()  # it was cut off by a full disk or a crash
    compiler = find_compiler()
    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder / f"{name}.{os.getpid()}-{secrets.token_hex(4)}.making"
    command = [*compiler, *flags, "-shared", "-fPIC", "-o", str(scratch)]
    command += [*(str(source_folder / name) for name in SOURCES), "-lpthread", "-lm"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        if run.returncode:
            said = (run.stderr.strip() or f"exit code {run.returncode}").splitlines()
            problem = next((line for line in said if "error" in line), said[0])
            raise KernelError(f"{' '.join(compiler)} cannot compile the kernel: {problem}")
        library = folder / f"{name}-{digest_of(scratch)}.so"
        scratch.rename(library)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelError(f"{' '.join(compiler)} cannot compile the kernel: {error}") from error
    finally:
        scratch.unlink(missing_ok=True)
    return library


def digest_of(path: Path) -> str:
    """Return the beginning of a file's hash."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def processor() -> str:
    """Describe this processor by its name and features, whatever the number of its cores."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    kept = ("model name", "flags", "Features")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(kept)))
