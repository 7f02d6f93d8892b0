"""Looks at what a model's folder really holds, before transformers reads it.

transformers loads what it can and says little of the rest. A pointer of Git LFS is a text where a
file should be. A pickle may run code. An adapter changes the weights that lie beside it. A matrix
of 8-bit numbers means nothing without its scales. A tokenizer's class may replace the splits that
stand in `tokenizer.json`. Each of these cases is corrected here, or refused in one line.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.utils import get_session
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import cached_file

from specsampling.disk import pointer_problem, sampled_sha256
from specsampling.models.cache import cache_folder, made_once
from specsampling.models.errors import ModelError, say
from specsampling.models.fetch import HUB_SECONDS, no_answer

SAFE_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
PICKLED_WEIGHTS = ("pytorch_model.bin", "pytorch_model.bin.index.json")
SETTINGS = ("config.json", "generation_config.json")  # copied to a converted folder
ADAPTER = "adapter_config.json"
ADAPTER_WEIGHTS, PICKLED_ADAPTER = "adapter_model.safetensors", "adapter_model.bin"
MERGE = "merge it into its base with peft's merge_and_unload, or pip install peft"
MERGED_TOLERANCE = 1e-3  # the largest relative change of float32 logits
PROBE_TOKENS = 16
# Texts that two tokenizers usually encode differently: code, spaces, digits, other scripts.
PROBES = (
    "def add(a: int, b: int) -> int:\n    return a + b\n\n\nprint(add(12345, 67890))\n",
    "The quick brown fox doesn't jump over 3.14 lazy dogs; it's 2023-02-02, isn't it?",
    "\tif x != y:\n\t\t  return {'a': [1, 2], \"b\": None}  # trailing   \n\n\n",
    "x =  7\n    [\n        1,\n    22]  # a line break, blanks and a digit",
    "naïve café – „Grüße“ 東京 Привет \U0001f600 \u00a0end",
)
WIDE = ("F64", "F32", "F16", "BF16")  # safetensors' names of values that need no scales


def require_files(spec: str) -> None:
    """Refuse a spec that names nothing, an odd file, Git LFS pointers, or the folder of a GGUF."""
    path = Path(spec)
    is_gguf = path.suffix.lower() == ".gguf"
    if path.is_file() and not is_gguf:
        raise ModelError(
            f"cannot load model {spec}: it is a file, and a model is a folder or a .gguf file; "
            f"name the folder, {path.parent}"
        )
    is_no_hub_id = is_gguf or re.search(r"^[./~]|/.*/|[:\\]|/$", spec)
    if is_no_hub_id and not path.exists():
        raise ModelError(
            f"cannot load model {spec}: it is not there, seen from {Path.cwd()}; check the path, "
            "or give a hub id, which is owner/name"
        )
    files = sorted([*path.iterdir(), *path.glob("*/*")]) if path.is_dir() else [path]
    for file in files:
        if problem := pointer_problem(file):
            raise ModelError(problem)
    ggufs = [file for file in files if file.suffix.lower() == ".gguf"]
    if path.is_dir() and ggufs and not (path / "config.json").is_file():
        raise ModelError(f"{spec} is a folder with a GGUF file; name the file: {ggufs[0]}")


def file_of(location: str, name: str) -> Path | None:
    """Find a file of a folder or a hub id, fetched if needed. Returns None if there is none."""
    if Path(location).is_dir():
        path = Path(location) / name
        return path if path.is_file() else None
    kinds = ("gated_repo", "missing_entries", "connection_errors")
    quiet = {f"_raise_exceptions_for_{kind}": False for kind in kinds}
    found = cached_file(location, name, **quiet, **hub_options(location))
    return Path(found) if found else None


def weight_files(location: str, names: tuple[str, str]) -> list[Path]:
    """List the files of a folder's or a hub id's weights, in order; [] if it has none so named.

    The two names are those of one file that holds all weights, and of the index of several files. A
    ModelError says that the index cannot be read, or names a missing file.
    """
    whole, index = (file_of(location, name) for name in names)
    if whole or not index:
        return [whole] if whole else []
    try:
        parts = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        why = f"{index} is no index of weights ({error!r})"
        raise ModelError(f"{why}; download it again") from error
    files = {name: file_of(location, name) for name in parts}
    if missing := [name for name, file in files.items() if file is None]:
        raise ModelError(
            f"cannot load model {location}: {missing[0]} is missing, which {index.name} names "
            f"({len(missing)} of {len(files)} files are missing); download it again"
        )
    return [file for file in files.values() if file]


def hub_options(location: str) -> dict[str, Any]:
    """Return options of `from_pretrained`, so that a hub out of reach is asked only once."""
    return {} if Path(location).is_dir() or _hub_answers() else {"local_files_only": True}


@cache
def _hub_answers() -> bool:
    """Say whether the model hub answers. transformers alone would try each file six times."""
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
    except Exception as error:
        say(f"  {no_answer(error)}: its cache is used")
        return False
    return True


# --- pickles -----------------------------------------------------------------------------


def safe_location(location: str) -> str:
    """Return where a model has safetensors: for pickles, a folder of the cache.

    A ModelError says that a pickle holds more than tensors.
    """
    if any(file_of(location, name) for name in SAFE_WEIGHTS):
        config = file_of(location, "config.json") if hub_options(location) else None
        return str(config.parent) if config else location  # given an id, transformers asks the hub
    pickles = weight_files(location, PICKLED_WEIGHTS)
    if not pickles:
        return location
    settings = [file for name in SETTINGS if (file := file_of(location, name))]
    digest = sampled_sha256([*pickles, *settings])
    folder = cache_folder() / f"{Path(location).resolve().name}-safetensors-{digest[:12]}"
    with made_once(folder) as made:
        if made is not None:
            made.mkdir()
            _convert(pickles, settings, made)
    return str(folder)


def _convert(pickles: list[Path], settings: list[Path], folder: Path) -> None:
    """Write each pickle's tensors as safetensors, with an index, and copy the configuration."""
    weight_map: dict[str, str] = {}
    for number, part in enumerate(pickles, 1):
        name = f"model-{number:05}-of-{len(pickles):05}.safetensors"
        # Tensors that share memory are written apart: loading ties them again.
        tensors = {key: value.clone().contiguous() for key, value in _unpickled(part).items()}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / SAFE_WEIGHTS[1]).write_text(json.dumps(index))
    for file in settings:
        shutil.copy(file, folder / file.name)


def _unpickled(file: Path) -> dict[str, Tensor]:
    """Read a pickle's tensors without running its code. Refuse a pickle of anything else."""
    try:
        try:
            held = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files of before torch 1.6 cannot be mapped
            held = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        called = re.search(r"GLOBAL (\S+)", str(error))
        why = f"it calls {called[1]}" if called else str(error).splitlines()[0]
        raise ModelError(
            f"cannot read {file}: it needs more than tensors ({why}), and a pickle's code is not "
            "run here; save the model again with save_pretrained, which writes safetensors"
        ) from error
    named = held if isinstance(held, dict) else {}
    others = [] if named else [f"a {type(held).__name__} without tensors"]
    others += [
        f"{key!r}, a {type(value).__name__}"
        for key, value in named.items()
        if not (isinstance(key, str) and _is_plain_tensor(value))
    ]
    if others:
        raise ModelError(
            f"cannot read {file}: it must hold tensors by name and nothing else (it holds "
            f"{others[0]}); save the model again with save_pretrained, which writes safetensors"
        )
    return dict(held)


def _is_plain_tensor(value: Any) -> bool:
    is_strided = isinstance(value, Tensor) and value.layout == torch.strided
    return is_strided and not (value.is_quantized or value.is_nested or value.is_meta)


# --- 8-bit numbers -----------------------------------------------------------------------


def stored_quantization(location: str) -> dict[str, Any] | None:
    """Return the `quantization_config` of a model's configuration, if it has one."""
    config = file_of(location, "config.json")
    return json.loads(config.read_text()).get("quantization_config") if config else None


def require_wide(location: str, unexpected: set[str], spec: str) -> None:
    """Refuse matrices of 8-bit numbers, whose scales no quantiser would apply.

    `unexpected` names the stored tensors that the model did not take.
    """
    for path in weight_files(location, SAFE_WEIGHTS):
        with safe_open(path, framework="pt") as file:
            for name in sorted(set(file.keys()) - unexpected):
                part = file.get_slice(name)
                is_matrix = name.endswith(".weight") or len(part.get_shape()) in (2, 3)
                if is_matrix and (kind := part.get_dtype()) not in WIDE:
                    raise ModelError(
                        f"cannot load model {spec}: {name} is stored as {kind}, and config.json "
                        "has no quantization_config that transformers can read, which says what "
                        "its scales are; put it back, or choose the model's 16-bit weights"
                    )


# --- adapters ----------------------------------------------------------------------------


def base_of_adapter(location: str) -> str | None:
    """Return where the base of an adapter is; None if there is no adapter.

    As in transformers and peft, the base is the folder itself if it holds weights, else what
    `base_model_name_or_path` names. An adapter is refused if its base is missing.
    """
    config = file_of(location, ADAPTER)
    if config is None:
        return None
    if any(file_of(location, name) for name in (*SAFE_WEIGHTS, *PICKLED_WEIGHTS)):
        return location
    base = json.loads(config.read_text()).get("base_model_name_or_path")
    if not base:
        raise ModelError(
            f"{location} is an adapter, and its {ADAPTER} names no base_model_name_or_path; "
            f"name one there, or {MERGE}"
        )
    try:
        require_files(base)
    except ModelError as error:
        raise ModelError(f"{location} is an adapter of another model: {error}") from None
    if file_of(base, "config.json") is None:
        raise ModelError(
            f"{location} is an adapter of {base}, which cannot be found; mend "
            f"base_model_name_or_path in its {ADAPTER}, or {MERGE}"
        )
    return str(base)


@contextmanager
def without_adapter(location: str) -> Iterator[str]:
    """Yield the same folder without its adapter, which transformers would apply."""
    if file_of(location, ADAPTER) is None:
        yield location
        return
    folder = location if Path(location).is_dir() else snapshot_download(location)
    with tempfile.TemporaryDirectory() as scratch:
        for file in Path(folder).iterdir():
            if file.is_file() and not file.name.startswith("adapter_"):
                os.symlink(file.resolve(), Path(scratch) / file.name)
        yield scratch


def merge_adapter(base: PreTrainedModel, location: str, spec: str) -> PreTrainedModel:
    """Add an adapter to its base's weights, in the base's precision.

    A ModelError says that peft is missing, or that the adapter does not fit its base or gives other
    logits once it is merged.
    """
    try:
        import peft
    except ImportError as error:
        raise ModelError(
            f"{spec} is an adapter ({ADAPTER}), which peft applies; {MERGE}"
        ) from error
    stored = file_of(location, ADAPTER_WEIGHTS) or file_of(location, PICKLED_ADAPTER)
    if stored is None:
        raise ModelError(f"{spec} is an adapter without {ADAPTER_WEIGHTS}; download it again")
    begins = str(json.loads((stored.parent / ADAPTER).read_text()).get("init_lora_weights"))
    if begins.startswith("pissa_niter"):
        raise ModelError(
            f"{spec} is an adapter whose base peft changes at random as it is loaded "
            f"(init_lora_weights {begins}); convert it with peft's "
            "path_initial_model_for_weight_conversion"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted: Any = peft.PeftModel.from_pretrained(base, str(stored.parent))
            _require_all_taken(adapted, stored, spec)
            before = _probe(adapted)
            merged = adapted.merge_and_unload(safe_merge=True)
    except ModelError:
        raise
    except Exception as error:  # peft may fail in any way
        line = " ".join(str(error).split())[:200]
        raise ModelError(
            f"the adapter {spec} cannot be merged into {base.config.name_or_path or 'its base'} "
            f"({line}); merge it with the tools that made it"
        ) from error
    if not (_probe(merged) - before).norm() < MERGED_TOLERANCE * before.norm():
        raise ModelError(
            f"the adapter {spec} gives other logits once it is merged, as where embedding and "
            "head share their weights; merge it with the tools that made it"
        )
    return merged


def _require_all_taken(adapted: Any, stored: Path, spec: str) -> None:
    """Refuse an adapter that has tensors without a place in its base, or lacks needed ones."""
    import peft

    names = set(load_file(stored) if stored.name == ADAPTER_WEIGHTS else _unpickled(stored))
    needed = set(peft.get_peft_model_state_dict(adapted, save_embedding_layers=False))
    known = needed | set(peft.get_peft_model_state_dict(adapted, save_embedding_layers=True))
    if lost := (names - known) | (needed - names):
        raise ModelError(
            f"cannot load the adapter {spec}: {len(lost)} of its tensors do not belong to its "
            f"base ({sorted(lost)[0]}); name its own base in {ADAPTER}"
        )


def _probe(model: Any) -> Tensor:
    """Compute a model's logits of a few fixed tokens."""
    tokens = torch.arange(PROBE_TOKENS)[None] % model.config.vocab_size
    with torch.inference_mode():
        return model.eval()(input_ids=tokens, use_cache=False).logits


# --- tokenizers --------------------------------------------------------------------------


def read_tokenizer_file(location: str) -> PreTrainedTokenizerBase | None:
    """Read the tokenizer of a folder's or hub id's `tokenizer.json`; None without such a file.

    The special tokens, the chat template and the tokens around a text are those of
    `tokenizer_config.json`. The class that it names may have its own splits, so it is not used. A
    ModelError says that one of `PROBES` is encoded otherwise than the file says.
    """
    path = file_of(location, "tokenizer.json")
    if path is None:
        return None
    tokenizer = PreTrainedTokenizerFast.from_pretrained(location, **hub_options(location))
    backend, written = tokenizer.backend_tokenizer, Tokenizer.from_file(str(path))
    for part in ("normalizer", "pre_tokenizer"):  # options of tokenizer_config.json change them
        setattr(backend, part, getattr(written, part))
    for one in (backend, written):
        one.no_truncation()
        one.no_padding()
    for probe in PROBES:
        ours, theirs = (one.encode(probe, add_special_tokens=False) for one in (backend, written))
        if ours.ids != theirs.ids:
            raise ModelError(
                f"the tokenizer of {location} encodes {probe[:24]!r} otherwise than its "
                "tokenizer.json says, by tokens that its tokenizer_config.json adds; download it "
                "again, or set models.tokenizer"
            )
    if tokenizer.eos_token is None:  # no file names the ends of texts: the tokenizer's class may
        with suppress(Exception):  # the class may bring its own code, which is not run
            named = AutoTokenizer.from_pretrained(
                location, trust_remote_code=False, **hub_options(location)
            )
            for name in ("bos_token", "eos_token"):
                token = getattr(named, name)
                if getattr(tokenizer, name) is None and token in tokenizer.get_vocab():
                    setattr(tokenizer, name, token)
    return tokenizer
