"""Draft x rule x choice of K: what each method of a run yields, and a figure.

Knows runs as `records` reads them; makes none (`Benchmarks/methods.py` does).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from specsampling.config import SPECULATIVE
from specsampling.results import metrics
from specsampling.results.figure1 import CELLS
from specsampling.results.figures import DARK, LIGHT, MIDDLE, new_figure
from specsampling.results.records import Run
from specsampling.results.tables import (
    BASELINE,
    aligned,
    interval_columns,
    interval_names,
    shared_rows,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AUTO_OVER_FIXED = "auto / fixed"
FILLS = {"token": DARK, "block": MIDDLE}


def methods_paths(folder: str | Path) -> dict[str, Path]:
    """Where the rows of each cell of the grid are."""
    return {cell: Path(folder, "methods", f"{cell}.jsonl") for cell in CELLS}


def methods_table(run: Run) -> pd.DataFrame:
    """A line per method: its draft, K and rule, and what it yields over the shared examples.

    Where K is found while decoding, also over the fastest fixed K of the same draft and rule.
    """
    rows = shared_rows(run.rows)
    parts = {method: _parts(method, run.meta["config"]["speculation"]) for method in rows}
    lines = []
    for method, of_method in rows.items():
        line: dict[str, Any] = dict(zip(("draft", "K", "rule"), parts[method], strict=True))
        line |= {"n": len(of_method), "tokens/s": metrics.tokens_per_second(of_method)}
        line |= interval_columns(
            "speedup", metrics.speedup(rows.get(BASELINE, []), of_method).of_totals
        )
        line["tokens/call"] = metrics.block_efficiency(of_method)
        line["accepted"] = metrics.draft_acceptance_rate(of_method)
        fixed = [
            rows[other]
            for other, (draft, k, rule) in parts.items()
            if parts[method] == (draft, "auto", rule) and k != "auto"
        ]
        fastest = max(fixed, key=metrics.tokens_per_second, default=[])
        line |= interval_columns(AUTO_OVER_FIXED, metrics.speedup(fastest, of_method).of_totals)
        lines.append(line)
    return pd.DataFrame(lines)


def _parts(method: str, speculation: Mapping[str, Any]) -> tuple[str, str, str]:
    """A method's draft, K and rule, by its name or else by its run's profile."""
    found = SPECULATIVE.fullmatch(method)
    if not found:
        return method, "", ""
    draft, k, rule = found.group("draft", "k", "rule")
    rule = rule or speculation.get("verifier", "token")
    return draft or "the profile's", k or str(speculation["k"]), rule


def methods_text(table: pd.DataFrame) -> pd.DataFrame:
    """A `methods_table` as text."""
    text = table[["draft", "K", "rule"]].copy()
    text["n"] = table["n"].astype(str)
    text["tokens/s"] = [f"{value:.1f}" for value in table["tokens/s"]]
    for name in ("speedup", AUTO_OVER_FIXED):
        intervals = table[interval_names(name)].itertuples(index=False)
        text[f"{name} [95%]"] = [
            "" if mid != mid else f"{mid:.2f} [{low:.2f}, {high:.2f}]"
            for mid, low, high in intervals
        ]
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
