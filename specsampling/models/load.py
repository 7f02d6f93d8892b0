"""Load a target and its draft: embedded, hub, local folder, GGUF, 8 or 4 bit.

A model's spec is one word: `embedded:smollm2-135m`, a hub id, a local folder, or a
`.gguf` file. A draft may also be `ngram` or `target-layers:N`, and `ngram+` before a model
looks up first. Nothing is chosen silently: what `auto` became is in the pair, and the scripts
print it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from specsampling.method.drafts import CompositeDraft, Draft, ModelDraft, NgramDraft, first_layers
from specsampling.models.attention import NAME as GROUPED_SDPA
from specsampling.models.distilled import assemble, is_distilled, lists_head_tokens, trim_head
from specsampling.models.embedded import ModelError, embedded_folder
from specsampling.models.fused import fuse_layers
from specsampling.models.packed import can_int8, can_pack, pack_linears, to_int8

EMBEDDED = "embedded:"
TARGET_LAYERS = "target-layers:"
LOOKUP_FIRST = "ngram+"

QUIET = {"verbose": False}  # no warning of a long text: the caller cuts it or says so

# Missing or broken files, an unknown architecture, a package or memory that is lacking.
LOAD_ERRORS = (OSError, ValueError, ImportError, RuntimeError, SafetensorError)

# Where two tokenizers usually part: code, spaces, digits, other scripts, special tokens.
TOKENIZER_PROBES = (
    "def add(a: int, b: int) -> int:\n    return a + b\n\n\nprint(add(12345, 67890))\n",
    "The quick brown fox doesn't jump over 3.14 lazy dogs; it's 2023-02-02, isn't it?",
    "\tif x != y:\n\t\t  return {'a': [1, 2], \"b\": None}  # trailing   \n\n\n",
    "naïve café – „Grüße“ 東京 Привет \U0001f600 \u00a0end",
    "<|endoftext|> <s> </s> <|im_start|>user\nhi<|im_end|>\n",
)


@dataclass(frozen=True)
class Pair:
    """A target, its draft and their tokenizer, ready to decode.

    Attributes:
        target: the model whose distribution every output has.
        draft: who proposes.
        tokenizer: shared by both.
        eos_ids: every id that ends a text, from the target's generation config.
    """

    target: PreTrainedModel
    draft: Draft
    tokenizer: PreTrainedTokenizerBase
    eos_ids: frozenset[int]

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with the special tokens that the tokenizer adds."""
        return self.tokenizer(text, **QUIET)["input_ids"]

    def encode_chat(self, message: str) -> list[int]:
        """Token ids of a user's message in the chat template, up to where the answer begins.

        Raises:
            ModelError: the tokenizer has no chat template, or one that fails.
        """
        if not self.tokenizer.chat_template:
            raise ModelError(
                "prompt_style chat needs a tokenizer with a chat template "
                f"({self.tokenizer.name_or_path} has none); choose prompt_style: completion"
            )
        chat = [{"role": "user", "content": message}]
        try:
            encoded: Any = self.tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, tokenizer_kwargs=QUIET
            )
        except Exception as error:  # a template is a program of the model's maker: any may come
            raise ModelError(
                f"the chat template of {self.tokenizer.name_or_path} fails "
                f"({type(error).__name__}: {_first_line(error)}); choose prompt_style: completion, "
                "or mend the template"
            ) from error
        return encoded["input_ids"]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out and spaces as they are."""
        text = self.tokenizer.decode(
            list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)  # a list only for a list of lists
        return text


def load_pair(
    target: str,
    draft: str = "ngram",
    *,
    tokenizer: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    target_quantization: str = "none",
    draft_quantization: str = "none",
    ngram_max: int = 3,
    ngram_min: int = 1,
    model_k: int | None = None,
    min_confidence: float = 0.0,
) -> Pair:
    """Load a target, a draft and the tokenizer they share.

    Args:
        target: a model's spec.
        draft: a model's spec, `target-layers:N` (the target's first N layers), `ngram`, or
            `ngram+` and a model, which is asked where the lookup finds nothing.
        tokenizer: a spec for both; None takes the target's and compares the draft's with it.
        dtype: "float32", "float16", "bfloat16", or "auto" (see `resolve_dtype`).
        device: "cpu", "cuda", "cuda:N", "mps", or "auto" (a GPU if there is one).
        target_quantization: "none", "int8" or "nf4" (needs the extra `quant`).
        draft_quantization: the same for a draft model of its own.
        ngram_max: longest n-gram that `ngram` looks up.
        ngram_min: shortest.
        model_k: the most tokens that a draft model proposes in a cycle; None for all k.
        min_confidence: see `drafts.ModelDraft`; 0 is off.

    Raises:
        ModelError: in one line, what could not be loaded, why, and the way out.
    """
    chosen_device = resolve_device(device)
    chosen_dtype = resolve_dtype(dtype, chosen_device)
    target_model = load_model(target, chosen_dtype, chosen_device, target_quantization)
    shared = load_tokenizer(tokenizer or target)
    eos = target_model.generation_config.eos_token_id if target_model.generation_config else None
    eos_ids = frozenset(eos if isinstance(eos, list) else [] if eos is None else [eos])
    proposes = load_draft(
        draft,
        target_model,
        chosen_dtype,
        compare_with=None if tokenizer else shared,
        quantization=draft_quantization,
        ngram_max=ngram_max,
        ngram_min=ngram_min,
        model_k=model_k,
        min_confidence=min_confidence,
    )
    return Pair(target_model, proposes, shared, eos_ids)


def load_draft(
    draft: str,
    target: PreTrainedModel,
    dtype: torch.dtype,
    *,
    compare_with: PreTrainedTokenizerBase | None = None,
    quantization: str = "none",
    ngram_max: int = 3,
    ngram_min: int = 1,
    model_k: int | None = None,
    min_confidence: float = 0.0,
) -> Draft:
    """Load a draft for a target that is there; see `load_pair`.

    Args:
        compare_with: a tokenizer that a draft model's own must equal; None asks no question.

    Raises:
        ModelError: in one line, what could not be loaded, why, and the way out.
    """
    lookup = NgramDraft(ngram_max, ngram_min)
    if draft == "ngram":
        return lookup
    spec = draft.removeprefix(LOOKUP_FIRST)
    if spec.startswith(TARGET_LAYERS):
        model = _first_layers(target, spec)
    else:
        if compare_with:
            require_same_tokenizer(compare_with, load_tokenizer(spec), spec)
        model = load_model(spec, dtype, target.device, quantization)
    proposes = ModelDraft(model, model_k, min_confidence)
    return proposes if spec == draft else CompositeDraft(lookup, proposes)


def _first_layers(target: PreTrainedModel, spec: str) -> PreTrainedModel:
    try:
        return first_layers(target, int(spec.removeprefix(TARGET_LAYERS)))
    except ValueError as error:
        raise ModelError(f"models.draft {spec}: {error}") from error


def load_model(
    spec: str, dtype: torch.dtype, device: torch.device, quantization: str = "none"
) -> PreTrainedModel:
    """Load one model for inference, straight onto its device.

    Unless it is quantised, its attention becomes `attention.grouped_sdpa`, a Llama's layers
    become `fused.FusedLayer`s, and on a CPU in bfloat16 its linear layers are packed
    (`packed.py`): the same products in the same precision. A distilled draft's head is trimmed,
    and on a CPU its matrices stay in 8 bit as they are shipped (`distilled.py`).

    Raises:
        ModelError: it cannot be found, loaded or quantised.
    """
    options: dict[str, Any] = {"dtype": dtype, "device_map": {"": device}}
    if quantization != "none":
        options["quantization_config"] = quantization_config(quantization, dtype)
    model: Any
    try:
        if is_gguf(spec):
            model = load_gguf(Path(spec))
            model = model.to(device=device, dtype=dtype)
        else:
            location = model_location(spec)
            with _quiet_transformers():
                model = AutoModelForCausalLM.from_pretrained(location, **options)
            if lists_head_tokens(location):
                trim_head(model, Path(location))
    except LOAD_ERRORS as error:
        raise ModelError(
            f"cannot load model {spec} ({_first_line(error)}); {_way_out(error)}"
        ) from error
    if not hasattr(model.config.get_text_config(), "max_position_embeddings"):
        raise ModelError(
            f"cannot decode with {spec}: {model.config.model_type} models name no context limit "
            "(max_position_embeddings); choose another model"
        )
    if quantization == "none":
        make_fast(model)
    return model.eval()


def make_fast(model: PreTrainedModel) -> None:
    """Prepare a model's layers for decoding, in place: see `load_model`."""
    if model.config._attn_implementation == "sdpa" and model._can_set_attn_implementation():
        model.set_attn_implementation(GROUPED_SDPA)
        fuse_layers(model)
    if is_distilled(model) and model.device.type == "cpu" and can_int8():
        to_int8(model)
    elif can_pack(model):
        pack_linears(model)


def load_tokenizer(spec: str) -> PreTrainedTokenizerBase:
    """Load one tokenizer.

    Raises:
        ModelError: it cannot be found or loaded.
    """
    try:
        with _quiet_transformers():
            if is_gguf(spec):
                path = Path(spec)
                tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
            else:
                tokenizer = AutoTokenizer.from_pretrained(model_location(spec))
    except LOAD_ERRORS as error:
        raise ModelError(
            f"cannot load the tokenizer of {spec} ({_first_line(error)}); set models.tokenizer "
            f"if the model ships without one, or {_way_out(error)}"
        ) from error
    if not tokenizer(TOKENIZER_PROBES[0])["input_ids"]:  # what is made where no files are
        raise ModelError(f"{spec} ships without a tokenizer; set models.tokenizer to one that fits")
    return tokenizer


def load_gguf(path: Path) -> PreTrainedModel:
    """A `.gguf` file as a float32 model (transformers dequantises it)."""
    model: Any
    with _quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32
        )
    # Dequantised, it is an ordinary model: without this mark it can be cast and saved.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model


def _gguf_to_folder(gguf: Path, folder: Path) -> None:
    """Keep the GGUF's exact values, in float32: other precisions are cast from it."""
    load_gguf(gguf).save_pretrained(folder)
    load_tokenizer(str(gguf)).save_pretrained(folder)


def is_gguf(spec: str) -> bool:
    return spec.endswith(".gguf")


def quantization_config(quantization: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """bitsandbytes' settings: LLM.int8(), or 4-bit NormalFloat with `dtype` arithmetic."""
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )


def require_same_tokenizer(
    target: PreTrainedTokenizerBase, draft: PreTrainedTokenizerBase, spec: str
) -> None:
    """Compare what two tokenizers encode, not only how many tokens they have.

    Raises:
        ModelError: they encode a probe differently, so the ids of the draft `spec` mean nothing
            to the target.
    """
    for probe in TOKENIZER_PROBES:
        if target(probe)["input_ids"] != draft(probe)["input_ids"]:
            raise ModelError(
                f"the draft {spec} must share its tokenizer with the target "
                f"{target.name_or_path} (they encode {probe[:24]!r} differently); choose a draft "
                "of the target's family, or draft: ngram"
            )


def resolve_device(device: str) -> torch.device:
    """`auto` is the first CUDA GPU, then Apple's, then the CPU.

    Raises:
        ModelError: the device asked for is not there.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", 0)
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    chosen = torch.device(device)
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ModelError(
            f"models.device {device} is not there (PyTorch sees {torch.cuda.device_count()} CUDA "
            "GPUs); choose --device cpu, or install a CUDA build of PyTorch"
        )
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise ModelError("models.device mps is not there; choose --device cpu")
    return torch.device("cuda", chosen.index or 0) if chosen.type == "cuda" else chosen


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the hardware computes in it, else float16 (GPU) or float32 (CPU)."""
    if dtype != "auto":
        return getattr(torch, dtype)
    if device.type == "cuda":
        return (
            torch.bfloat16
            if torch.cuda.is_bf16_supported(including_emulation=False)
            else torch.float16
        )
    if device.type == "mps":
        return torch.float16
    has_bfloat16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if has_bfloat16 else torch.float32


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


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Hide transformers' load reports and bars for a moment: the scripts have their own."""
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


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _way_out(error: BaseException) -> str:
    if isinstance(error, ImportError) or "bitsandbytes" in str(error):
        return 'install what it needs, for 8 and 4 bit with: pip install ".[quant]"'
    if isinstance(error, torch.OutOfMemoryError):
        return "choose a smaller model, int8 or nf4 quantization, or another device"
    return "check the name and the network, or give a local folder"
