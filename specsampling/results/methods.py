"""Draft x rule x choice of K: what each method of a run yields, and a figure.

Knows runs as `records` reads them; makes none (`Benchmarks/methods.py` does).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from specsampling.config import SPECULATIVE
from specsampling.results import metrics
from specsampling.results.figure1 import CELLS
from specsampling.results.figures import DARK, LIGHT, MIDDLE, new_figure
from specsampling.results.records import Run
from specsampling.results.tables import BASELINE, aligned, interval_columns, shared_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILLS = {"token": DARK, "block": MIDDLE}


def methods_paths(folder: str | Path) -> dict[str, Path]:
    """Where the rows of each cell of the grid are."""
    return {cell: Path(folder, "methods", f"{cell}.jsonl") for cell in CELLS}


def methods_table(run: Run) -> pd.DataFrame:
    """A line per method: its draft, K and rule, and what it yields over the shared examples."""
    rows = shared_rows(run.rows)
    lines = []
    for method, of_method in rows.items():
        found = SPECULATIVE.fullmatch(method)
        draft, k, rule = found.group("draft", "k", "rule") if found else (method, "", "")
        line = {"draft": draft or "the profile's", "K": k or "", "rule": rule or ""}
        line |= {"n": len(of_method), "tokens/s": metrics.tokens_per_second(of_method)}
        line |= interval_columns(
            "speedup", metrics.speedup(rows.get(BASELINE, []), of_method).of_totals
        )
        line["tokens/call"] = metrics.block_efficiency(of_method)
        line["accepted"] = metrics.draft_acceptance_rate(of_method)
        lines.append(line)
    return pd.DataFrame(lines)


def methods_text(table: pd.DataFrame) -> pd.DataFrame:
    """A `methods_table` as text."""
    text = table[["draft", "K", "rule"]].copy()
    text["n"] = table["n"].astype(str)
    text["tokens/s"] = [f"{value:.1f}" for value in table["tokens/s"]]
    intervals = table[["speedup", "speedup low", "speedup high"]].itertuples(index=False)
    text["speedup [95%]"] = [f"{mid:.2f} [{low:.2f}, {high:.2f}]" for mid, low, high in intervals]
    text["tokens/call"] = [f"{value:.2f}" for value in table["tokens/call"]]
    text["accepted"] = ["" if value != value else f"{value:.1%}" for value in table["accepted"]]
    return text


def format_methods(table: pd.DataFrame) -> str:
    """A `methods_table` for a terminal."""
    return "\n".join(aligned(methods_text(table)))


def methods_figure(table: pd.DataFrame, title: str) -> Figure:
    """The speedup of each method with its interval, the fastest above."""
    shown = table[table["K"] != ""].sort_values("speedup")
    names = [" ".join(filter(None, line)) for line in shown[["draft", "K", "rule"]].to_numpy()]
    bounds = [shown["speedup"] - shown["speedup low"], shown["speedup high"] - shown["speedup"]]
    figure, axes = new_figure()
    colours = [FILLS.get(rule, LIGHT) for rule in shown["rule"]]
    axes.barh(names, shown["speedup"], xerr=bounds, color=colours, capsize=2)
    axes.axvline(1, color="black", linestyle="--", linewidth=1)
    axes.set_title(title)
    axes.set_xlabel("speedup over the baseline (bars: 95% interval)")
    return figure
