"""Figure 1 of Chen et al. 2023 over our runs: time per token, acceptance and loop time over K.

Knows runs as `records` reads them; makes none (`Benchmarks/figure1.py` does).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from specsampling.config import SPECULATIVE
from specsampling.results import metrics
from specsampling.results.figures import DARK, MIDDLE
from specsampling.results.records import Row, Run
from specsampling.results.tables import BASELINE, aligned, as_text, interval_columns, shared_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AUTO = "speculative@auto"
CELLS = ("xsum-nucleus", "xsum-greedy", "humaneval-nucleus", "humaneval-greedy")
NOTES = (
    "K 0 is the baseline of one token a call. alpha: accepted / tested tokens; c: draft call / "
    "target call; loop: milliseconds a cycle, of its draft calls, its target call, and the rest",
    "predicted: (1 - alpha^(K+1)) / ((1 - alpha)(Kc + 1)), Leviathan et al. 2023, Theorem 3.8, K "
    "being the mean number of drafted tokens; for calls of one width it is a speedup over "
    "`reference`, whose calls have that width too, and otherwise over the baseline; the last "
    "column is the measured one / it",
)


def figure1_paths(folder: str | Path) -> dict[str, Path]:
    """Where the rows of each cell of the grid are."""
    return {cell: Path(folder, "figure1", f"{cell}.jsonl") for cell in CELLS}


def over_k(run: Run) -> pd.DataFrame:
    """A line per K, from 0 (the baseline), over the examples that every method has."""
    rows = shared_rows(run.rows)
    by_k = {0: rows.get(BASELINE, [])}
    for method, of_method in rows.items():
        found = SPECULATIVE.fullmatch(method)
        if found and (found.group("k") or "auto") != "auto":
            by_k[int(found.group("k"))] = of_method
    compared_with = rows.get("reference", by_k[0])
    lines = []
    for k, of_k in sorted(by_k.items()):
        line: dict[str, Any] = {"K": k, "n": len(of_k)}
        line["ms/token"] = 1000 / metrics.tokens_per_second(of_k)
        line |= interval_columns("speedup", metrics.speedup(by_k[0], of_k).of_totals)
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
    """The pace of the K found while decoding over that of the best fixed one, of 1 and more.

    (K = 0, the baseline, calls the target with one row, which none that drafts at one width can.)
    """
    rows = shared_rows(run.rows)
    if AUTO not in rows:
        return None
    table = over_k(run)
    best = best_k(table[table["K"] > 0])
    return metrics.speedup(rows[f"speculative@{best}"], rows[AUTO]).of_totals


def loop_line(table: pd.DataFrame) -> tuple[float, float, float]:
    """Loop time over K as a line: milliseconds at K = 0, milliseconds per K, and R squared."""
    from scipy.stats import linregress

    drafting = table[table["K"] > 0]
    fit = linregress(drafting["K"], drafting["loop ms"])
    return float(fit.intercept), float(fit.slope), float(fit.rvalue) ** 2


def best_k(table: pd.DataFrame) -> int:
    """The K of the least time per token."""
    return int(table["K"].iloc[int(table["ms/token"].argmin())])


def figure1_table(table: pd.DataFrame) -> pd.DataFrame:
    """An `over_k` as text."""
    text = pd.DataFrame({"K": table["K"].astype(str), "n": table["n"].astype(str)})
    text["ms/token"] = [f"{value:.1f}" for value in table["ms/token"]]
    intervals = table[["speedup", "speedup low", "speedup high"]].itertuples(index=False)
    text["speedup [95%]"] = [f"{mid:.2f} [{low:.2f}, {high:.2f}]" for mid, low, high in intervals]
    for name, digits in {"accepted": 3, "alpha": 3, "c": 2, "predicted": 2}.items():
        text[name] = [_number(value, digits) for value in table[name]]
    text["measured / predicted"] = [_number(value, 2) for value in table["measured / predicted"]]
    for name in ("loop ms", "draft ms", "target ms", "rest ms"):
        text[name] = [_number(value, 1) for value in table[name]]
    return text


def _number(value: float, digits: int) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}"


def describe_cell(cell: str, run: Run) -> str:
    """Where a cell is fastest, in one line."""
    table = over_k(run)
    best = table.set_index("K").loc[best_k(table)]
    line = f"{cell}: fastest at K = {best.name}, {as_text('speedup', best['speedup'])}"
    if found := found_k(run):
        interval = f"{found.estimate:.2f} [{found.low:.2f}, {found.high:.2f}]"
        line += f"; K found while decoding: {interval} of the best fixed K's pace"
    if len(table) > 3:
        intercept, slope, fit = loop_line(table)
        line += f"; loop time {intercept:.1f} + {slope:.2f} K ms (R^2 {fit:.3f})"
    return line


def format_figure1(runs: Mapping[str, Run]) -> str:
    """Every cell's table for a terminal, and what the columns are."""
    lines = []
    for cell, run in runs.items():
        lines += [describe_cell(cell, run), *aligned(figure1_table(over_k(run)))]
    return "\n".join([*lines, "", *NOTES])


def figure1(runs: Mapping[str, Run]) -> Figure:
    """The paper's three panels: time per token, acceptance rate and loop time over K."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(11, 4), layout="constrained")
    plt.close(figure)
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
        if found := shared_rows(run.rows).get(AUTO):
            num_drafted = [k for row in found for k in row.drafted]
            mean_k = sum(num_drafted) / max(len(num_drafted), 1)
            milliseconds = 1000 / metrics.tokens_per_second(found)
            panels[0].plot([mean_k], [milliseconds], "*", color=colour, markersize=11)
    for axes, title in zip(panels, titles.values()):
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel("K")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    panels[1].set_ylim(top=1)
    panels[2].legend()
    return figure
