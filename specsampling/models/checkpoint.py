"""One checkpoint into one model: its decoding proved, then made fast.

A model that decodes noise says nothing of it. So it is compared with itself without a cache
before it is handed out, and faster layers are kept only where they give what transformers' own
give.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from specsampling.method.step import has_step
from specsampling.models.attention import group_heads
from specsampling.models.distilled import is_distilled, lists_head_tokens, trim_head
from specsampling.models.errors import (
    ModelError,
    is_out_of_memory,
    model_error,
    reason,
    way_out_of,
)
from specsampling.models.estimate import Planned, outline_of, weight_bytes
from specsampling.models.exactness import Proof, prove_decoding, require_decodable
from specsampling.models.folder import SAFE_WEIGHTS
from specsampling.models.fused import fuse_layers
from specsampling.models.memory import require_memory
from specsampling.models.packed import can_int8, can_pack, pack_linears, to_int8
from specsampling.models.source import (
    digest_of,
    is_gguf,
    model_location,
    read_config,
    read_model,
)

log = logging.getLogger("specsampling")

# How far a fast model's logits may be from those of the model as loaded. Rounding moves them by
# 1.4% in bfloat16; an adapter that got lost moved them by 8%. In 8 bit rounding alone moves them by
# 10%, so there each layer is held against its own (`fused.py`, `packed.py`).
FAST_TOLERANCES = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.04}
INT8_TOLERANCE = 0.3


def load_model(
    spec: str,
    dtype: torch.dtype,
    device: torch.device,
    quantization: str = "none",
    device_map: Mapping[str, int | str] | None = None,
) -> PreTrainedModel:
    """Load one model for inference, straight onto its device.

    Unless it is quantised by bitsandbytes, it is made fast: see `make_fast`. Where that fails or
    changes what the model says, it keeps transformers' layers, and one line says so.

    Args:
        spec: a model's spec.
        dtype: of its weights.
        device: where it goes.
        quantization: "none", "int8" or "nf4". On a CPU "int8" is `packed.Int8Linear`.
        device_map: where its parts go, if not all of it goes there. A model in parts keeps
            transformers' layers, between which accelerate moves what passes.

    Raises:
        ModelError: it cannot be found, loaded or quantised, lacks tensors, or cannot be decoded
            with a cache that is rolled back, or there is too little memory.
    """
    to_8_bit = quantization == "int8" and device.type == "cpu"
    planned = plan_model(spec, dtype, quantization)
    if to_8_bit:
        quantization = "none"
        if not can_int8():
            raise ModelError(
                f"cannot put {spec} into int8: this PyTorch has no fast 8-bit layers for this "
                "processor; choose none or nf4"
            )
    if device.type == "cpu":
        _require_memory(spec, planned)
    model = _read(spec, dtype, device, quantization, device_map)
    with _one_line(spec):
        proof = require_decodable(model, spec)
        if quantization != "none" or device_map is not None:
            return model
        problem = _try_fast(model, proof, to_8_bit)
    if problem:
        log.warning("%s keeps transformers' layers: the faster ones %s", spec, problem)
        model = _read(spec, dtype, device, quantization)
    return model


def _try_fast(model: PreTrainedModel, proof: Proof, to_8_bit: bool) -> str:
    """Make a model fast and look at what it says then; what went wrong, in words, or nothing."""
    try:
        make_fast(model, to_8_bit)
        error = prove_decoding(model).difference(proof)
    except Exception as problem:  # whatever a layer makes of what it was not written for
        if is_out_of_memory(problem):
            raise
        return f"fail on it ({reason(problem)})"
    is_8_bit = to_8_bit or is_distilled(model)
    limit = INT8_TOLERANCE if is_8_bit else FAST_TOLERANCES[model.dtype]
    return "" if error < limit else f"give other logits (by {error:.1%})"


def make_fast(model: PreTrainedModel, to_8_bit: bool = False) -> None:
    """Prepare a model's layers for decoding, in place, one layer after the other.

    Heads that share keys are attended to together (`attention.py`), a Llama's layers become
    `fused.FusedLayer`s, and on a CPU in bfloat16 its linear layers are packed (`packed.py`):
    the same products in the same precision. With `to_8_bit`, and in a distilled draft, which is
    shipped so (`distilled.py`), a CPU's linear layers compute in 8 bit.
    """
    finish: Callable[[torch.nn.Module], None] = _keep
    if to_8_bit or (is_distilled(model) and model.device.type == "cpu" and can_int8()):
        finish = to_int8
    elif can_pack(model):
        finish = pack_linears
    group_heads(model)
    fuse_layers(model, finish)
    finish(model)
    if finish is to_int8 and not has_step(model):
        model.float()


def _keep(module: torch.nn.Module) -> None:
    """What is done to layers that stay as they are."""


def _read(
    spec: str,
    dtype: torch.dtype,
    device: torch.device,
    quantization: str,
    device_map: Mapping[str, int | str] | None = None,
) -> PreTrainedModel:
    """A model as transformers makes it, every tensor of it from the checkpoint."""
    options: dict[str, Any] = {"dtype": dtype, "device_map": device_map or {"": device}}
    if quantization != "none":
        options["quantization_config"] = quantization_config(quantization, dtype)
    with _one_line(spec):
        if is_gguf(spec):
            if quantization != "none" or device_map is not None:
                raise ModelError(
                    f"the GGUF file {spec} is neither quantised again nor split over devices; "
                    "choose none, int8 on a CPU, or the model's folder"
                )
            model = read_model(spec, dtype=dtype).to(device)
        else:
            model = read_model(spec, **options)
            if lists_head_tokens(location := model_location(spec)):
                trim_head(model, Path(location))
    return model.eval()


def plan_model(spec: str, dtype: torch.dtype, quantization: str = "none") -> Planned:
    """A model as `load_model` would make it, without its weights.

    Raises:
        ModelError: its configuration cannot be found or read.
    """
    with _one_line(spec):
        _require_decoder(spec)
        _require_shards(model_location(spec))
        return Planned(
            outline_of(spec, dtype), quantization, not is_gguf(spec), _largest_file(spec)
        )


def digest_model(spec: str) -> str:
    """What `source.digest_of` says of a spec.

    Raises:
        ModelError: its files cannot be found or read.
    """
    with _one_line(spec):
        return digest_of(spec)


def _largest_file(spec: str) -> float:
    """The share of a folder's weights that is in its largest file; 1 where there is no folder."""
    sizes = [path.stat().st_size for path in Path(model_location(spec)).glob("*.safetensors")]
    return max(sizes) / sum(sizes) if sizes else 1.0


@contextlib.contextmanager
def _one_line(spec: str) -> Iterator[None]:
    """Whatever is wrong with a checkpoint, as a ModelError."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # a checkpoint can be wrong in any way
        if type(error).__name__ == "OutOfMemoryError":  # a GPU's
            way_out = "choose a smaller model, int8 or nf4 quantization, or another device"
            raise ModelError(f"cannot load model {spec} ({reason(error)}); {way_out}") from error
        failure = f"cannot load model {spec}"
        raise model_error(failure, error, way_out_of(error, spec)) from error


def _require_decoder(spec: str) -> None:
    if (kind := read_config(spec)).is_encoder_decoder:
        raise ModelError(
            f"cannot decode with {spec}: {kind.model_type} models are encoder-decoders; "
            "choose a decoder-only model"
        )


def _require_shards(location: str) -> None:
    """Refuse a folder whose index names files of weights that are not there.

    Raises:
        ModelError: it names the index, and the first file.
    """
    index = Path(location, SAFE_WEIGHTS[1])
    if Path(location, SAFE_WEIGHTS[0]).is_file() or not index.is_file():
        return
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        missing = [name for name in names if not (index.parent / name).is_file()]
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        why = f"{index} is no index of weights ({error!r})"
        raise ModelError(f"{why}; download it again") from error
    if missing:
        raise ModelError(
            f"cannot load model {location}: {missing[0]} is missing, which {index.name} names "
            f"({len(missing)} of {len(names)} files are); download it again"
        )


def _require_memory(spec: str, planned: Planned) -> None:
    """Refuse a model for which a CPU's memory is not there, before minutes of reading it."""
    if hasattr(planned.outline.config, "quantization_config"):
        return  # its size is not known
    way_out = "close other programs, or choose a smaller model"
    if planned.outline.dtype == torch.float32:
        way_out += ", or --dtype bfloat16, which needs half of that"
    needed = weight_bytes(planned.outline, planned.quantization, torch.device("cpu"))
    require_memory(f"loading {spec}", needed, way_out)


def quantization_config(quantization: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """bitsandbytes' settings: LLM.int8(), or 4-bit NormalFloat with `dtype` arithmetic."""
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )
