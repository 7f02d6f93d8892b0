"""What each draft, rule and choice of K yields in a run, as a table and a figure.

`Benchmarks/methods.py` makes the runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from specsampling.config import SPECULATIVE
from specsampling.results import metrics, tables
from specsampling.results.figure1 import CELLS
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


def methods_paths(folder: str | Path) -> dict[str, Path]:
    return {cell: Path(folder, "methods", f"{cell}.jsonl") for cell in CELLS}


def methods_table(run: Run) -> pd.DataFrame:
    """Make a table of a line per method: its draft, K and rule, and its yield.

    A K found while decoding is also compared with the fastest fixed K of its draft and rule.
    """
    rows = tables.shared_rows(run.rows)
    parts = {method: _parts(method, run.meta["config"]["speculation"]) for method in rows}
    lines = []
    for method, of_method in rows.items():
        line: dict[str, Any] = dict(zip(("draft", "K", "rule"), parts[method], strict=True))
        line |= {"n": len(of_method), "tokens/s": metrics.tokens_per_second(of_method)}
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
    return tables.formatted(table, FORMATS)


def format_methods(table: pd.DataFrame) -> str:
    return "\n".join(tables.aligned(methods_text(table)))


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
