"""One checkpoint into one model: its decoding proved, then made fast.

A model that decodes noise says nothing of it. So it is compared with itself without a cache
before it is handed out, and faster layers are kept only where they give what transformers' own
give.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from specsampling.models.attention import group_heads
from specsampling.models.distilled import is_distilled, lists_head_tokens, trim_head
from specsampling.models.embedded import ModelError
from specsampling.models.exactness import Proof, prove_decoding, require_decodable
from specsampling.models.fused import fuse_layers
from specsampling.models.packed import can_int8, can_pack, pack_linears, to_int8
from specsampling.models.source import is_gguf, model_location, read_config, read_model, reason

log = logging.getLogger("specsampling")

INT8_TOLERANCE = 0.3  # of a distilled draft in 8 bit, whose target checks every token


def load_model(
    spec: str, dtype: torch.dtype, device: torch.device, quantization: str = "none"
) -> PreTrainedModel:
    """Load one model for inference, straight onto its device.

    Unless it is quantised, it is made fast: see `make_fast`. Where that fails or changes what
    the model says, it keeps transformers' layers, and one line says so.

    Raises:
        ModelError: it cannot be found, loaded or quantised, lacks tensors, or cannot be decoded
            with a cache that is rolled back.
    """
    model = _read(spec, dtype, device, quantization)
    proof = require_decodable(model, spec)
    if quantization != "none":
        return model
    problem = _try_fast(model, proof)
    if problem:
        log.warning("%s keeps transformers' layers: the faster ones %s", spec, problem)
        model = _read(spec, dtype, device, quantization)
    return model


def _try_fast(model: PreTrainedModel, proof: Proof) -> str:
    """Make a model fast and look at what it says then; what went wrong, in words, or nothing."""
    try:
        make_fast(model)
        error = prove_decoding(model).difference(proof)
    except torch.OutOfMemoryError:
        raise
    except Exception as problem:  # whatever a layer makes of what it was not written for
        return f"fail on it ({reason(problem)})"
    limit = INT8_TOLERANCE if is_distilled(model) else proof.tolerance
    return "" if error < limit else f"give other logits (by {error:.1%})"


def make_fast(model: PreTrainedModel) -> None:
    """Prepare a model's layers for decoding, in place.

    Heads that share keys are attended to together (`attention.py`), a Llama's layers become
    `fused.FusedLayer`s, and on a CPU in bfloat16 its linear layers are packed (`packed.py`):
    the same products in the same precision. A distilled draft's matrices stay in 8 bit on a CPU,
    as they are shipped (`distilled.py`).
    """
    group_heads(model)
    fuse_layers(model)
    if is_distilled(model) and model.device.type == "cpu" and can_int8():
        to_int8(model)
    elif can_pack(model):
        pack_linears(model)


def _read(
    spec: str, dtype: torch.dtype, device: torch.device, quantization: str
) -> PreTrainedModel:
    """A model as transformers makes it, every tensor of it from the checkpoint."""
    options: dict[str, Any] = {"dtype": dtype, "device_map": {"": device}}
    if quantization != "none":
        options["quantization_config"] = quantization_config(quantization, dtype)
    try:
        if not is_gguf(spec) and (kind := read_config(spec)).is_encoder_decoder:
            raise ModelError(
                f"cannot decode with {spec}: {kind.model_type} models are encoder-decoders; "
                "choose a decoder-only model"
            )
        model = read_model(spec, **({} if is_gguf(spec) else options))
        if is_gguf(spec):
            model = model.to(device=device, dtype=dtype)
        elif lists_head_tokens(location := model_location(spec)):
            trim_head(model, Path(location))
    except ModelError:
        raise
    except Exception as error:  # a checkpoint can be wrong in any way
        raise ModelError(
            f"cannot load model {spec} ({reason(error)}); {_way_out(error, spec)}"
        ) from error
    return model.eval()


def quantization_config(quantization: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """bitsandbytes' settings: LLM.int8(), or 4-bit NormalFloat with `dtype` arithmetic."""
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )


def _way_out(error: Exception, spec: str) -> str:
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return "choose a smaller model, int8 or nf4 quantization, or another device"
    if "safetensors" in text and _has_pickles(spec):
        return (
            "its weights are a pickle (pytorch_model.bin), which can run code and is not read "
            "here: save it again with save_pretrained, which writes safetensors"
        )
    if "trust_remote_code" in text or "custom code" in text:
        return "it needs code of its own (auto_map), which is not run here; choose another model"
    if isinstance(error, ImportError) or "bitsandbytes" in text:
        return 'install what it needs, for 8 and 4 bit with: pip install ".[quant]"'
    return "check the name and the network, or give a local folder"


def _has_pickles(spec: str) -> bool:
    folder = Path(spec)
    return not folder.is_dir() or any(folder.glob("pytorch_model*.bin"))
