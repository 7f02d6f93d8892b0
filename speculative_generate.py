"""`generate` of Transformers by speculative sampling, for models that are loaded there.

    from speculative_generate import speculative_generate

    output = speculative_generate(model, ids, assistant_model=small_model, max_new_tokens=64)

or, with this repository's folder as the recipe,

    model.generate(ids, custom_generate="PATH", trust_remote_code=True, assistant_model=small_model)
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from specsampling.method.adaptive import AdaptiveDraft
from specsampling.method.drafts import CompositeDraft, Draft, ModelDraft, NgramDraft
from specsampling.method.sampling import GREEDY, Sampling
from specsampling.method.session import context_limit
from specsampling.models.exactness import require_decodable
from speculative import speculative_stream

LARGEST_K = 7
DEFAULT_TOP_K = 50  # where nothing is set, `generate` samples among so many
# Settings that are followed, and settings that change no token of one text without a draft.
FOLLOWED = {
    *("do_sample", "temperature", "top_k", "top_p", "eos_token_id", "max_new_tokens", "max_length"),
    *("num_assistant_tokens", "assistant_confidence_threshold"),
    *("prompt_lookup_num_tokens", "max_matching_ngram_size"),
}
WITHOUT_EFFECT = {
    *("bos_token_id", "pad_token_id", "decoder_start_token_id", "use_cache", "cache_config"),
    *("cache_implementation", "max_cache_len", "is_assistant", "num_assistant_tokens_schedule"),
    *("compile_config", "disable_compile", "prefill_chunk_size", "low_memory", "early_stopping"),
    *("length_penalty", "transformers_version", "target_lookbehind"),
    *("assistant_lookbehind", "renormalize_logits"),
}
_proved: WeakSet[PreTrainedModel] = WeakSet()


class GenerateError(ValueError):
    """The error, in one line, that names an argument or setting that is not covered."""


def speculative_generate(
    model: PreTrainedModel,
    input_ids: Tensor | None = None,
    *,
    inputs: Tensor | None = None,
    assistant_model: PreTrainedModel | None = None,
    generation_config: GenerationConfig | None = None,
    attention_mask: Tensor | None = None,
    streamer: Any = None,
    generator: torch.Generator | None = None,
    **settings: Any,
) -> Tensor:
    """Continue one text. The output has exactly the distribution that `generate` samples from.

    The draft is `assistant_model`, or with `prompt_lookup_num_tokens` a lookup in the text, or
    both: then the lookup drafts first. How many tokens are drafted is chosen while decoding, unless
    `num_assistant_tokens` or `prompt_lookup_num_tokens` says it.

    Args:
        model: the target, loaded by Transformers.
        input_ids: [1, n] ids of the prompt; `inputs` is the same.
        assistant_model: a smaller model with the same tokenizer.
        generation_config: in place of the model's own.
        attention_mask: [1, n] ones.
        streamer: gets the prompt, each new token, and the end, as Transformers calls it.
        generator: source of randomness, on the model's device; None for torch's own.
        settings: fields of a `GenerationConfig`, which win over its values.

    Returns:
        [1, n + m] ids: the prompt and the new tokens.

    Raises:
        GenerateError: an argument or a setting is not covered, by its name.
        ModelError: a model cannot be decoded with a cache that is rolled back.
    """
    prompt = _prompt(input_ids if input_ids is not None else inputs, attention_mask)
    config = _settings(model, generation_config, settings)
    draft, k = _draft(assistant_model, config)
    for name, used in (("the model", model), ("assistant_model", assistant_model)):
        if used is not None and used not in _proved:
            require_decodable(used, name)
            _proved.add(used)
    steps = speculative_stream(
        model,
        draft,
        prompt,
        k=k,
        max_new_tokens=_max_new_tokens(config, len(prompt), context_limit(model)),
        sampling=_sampling(config),
        generator=generator,
        eos_ids=_eos_ids(config.eos_token_id),
    )
    if streamer is not None:
        streamer.put(torch.tensor([prompt]))
    new_ids: list[int] = []
    for step in steps:
        new_ids += step.token_ids
        for token in step.token_ids if streamer is not None else ():
            streamer.put(torch.tensor([token]))
    if streamer is not None:
        streamer.end()
    return torch.tensor([[*prompt, *new_ids]], device=model.device)


def _prompt(ids: Tensor | None, attention_mask: Tensor | None) -> list[int]:
    if ids is None or ids.dim() != 2 or len(ids) != 1:
        got = "none" if ids is None else f"shape {tuple(ids.shape)}"
        raise GenerateError(f"input_ids must be one text of shape [1, n] (got {got}); pass one row")
    if attention_mask is not None and not bool(attention_mask.all()):
        raise GenerateError("attention_mask must be all ones (got zeros); leave padding out")
    return ids[0].tolist()


def _settings(
    model: PreTrainedModel, given: GenerationConfig | None, settings: dict[str, Any]
) -> GenerationConfig:
    """Merge the settings as `generate` does, and refuse those that are not covered."""
    config = copy.deepcopy(given or model.generation_config) or GenerationConfig()
    unknown = config.update(**settings)
    defaults: dict[str, Any] = GenerationConfig._get_default_generation_params()
    for name in unknown:
        raise GenerateError(f"{name} is not covered (got {unknown[name]!r:.40}); leave it out")
    for name, value in vars(config).items():
        is_default = value is None or value is False or value == defaults.get(name)
        is_covered = name.startswith("_") or name in FOLLOWED | WITHOUT_EFFECT
        if not (is_default or is_covered):
            way_out = f"pass {name}={defaults.get(name)} to go without it"
            raise GenerateError(f"{name} is not covered (got {value!r:.40}); {way_out}")
    return config


def _draft(assistant: PreTrainedModel | None, config: GenerationConfig) -> tuple[Draft, int]:
    """Return the draft, and the most tokens that a cycle drafts."""
    num_lookup, num_model = config.prompt_lookup_num_tokens, config.num_assistant_tokens
    threshold = config.assistant_confidence_threshold or 0.0
    lookup = NgramDraft(config.max_matching_ngram_size or 2, 1) if num_lookup else None
    asked = ModelDraft(assistant, num_model, threshold) if assistant is not None else None
    if asked and lookup:
        return CompositeDraft(lookup, asked), max(num_lookup, num_model or 1)
    if asked and num_model:
        return asked, num_model
    if asked:
        return AdaptiveDraft.of(asked), LARGEST_K
    if lookup:
        return lookup, num_lookup
    raise GenerateError(
        "assistant_model or prompt_lookup_num_tokens must be given (got neither); they draft"
    )


def _sampling(config: GenerationConfig) -> Sampling:
    if not config.do_sample:
        return GREEDY
    top_k = DEFAULT_TOP_K if config.top_k is None else config.top_k
    temperature = 1.0 if config.temperature is None else config.temperature
    top_p = 1.0 if config.top_p is None else config.top_p
    return Sampling(temperature, top_k, top_p)


def _max_new_tokens(config: GenerationConfig, num_prompt: int, context: int) -> int:
    if config.max_new_tokens is not None:
        return config.max_new_tokens
    longest = config.max_length or 20
    if longest <= num_prompt:
        rule = f"max_length must exceed the prompt's {num_prompt} tokens"
        raise GenerateError(f"{rule} (got {longest}); pass max_new_tokens")
    return min(longest, context) - num_prompt


def _eos_ids(ids: int | Sequence[int] | None) -> Sequence[int]:
    return () if ids is None else [ids] if isinstance(ids, int) else list(ids)
