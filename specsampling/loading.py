"""Loads, compiles and checks the models of a configuration, until they are ready to decode.

In all functions, `config` is the run's configuration, and `longest` is the number of tokens that
the longest text has with its prompt.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from specsampling.config import Compile, Config, ConfigError, method_parts, mistake
from specsampling.draft_name import DraftName
from specsampling.kernel.engine import set_num_threads
from specsampling.method.adaptive import AdaptiveDraft
from specsampling.method.batch import BatchRunner
from specsampling.method.drafts import Draft, NgramDraft
from specsampling.method.forward import Model, is_exact
from specsampling.method.session import context_limit
from specsampling.method.step import has_step
from specsampling.models.checkpoint import digest_model, plan_model
from specsampling.models.errors import ModelError, say
from specsampling.models.estimate import Lengths, Planned, need_of, ways_out
from specsampling.models.exactness import check_exactness
from specsampling.models.kernel_model import why_no_kernel
from specsampling.models.load import (
    Pair,
    check_tokenizers,
    draft_models,
    load_draft,
    load_pair,
    resolve_device,
    resolve_dtype,
    with_models,
)
from specsampling.models.memory import free_bytes, gigabytes, limit_way_out, resident_bytes
from specsampling.models.packing import why_not
from specsampling.models.source import EMBEDDED
from specsampling.models.split import SPLIT, split_target
from specsampling.models.static import make_static
from specsampling.provenance import device_name, precision
from specsampling.results.records import Run
from specsampling.tasks.task import Example

# A key is a draft's name, or "" for the pair's own, and whether k is chosen while decoding.
Drafts = dict[tuple[str, bool], Draft]

THREADS_PER_CORE = 8  # the system may refuse more threads, and that would end the process


def outline_models(config: Config) -> tuple[Pair, list[Planned]]:
    """Read what a run needs before it loads weights: configurations and tokenizers.

    Returns:
        A pair without weights, which encodes prompts, and the models as they will be loaded, the
            target first.

    Raises:
        ModelError: something is missing or does not fit.
    """
    models = config.models
    named = [models.draft, *drafts_named(config)]
    specs = dict.fromkeys(spec for name in named if (spec := DraftName.parse(name).spec))
    dtype = resolve_dtype(models.dtype, resolve_device(models.device))
    tokenizer = check_tokenizers(models.target, list(specs), models.tokenizer)
    target = plan_model(models.target, dtype, models.target_quantization)
    drafts = [plan_model(spec, dtype, models.draft_quantization) for spec in specs]
    return Pair(target.outline, NgramDraft(), tokenizer, frozenset()), [target, *drafts]


def baselines(config: Config) -> list[str]:
    """Name the methods that others are compared with.

    `reference` decodes with calls as wide as those of the speculative methods, so its rows have the
    same bits. In the CPU kernel bits do not depend on width, and `reference` would only repeat
    `autoregressive`.
    """
    device, target = resolve_device(config.models.device), config.models.target
    uses_kernel = device.type == "cpu" and config.decoding.compile != "off" and not why_no_kernel()
    if uses_kernel and not target.startswith(EMBEDDED):
        dtype = resolve_dtype(config.models.dtype, device)
        uses_kernel = not why_not(plan_model(target, dtype, "none").outline)
    needs_reference = config.decoding.bit_exact and not uses_kernel
    return ["autoregressive", *["reference"] * needs_reference]


def drafts_named(config: Config) -> list[str]:
    """Return the drafts that the methods name, each once."""
    drafts = [method_parts(method, config).draft for method in config.run.methods]
    return [draft for draft in dict.fromkeys(drafts) if draft]


def digest_files(config: Config, examples: Sequence[Example]) -> dict[str, str]:
    """Return hashes of a run's models and data, to tell them from others of the same names."""
    models = config.models
    specs = {"models.target": models.target, "models.draft": DraftName.parse(models.draft).spec}
    specs["models.tokenizer"] = models.tokenizer or ""
    specs |= {f"draft {draft}": DraftName.parse(draft).spec for draft in drafts_named(config)}
    digests = {name: digest_model(spec) for name, spec in specs.items() if spec}
    texts = json.dumps([(example.id, example.text, example.reference) for example in examples])
    return digests | {"data": hashlib.sha256(texts.encode()).hexdigest()[:16]}


def settle_memory(
    config: Config, models: Sequence[Planned], num_prompt_tokens: int, num_sharing: int = 1
) -> tuple[dict[str, int | str] | None, str]:
    """Compare what a run will take with the memory that is free, and print both.

    `models` come from `outline_models`, and the longest prompt has `num_prompt_tokens`.
    `num_sharing` processes share this machine's memory equally.

    Returns:
        The device of each part of the target, or None if the target is not split over GPUs; and
            the expected peak in words, or "" if it was not estimated.

    Raises:
        ModelError: the models do not fit; the message names choices that fit.
    """
    if any(hasattr(model.outline.config, "quantization_config") for model in models):
        say("  memory: not estimated, because a checkpoint is already quantised")
        return None, ""
    target, *drafts = models
    longest = num_prompt_tokens + config.decoding.max_new_tokens
    lengths = Lengths(longest, num_prompt_tokens, config.width, config.run.batch_size)
    device = resolve_device(config.models.device)
    need = need_of(target, drafts, device, lengths)
    if config.models.device.startswith(SPLIT):
        gpus = {i: free_bytes(torch.device("cuda", i)) for i in range(torch.cuda.device_count())}
        return split_target(target, drafts, lengths, gpus, config.models.device), ""
    free = free_bytes(device) // (1 if device.type == "cuda" else num_sharing)
    say(f"  memory: {need}, of {gigabytes(free)} free")
    if need.least > free:
        fitting = ways_out(target, drafts, device, lengths, free)
        raise ModelError(
            f"the models need {need}, and {device} has {gigabytes(free)} free; "
            f"choose {', or '.join(fitting) or 'smaller models'}{limit_way_out()}"
        )
    if need.total > free:
        say("  memory: loading will be slow, because checkpoint and model do not fit at once")
    if device.type == "cpu":
        return None, gigabytes(resident_bytes() + need.total)
    return None, f"{gigabytes(need.total)} of {device}"


def load_configured_pair(config: Config, device_map: Mapping[str, int | str] | None = None) -> Pair:
    """Load the target and its draft, and print the device and the precision.

    Raises:
        ConfigError: a size does not fit the target's context, or there are too many threads.
    """
    threads, most = config.run.threads, THREADS_PER_CORE * (os.cpu_count() or 1)
    if threads > most:
        rule = f"<= {most} here, {THREADS_PER_CORE} for each processor core"
        raise mistake("run.threads", rule, threads, "0 leaves the number to torch")
    if threads:
        torch.set_num_threads(threads)
        set_num_threads(threads)
    models = config.models
    say(f"Loading {models.target} with draft {models.draft} ...")
    pair = load_pair(**asdict(models), device_map=device_map, **_draft_options(config))
    device = pair.target.device
    say(f"  {device_name(device)} ({device}), {precision(config, device)}")
    _check_context(config, pair.target)
    return pair


def _check_context(config: Config, target: Model) -> None:
    """Check that a call and an answer fit the loaded target's context."""
    context, k, decoding = context_limit(target), config.speculation.k, config.decoding
    for field, value, size in (
        ("decoding.max_new_tokens", decoding.max_new_tokens, decoding.max_new_tokens + 1),
        ("speculation.k", k, 0 if k == "auto" else k + 1),
        ("decoding.width", decoding.width, config.call_width or 0),
    ):
        if size > context:
            raise ConfigError(
                f"{field} must fit the target's context of {context} tokens (got {value}); "
                "lower it, or choose a model with a longer context"
            )


def _draft_options(config: Config) -> dict[str, Any]:
    names = ("ngram_max", "ngram_min", "model_k", "min_confidence")
    options = {name: getattr(config.speculation, name) for name in names}
    return options | {"compile": config.decoding.compile}


def load_drafts(config: Config, pair: Pair) -> Drafts:
    """Return the pair's own draft, and load the others that the methods name."""
    models = config.models
    drafts: Drafts = {("", False): pair.draft}
    loaded = draft_models(models.draft, pair.draft)
    for spec in drafts_named(config):
        say(f"Loading the draft {spec} ...")
        drafts[spec, False] = load_draft(
            spec,
            pair.target,
            resolve_dtype(models.dtype, pair.target.device),
            quantization=models.draft_quantization,
            loaded=loaded,
            **_draft_options(config),
        )
        loaded |= draft_models(spec, drafts[spec, False])
    for parts in (method_parts(method, config) for method in config.run.methods):
        if parts.is_adaptive:
            drafts[parts.draft, True] = AdaptiveDraft.of(drafts[parts.draft, False])
    return drafts


def settle_steps(config: Config, existing_run: Run | None) -> tuple[Compile, str]:
    """Return what `decoding.compile: auto` means in a run, and the reason if it means "off".

    A resumed run goes on as `existing_run` began.

    Raises:
        ConfigError: the mode is `on`, but a GPU does not capture calls of several texts at once.
    """
    mode, size = config.decoding.compile, config.run.batch_size
    is_gpu_batch = size > 1 and resolve_device(config.models.device).type != "cpu"
    if is_gpu_batch and mode == "on":
        way_out = "set one of the two, or compile: auto"
        raise mistake("run.batch_size", "1 for decoding.compile: on with a GPU", size, way_out)
    if mode == "auto" and is_gpu_batch:
        return "off", "run.batch_size: several texts at once"
    if mode == "auto" and existing_run is not None and not existing_run.meta.get("steps"):
        return "off", "as in the rows that the file has"
    return mode, "decoding.compile: off"


def settle_noise(config: Config, existing_run: Run | None) -> frozenset[str]:
    """Return the methods that draw each token with the noise of its position.

    These are the methods with the rule `coupled` and, when sampling, the baselines. A resumed run
    goes on as `existing_run` began.
    """
    baselines = frozenset({"autoregressive", "reference"})
    is_sequential = config.sampling.noise == "sequential" or config.sampling.temperature == 0
    rows = existing_run.rows if existing_run else []
    if is_sequential or any(row.method in baselines and not row.noise for row in rows):
        baselines = frozenset()
    return config.coupled_methods | baselines & {*config.run.methods}


def make_steps(
    config: Config, pair: Pair, drafts: Drafts, longest: int
) -> tuple[Pair, Drafts, bool]:
    """Capture the models' decode calls on a GPU, and print the result for each model.

    Returns:
        The pair and the drafts with these calls, and whether the target's calls are static.
    """

    def capture(name: str, model: Model) -> Model:
        report = lambda line: say(f"  {name}: {line}")  # noqa: E731
        # A draft is fed one token, two after a fully accepted cycle, or all tokens it has missed.
        sizes = {1, config.width} if model is pair.target else {1, 2, config.width}
        made, result = make_static(model, config.decoding.compile, longest, sizes, report)
        report(result)
        return made

    made, drafts = _with_each_model(config, pair, drafts, capture)
    return made, drafts, not isinstance(made.target, PreTrainedModel)


def make_batch(config: Config, pair: Pair, drafts: Drafts, longest: int) -> tuple[Pair, Drafts]:
    """Make the models ready for `run.batch_size` texts at once.

    Raises:
        ModelError: a model can only decode one text at a time.
    """
    size = config.run.batch_size

    def prepare(name: str, model: Model) -> Model:
        if is_exact(model):
            return model  # its calls take rows of any texts
        assert isinstance(model, PreTrainedModel)
        if not has_step(model):
            raise ModelError(
                f"run.batch_size must be 1 for {name} (got {size}): {model.config.model_type} "
                "models keep transformers' forward, which decodes one text at a time here"
            )
        width = config.width if config.decoding.bit_exact and model is pair.target else None
        return BatchRunner(model, size, longest, config.width, width)

    return _with_each_model(config, pair, drafts, prepare)


def _with_each_model(
    config: Config, pair: Pair, drafts: Drafts, prepare: Callable[[str, Model], Model]
) -> tuple[Pair, Drafts]:
    """Replace each model by the result of `prepare`, which gets the model's name and the model."""
    names = {pair.target: config.models.target}
    for (spec, _), draft in drafts.items():
        for name, model in draft_models(spec or config.models.draft, draft).items():
            names[model] = f"the draft {name}"
    made = {model: prepare(name, model) for model, name in names.items()}
    drafts = {key: with_models(draft, made) for key, draft in drafts.items()}
    return replace(pair, target=made[pair.target], draft=drafts["", False]), drafts


def self_check(config: Config, pair: Pair, longest: int) -> str:
    """Check whether decoding is bit-exact on the loaded target; print and return the verdict."""
    check = check_exactness(pair.target, config.call_width, capacity=longest)
    verdict = "not asked for (decoding.bit_exact: false)"
    if is_exact(pair.target):
        verdict = f"{check}, at any width"
    elif config.decoding.bit_exact:
        verdict = f"{check}, at width {config.width}"
    say(f"  bit-exact decoding: {verdict}")
    if config.decoding.bit_exact and config.coupled_methods and not check.is_exact:
        raise ModelError(
            "speculation.verifier coupled needs rows with the same bits in every call (got: "
            f"{check}); choose token, or set decoding.bit_exact: false to let texts differ"
        )
    return verdict
