"""Where a model's files are: an embedded pair, a hub id, a local folder, a `.gguf` file.

What reads them is transformers, kept quiet: its bars would come between the scripts' own lines,
and its report of what it did not find is read here, since it puts random numbers there. Nothing
here runs code that a checkpoint brings.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from specsampling.models.distilled import assemble
from specsampling.models.embedded import embedded_folder
from specsampling.models.errors import ModelError

EMBEDDED = "embedded:"
SHARD_SIZE = "256MB"
SAFE = {"trust_remote_code": False}  # else a checkpoint's own code is asked for on stdin


def model_location(spec: str) -> str:
    """What `from_pretrained` takes: a local folder or a hub id.

    The folder of an embedded model is an ordinary Hugging Face folder, made at the first call;
    other tools can load it.

    Raises:
        ModelError: the embedded model is unknown or cannot be had.
    """
    if spec.startswith(EMBEDDED):
        return str(embedded_folder(spec.removeprefix(EMBEDDED), _gguf_to_folder, assemble))
    return spec


def is_gguf(spec: str) -> bool:
    return spec.endswith(".gguf")


def read_tokenizer(spec: str) -> PreTrainedTokenizerBase:
    """A spec's tokenizer, as transformers reads it."""
    with quiet_transformers():
        if is_gguf(spec):
            path = Path(spec)
            return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, **SAFE)
        return AutoTokenizer.from_pretrained(model_location(spec), **SAFE)


def read_config(spec: str) -> PreTrainedConfig:
    """A spec's configuration."""
    with quiet_transformers():
        if is_gguf(spec):
            path = Path(spec)
            return AutoConfig.from_pretrained(path.parent, gguf_file=path.name, **SAFE)
        return AutoConfig.from_pretrained(model_location(spec), **SAFE)


def read_model(spec: str, **options: Any) -> Any:
    """A spec's model, every tensor of it from the checkpoint; safetensors or GGUF only.

    Raises:
        ModelError: the checkpoint lacks tensors, or has others than its configuration says.
    """
    model, report = (
        _read_gguf(Path(spec), **options) if is_gguf(spec) else _read_folder(spec, options)
    )
    _require_whole(model, report, spec)
    return model


def _read_folder(spec: str, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A folder's or a hub id's model, and transformers' report of what it found."""
    location = model_location(spec)
    with quiet_transformers():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            location,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are in the report, by name
            output_loading_info=True,
            **SAFE,
            **options,
        )
    return loaded


def _read_gguf(path: Path, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """A `.gguf` file as an ordinary model: transformers dequantises it, and rounds."""
    with quiet_transformers():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=dtype, output_loading_info=True, **SAFE
        )
    model, report = loaded
    # Dequantised, it is an ordinary model: without this mark it can be cast and saved.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model, report


def _require_whole(model: PreTrainedModel, report: dict[str, Any], spec: str) -> None:
    """Refuse a checkpoint that leaves a tensor to chance, or holds one that has no place.

    Raises:
        ModelError: tensors are missing, have another shape, or belong to layers or parts of
            layers that the configuration does not have.
    """
    mismatched = [f"{name} {tuple(was)}" for name, was, *_ in report["mismatched_keys"]]
    homeless = [name for name in report["unexpected_keys"] if _has_a_place_beside(model, name)]
    for names, problem in (
        (report["missing_keys"], "lacks tensors that the model needs"),
        (mismatched, "has tensors of another shape than its config.json says"),
        (homeless, "has tensors that its config.json leaves out"),
    ):
        if names:
            shown = ", ".join(sorted(names)[:3]) + (" ..." if len(names) > 3 else "")
            raise ModelError(
                f"cannot load model {spec}: it {problem} ({len(names)}: {shown}); "
                "download or convert it again"
            )


def _has_a_place_beside(model: PreTrainedModel, name: str) -> bool:
    """Whether a tensor that the model does not know would be part of a layer that it does know.

    A bias of a layer without one, or one more layer in a list of layers, changes what the model
    computes. A vision tower or a saved buffer does not.
    """
    if not name.endswith((".weight", ".bias")):
        return False
    owner, _, _ = name.rpartition(".")
    modules = dict(model.named_modules())
    if owner in modules:
        return isinstance(getattr(modules[owner], "weight", None), torch.nn.Parameter)
    return re.sub(r"\.\d+\.", ".0.", owner) in modules


def _gguf_to_folder(gguf: Path, folder: Path) -> None:
    """Keep a GGUF file's values in bfloat16, which is quickly read, in many small files.

    Loading maps a file into memory until the last of its layers has been packed, so small files
    keep its peak low.
    """
    model = read_model(str(gguf), dtype=torch.bfloat16)
    with quiet_transformers():
        model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
    read_tokenizer(str(gguf)).save_pretrained(folder)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide transformers' load reports and bars for a moment."""
    verbosity = transformers_logging.get_verbosity()
    has_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if has_bars:
            transformers_logging.enable_progress_bar()


def reason(error: BaseException) -> str:
    """An exception in one line, with its type where the text alone says little."""
    line = (str(error).strip().splitlines() or [""])[0].rstrip(".")[:300]
    if line and isinstance(error, (OSError, ValueError, ImportError, RuntimeError)):
        return line
    return f"{type(error).__name__}: {line}".removesuffix(": ")
