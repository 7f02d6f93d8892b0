"""Loads a target and its draft: embedded, hub, local folder, GGUF, 8 or 4 bit.

A model's spec is one word: `embedded:smollm2-135m`, a hub id, a local folder, or a `.gguf` file. A
draft's name may have more parts (`draft_name.py`). The pair shows what `auto` became, and scripts
print it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pkgutil import resolve_name
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from specsampling.draft_name import LOOKUPS, TARGET_LAYERS, DraftName
from specsampling.method.adaptive import AdaptiveDraft
from specsampling.method.drafts import CompositeDraft, Draft, ModelDraft, first_layers
from specsampling.method.forward import Model, is_exact
from specsampling.method.session import CONTEXT_NAMES, context_limit
from specsampling.models.checkpoint import load_model
from specsampling.models.errors import ModelError, model_error
from specsampling.models.exactness import require_decodable
from specsampling.models.kernel_model import why_no_kernel
from specsampling.models.source import model_location
from specsampling.models.split import SPLIT
from specsampling.models.tokenizer import (
    QUIET,
    encode_chat,
    end_ids,
    load_tokenizer,
    num_appended,
    require_same_tokenizer,
)

__all__ = ["Pair", "check_tokenizers", "load_draft", "load_pair", "model_location"]

log = logging.getLogger("specsampling")

# Settings beside the warp that change the tokens of `generate`, with their defaults.
GENERATE_ONLY: dict[str, Any] = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    **dict.fromkeys(("bad_words_ids", "sequence_bias", "min_new_tokens")),
    **dict.fromkeys(("exponential_decay_length_penalty", "suppress_tokens")),
    **dict.fromkeys(("begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id")),
}


@dataclass(frozen=True)
class Pair:
    """A target, its draft and their tokenizer, ready to decode."""

    target: Model  # the model whose distribution every output has
    draft: Draft
    tokenizer: PreTrainedTokenizerBase
    eos_ids: frozenset[int]  # every id that ends a text; see `tokenizer.end_ids`
    now: datetime | None = None  # the local time that chat templates see; None for the clock's

    def encode(self, text: str) -> list[int]:
        """Encode a prompt, with the special tokens that the tokenizer puts before it."""
        ids = self.tokenizer(text, **QUIET)["input_ids"]
        return ids[: len(ids) - num_appended(self.tokenizer)]

    def encode_chat(self, message: str) -> list[int]:
        """Encode a user's message in the chat template; see `tokenizer.encode_chat`."""
        return encode_chat(self.tokenizer, message, self.now)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Decode token ids to text, with spaces as they are."""
        text = self.tokenizer.decode(
            list(token_ids), skip_special_tokens, clean_up_tokenization_spaces=False
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
    device_map: Mapping[str, int | str] | None = None,
    ngram_max: int = 3,
    ngram_min: int = 1,
    model_k: int | None = None,
    min_confidence: float = 0.0,
    compile: str = "auto",
) -> Pair:
    """Load a target, a draft and the tokenizer they share.

    If the CPU kernel decodes both, PyTorch computes on one thread from then on.

    Args:
        target: a model's spec.
        draft: a draft's name; see `draft_name.py`.
        tokenizer: a spec for both; None takes the target's and compares the draft's with it.
        dtype: "float32", "float16", "bfloat16", or "auto" (see `resolve_dtype`).
        device: "cpu", "cuda", "cuda:N", "mps", or "auto" (a GPU if there is one).
        target_quantization: "none", "int8", "nf4" (needs the extra `quant`), or on a CPU "int4".
        draft_quantization: the same for a draft model of its own.
        device_map: where each part of the target goes, as accelerate takes it; None for all of it
            on `device`, where the draft goes in any case.
        ngram_max, ngram_min: the longest and the shortest n-gram that `ngram` looks up.
        model_k: the most tokens that a draft model proposes in a cycle; None for all k.
        min_confidence: see `drafts.ModelDraft`; 0 is off.
        compile: "off" leaves out the CPU kernel; "on" refuses models that it cannot decode.

    Raises:
        ModelError: in one line, what could not be loaded, why, and the way out.
    """
    chosen_device = resolve_device(device)
    chosen_dtype = resolve_dtype(dtype, chosen_device)
    shared = check_tokenizers(target, [draft], tokenizer)
    target_model = load_model(
        target, chosen_dtype, chosen_device, target_quantization, device_map, compile
    )
    _warn_of_settings(target_model, target)
    loaded_draft = load_draft(
        draft,
        target_model,
        chosen_dtype,
        quantization=draft_quantization,
        ngram_max=ngram_max,
        ngram_min=ngram_min,
        model_k=model_k,
        min_confidence=min_confidence,
        compile=compile,
    )
    if all(map(is_exact, (target_model, *draft_models(draft, loaded_draft).values()))):
        torch.set_num_threads(1)  # more would spin on cores that the kernel's threads need
    return Pair(target_model, loaded_draft, shared, end_ids(shared, target_model))


def check_tokenizers(
    target: str, drafts: Sequence[str], tokenizer: str | None = None
) -> PreTrainedTokenizerBase:
    """Return the tokenizer that a target shares with its drafts, before any weights are read.

    Specs are as `load_pair` takes them. With a `tokenizer` for all, nothing is compared. A
    ModelError names a tokenizer that cannot be loaded, or a draft's that encodes differently.
    """
    shared = load_tokenizer(tokenizer or target)
    for draft in drafts:
        if tokenizer is None and (spec := DraftName.parse(draft).spec):
            require_same_tokenizer(shared, load_tokenizer(spec), spec)
    return shared


def _warn_of_settings(target: Model, spec: str) -> None:
    """Warn of settings that `generate` would apply, and of texts that end before the context."""
    changed = [
        f"{name} {value}"
        for name, default in GENERATE_ONLY.items()
        if (value := getattr(target.generation_config, name, default)) not in (default, None)
    ]
    if changed:
        message = "the generation config of %s has settings that are not applied here: %s"
        log.warning(message, spec, ", ".join(changed))
    config = target.config.get_text_config(decoder=True)
    declared = next(getattr(config, name) for name in CONTEXT_NAMES if hasattr(config, name))
    if (limit := context_limit(target)) < declared:
        log.warning(
            "texts of %s end at %d tokens, not at %d: beyond that it changes the frequencies of "
            "all positions in the middle of a text",
            *(spec, limit, declared),
        )


def load_draft(
    draft: str,
    target: Model,
    dtype: torch.dtype,
    *,
    quantization: str = "none",
    ngram_max: int = 3,
    ngram_min: int = 1,
    model_k: int | None = None,
    min_confidence: float = 0.0,
    compile: str = "auto",
    loaded: Mapping[str, Model] | None = None,
) -> Draft:
    """Load a draft for a loaded target; see `load_pair` and `check_tokenizers`.

    Draft models that are loaded already are taken from `loaded`, by spec. A model that cannot be
    loaded is a ModelError.
    """
    name = DraftName.parse(draft)
    lookup = resolve_name(LOOKUPS[name.lookup])(ngram_max, ngram_min) if name.lookup else None
    if lookup and not name.model:
        return lookup
    if loaded and name.model in loaded:
        model = loaded[name.model]
    elif name.model.startswith(TARGET_LAYERS):
        model = _first_layers(target, name.model)
    else:
        model = load_model(name.model, dtype, target.device, quantization, compile=compile)
    model_draft = ModelDraft(model, model_k, min_confidence, name.is_greedy)
    return CompositeDraft(lookup, model_draft) if lookup else model_draft


def draft_models(draft: str, loaded: Draft) -> dict[str, Model]:
    """Return the model of a loaded draft by its spec; {} if it has none."""
    asked = loaded.model if isinstance(loaded, (CompositeDraft, AdaptiveDraft)) else loaded
    if not isinstance(asked, ModelDraft):
        return {}
    return {DraftName.parse(draft).model: asked.model}


def with_models(draft: Draft, made: Mapping[Model, Model]) -> Draft:
    """Return a draft whose model, if it has one, is what was `made` of it."""
    if isinstance(draft, (CompositeDraft, AdaptiveDraft)) and draft.model:
        return replace(draft, model=replace(draft.model, model=made[draft.model.model]))
    return replace(draft, model=made[draft.model]) if isinstance(draft, ModelDraft) else draft


def _first_layers(target: Model, spec: str) -> Model:
    name, way_out = f"models.draft {spec}", "choose draft: ngram, or a small model of the family"
    try:
        model = first_layers(target, int(spec.removeprefix(TARGET_LAYERS)))
    except ValueError as error:
        raise ModelError(f"{name}: {error}; {way_out}") from error
    except Exception as error:  # some configurations do not let their number of layers change
        failure = f"{name}: {target.config.model_type} models cannot be cut"
        raise model_error(failure, error, way_out) from error
    if isinstance(model, PreTrainedModel):
        require_decodable(model, name)
    return model


def resolve_device(device: str) -> torch.device:
    """Choose a device, or raise a ModelError if it is missing.

    `auto` is a CUDA GPU, else Apple's, else the CPU. A split begins on GPU 0.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", 0)
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    chosen = torch.device("cuda" if device.startswith(SPLIT) else device)
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ModelError(
            f"models.device {device} is not there (PyTorch sees {torch.cuda.device_count()} CUDA "
            "GPUs); choose --device cpu, or install a CUDA build of PyTorch"
        )
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise ModelError("models.device mps is not there; choose --device cpu")
    return torch.device("cuda", chosen.index or 0) if chosen.type == "cuda" else chosen


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Choose a dtype. `auto` is bfloat16 if it is fast, else float16 (GPU) or float32 (CPU)."""
    if dtype != "auto":
        return getattr(torch, dtype)
    if device.type != "cpu":
        is_cuda = device.type == "cuda"
        has_bfloat16 = is_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bfloat16 else torch.float16
    has_bfloat16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if has_bfloat16 or not why_no_kernel() else torch.float32
