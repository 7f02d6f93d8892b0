"""Every draft, rule and choice of K beside each other, on both tasks, greedily and sampled.

    python Benchmarks/methods.py --limit 20                     the demo pair
    python Benchmarks/methods.py --limit 20 --profile qwen-coder-cpu  Qwen2.5-Coder 1.5B with 0.5B

Drafts: the profile's model, n-grams, both, and the target's own first layers. K: the profile's
largest, and found while decoding. Rules: token by token, and, where they differ (sampling, and a
draft that has a distribution), the block as a whole. Each cell of the grid is one run whose
methods take turns, over texts of 64 tokens. Rows go to methods/ in the output folder; a rerun
continues, and Benchmarks/methods.ipynb shows the table and a figure.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    from specsampling.edge import catch_signals

    catch_signals()

import pandas as pd

from Benchmarks.table1 import (
    CELLS,
    TABLE1_FILES,
    cell_overrides,
    cell_parser,
    chosen_cells,
    require_cells,
    run_cells,
    short_texts,
)
from specsampling.config import SPECULATIVE, load_config
from specsampling.console import exit_code
from specsampling.draft_name import DraftName
from specsampling.results import metrics, table_text, tables
from specsampling.results.figures import DARK, LIGHT, MIDDLE, new_figure
from specsampling.results.records import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AUTO_OVER_FIXED = "auto / fixed"
FORMATS = {
    **{"draft": "", "K": "", "rule": "", "n": "d", "tokens/s": ".1f", "speedup": ".2f"},
    **{AUTO_OVER_FIXED: ".2f", "tokens/call": ".2f", "accepted": ".1%"},
}
FILLS = {"token": DARK, "block": MIDDLE}


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_options(arguments)
    paths = methods_paths(options.output_folder)
    paths = {cell: paths[cell] for cell in options.cells}
    require_cells(paths, options)
    overrides = {cell: overrides_of(cell, options) for cell in paths}
    for cell, run in run_cells(paths, overrides, options).items():
        print(f"\n{cell}\n{format_methods(methods_table(run))}")
    return 0


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = cell_parser(__doc__, num_samples=1)
    parser.add_argument("--cells", metavar="A,B", default=",".join(CELLS), help="some of them")
    parser.add_argument(
        "--layers", metavar="N", default="4", help="the target's first N as a draft; 0: none"
    )
    options = parser.parse_args(arguments)
    options.cells = chosen_cells(options.cells)
    return options


def overrides_of(cell: str, options: argparse.Namespace) -> list[str]:
    """What a cell changes in the profile: table1's, and a method for each combination."""
    from specsampling.loading import baselines

    config = load_config(options.config, options.profile)
    model = DraftName.parse(config.models.draft).model
    drafts = ["ngram", model, f"ngram+{model}"] if model else ["ngram"]
    if options.layers != "0":
        drafts.append(f"target-layers:{options.layers}")
    is_greedy = CELLS[cell].temperature == 0
    methods = baselines(config) if is_greedy else ["autoregressive"]
    k = config.largest_k
    for draft in drafts:
        choices = [f"{k}@token", "auto@token"]
        if not is_greedy and draft != "ngram":
            choices += [f"{k}@block", "auto@block"]
        methods += [f"speculative:{draft}@{choice}" for choice in choices]
    listed = ", ".join(f'"{method}"' for method in methods)
    return [
        *cell_overrides(CELLS[cell], options),
        short_texts(config),
        f"run.methods=[{listed}]",
    ]


def methods_paths(folder: str | Path) -> dict[str, Path]:
    return {cell: Path(folder, "methods", f"{cell}.jsonl") for cell in TABLE1_FILES}


def methods_table(run: Run) -> pd.DataFrame:
    """Make a table of a line per method: its draft, K and rule, and its yield.

    A K found while decoding is also compared with the fastest fixed K of its draft and rule.
    """
    rows = tables.shared_rows(run.rows)
    parts = {method: _parts(method, run.meta["config"]["speculation"]) for method in rows}
    lines = []
    for method, of_method in rows.items():
        line: dict[str, Any] = dict(zip(("draft", "K", "rule"), parts[method], strict=True))
        line["n"] = metrics.num_problems(of_method)
        line["tokens/s"] = metrics.tokens_per_second(of_method)
        line |= tables.speedup_columns("speedup", rows.get(tables.BASELINE, []), of_method)
        line["tokens/call"] = metrics.block_efficiency(of_method)
        line["accepted"] = metrics.draft_acceptance_rate(of_method)
        fixed = [
            rows[other]
            for other, (draft, k, rule) in parts.items()
            if parts[method] == (draft, "auto", rule) and k != "auto"
        ]
        fastest = max(fixed, key=metrics.tokens_per_second, default=[])
        line |= tables.speedup_columns(AUTO_OVER_FIXED, fastest, of_method)
        lines.append(line)
    return pd.DataFrame(lines)


def _parts(method: str, speculation: Mapping[str, Any]) -> tuple[str, str, str]:
    """Read a method's draft, K and rule from its name, or else from its run's profile."""
    found = SPECULATIVE.fullmatch(method)
    if not found:
        return method, "", ""
    draft, k, rule = found.group("draft", "k", "rule")
    rule = rule or speculation.get("verifier", "token")
    return draft or "the profile's", k or str(speculation["k"]), rule


def methods_text(table: pd.DataFrame) -> pd.DataFrame:
    return table_text.formatted(table, FORMATS)


def format_methods(table: pd.DataFrame) -> str:
    notes = tables.few_notes(max(table["n"], default=0))
    return "\n".join([*table_text.aligned(methods_text(table), keys=3), *notes])


def methods_figure(table: pd.DataFrame, title: str) -> Figure:
    """Plot the speedup of each method with its interval, the fastest above."""
    shown = table[table["K"] != ""].sort_values("speedup")
    names = [" ".join(filter(None, line)) for line in shown[["draft", "K", "rule"]].to_numpy()]
    bounds = [shown["speedup"] - shown["speedup low"], shown["speedup high"] - shown["speedup"]]
    figure, axes = new_figure()
    colours = [FILLS.get(rule, LIGHT) for rule in shown["rule"]]
    axes.barh(names, shown["speedup"], xerr=bounds, color=colours, capsize=2)
    axes.axvline(1, color="black", linestyle="--", linewidth=1)
    axes.set(title=title, xlabel="speedup over the baseline (bars: 95% interval)")
    return figure


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
