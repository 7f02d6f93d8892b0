"""Figure 1 of Chen et al. 2023: time per token, acceptance rate and loop time over K.

    python Benchmarks/figure1.py               the demo pair, K from 0 to 8
    python Benchmarks/figure1.py --limit 2     a first look; without it, the same goes on from there

Each cell (XSum and HumanEval, the paper's nucleus and greedily) is one run of main_exp1.py or
main_exp2.py whose methods are the baseline, the same at the width of all other calls (`reference`),
`speculative@K` for every K, and `speculative@auto`, so that all take turns. The draft is the
profile's model, without lookups before it and without a stop where it is unsure: K tokens every
time, as in the paper. Texts end after 64 tokens. Rows go to figure1/ in the output folder. A rerun
continues where the last one stopped; Benchmarks/figure1.ipynb shows the tables and the figure.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
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
from specsampling.checking import parse_yaml
from specsampling.config import SPECULATIVE, ConfigError, load_config
from specsampling.console import exit_code
from specsampling.draft_name import DraftName
from specsampling.results import metrics, table_text, tables
from specsampling.results.figures import DARK, MIDDLE, new_figure, save_figure
from specsampling.results.records import Row, Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AUTO = "speculative@auto"
FORMATS = {
    **{"K": "d", "n": "d", "ms/token": ".1f", "speedup": ".2f", "accepted": ".3f", "alpha": ".3f"},
    **{"c": ".2f", "predicted": ".2f", "measured / predicted": ".2f"},
    **{f"{part} ms": ".1f" for part in ("loop", "draft", "target", "rest")},
}
NOTES = (
    "K 0 is the baseline of one token a call. alpha: accepted / tested tokens; c: draft call / "
    "target call; loop: milliseconds a cycle, of its draft calls, its target call, and the rest",
    "predicted: (1 - alpha^(K+1)) / ((1 - alpha)(Kc + 1)), Leviathan et al. 2023, Theorem 3.8, K "
    "being the mean number of drafted tokens; for calls of one width it is a speedup over "
    "`reference`, whose calls have that width too, and otherwise over the baseline; the last "
    "column is the measured one / it",
)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_options(arguments)
    paths = figure1_paths(options.output_folder)
    paths = {cell: paths[cell] for cell in options.cells}
    require_cells(paths, options)
    overrides = {cell: overrides_of(cell, options) for cell in paths}
    if runs := run_cells(paths, overrides, options):
        print(f"\nFigure 1\n{format_figure1(runs)}")
        save_figure(figure1(runs), options.output_folder / "figures", "figure1")
    return 0


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = cell_parser(__doc__, num_samples=1)
    parser.add_argument("--k", metavar="N", default="8", help="largest K (default: 8)")
    parser.add_argument("--cells", metavar="A,B", default=",".join(CELLS), help="some of them")
    options = parser.parse_args(arguments)
    options.k = parse_yaml(options.k, "--k")
    if not isinstance(options.k, int) or not 1 <= options.k <= 64:
        raise ConfigError(f"--k must be an integer from 1 to 64 (got {options.k})")
    options.cells = chosen_cells(options.cells)
    return options


def overrides_of(cell: str, options: argparse.Namespace) -> list[str]:
    """What a cell changes in the profile: table1's, and one method for each K."""
    from specsampling.loading import baselines

    config = load_config(options.config, options.profile)
    draft = DraftName.parse(config.models.draft).model or config.models.draft
    # The formula takes a call of K + 1 rows for as long as one of 1: so are `reference`'s calls.
    is_bit_exact = config.decoding.bit_exact
    methods = [
        *baselines(config),
        *(f"speculative@{k}" for k in [*range(1, options.k + 1), "auto"]),
    ]
    return [
        *cell_overrides(CELLS[cell], options),
        f"models.draft={draft}",
        f"speculation.k={options.k}",
        "speculation.model_k=null",
        short_texts(config),
        "speculation.min_confidence=0",
        "speculation.verifier=token",
        f"decoding.bit_exact={json.dumps(is_bit_exact)}",
        "decoding.width=0",
        f"run.methods=[{', '.join(methods)}]",
    ]


def figure1_paths(folder: str | Path) -> dict[str, Path]:
    return {cell: Path(folder, "figure1", f"{cell}.jsonl") for cell in TABLE1_FILES}


def over_k(run: Run) -> pd.DataFrame:
    """Make a table of a line per K, from 0 (the baseline), over the examples that all have."""
    rows = tables.shared_rows(run.rows)
    by_k = {0: rows.get(tables.BASELINE, [])}
    for method, of_method in rows.items():
        found = SPECULATIVE.fullmatch(method)
        if found and (found.group("k") or "auto") != "auto":
            by_k[int(found.group("k"))] = of_method
    compared_with = rows.get("reference", by_k[0])
    lines = []
    for k, of_k in sorted(by_k.items()):
        line: dict[str, Any] = {"K": k, "n": metrics.num_problems(of_k)}
        line["ms/token"] = 1000 / metrics.tokens_per_second(of_k)
        line |= tables.speedup_columns("speedup", by_k[0], of_k)
        if k:
            line |= _cycle_columns(of_k)
            line["predicted"] = metrics.predicted_speedup(of_k)
            measured = metrics.speedup(compared_with, of_k).of_totals.estimate
            line["measured / predicted"] = measured / line["predicted"]
        lines.append(line)
    return pd.DataFrame(lines)


def _cycle_columns(rows: Sequence[Row]) -> dict[str, float]:
    num_cycles = sum(len(row.drafted) for row in rows)
    seconds = {
        "loop": sum(row.decode_seconds for row in rows),
        "draft": sum(row.draft_call_seconds or math.nan for row in rows),
        "target": sum(row.target_call_seconds or math.nan for row in rows),
    }
    seconds["rest"] = seconds["loop"] - seconds["draft"] - seconds["target"]
    return {
        "accepted": metrics.draft_acceptance_rate(rows),
        "alpha": metrics.per_token_acceptance(rows),
        "c": metrics.cost_ratio(rows),
        **{f"{name} ms": 1000 * value / num_cycles for name, value in seconds.items()},
    }


def found_k(run: Run) -> metrics.Interval | None:
    """Divide the pace of the K found while decoding by that of the best fixed K >= 1.

    K = 0 is left out: the baseline calls the target with one row, and a method that drafts cannot.
    """
    rows = tables.shared_rows(run.rows)
    if AUTO not in rows:
        return None
    table = over_k(run)
    best = best_k(table[table["K"] > 0])
    return metrics.speedup(rows[f"speculative@{best}"], rows[AUTO]).of_totals


def best_k(table: pd.DataFrame) -> int:
    return int(table["K"].iloc[int(table["ms/token"].argmin())])


def figure1_table(table: pd.DataFrame) -> pd.DataFrame:
    return table_text.formatted(table, FORMATS)


def describe_cell(cell: str, run: Run) -> str:
    """Say in one line where a cell is fastest."""
    table = over_k(run)
    if table["ms/token"].isna().all():
        return f"{cell}: rows of several machines, whose speeds cannot be compared"
    best = table.set_index("K").loc[best_k(table)]
    line = f"{cell}: fastest at K = {best.name}, {table_text.as_text('speedup', best['speedup'])}"
    if found := found_k(run):
        line += f"; K found while decoding: {found:.2f} of the best fixed K's pace"
    if len(table) > 3:
        from scipy.stats import linregress

        drafting = table[table["K"] > 0]
        fit = linregress(drafting["K"], drafting["loop ms"])
        line += f"; loop time {fit.intercept:.1f} + {fit.slope:.2f} K ms (R^2 {fit.rvalue**2:.3f})"
    return line


def format_figure1(runs: Mapping[str, Run]) -> str:
    """Format every cell's table for a terminal, and explain the columns."""
    lines = []
    for cell, run in runs.items():
        table = over_k(run)
        lines += [describe_cell(cell, run), *table_text.aligned(figure1_table(table))]
        lines += tables.few_notes(max(table["n"]))
    return "\n".join([*lines, "", *NOTES])


def figure1(runs: Mapping[str, Run]) -> Figure:
    """Plot the paper's three panels: time per token, acceptance rate and loop time over K."""
    figure, panels = new_figure(3)
    titles = {
        "ms/token": "time per token (ms); K = 0: the baseline\n"
        "dotted: predicted; star: K found while decoding",
        "accepted": "draft acceptance rate",
        "loop ms": "loop time (ms)",
    }
    for cell, run in runs.items():
        table = over_k(run)
        task, _, sampling = cell.partition("-")
        colour = DARK if task == "humaneval" else MIDDLE
        style = {"marker": "o" if sampling == "greedy" else "s", "color": colour, "markersize": 4}
        line = "-" if sampling == "greedy" else "--"
        for axes, column in zip(panels, titles):
            axes.plot(table["K"], table[column], line, label=cell, **style)
        measured = table["ms/token"] * table["measured / predicted"]
        panels[0].plot(table["K"], measured, ":", color=colour)
        if found := tables.shared_rows(run.rows).get(AUTO):
            num_drafted = [k for row in found for k in row.drafted] or [0]
            milliseconds = 1000 / metrics.tokens_per_second(found)
            panels[0].plot([fmean(num_drafted)], [milliseconds], "*", color=colour, markersize=11)
    for axes, title in zip(panels, titles.values()):
        axes.set_title(title, fontsize="medium")
        axes.set(xlabel="K", ylim=(0, None))
        axes.xaxis.get_major_locator().set_params(integer=True)
    panels[1].set_ylim(top=1)
    panels[2].legend()
    return figure


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
