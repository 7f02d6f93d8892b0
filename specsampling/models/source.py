"""Finds and reads a model's files: an embedded pair, a hub id, a local folder, a `.gguf` file.

transformers reads the files without its bars, which would come between the scripts' own lines. If a
tensor is missing, transformers makes it of random numbers, so this module reads its report. No code
that a checkpoint brings is run.
"""

from __future__ import annotations

import contextlib
import hashlib
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
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils import logging as transformers_logging

from specsampling.disk import sampled_sha256
from specsampling.models import folder as folders
from specsampling.models.distilled import assemble
from specsampling.models.embedded import embedded_folder
from specsampling.models.errors import ModelError
from specsampling.models.gguf_file import open_gguf
from specsampling.models.gguf_model import gguf_config, gguf_model
from specsampling.models.gguf_tokenizer import gguf_tokenizer

EMBEDDED = "embedded:"
SHARD_SIZE = "256MB"
READ_FILES = (".safetensors", ".json", ".model", ".txt", ".jinja")  # what a folder's digest covers
DIGEST_LETTERS = 16
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")
# Ends of names of buffers that some checkpoints hold although models compute them.
SAVED_BUFFERS = (
    *(".inv_freq", ".cos_cached", ".sin_cached", ".position_ids"),
    *(".masked_bias", ".attn.bias", ".attention.bias"),
)
SAFE = {"trust_remote_code": False}  # else transformers asks on stdin whether to run code


def model_location(spec: str) -> str:
    """Return what `from_pretrained` takes: a local folder or a hub id, or raise a ModelError.

    An embedded model's folder is an ordinary Hugging Face folder, made at the first call.
    """
    if spec.startswith(EMBEDDED):
        return str(embedded_folder(spec.removeprefix(EMBEDDED), _gguf_to_folder, assemble))
    folders.require_files(spec)
    return spec


def digest_of(spec: str) -> str:
    """Tell a model's or tokenizer's files from other files of the same names.

    An embedded model has the name of its cached folder, a hub id the commit, and a folder or a GGUF
    file a hash. An adapter's digest includes that of its base. A file that cannot be read is an
    OSError.
    """
    location = model_location(spec)
    if spec.startswith(EMBEDDED):
        return Path(location).name
    if is_gguf(spec):
        return sampled_sha256([Path(spec)])[:DIGEST_LETTERS]
    base = folders.base_of_adapter(location)
    behind = "" if base in (None, location) else f" on {digest_of(str(base))}"
    if not Path(location).is_dir():
        config = folders.file_of(location, folders.ADAPTER) or folders.file_of(
            location, "config.json"
        )
        return f"{config.parent.name if config else ''}{behind}"
    files = sorted(path for path in Path(location).iterdir() if path.is_file())
    has_safe = any(path.name in folders.SAFE_WEIGHTS for path in files)
    read = [p for p in files if p.suffix in READ_FILES or (p.suffix == ".bin" and not has_safe)]
    return sampled_sha256(read)[:DIGEST_LETTERS] + behind


def is_gguf(spec: str) -> bool:
    return spec.lower().endswith(".gguf") and not Path(spec).is_dir()


def read_tokenizer(spec: str) -> PreTrainedTokenizerBase:
    """Read a spec's tokenizer: a GGUF file's, `tokenizer.json`'s, or what transformers makes."""
    location = model_location(spec)
    with quiet_transformers():
        if is_gguf(spec):
            return gguf_tokenizer(Path(spec))
        if not any(folders.file_of(location, name) for name in TOKENIZER_FILES):
            location = folders.base_of_adapter(location) or location
        tokenizer = folders.read_tokenizer_file(location)
        return tokenizer or AutoTokenizer.from_pretrained(
            location, **SAFE, **folders.hub_options(location)
        )


def read_config(spec: str) -> PreTrainedConfig:
    """Read a spec's configuration."""
    location = model_location(spec)
    with quiet_transformers():
        if is_gguf(spec):
            return gguf_config(open_gguf(Path(spec)))
        location = folders.base_of_adapter(location) or location
        return AutoConfig.from_pretrained(location, **SAFE, **folders.hub_options(location))


def read_model(spec: str, **options: Any) -> Any:
    """Read a spec's model, with every tensor from the checkpoint and any adapter merged in.

    The options are those of `from_pretrained`; a GGUF file takes `dtype` alone. A ModelError says
    that the checkpoint lacks tensors, or has others than its configuration says.
    """
    location = model_location(spec)
    if is_gguf(spec):
        with quiet_transformers():
            return gguf_model(Path(spec), **options)
    base = folders.base_of_adapter(location)
    if base is None:
        return _read_folder(location, spec, options)
    return _adapted(base, location, spec, options)


def _read_folder(location: str, spec: str, options: dict[str, Any]) -> Any:
    """Read a folder's or a hub id's model without its adapter."""
    with quiet_transformers(), folders.without_adapter(folders.safe_location(location)) as folder:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # the report names them
            output_loading_info=True,
            **(SAFE | folders.hub_options(folder) | options),
        )
        model, report = loaded
        quantization = folders.stored_quantization(folder)
        if quantization is None or not AutoHfQuantizer.supports_quant_method(quantization):
            folders.require_wide(folder, set(report["unexpected_keys"]), spec)
        elif getattr(model, "hf_quantizer", None) is None:
            # The model is dequantised, but numbers stored without scales keep their own type.
            model = model.to(options["dtype"])
        _require_whole(model, report, spec)
    return model


def _adapted(base: str, location: str, spec: str, options: dict[str, Any]) -> Any:
    """Read an adapter's base and merge the adapter into it, in float32 and rounded once."""
    if "quantization_config" in options or len(options.get("device_map", {})) > 1:
        raise ModelError(
            f"{spec} is an adapter, which is neither quantised nor split while it is applied; "
            "merge it into its base with peft's merge_and_unload"
        )
    model = _read_folder(model_location(base), base, {"dtype": torch.float32})
    with quiet_transformers():
        merged = folders.merge_adapter(model, location, spec).to(options["dtype"])
    (device,) = options.get("device_map", {"": "cpu"}).values()
    return merged.to(device)


def _require_whole(model: PreTrainedModel, report: dict[str, Any], spec: str) -> None:
    """Refuse a checkpoint that lacks a tensor, or holds one that has no place in the model."""
    mismatched = [f"{name} {tuple(was)}" for name, was, *_ in report["mismatched_keys"]]
    homeless = [name for name in report["unexpected_keys"] if _is_in_known_part(model, name)]
    problems = {
        "lacks tensors that the model needs": report["missing_keys"],
        "has tensors of another shape than its config.json says": mismatched,
        "has tensors that its config.json leaves out": homeless,
    }
    for problem, names in problems.items():
        if names:
            shown = ", ".join(sorted(names)[:3]) + (" ..." if len(names) > 3 else "")
            raise ModelError(
                f"cannot load model {spec}: it {problem} ({len(names)}: {shown}); "
                "download or convert it again"
            )


def _is_in_known_part(model: PreTrainedModel, name: str) -> bool:
    """Say whether a tensor that the model does not know lies inside a part that it knows.

    A bias of a layer without one, or one more layer in a list, changes what the model computes. A
    vision tower or a saved buffer does not.
    """
    if name.endswith(SAVED_BUFFERS):
        return False
    modules = dict(model.named_modules())
    owner = name.rpartition(".")[0]
    while owner and not {owner, re.sub(r"\.\d+(?=\.|$)", ".0", owner)} & modules.keys():
        owner = owner.rpartition(".")[0]
    inside = name.removeprefix(f"{owner}.").count(".")
    is_layer = hasattr(modules.get(owner), "weight")
    return bool(owner) and (is_layer or owner.count(".") > 1 or inside <= 1)


def _gguf_to_folder(gguf: Path, folder: Path) -> str:
    """Convert a GGUF file to a folder in bfloat16, and return the hash of its tensors.

    Many small files keep the peak of memory low, because a file is mapped until it is packed.
    """
    model = read_model(str(gguf), dtype=torch.bfloat16)
    with quiet_transformers():
        model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
    read_tokenizer(str(gguf)).save_pretrained(folder)
    return tensors_sha256(model)


def tensors_sha256(model: PreTrainedModel) -> str:
    """Hash all names, shapes, types and values of a model's parameters."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


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
