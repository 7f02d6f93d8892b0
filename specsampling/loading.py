"""From a configuration to models that are ready to decode: loaded, compiled, checked.

Torch is imported only once a configuration has been read, so that a mistake in it is told at once.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from specsampling.config import Compile, Config, ConfigError, MethodParts, method_parts
from specsampling.provenance import device_name, precision

if TYPE_CHECKING:
    from specsampling.method.drafts import Draft
    from specsampling.models.estimate import Planned
    from specsampling.models.load import Pair
    from specsampling.results.records import Run
    from specsampling.tasks.task import Example

THREADS_PER_CORE = 8  # beyond that the system may refuse them, and ends the process


@dataclass(frozen=True)
class Outlines:
    """A run's models before they are loaded: shapes without weights.

    Attributes:
        pair: encodes prompts, and knows the target's context; nobody drafts.
        target: as it will be loaded.
        drafts: the models that will draft.
    """

    pair: Pair
    target: Planned
    drafts: list[Planned]


def outline_models(config: Config) -> Outlines:
    """From configurations and tokenizers alone, what a run needs to know before it loads.

    Raises:
        ModelError: in one line, what cannot be had.
    """
    from specsampling.method.drafts import NgramDraft
    from specsampling.models.checkpoint import plan_model
    from specsampling.models.load import (
        Pair,
        check_tokenizers,
        draft_spec,
        resolve_device,
        resolve_dtype,
    )

    models = config.models
    named = dict.fromkeys([models.draft, *(parts.draft for parts in drafts_named(config))])
    specs = dict.fromkeys(spec for name in named if name and (spec := draft_spec(name)))
    dtype = resolve_dtype(models.dtype, resolve_device(models.device))
    tokenizer = check_tokenizers(models.target, list(specs), models.tokenizer)
    target = plan_model(models.target, dtype, models.target_quantization)
    drafts = [plan_model(spec, dtype, models.draft_quantization) for spec in specs]
    return Outlines(Pair(target.outline, NgramDraft(), tokenizer, frozenset()), target, drafts)


def digest_files(config: Config, examples: Sequence[Example]) -> dict[str, str]:
    """What tells a run's models and data from others under the same names, by those names.

    Args:
        config: of the run.
        examples: all of the task's.

    Raises:
        ModelError: a model's files cannot be had.
    """
    from specsampling.models.checkpoint import digest_model
    from specsampling.models.load import draft_spec

    models = config.models
    specs = {"models.target": models.target, "models.draft": draft_spec(models.draft)}
    if models.tokenizer:
        specs["models.tokenizer"] = models.tokenizer
    for parts in drafts_named(config):
        if parts.draft:
            specs[f"draft {parts.draft}"] = draft_spec(parts.draft)
    digests = {name: digest_model(spec) for name, spec in specs.items() if spec}
    texts = json.dumps([(example.id, example.text, example.reference) for example in examples])
    return digests | {"data": hashlib.sha256(texts.encode()).hexdigest()[:16]}


@dataclass(frozen=True)
class MemoryPlan:
    """What is known of a run's memory before it is spent.

    Attributes:
        device_map: where each part of the target goes, if it is laid over several GPUs.
        peak: expected, in words; "" where it is not estimated.
    """

    device_map: dict[str, int | str] | None = None
    peak: str = ""


def settle_memory(
    config: Config, outlines: Outlines, prompt_lengths: Collection[int], num_sharing: int = 1
) -> MemoryPlan:
    """Hold what a run will take against the memory that is free, and say both.

    Args:
        config: of the run.
        outlines: its models.
        prompt_lengths: of all prompts to come, in tokens.
        num_sharing: processes that take as much of this machine.

    Raises:
        ModelError: it does not fit, in one line, with what would.
    """
    import torch

    from specsampling.models.errors import ModelError
    from specsampling.models.estimate import Lengths, need_of, ways_out
    from specsampling.models.load import resolve_device
    from specsampling.models.memory import free_bytes, gigabytes, limit_way_out, resident_bytes
    from specsampling.models.split import SPLIT, split_target

    say = partial(print, file=sys.stderr, flush=True)
    models = [outlines.target, *outlines.drafts]
    if any(hasattr(model.outline.config, "quantization_config") for model in models):
        say("  memory: not estimated, a checkpoint is quantised already")
        return MemoryPlan()
    width = call_width(config) or config.width
    prompt = max(prompt_lengths)
    longest = prompt + config.decoding.max_new_tokens
    num_texts = config.run.batch_size
    lengths = Lengths(longest, prompt, width, num_texts)
    device = resolve_device(config.models.device)
    need = need_of(outlines.target, outlines.drafts, device, lengths)
    if config.models.device.startswith(SPLIT):
        gpus = {i: free_bytes(torch.device("cuda", i)) for i in range(torch.cuda.device_count())}
        places = split_target(outlines.target, outlines.drafts, lengths, gpus, config.models.device)
        return MemoryPlan(places)
    free = free_bytes(device) if device.type == "cuda" else free_bytes(device) // num_sharing
    say(f"  memory: {need}, of {gigabytes(free)} free")
    if need.least > free:
        fitting = ways_out(outlines.target, outlines.drafts, device, lengths, free)
        raise ModelError(
            f"the models need {need}, and {device} has {gigabytes(free)} free; "
            f"choose {', or '.join(fitting) or 'smaller models'}{limit_way_out()}"
        )
    if need.total > free:
        say("  memory: loading will be slow, the checkpoint does not fit beside what is made of it")
    if device.type == "cpu":
        return MemoryPlan(peak=gigabytes(resident_bytes() + need.total))
    return MemoryPlan(peak=f"{gigabytes(need.total)} of {device}")


def load_configured_pair(
    config: Config,
    device_map: Mapping[str, int | str] | None = None,
    mode: Compile | None = None,
) -> Pair:
    """Load the models that a configuration names, and say what became of `auto`.

    Args:
        config: of the run.
        device_map: see `MemoryPlan`.
        mode: what `settle_steps` says; None takes the configuration's.
    """
    import torch

    from specsampling.kernel.engine import set_num_threads
    from specsampling.models.load import check_tokenizers, load_pair

    _check_threads(config.run.threads)
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
        set_num_threads(config.run.threads)
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
        device_map=device_map,
        compile=mode or config.decoding.compile,
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


def load_drafts(
    config: Config, pair: Pair, mode: Compile | None = None
) -> dict[tuple[str, bool], Draft]:
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
            compile=mode or config.decoding.compile,
            loaded=loaded,
        )
        loaded |= draft_models(spec, fixed[spec])
    drafts: dict[tuple[str, bool], Draft] = {(spec, False): draft for spec, draft in fixed.items()}
    for parts in drafts_named(config):
        if parts.is_adaptive:
            drafts[parts.draft, True] = AdaptiveDraft.of(fixed[parts.draft])
    return drafts


def settle_steps(config: Config, there: Run | None) -> tuple[Compile, str]:
    """What `decoding.compile: auto` comes to in a run, and why in words where that is "off".

    What was begun one way goes on so. On a GPU several texts at once are not captured.

    Args:
        config: of the run.
        there: what an earlier process left of it.

    Raises:
        ConfigError: the run asks for both.
    """
    from specsampling.models.load import resolve_device

    mode, size = config.decoding.compile, config.run.batch_size
    is_gpus_batch = size > 1 and resolve_device(config.models.device).type != "cpu"
    if is_gpus_batch and mode == "on":
        raise ConfigError(
            f"run.batch_size must be 1 for decoding.compile: on, but on a CPU (got {size}); set "
            "one of the two, or compile: auto"
        )
    if mode != "auto":
        return mode, "decoding.compile: off"
    if is_gpus_batch:
        return "off", "run.batch_size: several texts at once"
    if there is not None and not there.meta.get("steps"):
        return "off", "as the rows that are there"
    return "auto", ""


def make_steps(
    config: Config,
    mode: Compile,
    pair: Pair,
    drafts: dict[tuple[str, bool], Draft],
    num_prompt_tokens: int,
) -> bool:
    """Capture the models' decode calls on a GPU, and say what became of each.

    Returns:
        Whether the target's calls are static now.
    """
    from specsampling.method.forward import is_exact, runner_of
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
    return is_exact(pair.target) or runner_of(pair.target) is not None


def make_batch(
    config: Config, pair: Pair, drafts: dict[tuple[str, bool], Draft], num_prompt_tokens: int
) -> None:
    """Make the models ready for `run.batch_size` texts at once.

    Raises:
        ModelError: one of them cannot decode several.
    """
    from transformers import PreTrainedModel

    from specsampling.method.batch import install
    from specsampling.method.forward import is_exact
    from specsampling.method.step import has_step
    from specsampling.models.errors import ModelError
    from specsampling.models.load import draft_models

    size, widest = config.run.batch_size, call_width(config) or config.width
    models = {config.models.target: pair.target}
    for (spec, _), draft in drafts.items():
        models |= draft_models(spec or config.models.draft, draft)
    for name, model in models.items():
        if is_exact(model):
            continue  # its calls take rows of any texts
        assert isinstance(model, PreTrainedModel)
        if not has_step(model):
            raise ModelError(
                f"run.batch_size must be 1 for {name} (got {size}): {model.config.model_type} "
                "models keep transformers' forward, which is for one text here"
            )
        longest = num_prompt_tokens + config.decoding.max_new_tokens
        width = config.width if config.decoding.bit_exact and model is pair.target else None
        install(model, size, longest, widest, width)


def self_check(config: Config, pair: Pair, num_prompt_tokens: int) -> str:
    """Whether decoding is bit-exact on the loaded target, in words that are printed too.

    Args:
        config: what the run asks for.
        pair: the loaded models.
        num_prompt_tokens: of the longest prompt to come.
    """
    from specsampling.method.forward import is_exact
    from specsampling.models.exactness import check_exactness

    width = call_width(config)
    longest = num_prompt_tokens + config.decoding.max_new_tokens
    check = check_exactness(pair.target, width, capacity=longest)
    verdict = "not asked for (decoding.bit_exact: false)"
    if is_exact(pair.target):
        verdict = f"{check}, at any width"
    elif config.decoding.bit_exact:
        verdict = f"{check}, at width {width}"
    print(f"  bit-exact decoding: {verdict}", file=sys.stderr)
    return verdict


def call_width(config: Config) -> int | None:
    """Rows of every decode call; None for as many as there are new tokens."""
    return config.width if config.decoding.bit_exact else config.decoding.width or None
