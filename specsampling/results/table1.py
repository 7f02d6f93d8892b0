"""Table 1 of Chen et al. 2023 over our runs: the paper's grid, and the paper's own figures.

`Benchmarks/table1.py` makes the runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from specsampling.results import metrics, tables
from specsampling.results.figures import DARK, MIDDLE, new_figure
from specsampling.results.records import Run
from specsampling.results.tables import as_text, interval_columns, interval_names

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The grid of the paper, and greedy HumanEval, which the paper does not have.
TABLE1_FILES = {  # the greedy cells are the two experiments themselves
    "xsum-nucleus": "results1-nucleus.jsonl",
    "xsum-greedy": "results1.jsonl",
    "humaneval-nucleus": "results2-nucleus.jsonl",
    "humaneval-greedy": "results2.jsonl",
}
TABLE1_KEYS = ["benchmark", "sampling", "method"]
TABLE1_HEADINGS = ["source", "benchmark", "sampling"]  # in a terminal: lines of their own
TABLE1_MEASURES = {"rouge2": "XSum (ROUGE-2)", "pass@1": "HumanEval (pass@1)"}
COUPLED = "speculative@coupled"  # beside the paper's rule: it writes the baseline's texts
PAPER = "published by Chen et al. 2023, not measured here"
PAPER_SETUP = "the paper's: Chinchilla 70B, draft of 4B, K = 4, 16 TPU v4; 100 samples on HumanEval"


def table1_paths(folder: str | Path) -> dict[str, Path]:
    """Return the file of each cell's rows, in the paper's order."""
    return {cell: Path(folder, file) for cell, file in TABLE1_FILES.items()}


def table1(runs: Sequence[Run]) -> pd.DataFrame:
    """Make Table 1 of Chen et al. 2023 over our runs: a line per cell of the grid and method.

    It joins a `summary_table` of each run, with the paper's measure of quality (ROUGE-2 or
    pass@1), its difference from `autoregressive`'s, and decode milliseconds per new token.
    """
    parts, notes = [], []
    for run in runs:
        config = run.meta["config"]
        measure = "pass@1" if config["xsum"] is None else "rouge2"
        sampling = tables.describe_sampling(config["sampling"])
        rows = [row for row in run.rows if row.method in (*tables.METHODS, COUPLED)]
        part = tables.summary_table(rows, run.scores, sampling)
        notes += [f"{TABLE1_MEASURES[measure]}, {sampling}: {n}" for n in part.attrs["notes"]]
        part["benchmark"] = TABLE1_MEASURES[measure]
        part["ms/token"] = 1000 / part["tokens/s"]
        parts.append(part.join(_quality_differences(run, measure), on="method"))
    columns = [*TABLE1_KEYS, "n"]
    for measure in TABLE1_MEASURES:
        columns += [*interval_names(measure), *interval_names(f"{measure} difference")]
    columns += ["ms/token", *interval_names("speedup"), "identical outputs"]
    ks = {name.removeprefix("pass@") for part in parts for name in part} - {"1"}
    columns += [f"pass@{k}" for k in sorted(filter(str.isdigit, ks), key=int)]
    table = pd.concat([part.reindex(columns=columns) for part in parts], ignore_index=True)
    table.attrs["notes"] = notes
    return table


def paper_table1() -> pd.DataFrame:
    """Return Table 1 as Chen et al. 2023 published it, in the columns of `table1`."""
    xsum, humaneval = TABLE1_MEASURES.values()
    nan = math.nan
    return pd.DataFrame(
        [
            (xsum, "temperature 1, top-p 0.8", "autoregressive", 0.112, nan, 14.1, 1.0),
            (xsum, "temperature 1, top-p 0.8", "speculative", 0.114, nan, 7.52, 1.92),
            (xsum, "greedy", "autoregressive", 0.157, nan, 14.1, 1.0),
            (xsum, "greedy", "speculative", 0.156, nan, 7.00, 2.01),
            (humaneval, "temperature 0.8, top-p 0.95", "autoregressive", nan, 0.451, 14.1, 1.0),
            (humaneval, "temperature 0.8, top-p 0.95", "speculative", nan, 0.470, 5.73, 2.46),
        ],
        columns=[*TABLE1_KEYS, "rouge2", "pass@1", "ms/token", "speedup"],
    )


def table1_beside_paper(table: pd.DataFrame) -> pd.DataFrame:
    """Turn a `table1` into text, with the paper's own below; `result` is the measure."""
    both = pd.concat(
        {"this run": table.set_index(TABLE1_KEYS), PAPER: paper_table1().set_index(TABLE1_KEYS)},
        names=["source"],
    )
    text = tables.printable(both)
    for position, (name, suffix) in enumerate({"result": "", "difference": " difference"}.items()):
        rouge2, passed = text.pop(f"rouge2{suffix}"), text.pop(f"pass@1{suffix}")
        text.insert(position + 1, name, rouge2.where(rouge2 != "-", passed))
    return text


def format_table1(table: pd.DataFrame) -> str:
    """Format a `table1` for a terminal, with headings, and the paper's own below it."""
    text = table1_beside_paper(table).reset_index()
    first, second, rule, *lines = tables.aligned(text.drop(columns=TABLE1_HEADINGS))
    shown, above = [first, second], ("", "", "")
    for line, heading in zip(lines, zip(*(text[name] for name in TABLE1_HEADINGS)), strict=True):
        if heading[0] != above[0]:
            shown += [rule, f"{heading[0]}:"]
        if heading != above:
            shown.append(", ".join(heading[1:]))
        above = heading
        shown.append(line)
    return "\n".join([*shown, rule, *table.attrs["notes"], PAPER_SETUP])


def table1_figure(table: pd.DataFrame) -> Figure:
    """Plot the speedup in each cell of a `table1`, with its interval, beside the paper's."""
    ours, paper = (
        part[part["method"] == "speculative"].set_index(["benchmark", "sampling"])
        for part in (table, paper_table1())
    )
    paper = paper.reindex(ours.index)
    positions = np.arange(len(ours))
    bounds = [ours["speedup"] - ours["speedup low"], ours["speedup high"] - ours["speedup"]]
    figure, axes = new_figure()
    style = {"fmt": "D", "color": DARK, "capsize": 4, "label": "this run, with its 95% interval"}
    axes.errorbar(ours["speedup"], positions, xerr=np.nan_to_num(bounds), **style)
    style = {"color": MIDDLE, "markerfacecolor": "white", "markersize": 8}
    label = "the paper's, on its own models and hardware"
    axes.plot(paper["speedup"], positions + 0.25, "s", label=label, **style)
    for position, speedup, published in zip(positions, ours["speedup"], paper["speedup"]):
        label = as_text("speedup", speedup)
        axes.annotate(label, (speedup, position - 0.1), ha="center", va="bottom")
        if published > 0:
            label = f"   {as_text('speedup', published)}"
            axes.annotate(label, (published, position + 0.25), va="center")
    axes.axvline(1, color="black", linestyle="--", linewidth=1, label="as fast as the baseline")
    axes.set_yticks(positions, [",\n".join(map(str, cell)) for cell in ours.index])
    axes.set(
        title="Speedup of speculative sampling, cell by cell",
        xlabel="speedup (baseline s/token ÷ speculative s/token)",
        ylabel="benchmark and sampling",
        xlim=(0, None),
        ylim=(len(ours) - 0.5, -0.7),
    )
    figure.legend(loc="outside lower center", ncols=1)
    return figure


def _quality_differences(run: Run, measure: str) -> pd.DataFrame:
    """Tell by method how much higher the paper's measure is than the baseline's."""
    scored = {
        method: tables.scores_of(rows, run.scores or [])
        for method, rows in tables.shared_rows(run.rows).items()
    }
    baseline, lines = scored.pop(tables.BASELINE, []), {}
    for method, scores in scored.items():
        difference = metrics.quality_difference(scores, baseline, measure)
        lines[method] = interval_columns(f"{measure} difference", difference)
    return pd.DataFrame.from_dict(lines, orient="index")
