"""Draws the figures of a finished run with matplotlib, to be read in greyscale too."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specsampling.results import metrics
from specsampling.results.records import Row
from specsampling.results.tables import BASELINE, as_text, rows_by_method, shared_rows

if TYPE_CHECKING:  # a script that prints a table needs no matplotlib
    from matplotlib.figure import Figure

DARK, MIDDLE, LIGHT = "#1b3a57", "#7d93a8", "#d5dde5"  # distinct in greyscale too


def speedup_figure(rows: Sequence[Row]) -> Figure:
    """Plot each example's speedup, sorted, with the ratio of totals and its interval."""
    by_method = shared_rows(rows)
    compared = metrics.speedup(by_method.get(BASELINE, []), by_method.get("speculative", []))
    ratios = sorted(compared.per_problem.values())
    total = compared.of_totals
    figure, axes = new_figure()
    axes.plot(range(1, len(ratios) + 1), ratios, ".", color=DARK, label="one example")
    total_label = f"ratio of totals: {as_text('speedup', total.estimate)}"
    axes.axhline(total.estimate, color=DARK, label=total_label)
    axes.axhspan(total.low, total.high, color=LIGHT, linewidth=0, label="its 95% interval")
    axes.axhline(1, color="black", linestyle="--", linewidth=1, label="as fast as the baseline")
    num_faster = sum(ratio > 1 for ratio in ratios)
    axes.set(
        title=f"Speculative decoding is faster on {num_faster} of {len(ratios)} examples",
        xlabel="examples, sorted by speedup",
        ylabel="speedup\n(baseline s/token ÷ speculative s/token)",
        ylim=(0, None),
    )
    axes.legend()
    return figure


def accepted_figure(rows: Sequence[Row]) -> Figure:
    """Plot a histogram of accepted tokens per cycle, with a bar for cycles without a draft."""
    speculative = rows_by_method(rows).get("speculative", [])
    counts = metrics.accepted_histogram(speculative)
    without_draft = metrics.num_cycles_without_draft(speculative)
    num_cycles = max(int(counts.sum()) + without_draft, 1)
    bars = {"no\ndraft": without_draft} if without_draft else {}
    bars |= {str(accepted): int(count) for accepted, count in enumerate(counts)}
    figure, axes = new_figure()
    drawn = axes.bar(
        list(bars), [100 * count / num_cycles for count in bars.values()], color=MIDDLE
    )
    axes.bar_label(drawn, [f"{count:,}" for count in bars.values()], padding=2)
    if without_draft:
        drawn[0].set(facecolor="white", edgecolor=MIDDLE, hatch="///")
    efficiency = metrics.block_efficiency(speculative)
    axes.set_title(f"Tokens accepted per cycle: {efficiency:.2f} new tokens per target call")
    axes.set_xlabel("accepted draft tokens in a cycle")
    axes.set_ylabel("share of cycles (%)\n(number of cycles above the bar)")
    axes.margins(y=0.1)
    return figure


def tokens_per_second_figure(rows: Sequence[Row]) -> Figure:
    """Plot the decoding speed of each method: the spread over examples, and the total."""
    by_method = shared_rows(rows)
    speeds = {
        method: [
            metrics.tokens_per_second(of_problem)
            for of_problem in metrics.grouped((row.example_id, row) for row in of_method).values()
        ]
        for method, of_method in by_method.items()
    }
    figure, axes = new_figure()
    axes.boxplot(
        [[speed for speed in of_method if speed > 0] for of_method in speeds.values()],
        widths=0.4,
        whis=(5, 95),
        flierprops={"marker": ".", "markersize": 3, "markeredgecolor": MIDDLE},
        medianprops={"color": MIDDLE},
    )
    for position, of_method in enumerate(by_method.values(), start=1):
        total = metrics.tokens_per_second(of_method)
        label = "all tokens / all seconds" if position == 1 else None
        axes.plot(position, total, "D", color=DARK, label=label)
        axes.annotate(f"{total:.1f}", (position + 0.25, total), va="center")
    labels = [method.replace(":", ":\n") for method in speeds]
    axes.set_xticks(range(1, len(speeds) + 1), labels)
    num_examples = max(map(len, speeds.values()))
    axes.set(
        title=f"Decoding speed of each method over {num_examples} examples",
        xlabel="box: middle half of the examples and their median; whiskers: 5% to 95%",
        ylabel="tokens per second (prefill left out)",
        ylim=(0, None),
    )
    axes.legend()
    return figure


def save_figure(figure: Figure, folder: str | Path, name: str) -> None:
    """Write `name`.png and `name`.svg into `folder`, which is made if it is missing."""
    import matplotlib as mpl

    Path(folder).mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"svg.hashsalt": name}):  # no date: equal figures make equal files
        figure.savefig(Path(folder, f"{name}.png"), dpi=150)
        figure.savefig(Path(folder, f"{name}.svg"), metadata={"Date": None})


def new_figure(num_panels: int = 1) -> tuple[Figure, Any]:
    """Make a figure with its axes. Pyplot forgets it, so a notebook shows it only once."""
    import matplotlib.pyplot as plt

    size = (7, 4) if num_panels == 1 else (11, 4)
    figure, axes = plt.subplots(1, num_panels, figsize=size, layout="constrained")
    plt.close(figure)
    for panel in figure.axes:
        panel.spines[["top", "right"]].set_visible(False)
    return figure, axes
