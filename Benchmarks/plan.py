"""Predict from measured calls whether speculative sampling pays on this machine for a pair.

    python Benchmarks/plan.py --target deepseek-coder-6.7b --draft deepseek-coder-1.3b
    python Benchmarks/plan.py --profile qwen-coder-cpu --validate

The script times a draft call, target calls of one to K + 1 rows, and a prefill. The models are the
profile's own, or have random weights in the shape of a configuration: a name below, a hub id, or a
folder with a config.json. It then predicts tokens per second and the best K for acceptance rates of
0.3 to 0.95, and the least rate that pays. The formula is Theorem 3.8 of Leviathan et al. 2023, with
measured calls in place of c.

`--rows FILE` predicts what a finished run would take here. `--validate` runs the real decoder with
a draft of known acceptance, and prints measured / predicted. `--figure FOLDER` measures at contexts
from 128 tokens to the models' limit, and draws time per token over context and K.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    from specsampling.edge import catch_signals

    catch_signals()

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from autoregressive import autoregressive
from specsampling.checking import parse_yaml
from specsampling.config import ConfigError, load_config
from specsampling.console import PROJECT, Parser, exit_code
from specsampling.loading import load_configured_pair
from specsampling.method.distribution import Distribution, one_hot
from specsampling.method.drafts import DraftTerms, ModelDraft, ModelProposer, num_logits
from specsampling.method.forward import Model, is_exact
from specsampling.method.session import Session, context_limit
from specsampling.models.checkpoint import make_fast
from specsampling.models.load import draft_models, resolve_device, resolve_dtype
from specsampling.models.source import quiet_transformers
from specsampling.models.static import make_static
from specsampling.provenance import device_name, peak_memory
from specsampling.results.figures import DARK, LIGHT, MIDDLE, save_figure
from specsampling.results.records import read_run
from specsampling.results.tables import rows_by_method
from speculative import speculative

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONFIGS: dict[str, dict[str, Any]] = json.loads(
    (PROJECT / "specsampling" / "data" / "configs.json").read_text()
)
ACCEPTANCES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
VALIDATED = (0.5, 0.7, 0.9)
NUM_CALLS = 15
SHOWN_ACCEPTANCE = 0.8
SHADES = (DARK, MIDDLE, LIGHT)
STEP = 8  # bit-exact decoding has widths that are multiples of this


@dataclass(frozen=True)
class Calls:
    """The seconds that calls take on this machine.

    Attributes:
        draft: a call of the draft.
        baseline: a target call of one row.
        target: by K, a target call that verifies K tokens.
        prefill: the prefills of both models together.
        rows: by K, the rows of that target call.
    """

    draft: float
    baseline: float
    target: dict[int, float]
    prefill: float
    rows: dict[int, int] = field(default_factory=dict)

    def tokens_per_second(self, acceptance: float, k: int) -> float:
        """Return the expected rate if each token is accepted with this probability."""
        return expected_tokens(acceptance, k) / (k * self.draft + self.target[k])

    def best_k(self, acceptance: float) -> int:
        return max(self.target, key=lambda k: self.tokens_per_second(acceptance, k))

    def speedup(self, acceptance: float) -> float:
        """Return the speedup over the target alone, at the best K."""
        return self.baseline * self.tokens_per_second(acceptance, self.best_k(acceptance))

    def break_even(self) -> float | None:
        """Return the least acceptance that pays; None if none does."""
        steps = (step / 200 for step in range(200))
        return next((acceptance for acceptance in steps if self.speedup(acceptance) > 1), None)


def expected_tokens(acceptance: float, k: int) -> float:
    """Return a cycle's tokens: (1 - α^(k + 1)) / (1 - α), Leviathan et al. 2023, equation 1."""
    return (1 - acceptance ** (k + 1)) / (1 - acceptance)


def measure(target: Model, draft: Model, largest_k: int, num_prompt_tokens: int) -> Calls:
    """Time the kinds of calls in turn, so that a busy moment of the machine slows them all."""
    rows = {k: rows_of(target, k) for k in range(1, largest_k + 1)}
    kinds: dict[Any, Any] = {"draft": (draft, 1), "baseline": (target, 1)}
    kinds |= {num_rows: (target, num_rows) for num_rows in sorted(set(rows.values()))}
    sessions, prefill = {}, 0.0
    tokens = some_tokens(target, draft, max(num_prompt_tokens, max(rows.values()) + 1))
    for kind, (model, num_rows) in kinds.items():
        sessions[kind] = Session(model, len(tokens) + 64, num_rows if num_rows > 1 else None)
        sessions[kind].prefill(tokens[:-1])
        if kind in ("draft", "baseline"):
            prefill += sessions[kind].forward_seconds
    seconds: dict[Any, list[float]] = {kind: [] for kind in kinds}
    for _ in range(NUM_CALLS):
        for kind, session in sessions.items():
            num_rows = kinds[kind][1]
            session.length = len(tokens) - num_rows
            start = time.perf_counter()
            session.score(tokens, last=num_rows)
            seconds[kind].append(time.perf_counter() - start)
    median = {kind: statistics.median(times[2:]) for kind, times in seconds.items()}
    by_k = {k: median[num_rows] for k, num_rows in rows.items()}
    return Calls(median["draft"], median["baseline"], by_k, prefill, rows)


def some_tokens(target: Model, draft: Model, num: int) -> list[int]:
    """Return a text that both models can read."""
    known = min(num_logits(target), num_logits(draft))
    return [i % min(known - 1, 1000) + 1 for i in range(num)]


def width_of(k: int) -> int:
    return (k // STEP + 1) * STEP


def rows_of(target: Model, k: int) -> int:
    """Rows of the target's call that verifies k tokens: as needed in the kernel, else a width."""
    return k + 1 if is_exact(target) else width_of(k)


# --- models --------------------------------------------------------------------------


def random_model(name: str, dtype: torch.dtype, device: torch.device, to_8_bit: bool) -> Any:
    """Make a fast model in the shape of a configuration, with random weights."""
    with quiet_transformers():
        if name in CONFIGS:
            config: Any = AutoConfig.for_model(**CONFIGS[name])
        else:
            try:
                config = AutoConfig.from_pretrained(name, trust_remote_code=False)
            except Exception as error:
                known = ", ".join(CONFIGS)
                raise ConfigError(
                    f"--target and --draft must name a configuration (got {name}); choose one of "
                    f"{known}, a hub id, or a folder with a config.json"
                ) from error
        with no_init_weights(), device:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    generator = torch.Generator(device).manual_seed(0)
    for weight in model.parameters():
        weight.requires_grad_(False)
        weight.fill_(1.0) if weight.dim() == 1 else weight.normal_(0, 0.02, generator=generator)
    return make_fast(model.eval(), "int8" if to_8_bit and device.type == "cpu" else "none")


# --- a draft of known acceptance ----------------------------------------------------


@dataclass(frozen=True)
class ScriptedDraft:
    """A draft that takes a model's time, and is right with the probability `acceptance`."""

    model: Model
    text: list[int]  # the prompt and the target's own tokens
    acceptance: float

    def start(self, terms: DraftTerms) -> ScriptedProposer:
        return ScriptedProposer(self, terms)


class ScriptedProposer(ModelProposer):
    def __init__(self, script: ScriptedDraft, terms: DraftTerms):
        super().__init__(ModelDraft(script.model), terms)
        self._script = script
        self._chance = random.Random(0)

    def propose(self, tokens: Sequence[int], k: int) -> tuple[list[int], list[Distribution]]:
        proposed, _ = super().propose(tokens, k)
        right = self._script.text[len(tokens) : len(tokens) + len(proposed)]
        right += proposed[len(right) :]
        vocab_size = self._terms.vocab_size
        said = [
            token if self._chance.random() < self._script.acceptance else (token + 1) % vocab_size
            for token in right
        ]
        return said, one_hot(said)


def validate(
    target: Model, draft: Model, calls: Calls, prompt: list[int], num_new: int
) -> list[str]:
    """Report measured / predicted tokens per second of the real decoder, at the best K.

    The prediction uses calls timed before and after the text, because a machine's pace drifts.
    """
    options: dict[str, Any] = {"max_new_tokens": num_new}
    lines = []
    for acceptance in VALIDATED:
        k = calls.best_k(acceptance)
        own = autoregressive(target, prompt, width=width_of(k), **options)
        script = ScriptedDraft(draft, prompt + own.token_ids, acceptance)
        before = measure(target, draft, k, len(prompt))
        done = speculative(target, script, prompt, k=k, width=width_of(k), **options)
        after = measure(target, draft, k, len(prompt))
        if done.token_ids != own.token_ids:
            lines.append(f"acceptance {acceptance}: the outputs differ from the target's own")
        accepted, drafted = sum(done.accepted), sum(done.drafted)
        cycles = len(done.drafted)
        timed = (cycles * of.target[k] + drafted * of.draft for of in (before, after))
        predicted = statistics.mean(timed)
        lines.append(
            f"acceptance {acceptance:.2f}, K = {k}: "
            f"{len(done.token_ids) / done.decode_seconds:.1f} tokens/s, "
            f"measured / predicted {predicted / done.decode_seconds:.2f} "
            f"({accepted} of {drafted} accepted in {cycles} cycles)"
        )
    return lines


# --- what is printed -----------------------------------------------------------------


def report(calls: Calls) -> list[str]:
    """Return the times, a line per acceptance, and a sentence of advice."""
    widths = some_sizes(calls)
    c = calls.draft / calls.baseline
    lines = [
        f"draft call {1e3 * calls.draft:.1f} ms, target call "
        + ", ".join(
            f"{1e3 * seconds:.1f} of {rows} rows"
            for rows, seconds in ({1: calls.baseline} | widths).items()
        )
        + f" (c {c:.2f}); prefill of both {1e3 * calls.prefill:.0f} ms",
        f"the target alone: {1 / calls.baseline:.1f} tokens/s",
        "acceptance  best K  tokens/s  speedup",
    ]
    for acceptance in ACCEPTANCES:
        k = calls.best_k(acceptance)
        rate = calls.tokens_per_second(acceptance, k)
        lines.append(f"{acceptance:10.2f}  {k:6}  {rate:8.1f}  {calls.speedup(acceptance):7.2f}")
    return [*lines, advice(calls)]


def some_sizes(calls: Calls) -> dict[int, float]:
    """Seconds of the target's calls by their rows: powers of two, and the largest."""
    sizes = {calls.rows.get(k, width_of(k)): seconds for k, seconds in calls.target.items()}
    return {rows: sizes[rows] for rows in sizes if rows.bit_count() == 1 or rows == max(sizes)}


def advice(calls: Calls) -> str:
    least = calls.break_even()
    if least is None:
        return (
            "Do not speculate: a draft call takes as long as it could save. Choose a smaller "
            "draft, or draft: ngram, which needs no calls."
        )
    if least > 0.8:
        return (
            f"Speculation pays only if more than {least:.0%} of the tested tokens are accepted. "
            "Few pairs reach that. Choose a smaller draft, or draft: ngram."
        )
    return (
        f"Speculation pays if more than {least:.0%} of the tested tokens are accepted. At 80%, "
        f"K = {calls.best_k(0.8)} gives a speedup of {calls.speedup(0.8):.1f}."
    )


def what_rows_would_take(path: Path, calls: Calls) -> list[str]:
    """Predict the seconds that a finished run's calls would take here."""
    lines = []
    for method, rows in rows_by_method(read_run(path).rows).items():
        largest = max((max(row.drafted, default=0) for row in rows), default=0)
        k = min(max(largest, 1), max(calls.target))
        call = calls.target[k] if method != "autoregressive" else calls.baseline
        predicted = sum(
            row.target_calls * call + row.draft_calls * calls.draft + calls.prefill for row in rows
        )
        measured = sum(row.prefill_seconds + row.decode_seconds for row in rows)
        times = f"took {measured:.0f} s, and would take about {predicted:.0f} s here"
        lines.append(f"{method}: the run {times} ({len(rows)} rows)")
    return lines


# --- over contexts -------------------------------------------------------------------


def contexts_of(limit: int) -> list[int]:
    """List 128 tokens, doubled up to what a model can hold with room for a few calls."""
    longest = limit - 64 - STEP
    doubled = [128 << i for i in range(longest.bit_length()) if 128 << i < longest]
    return [*doubled, longest]


def context_figure(measured: dict[int, Calls], title: str) -> Figure:
    """Plot milliseconds per call over the context, and per token over K at three contexts."""
    import matplotlib.pyplot as plt

    drawn, (calls, tokens) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    plt.close(drawn)
    contexts = list(measured)
    kinds = {"draft": [1e3 * of.draft for of in measured.values()]}
    kinds["target, 1 row"] = [1e3 * of.baseline for of in measured.values()]
    for rows in some_sizes(measured[contexts[0]]):
        times = [1e3 * some_sizes(of)[rows] for of in measured.values()]
        kinds[f"target, {rows} rows"] = times
    for (name, times), marker in zip(kinds.items(), "osD^v<>"):
        calls.plot(contexts, times, marker=marker, markersize=4, color=DARK, label=name)
    calls.set_xscale("log", base=2)
    calls.set_xlabel("context (tokens)")
    calls.set_ylabel("milliseconds per call")
    colours = dict(zip([contexts[-1], contexts[len(contexts) // 2], contexts[0]], SHADES))
    for context, colour in colours.items():
        of = measured[context]
        times = [1e3 / of.tokens_per_second(SHOWN_ACCEPTANCE, k) for k in of.target]
        tokens.plot(list(of.target), times, "o-", markersize=4, color=colour, label=f"{context:,}")
        tokens.axhline(1e3 * of.baseline, color=colour, linestyle="--", linewidth=1)
    tokens.set_xlabel(f"K, {SHOWN_ACCEPTANCE:.0%} accepted (dashed: the target alone)")
    tokens.set_ylabel("milliseconds per token")
    for axes in (calls, tokens):
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    calls.legend(title="call")
    tokens.legend(title="context")
    drawn.suptitle(title)
    return drawn


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_options(arguments)
    target, draft = pair_of(options)
    longest = options.prompt_tokens + options.new_tokens
    if longest + STEP > min(context_limit(target), context_limit(draft)):
        raise ConfigError(
            f"--prompt-tokens and --new-tokens must fit both contexts (got {longest} together)"
        )
    widths = {width_of(k) for k in range(1, options.k + 1)}
    say = lambda line: print(f"  {line}", file=sys.stderr, flush=True)  # noqa: E731
    target, made = make_static(target, options.compile, longest + 64, {1, *widths}, say)
    say(made)
    draft, made = make_static(draft, options.compile, longest + 64, {1, 2, max(widths)}, say)
    say(made)
    calls = measure(target, draft, options.k, options.prompt_tokens)
    print(
        f"{device_name(target.device)}, {str(target.dtype).removeprefix('torch.')}; peak memory "
        f"{peak_memory(target.device)}"
    )
    print("\n".join(report(calls)))
    if options.rows:
        print("\n".join(what_rows_would_take(options.rows, calls)))
    if options.validate:
        prompt = some_tokens(target, draft, options.prompt_tokens)
        print("\n".join(validate(target, draft, calls, prompt, options.new_tokens)))
    if options.figure:
        measured = {}
        for context in contexts_of(min(context_limit(target), context_limit(draft))):
            measured[context] = measure(target, draft, options.k, context)
            say(f"context {context:,}: " + report(measured[context])[0])
        drawn = context_figure(measured, device_name(target.device))
        save_figure(drawn, options.figure, "contexts")
    return 0


def pair_of(options: argparse.Namespace) -> tuple[Model, Model]:
    """Return the profile's models, or two models of random weights."""
    if options.target or options.draft:
        if not (options.target and options.draft):
            raise ConfigError("--target and --draft must come together; or give --profile")
        device = resolve_device(options.device)
        dtype = resolve_dtype(options.dtype, device)
        to_8_bit = options.quantization == "int8"
        target, draft = (
            random_model(name, dtype, device, to_8_bit) for name in (options.target, options.draft)
        )
        return target, draft
    config = load_config(options.config, options.profile)
    config = replace(config, models=replace(config.models, device=options.device))
    pair = load_configured_pair(config)
    models = list(draft_models(config.models.draft, pair.draft).values())
    if not models:
        raise ConfigError(
            f"models.draft must be a model here (got {config.models.draft}); n-grams need no plan, "
            "because they take no calls and pay wherever some tokens are accepted"
        )
    return pair.target, models[0]


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    names = ", ".join(CONFIGS)
    parser = Parser(f"{__doc__}\nNames: {names}.")
    parser.add_argument("--target", metavar="NAME", help="a configuration, for random weights")
    parser.add_argument("--draft", metavar="NAME", help="the draft's configuration")
    parser.add_argument("--config", metavar="FILE", type=Path, default=PROJECT / "config.yaml")
    parser.add_argument("--profile", metavar="NAME", help="a profile, for its own models")
    parser.add_argument("--device", metavar="NAME", default="auto")
    parser.add_argument("--dtype", metavar="NAME", default="auto", help="of random weights")
    parser.add_argument("--quantization", choices=["none", "int8"], default="none")
    parser.add_argument("--compile", choices=["auto", "on", "off"], default="off")
    parser.add_argument("--k", metavar="N", default="8", help="largest K (default: 8)")
    parser.add_argument("--prompt-tokens", metavar="N", default="256")
    parser.add_argument("--new-tokens", metavar="N", default="64", help="decoded by --validate")
    parser.add_argument("--rows", metavar="FILE", type=Path, help="a finished run's rows")
    parser.add_argument("--validate", action="store_true")
    parser.add_argument("--figure", metavar="FOLDER", type=Path, help="for contexts.png and .svg")
    options = parser.parse_args(arguments)
    for name in ("k", "prompt_tokens", "new_tokens"):
        flag = "--" + name.replace("_", "-")
        value = parse_yaml(getattr(options, name), flag)
        if not isinstance(value, int) or not 2 <= value <= 100_000:
            raise ConfigError(f"{flag} must be an integer from 2 to 100,000 (got {value})")
        setattr(options, name, value)
    return options


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
