"""Loads one checkpoint into one model, proves its decoding, and makes it fast.

A model may decode noise without any error. So each model is compared with itself without a cache
before it is used. Faster layers are kept only if they give the logits of transformers' own.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from specsampling.kernel.build import KernelError
from specsampling.method.forward import Model
from specsampling.models.attention import group_heads
from specsampling.models.distilled import is_distilled, trimmed
from specsampling.models.embedded import published_file
from specsampling.models.errors import ModelError, is_out_of_memory, model_error, reason, way_out_of
from specsampling.models.estimate import Planned, outline, uses_kernel, weight_bytes
from specsampling.models.exactness import (
    Proof,
    prove_decoding,
    prove_without_cache,
    require_decodable,
)
from specsampling.models.folder import SAFE_WEIGHTS, weight_files
from specsampling.models.gguf_file import open_gguf
from specsampling.models.kernel_model import KernelModel, to_kernel
from specsampling.models.memory import require_memory
from specsampling.models.source import (
    EMBEDDED,
    digest_of,
    is_gguf,
    model_location,
    read_config,
    read_model,
)

log = logging.getLogger("specsampling")

# How far a fast model's logits may be from those of the model as loaded. In bfloat16 rounding moves
# them by 1.4%, and a lost adapter by 8%. Rounding to 8 and 4 bit moves them more.
FAST_TOLERANCES = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.04}
ROUNDED_TOLERANCES = {"none": 0.3, "int8": 0.3, "int4": 0.7}  # none: a GGUF file's own blocks


def load_model(
    spec: str,
    dtype: torch.dtype,
    device: torch.device,
    quantization: str = "none",
    device_map: Mapping[str, int | str] | None = None,
    compile: str = "auto",
) -> Model:
    """Load one model for inference, straight onto its device.

    On a CPU the model goes into the kernel (`kernel_model.py`) if the kernel knows it. Otherwise
    its heads that share keys are attended to together (`attention.py`). If either fails or changes
    the logits, the model keeps transformers' layers, and one line says so.

    Args:
        spec: a model's spec.
        dtype: the precision of its weights.
        device: where the model goes.
        quantization: "none", "int8", "nf4", or on a CPU "int4". Layers in nf4 compute in `dtype`,
            but in bfloat16 on a CPU with AVX-512 BF16, whatever `dtype` is.
        device_map: where its parts go, if not all of it goes there. A model in parts keeps
            transformers' layers, and accelerate moves what passes between them.
        compile: "off" leaves the kernel out; "on" refuses a model that it cannot decode.

    Raises:
        ModelError: the model cannot be found, loaded or quantised, it lacks tensors or cannot be
            decoded with a cache that is rolled back, or there is too little memory.
    """
    for_kernel = device.type == "cpu" and device_map is None and quantization != "nf4"
    if quantization == "int4" and device.type != "cpu":
        raise ModelError(
            f"cannot put {spec} into int4: that is the CPU kernel's, and the device is {device}; "
            "choose nf4, int8 or none"
        )
    planned = plan_model(spec, dtype, quantization)
    if device.type == "cpu":
        _require_memory(spec, planned)
    model = _read(spec, dtype, device, "none" if for_kernel else quantization, device_map)
    with _one_line(spec):
        num_threads = torch.get_num_threads()
        if for_kernel:  # beside other work, two threads may wait minutes for each other
            torch.set_num_threads(1)
        try:
            proof = prove_without_cache(model, spec)
        finally:
            torch.set_num_threads(num_threads)
        if for_kernel:
            problem = "decoding.compile is off"
            if compile != "off":
                made, problem = _into_kernel(model, proof, spec, quantization)
                if made is not None:
                    return made
            if compile == "on" or quantization != "none":
                raise ModelError(_no_kernel(spec, quantization, problem))
            if compile != "off":
                log.warning("%s is decoded by PyTorch, without the CPU kernel: %s", spec, problem)
                model = _read(spec, dtype, device, "none")
        require_decodable(model, spec, proof)
        if quantization != "none" or device_map is not None:
            return model
        problem = _try_grouped(model, proof)
    if problem:
        log.warning("%s keeps transformers' layers: the faster ones %s", spec, problem)
        model = _read(spec, dtype, device, quantization)
    return model


def _no_kernel(spec: str, quantization: str, problem: str) -> str:
    what, way_out = f"put {spec} into {quantization}", "none"
    if quantization == "none":
        what, way_out = f"compile {spec}", "decoding.compile: auto or off"
    return f"cannot {what}: this needs the CPU kernel ({problem}); choose {way_out}"


def _into_kernel(
    model: PreTrainedModel, proof: Proof, spec: str, quantization: str
) -> tuple[KernelModel | None, str]:
    """Bring a model into the kernel; return None and the reason if that fails."""
    path = Path(spec) if is_gguf(spec) else None
    if quantization == "int4" and spec.startswith(EMBEDDED):
        path = published_file(spec.removeprefix(EMBEDDED))  # its own blocks, not rounded again
    if quantization == "none" and is_distilled(model):
        quantization = "int8"  # it is shipped so
    file = open_gguf(path) if path else None
    try:
        made = to_kernel(model, quantization, file)
        error = prove_decoding(made).difference(proof)
    except KernelError as problem:
        return None, str(problem)
    except Exception as problem:  # a checkpoint can be wrong in any way
        if is_out_of_memory(problem):
            raise
        return None, f"the kernel fails on the model ({reason(problem)})"
    is_rounded = quantization != "none" or file is not None
    limit = ROUNDED_TOLERANCES[quantization] if is_rounded else FAST_TOLERANCES[made.dtype]
    return (made, "") if error < limit else (None, f"the kernel's logits differ (by {error:.1%})")


def make_fast(model: PreTrainedModel, quantization: str = "none") -> Model:
    """Prepare a model of any weights for decoding, without a proof.

    The model is returned itself, or it loses its weights to the CPU kernel. Only the kernel
    quantises here: a ModelError says that it does not know a model that it must quantise.
    """
    if quantization != "none" or uses_kernel(model, quantization, model.device):
        try:
            return to_kernel(model, quantization)
        except KernelError as error:
            raise ModelError(_no_kernel("the model", quantization, str(error))) from error
    group_heads(model)
    return model


def _try_grouped(model: PreTrainedModel, proof: Proof) -> str:
    """Group a model's heads and prove its logits. Return what went wrong, or ""."""
    try:
        group_heads(model)
        error = prove_decoding(model).difference(proof)
    except Exception as problem:  # a layer can fail in any way
        if is_out_of_memory(problem):
            raise
        return f"fail on it ({reason(problem)})"
    return "" if error < FAST_TOLERANCES[model.dtype] else f"give other logits (by {error:.1%})"


def _read(
    spec: str,
    dtype: torch.dtype,
    device: torch.device,
    quantization: str,
    device_map: Mapping[str, int | str] | None = None,
) -> PreTrainedModel:
    """Load a model as transformers makes it, with every tensor from the checkpoint."""
    options: dict[str, Any] = {"dtype": dtype, "device_map": device_map or {"": device}}
    if quantization == "int8":
        # Columns of outliers would be picked from all rows of a call, so rows would meet.
        quantized = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
        options["quantization_config"] = quantized
    elif quantization != "none":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    with _one_line(spec):
        if is_gguf(spec):
            if quantization != "none" or device_map is not None:
                raise ModelError(
                    f"the GGUF file {spec} is neither quantised again nor split over devices; "
                    "choose none, int8 or int4 on a CPU, or the model's folder"
                )
            model = read_model(spec, dtype=dtype).to(device)
        else:
            model = trimmed(read_model(spec, **options), model_location(spec))
    return model.eval()


def plan_model(spec: str, dtype: torch.dtype, quantization: str = "none") -> Planned:
    """Describe a model as `load_model` would make it, unread; or raise a ModelError."""
    with _one_line(spec):
        if (config := read_config(spec)).is_encoder_decoder:
            raise ModelError(
                f"cannot decode with {spec}: {config.model_type} models are encoder-decoders; "
                "choose a decoder-only model"
            )
        if Path(location := model_location(spec)).is_dir():
            weight_files(location, SAFE_WEIGHTS)
        model = trimmed(outline(config, dtype), location)
        return Planned(model, quantization, not is_gguf(spec))


def digest_model(spec: str) -> str:
    """Return `source.digest_of` of a spec. Whatever goes wrong is a ModelError."""
    with _one_line(spec):
        return digest_of(spec)


@contextlib.contextmanager
def _one_line(spec: str) -> Iterator[None]:
    """Raise a ModelError for whatever is wrong with a checkpoint."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # a checkpoint can be wrong in any way
        if type(error).__name__ == "OutOfMemoryError":  # a GPU's
            way_out = "choose a smaller model, int8 or nf4 quantization, or another device"
            raise ModelError(f"cannot load model {spec} ({reason(error)}); {way_out}") from error
        raise model_error(f"cannot load model {spec}", error, way_out_of(error, spec)) from error


def _require_memory(spec: str, planned: Planned) -> None:
    """Refuse a model that does not fit into memory, before minutes of reading it."""
    if hasattr(planned.outline.config, "quantization_config"):
        return  # the model's size is not known
    way_out = "close other programs, or choose a smaller model"
    if planned.outline.dtype == torch.float32:
        way_out += ", or --dtype bfloat16, which needs half of that"
    needed = weight_bytes(planned.outline, planned.quantization, torch.device("cpu"))
    require_memory(f"loading {spec}", needed, way_out)
