"""From a configuration to models that are ready to decode: loaded, compiled, checked.

Torch is imported only once a configuration has been read, so that a mistake in it is told at once.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

from specsampling.config import Compile, Config, ConfigError, MethodParts, method_parts
from specsampling.provenance import device_name, precision

if TYPE_CHECKING:
    from specsampling.method.drafts import Draft
    from specsampling.models.load import Pair
    from specsampling.results.records import Run

WORTH_COMPILING = 200  # rows
THREADS_PER_CORE = 8  # beyond that the system may refuse them, and ends the process


def load_configured_pair(config: Config) -> Pair:
    """Load the models that a configuration names, and say what became of `auto`."""
    import torch

    from specsampling.models.load import check_tokenizers, load_pair

    _check_threads(config.run.threads)
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    models = config.models
    others = list({parts.draft: None for parts in drafts_named(config) if parts.draft})
    if others:
        check_tokenizers(models.target, others, models.tokenizer)
    print(f"Loading {models.target} with draft {models.draft} ...", file=sys.stderr, flush=True)
    pair = load_pair(
        models.target,
        models.draft,
        tokenizer=models.tokenizer,
        dtype=models.dtype,
        device=models.device,
        target_quantization=models.target_quantization,
        draft_quantization=models.draft_quantization,
        **_draft_options(config),
    )
    device = pair.target.device
    print(f"  {device_name(device)} ({device}), {precision(config, device)}", file=sys.stderr)
    _check_context(config, pair)
    return pair


def _check_threads(threads: int) -> None:
    most = THREADS_PER_CORE * (os.cpu_count() or 1)
    if threads > most:
        raise ConfigError(
            f"run.threads must be <= {most} here, {THREADS_PER_CORE} for each processor core "
            f"(got {threads}); 0 leaves the number to torch"
        )


def _check_context(config: Config, pair: Pair) -> None:
    """Hold the sizes of a call and of an answer to what the loaded target can look at."""
    from specsampling.method.session import context_limit

    context = context_limit(pair.target)
    sizes = {
        "decoding.max_new_tokens": config.decoding.max_new_tokens + 1,  # a prompt has one or more
        "speculation.k": 0 if config.speculation.k == "auto" else config.largest_k + 1,
        "decoding.width": call_width(config) or 0,
    }
    for field, size in sizes.items():
        if size > context:
            block, _, key = field.partition(".")
            value = getattr(getattr(config, block), key)
            raise ConfigError(
                f"{field} must fit the target's context of {context} tokens (got {value}); "
                "lower it, or choose a model with a longer context"
            )


def _draft_options(config: Config) -> dict[str, Any]:
    names = ("ngram_max", "ngram_min", "model_k", "min_confidence")
    return {name: getattr(config.speculation, name) for name in names}


def drafts_named(config: Config) -> list[MethodParts]:
    """Of the methods; the draft "" is the pair's own."""
    return [method_parts(method, config) for method in config.run.methods]


def load_drafts(config: Config, pair: Pair) -> dict[tuple[str, bool], Draft]:
    """The methods' drafts, by name ("" is the pair's own) and whether k is found while decoding."""
    from specsampling.method.adaptive import AdaptiveDraft
    from specsampling.models.load import draft_models, load_draft, resolve_dtype

    fixed = {"": pair.draft}
    loaded = draft_models(config.models.draft, pair.draft)
    for spec in (parts.draft for parts in drafts_named(config)):
        if spec in fixed:
            continue
        print(f"Loading the draft {spec} ...", file=sys.stderr, flush=True)
        fixed[spec] = load_draft(
            spec,
            pair.target,
            resolve_dtype(config.models.dtype, pair.target.device),
            quantization=config.models.draft_quantization,
            **_draft_options(config),
            loaded=loaded,
        )
        loaded |= draft_models(spec, fixed[spec])
    drafts: dict[tuple[str, bool], Draft] = {(spec, False): draft for spec, draft in fixed.items()}
    for parts in drafts_named(config):
        if parts.is_adaptive:
            drafts[parts.draft, True] = AdaptiveDraft.of(fixed[parts.draft])
    return drafts


def settle_steps(config: Config, there: Run | None, num_rows: int) -> tuple[Compile, str]:
    """What `decoding.compile: auto` comes to in a run, and why in words where that is "off".

    Compiling takes minutes, so it is for long runs; and what was begun one way goes on so.

    Args:
        config: of the run.
        there: what an earlier process left of it.
        num_rows: how many it will have.
    """
    mode, device = config.decoding.compile, config.models.device
    if mode != "auto":
        return mode, "decoding.compile: off"
    if there is not None:
        is_eager = not there.meta.get("steps")
        return ("off", "as the rows that are there") if is_eager else ("auto", "")
    if num_rows < WORTH_COMPILING and not device.startswith("cuda"):
        return "off", f"{num_rows} rows are over sooner; --set decoding.compile=on does compile"
    return "auto", ""


def make_steps(
    config: Config,
    mode: Compile,
    pair: Pair,
    drafts: dict[tuple[str, bool], Draft],
    num_prompt_tokens: int,
) -> bool:
    """Compile or capture the models' decode calls, and say what became of each.

    Returns:
        Whether the target's calls are static now.
    """
    from specsampling.method.forward import runner_of
    from specsampling.models.load import draft_models
    from specsampling.models.static import make_static

    longest = num_prompt_tokens + config.decoding.max_new_tokens
    widest = call_width(config) or config.width
    models = {config.models.target: (pair.target, {1, widest})}
    for (spec, _), draft in drafts.items():  # fed its own last token, or all that it missed
        for name, model in draft_models(spec or config.models.draft, draft).items():
            models[f"the draft {name}"] = model, {1, 2, widest}
    for name, (model, sizes) in models.items():
        say = partial(print, f"  {name}:", file=sys.stderr, flush=True)
        say(make_static(model, mode, longest, sizes, report=say))
    return runner_of(pair.target) is not None


def self_check(config: Config, pair: Pair, num_prompt_tokens: int) -> str:
    """Whether decoding is bit-exact on the loaded target, in words that are printed too.

    Args:
        config: what the run asks for.
        pair: the loaded models.
        num_prompt_tokens: of the longest prompt to come.
    """
    from specsampling.models.exactness import check_exactness

    width = call_width(config)
    longest = num_prompt_tokens + config.decoding.max_new_tokens
    check = check_exactness(pair.target, width, capacity=longest)
    verdict = "not asked for (decoding.bit_exact: false)"
    if config.decoding.bit_exact:
        verdict = f"{check}, at width {width}"
    print(f"  bit-exact decoding: {verdict}", file=sys.stderr)
    return verdict


def call_width(config: Config) -> int | None:
    """Rows of every decode call; None for as many as there are new tokens."""
    return config.width if config.decoding.bit_exact else config.decoding.width or None
