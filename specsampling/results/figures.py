"""Draws the figures of a finished run with matplotlib, to be read in greyscale too."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from specsampling.results import metrics
from specsampling.results.records import Row
from specsampling.results.table_text import as_text
from specsampling.results.tables import (
    BASELINE,
    drafting_rows,
    rows_by_machine,
    shared_rows,
)

if TYPE_CHECKING:  # a script that prints a table needs no matplotlib
    from matplotlib.figure import Figure

DARK, MIDDLE, LIGHT = "#1b3a57", "#7d93a8", "#d5dde5"  # distinct in greyscale too


def speedup_figure(rows: Sequence[Row]) -> Figure:
    """Plot the speedups of each method: a dot per problem, and the ratio of totals."""
    groups = _timed_groups(rows)
    compared = {
        name: metrics.speedup(by_method.get(BASELINE, []), of_method)
        for place, by_method in groups.items()
        for method, of_method in by_method.items()
        if method != BASELINE and (name := _label(method, place))
    }
    compared = {name: of for name, of in compared.items() if of.per_problem}
    if not compared:
        return _no_figure(f"no method to compare with {BASELINE} on one machine")
    figure, axes = new_figure(height=1.8 + 0.5 * len(compared))
    for position, of in enumerate(compared.values()):
        label = "one problem" if position == 0 else None
        ratios = list(of.per_problem.values())
        places = np.linspace(position - 0.2, position + 0.2, len(ratios) + 2)[1:-1]
        axes.plot(ratios, places, ".", color=MIDDLE, markersize=4, label=label)
        total = of.of_totals
        bounds = np.nan_to_num([[total.estimate - total.low], [total.high - total.estimate]])
        style = {"fmt": "D", "color": DARK, "capsize": 4, "markersize": 5}
        label = "ratio of totals, with its 95% interval" if position == 0 else None
        axes.errorbar(total.estimate, position, xerr=bounds, label=label, **style)
        num_faster = sum(ratio > 1 for ratio in ratios)
        words = f"{as_text('speedup', total.estimate)}; faster on {num_faster} of {len(ratios)}"
        axes.annotate(words, (1.01, position), xycoords=("axes fraction", "data"), va="center")
    axes.axvline(1, color="black", linestyle="--", linewidth=1, label="as fast as the baseline")
    axes.set(title="Speedup of each method", xlim=(0, None))
    axes.set_xlabel("speedup (baseline s/token ÷ method s/token)")
    _name_lines(figure, axes, list(compared))
    return figure


def accepted_figure(rows: Sequence[Row]) -> Figure:
    """Plot histograms of accepted tokens per cycle, with a bar for cycles without a draft."""
    groups = drafting_rows(rows)
    if not groups:
        return _no_figure("no method of this run drafts")
    figure, panels = new_figure(num_rows=len(groups), height=2 + 1.9 * len(groups))
    for axes, (method, of_method) in zip(np.ravel(panels), groups.items()):
        counts = metrics.accepted_histogram(of_method)
        without_draft = metrics.num_cycles_without_draft(of_method)
        num_cycles = int(counts.sum()) + without_draft
        bars = {"no\ndraft": without_draft} if without_draft else {}
        bars |= {str(accepted): int(count) for accepted, count in enumerate(counts)}
        heights = [100 * count / num_cycles for count in bars.values()]
        drawn = axes.bar(list(bars), heights, color=MIDDLE)
        axes.bar_label(drawn, [f"{count:,}" for count in bars.values()], padding=2, fontsize=7)
        if without_draft:
            drawn[0].set(facecolor="white", edgecolor=MIDDLE, hatch="///")
        efficiency = metrics.block_efficiency(of_method)
        axes.set_title(f"{method}: {efficiency:.2f} new tokens per target call", fontsize="small")
        axes.margins(y=0.15)
    axes.set_xlabel("accepted draft tokens in a cycle")
    figure.supylabel("share of cycles (%), with their number above the bar", fontsize="medium")
    return figure


def tokens_per_second_figure(rows: Sequence[Row]) -> Figure:
    """Plot the decoding speed of each method: the spread over problems, and the total."""
    groups = {
        _label(method, place): of_method
        for place, by_method in _timed_groups(rows).items()
        for method, of_method in by_method.items()
        if metrics.tokens_per_second(of_method) > 0
    }
    if not groups:
        return _no_figure("no speed of one machine")
    figure, axes = new_figure(height=1.8 + 0.5 * len(groups))
    for position, of_method in enumerate(groups.values()):
        by_problem = metrics.grouped((row.example_id, row) for row in of_method).values()
        speeds = [metrics.tokens_per_second(of_problem) for of_problem in by_problem]
        axes.boxplot(
            [[speed for speed in speeds if speed > 0]],
            positions=[position],
            orientation="horizontal",
            widths=0.4,
            whis=(5, 95),
            flierprops={"marker": ".", "markersize": 3, "markeredgecolor": MIDDLE},
            medianprops={"color": MIDDLE},
        )
        total = metrics.tokens_per_second(of_method)
        label = "all tokens / all seconds" if position == 0 else None
        axes.plot(total, position, "D", color=DARK, markersize=5, label=label)
        place = (1.01, position)
        axes.annotate(f"{total:.1f}", place, xycoords=("axes fraction", "data"), va="center")
    num = max(map(metrics.num_problems, groups.values()))
    axes.set(title=f"Decoding speed of each method over {num} problems", xlim=(0, None))
    axes.set_xlabel(
        "tokens per second (prefill left out)\n"
        "box: middle half of the problems and their median; whiskers: 5% to 95%"
    )
    _name_lines(figure, axes, list(groups))
    return figure


def _timed_groups(rows: Sequence[Row]) -> dict[str, dict[str, list[Row]]]:
    """Group rows by the machine's name ("" for a single one), then by method."""
    return rows_by_machine(rows) or {"": shared_rows(rows)}


def _label(method: str, machine: str) -> str:
    """Break a method's name into short lines, with its machine if there are several."""
    words = re.sub(r"(?<=[:@+])(?=.)", " ", method)
    name = textwrap.fill(words, 26, break_on_hyphens=False)
    return name.replace(" ", "") + (f"\non {machine}" if machine else "")


def _name_lines(figure: Figure, axes: Any, names: Sequence[str]) -> None:
    """Name the lines of a figure that has a line per method, the first above."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_ylabel("method")
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")


def _no_figure(reason: str) -> Figure:
    """Make a figure that says why nothing is drawn."""
    figure, axes = new_figure(height=1)
    axes.set_axis_off()
    axes.set_title(f"Nothing to draw: {reason}", fontsize="medium")
    return figure


def save_figure(figure: Figure, folder: str | Path, name: str) -> None:
    """Write `name`.png and `name`.svg into `folder`, which is made if it is missing."""
    import matplotlib as mpl

    Path(folder).mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"svg.hashsalt": name}):  # no date: equal figures make equal files
        figure.savefig(Path(folder, f"{name}.png"), dpi=150)
        figure.savefig(Path(folder, f"{name}.svg"), metadata={"Date": None})


def new_figure(num_columns: int = 1, num_rows: int = 1, height: float = 4) -> tuple[Figure, Any]:
    """Make a figure with its axes. Pyplot forgets it, so a notebook shows it only once."""
    import matplotlib.pyplot as plt

    size = 7 if num_columns == 1 else 11, height
    figure, axes = plt.subplots(num_rows, num_columns, figsize=size, layout="constrained")
    plt.close(figure)
    for panel in figure.axes:
        panel.spines[["top", "right"]].set_visible(False)
    return figure, axes
