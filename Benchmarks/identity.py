"""What identity costs: three rules on the same prompts, beside what theory expects of them.

    python Benchmarks/identity.py                                the demo pair
    python Benchmarks/identity.py --limit 4 --profile qwen-coder-cpu   Qwen2.5-Coder 1.5B with 0.5B
    python Benchmarks/identity.py --show                         only print the tables again

`coupled` gives a seed one text, with any draft and without one. `token` and `block` accept more of
a model's tokens, and write other texts. Each setting is a run of HumanEval whose methods take
turns: every draft under every rule, and a draft that proposes its most probable tokens. The
chances of a single drafted token are then computed at each position of the baseline's texts. Rows
go to identity/ in the output folder. A rerun goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    from specsampling.edge import catch_signals

    catch_signals()

import numpy as np
import pandas as pd

import main_exp2
from Benchmarks.table1 import flags_of, runs_parser, short_texts
from specsampling.checking import parse_yaml
from specsampling.config import SPECULATIVE, Config, ConfigError, load_config, require_task
from specsampling.console import exit_code
from specsampling.draft_name import GREEDY, DraftName
from specsampling.edge import rank
from specsampling.results import metrics, table_text, tables
from specsampling.results.records import Run, read_run
from specsampling.results.runfile import check_output
from specsampling.tasks.humaneval import HumanEval

SETTINGS = [(temperature, top_p) for temperature in (0.6, 0.8, 1.0) for top_p in (1.0, 0.95)]
CHANCES = "chances.jsonl"
FORMATS = {
    **{"temperature": ".1f", "top_p": ".2f", "draft": "", "rule": "", "n": "d"},
    **{"expected": ".3f", "accepted": ".3f", "tokens/call": ".2f", "of token's": ".2f"},
    **{"tokens/s": ".1f", "speedup": ".2f", "identical": ""},
}


@dataclasses.dataclass(frozen=True)
class Chances:
    """The chances of a single drafted token at each position of a text, by closed forms.

    Attributes:
        temperature, top_p: the warp of both distributions.
        example_id: whose text, the baseline's.
        token: of `token` and `block`.
        coupled: of `coupled`.
        greedy: of exact matching with the draft's most probable token.
    """

    temperature: float
    top_p: float
    example_id: str
    token: list[float]
    coupled: list[float]
    greedy: list[float]


def token_chance(target: np.ndarray, draft: np.ndarray) -> float:
    """1 - TV = sum over v of min(p(v), q(v)): Chen et al. 2023 accept a token so often."""
    return float(np.minimum(target, draft).sum())


def coupled_chance(target: np.ndarray, draft: np.ndarray) -> float:
    """The chance that two exponential races with the same noise have the same winner.

    It is the sum over v of 1 / sum over w of max(p(w) / p(v), q(w) / q(v)) (Daliri et al. 2024).
    Where p(w) / q(w) exceeds p(v) / q(v) the first is larger, so sums over sorted ratios do.

    Args:
        target: [V] float64, sums to 1.
        draft: [V] float64, sums to 1.
    """
    some = (target > 0) | (draft > 0)
    p, q = target[some], draft[some]
    with np.errstate(divide="ignore"):
        order = np.argsort(-(p / q))
    p, q = p[order], q[order]
    p_above = np.cumsum(p) - p  # of larger ratios
    q_rest = np.cumsum(q[::-1])[::-1]
    both = (p > 0) & (q > 0)
    return float((1 / (p_above[both] / p[both] + q_rest[both] / q[both])).sum())


def greedy_chance(target: np.ndarray, draft: np.ndarray) -> float:
    """p at the draft's argmax."""
    return float(target[draft.argmax()])


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_options(arguments)
    config = load_config(options.config, options.profile)
    require_task(config, "humaneval")
    folder = options.output_folder / "identity"
    paths = paths_of(folder)
    if not options.show:
        for path in paths.values() if rank() == 0 else ():
            check_output(path)
        for setting, path in paths.items():
            print(f"\ntemperature {setting[0]}, top-p {setting[1]}", flush=True)
            main_exp2.main(arguments_of(setting, path, config, options))
        if rank():
            return 0
        if options.fresh:  # they are of the texts that were there
            (folder / CHANCES).unlink(missing_ok=True)
        add_chances(folder / CHANCES, paths, options)
    elif missing := [path for path in paths.values() if not path.is_file()]:
        raise ConfigError(f"--show needs rows (got none in {missing[0]}); run it without --show")
    chances = read_chances(folder / CHANCES)
    whole = pd.concat(
        identity_table(read_run(path), setting, chances) for setting, path in paths.items()
    )
    print(
        "\nby setting", *table_text.aligned(table_text.formatted(whole, FORMATS), keys=4), sep="\n"
    )
    print("\nover all settings", *table_text.aligned(over_settings(whole), keys=2), sep="\n")
    print(NOTE)
    return 0


def paths_of(folder: Path) -> dict[tuple[float, float], Path]:
    """The file of each setting's rows."""
    return {setting: folder / f"{setting[0]:g}-{setting[1]:g}.jsonl" for setting in SETTINGS}


NOTE = """\
expected: chance of a single drafted token at each position of the baseline's texts, by closed form
accepted: accepted / tested tokens; of token's: tokens/call / those of the rule token
identical: texts that equal the baseline's at the same seed"""


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = runs_parser(__doc__)
    parser.set_defaults(limit="20")
    parser.add_argument("--k", metavar="N", default="4", help="tokens per cycle (default: 4)")
    parser.add_argument("--show", action="store_true", help="print the tables of finished rows")
    options = parser.parse_args(arguments)
    options.k = parse_yaml(options.k, "--k")
    if not isinstance(options.k, int) or not 1 <= options.k <= 64:
        raise ConfigError(f"--k must be an integer from 1 to 64 (got {options.k}); lower it")
    return options


def model_of(config: Config) -> str:
    """The model that drafts in a profile; a ConfigError if none does."""
    if not (model := DraftName.parse(config.models.draft).model):
        raise ConfigError("models.draft must ask a model (got ngram); choose another profile")
    return model


def arguments_of(
    setting: tuple[float, float], path: Path, config: Config, options: argparse.Namespace
) -> list[str]:
    """Arguments of main_exp2.py for a setting's run."""
    from specsampling.loading import baselines

    model = model_of(config)
    rules = {
        "ngram": ["token", "coupled"],  # with one-hot drafts the block's rule is the token's
        model: ["token", "block", "coupled"],
        f"ngram+{model}": ["token", "block", "coupled"],
        f"{GREEDY}{model}": ["coupled"],
    }
    methods = baselines(config)
    methods += [f"speculative:{draft}@{rule}" for draft, of in rules.items() for rule in of]
    listed = ", ".join(f'"{method}"' for method in methods)
    values = [
        *(f"sampling.temperature={setting[0]}", f"sampling.top_p={setting[1]}"),
        *("sampling.top_k=0", "sampling.num_samples=1", short_texts(config)),
        *(f"speculation.k={options.k}", "speculation.model_k=null", "decoding.width=0"),
        *("speculation.min_confidence=0", f"run.methods=[{listed}]", f"run.limit={options.limit}"),
    ]
    found = ["--config", str(options.config), "--output", str(path)]
    found += ["--profile", options.profile] if options.profile else []
    found += [part for value in values for part in ("--set", value)]
    return found + flags_of(options)


def read_chances(path: Path) -> list[Chances]:
    lines = path.read_text().splitlines() if path.is_file() else []
    return [Chances(**json.loads(line)) for line in lines]


def add_chances(
    path: Path, paths: dict[tuple[float, float], Path], options: argparse.Namespace
) -> None:
    """Score the baselines' texts with both models, and append what is missing."""
    from specsampling.loading import load_configured_pair, outline_models
    from specsampling.method.session import Session
    from specsampling.models.load import draft_models
    from specsampling.provenance import prompt_date
    from specsampling.runner import encode_prompts

    done = {(item.temperature, item.top_p, item.example_id) for item in read_chances(path)}
    runs = {setting: read_run(of) for setting, of in paths.items()}
    missing = {
        setting: [
            row
            for row in run.rows
            if row.method == "autoregressive" and (*setting, row.example_id) not in done
        ]
        for setting, run in runs.items()
    }
    if not any(missing.values()):
        return
    config = load_config(options.config, options.profile)
    config = load_config(options.config, options.profile, [f"models.draft={model_of(config)}"])
    task, longest = HumanEval(require_task(config, "humaneval")), config.decoding.max_new_tokens
    outline, _ = outline_models(config)
    pair = load_configured_pair(config)
    (draft,) = draft_models(config.models.draft, pair.draft).values()
    for setting, rows in missing.items():
        dated = dataclasses.replace(outline, now=prompt_date(runs[setting].meta))
        found = encode_prompts(task, dated, None, longest)
        prompts = {example.id: prompt.token_ids for example, prompt in found}
        for row in rows:
            tokens = [*prompts[row.example_id], *row.token_ids][:-1]
            target_logits, draft_logits = (
                Session(model, len(tokens)).score(tokens, last=len(row.token_ids))
                for model in (pair.target, draft)
            )
            of_text = chances_of(target_logits, draft_logits, *setting)
            chances = Chances(*setting, row.example_id, *of_text)
            with path.open("a") as file:
                file.write(f"{json.dumps(dataclasses.asdict(chances))}\n")


def chances_of(target: Any, draft: Any, temperature: float, top_p: float) -> list[list[float]]:
    """The chances at n positions, from [n, V] logits of the target and of the draft."""
    from specsampling.method.sampling import Sampling, probs_from_logits

    warp, size = Sampling(temperature, top_p=top_p), target.shape[-1]
    found: list[list[float]] = [[], [], []]
    rows = zip(probs_from_logits(target, warp), probs_from_logits(draft[:, :size], warp))
    for p, q in rows:
        dense = [probs.dense(size).double().numpy() for probs in (p, q)]
        for chances, chance in zip(found, (token_chance, coupled_chance, greedy_chance)):
            chances.append(round(chance(*dense), 4))
    return found


def identity_table(
    run: Run, setting: tuple[float, float], chances: Iterable[Chances]
) -> pd.DataFrame:
    """Make a table of a line per draft and rule, over the examples that all have."""
    rows = tables.shared_rows(run.rows)
    baseline, exact = rows["autoregressive"], rows.get("reference", rows["autoregressive"])
    of_setting = [item for item in chances if (item.temperature, item.top_p) == setting]
    lines: list[dict[str, Any]] = []
    for method, of_method in rows.items():
        parts: Any = SPECULATIVE.fullmatch(method)
        if not parts:
            continue
        draft, rule = parts.group("draft", "rule")
        line: dict[str, Any] = {"temperature": setting[0], "top_p": setting[1]}
        line |= {"draft": draft, "rule": rule, "n": metrics.num_problems(of_method)}
        line["expected"] = np.nan
        if not draft.startswith("ngram"):
            kind = "greedy" if draft.startswith(GREEDY) else "coupled" if rule == "coupled" else ""
            values = [value for item in of_setting for value in getattr(item, kind or "token")]
            line["expected"] = float(np.mean(values)) if values else np.nan
        line["accepted"] = metrics.per_token_acceptance(of_method)
        line["tokens/call"] = metrics.block_efficiency(of_method)
        by_token = rows[f"speculative:{draft.removeprefix(GREEDY)}@token"]
        line["of token's"] = line["tokens/call"] / metrics.block_efficiency(by_token)
        line["tokens/s"] = metrics.tokens_per_second(of_method)
        line |= tables.speedup_columns("speedup", baseline, of_method)
        same, compared = metrics.count_identical(of_method, exact)
        line["identical"] = f"{same}/{compared}"
        lines.append(line)
    return pd.DataFrame(lines)


def over_settings(table: pd.DataFrame) -> pd.DataFrame:
    """Average each draft and rule over the settings."""
    columns = ["expected", "accepted", "tokens/call", "of token's", "tokens/s"]
    found = table.groupby(["draft", "rule"], sort=False)[columns].mean().reset_index()
    return table_text.formatted(found, {name: FORMATS[name] for name in found.columns})


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
