"""Where a model's files are: an embedded pair, a hub id, a local folder, a `.gguf` file.

What reads them is transformers, kept quiet: its reports are read by `checkpoint`, its bars
would come between the scripts' own lines. Nothing here runs code that a checkpoint brings.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from specsampling.models.distilled import assemble
from specsampling.models.embedded import embedded_folder

EMBEDDED = "embedded:"
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
    """A spec's configuration; a GGUF file has none apart."""
    with quiet_transformers():
        return AutoConfig.from_pretrained(model_location(spec), **SAFE)


def read_model(spec: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    """A spec's model and transformers' report of what it found; safetensors or GGUF only."""
    if is_gguf(spec):
        return _read_gguf(Path(spec))
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


def _read_gguf(path: Path) -> tuple[Any, dict[str, Any]]:
    """A `.gguf` file as a float32 model (transformers dequantises it)."""
    with quiet_transformers():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, output_loading_info=True, **SAFE
        )
    model, report = loaded
    # Dequantised, it is an ordinary model: without this mark it can be cast and saved.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model, report


def _gguf_to_folder(gguf: Path, folder: Path) -> None:
    """Keep the GGUF's exact values, in float32: other precisions are cast from it."""
    model, _ = read_model(str(gguf))
    model.save_pretrained(folder)
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
