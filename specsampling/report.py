"""Tables and figures of a finished run, as the notebooks and the scripts show them.

Tables are pandas frames of plain numbers (rates are fractions); `printable` and
`format_table` turn them into text with percentages. Figures are matplotlib, made
to be read in greyscale. Knows rows, scores and a run's meta; decodes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from specsampling import metrics
from specsampling.records import RougeScore, Row, Score, Scores

if TYPE_CHECKING:  # imported where a figure is drawn: a script that prints a table needs none
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

METHODS = ("autoregressive", "reference", "speculative")  # then speculative:DRAFT, others
BASELINE = "autoregressive"  # the fastest baseline: speedups are measured against it

DARK, MIDDLE, LIGHT = "#1b3a57", "#7d93a8", "#d5dde5"  # apart in greyscale too

TERMINAL_HEADERS = {  # the header's two lines
    "method": ("", "method"),
    "n": ("", "n"),
    "pass@1": ("pass@1", "[95%]"),
    "rouge1": ("rouge1", "[95%]"),
    "tokens/s": ("", "tokens/s"),
    "speedup": ("speedup", "[95%]"),
    "end-to-end speedup": ("with", "prefill"),
    "draft acceptance rate": ("draft", "accepted"),
    "block efficiency": ("tokens", "/call"),
    "time outside forwards": ("outside", "forwards"),
    "identical outputs": ("identical", "outputs"),
}


# --- tables --------------------------------------------------------------------------


def summary_table(
    rows: Sequence[Row], scores: Scores | None = None, sampling: str = ""
) -> pd.DataFrame:
    """One line of numbers per method, every line over the same (example, sample) pairs.

    Pairs that a method lacks (a run stopped midway) are left out of all lines.
    `table.attrs["notes"]` is a list of sentences that belong under the table.

    Args:
        rows: a run's rows, of any methods.
        scores: pass or fail per row, or ROUGE; without them there are no such columns.
        sampling: how tokens were chosen, in the words of `describe_sampling`.
    """
    kept = _shared_rows(rows)
    compared_with = "reference" if "reference" in kept else BASELINE
    notes = []
    if num_left_out := len(rows) - sum(map(len, kept.values())):
        notes.append(f"{num_left_out} rows left out: another method lacks their example")
    lines = []
    for method, of_method in kept.items():
        line: dict[str, Any] = {"method": method, "sampling": sampling, "n": len(of_method)}
        if scores is not None:
            scored = _scores_of(of_method, scores)
            line |= _rouge_columns(scored) if _is_rouge(scores) else _pass_columns(scored)
            if len(scored) < len(of_method):
                notes.append(f"{method}: only {len(scored)} of {len(of_method)} rows are scored")
        line |= _speed_columns(of_method, kept.get(BASELINE, []))
        line["identical outputs"] = ""
        # Under sampling each method has a random stream of its own: texts must differ.
        is_greedy = sampling in ("", "greedy")
        if method.startswith("speculative") and compared_with in kept and is_greedy:
            num_identical, num_compared = metrics.count_identical(of_method, kept[compared_with])
            line["identical outputs"] = f"{num_identical}/{num_compared}"
        lines.append(line)
    if any(line["identical outputs"] for line in lines):
        notes.append(f"identical outputs: same token ids as method {compared_with}")
    if scores is not None and _is_rouge(scores):
        notes += _rouge_differences(kept, scores)
    cut = {row.example_id for row in rows if row.num_cut_tokens}
    if cut:
        notes.append(f"documents cut at their end to fit the context: {len(cut)}")
    table = pd.DataFrame(lines)
    table.attrs["notes"] = notes
    return table


def published_table() -> pd.DataFrame:
    """HumanEval as the earlier attempt at this reproduction published it: not our figures."""
    return pd.DataFrame(
        {
            "method": ["autoregressive", "speculative"],
            "pass@1": [0.35, 0.40],
            "speedup": [math.nan, 2.52],
            "draft acceptance rate": [math.nan, 0.75],
        }
    )


def printable(table: pd.DataFrame) -> pd.DataFrame:
    """A table as text: percentages, intervals as "1.62 [1.51, 1.74]", "-" where nothing is."""
    columns = {}
    for name in table.columns:
        if name.endswith((" low", " high")):
            continue
        columns[name] = [_as_text(name, value) for value in table[name]]
        if f"{name} low" in table:
            bounds = zip(table[f"{name} low"], table[f"{name} high"], strict=True)
            columns[name] = [
                cell
                if math.isnan(low)
                else f"{cell} [{_as_text(name, low)}, {_as_text(name, high)}]"
                for cell, (low, high) in zip(columns[name], bounds, strict=True)
            ]
    return pd.DataFrame(columns, index=table.index)


def format_table(table: pd.DataFrame) -> str:
    """A `summary_table` for a terminal: aligned, notes below, about 120 columns wide."""
    if table.empty:
        return "no rows to show"
    unseen = ["end-to-end speedup low", "end-to-end speedup high"]
    if "rouge1" in table:
        unseen += ["rouge2 low", "rouge2 high", "rougeL", "time outside forwards"]
    text = printable(table.drop(columns=unseen))
    columns = []
    for name in text.columns.drop("sampling"):
        cells = [*TERMINAL_HEADERS.get(name, ("", name)), *text[name]]
        width = max(map(len, cells))
        columns.append(
            [f"{cell:<{width}}" if name == "method" else f"{cell:>{width}}" for cell in cells]
        )
    lines = ["  ".join(cells).rstrip() for cells in zip(*columns, strict=True)]
    lines.insert(2, "-" * max(map(len, lines)))
    return "\n".join([*lines, *table.attrs["notes"]])


# --- sentences -----------------------------------------------------------------------


def describe_sampling(sampling: Mapping[str, Any]) -> str:
    """A config's `sampling` block in words: "greedy", or "temperature 0.8, top-p 0.95"."""
    if sampling["temperature"] == 0:
        return "greedy"
    words = [f"temperature {sampling['temperature']:g}"]
    if sampling["top_k"] > 0:
        words.append(f"top-k {sampling['top_k']}")
    if sampling["top_p"] < 1:
        words.append(f"top-p {sampling['top_p']:g}")
    return ", ".join(words)


def describe_run(meta: Mapping[str, Any]) -> str:
    """What was run, on what, and by which command: a few lines from a run's meta."""
    config = meta["config"]
    k, model_k = (config["speculation"].get(name) for name in ("k", "model_k"))
    limit = f" (at most {model_k} from a model)" if model_k else ""
    versions = ", ".join(f"{name} {version}" for name, version in meta["versions"].items())
    return f"""\
models:   target {config["models"]["target"]}, draft {config["models"]["draft"]}
decoding: k = {k}{limit}, {describe_sampling(config["sampling"])}, \
at most {config["decoding"]["max_new_tokens"]} new tokens
exact:    {meta["bit_exact"]}
machine:  {meta["device_name"]} ({meta["device"]}), {meta["precision"]}, {meta["threads"]} threads
run:      profile {meta["profile"]}, config {meta["config_hash"]}, \
commit {meta["git_commit"]}, {meta["date"]}
command:  {meta["command"]}
versions: {versions}"""


# --- figures -------------------------------------------------------------------------


def speedup_figure(rows: Sequence[Row]) -> Figure:
    """Each problem's speedup, sorted, with the ratio of totals and its interval as a line."""
    by_method = _shared_rows(rows)
    compared = metrics.speedup(by_method.get(BASELINE, []), by_method.get("speculative", []))
    ratios = sorted(compared.per_problem.values())
    total = compared.of_totals
    figure, axes = _new_figure()
    axes.plot(range(1, len(ratios) + 1), ratios, ".", color=DARK, label="one problem")
    total_label = f"ratio of totals: {_as_text('speedup', total.estimate)}"
    axes.axhline(total.estimate, color=DARK, label=total_label)
    axes.axhspan(total.low, total.high, color=LIGHT, linewidth=0, label="its 95% interval")
    axes.axhline(1, color="black", linestyle="--", linewidth=1, label="as fast as the baseline")
    num_faster = sum(ratio > 1 for ratio in ratios)
    axes.set_title(f"Speculative decoding is faster on {num_faster} of {len(ratios)} problems")
    axes.set_xlabel("problems, sorted by speedup")
    axes.set_ylabel("speedup\n(baseline s/token ÷ speculative s/token)")
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


def accepted_figure(rows: Sequence[Row]) -> Figure:
    """Histogram of accepted tokens per cycle; cycles without a draft are a bar of their own."""
    speculative = _rows_by_method(rows).get("speculative", [])
    counts = metrics.accepted_histogram(speculative)
    without_draft = metrics.num_cycles_without_draft(speculative)
    num_cycles = max(int(counts.sum()) + without_draft, 1)
    bars = {"no\ndraft": without_draft} if without_draft else {}
    bars |= {str(accepted): int(count) for accepted, count in enumerate(counts)}
    figure, axes = _new_figure()
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
    """Decoding speed of each method: the spread over problems, and the total."""
    by_method = _shared_rows(rows)
    speeds = {
        method: [
            metrics.tokens_per_second(of_problem)
            for of_problem in metrics.group_by_problem(of_method).values()
        ]
        for method, of_method in by_method.items()
    }
    figure, axes = _new_figure()
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
    num_problems = max(map(len, speeds.values()))
    axes.set_title(f"Decoding speed of each method over {num_problems} problems")
    axes.set_xlabel("box: middle half of the problems and their median; whiskers: 5% to 95%")
    axes.set_ylabel("tokens per second (prefill left out)")
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


def save_figure(figure: Figure, folder: str | Path, name: str) -> None:
    """Write `name`.png and `name`.svg into `folder`, which is made if it is not there."""
    import matplotlib as mpl

    Path(folder).mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"svg.hashsalt": name}):  # with no date: same figure, same file
        figure.savefig(Path(folder, f"{name}.png"), dpi=150)
        figure.savefig(Path(folder, f"{name}.svg"), metadata={"Date": None})


# --- the parts they share ------------------------------------------------------------


def _rows_by_method(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found = {row.method for row in rows}
    others = sorted(found - set(METHODS))
    return {
        method: [row for row in rows if row.method == method]
        for method in (*METHODS, *others)
        if method in found
    }


def _shared_rows(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by method, of the (example, sample) pairs that every method has."""
    by_method = _rows_by_method(rows)
    pairs = [{(row.example_id, row.sample_index) for row in group} for group in by_method.values()]
    shared = set.intersection(*pairs) if pairs else set()
    return {
        method: [row for row in group if (row.example_id, row.sample_index) in shared]
        for method, group in by_method.items()
    }


def _is_rouge(scores: Scores) -> bool:
    return bool(scores) and "rouge1" in scores[0]


def _scores_of(rows: Sequence[Row], scores: Scores) -> list[Any]:
    """The scores of `rows`, of the kind that they are."""
    keys = {row.key for row in rows}
    return [
        score
        for score in scores
        if (score["example_id"], score["method"], score["sample_index"]) in keys
    ]


def _pass_columns(scores: Sequence[Score]) -> dict[str, float]:
    """pass@1 with its interval, and larger k where every problem has enough samples."""
    larger = {f"pass@{k}": value for k, value in metrics.pass_at_k(scores).items() if k > 1}
    return _interval_columns("pass@1", metrics.pass_at_1_interval(scores)) | larger


def _rouge_columns(scores: Sequence[RougeScore]) -> dict[str, float]:
    """Mean ROUGE F1, each with its interval."""
    columns: dict[str, float] = {}
    for name in metrics.ROUGE_NAMES:
        columns |= _interval_columns(name, metrics.rouge_interval(scores, name))
    return columns


def _rouge_differences(by_method: Mapping[str, Sequence[Row]], scores: Scores) -> list[str]:
    """A sentence per method that the speculative one is compared with; `reference` must give 0."""
    scored = {method: _scores_of(rows, scores) for method, rows in by_method.items()}
    ours = scored.pop("speculative", [])
    sentences = []
    for method, theirs in scored.items():
        found = metrics.rouge_difference(ours, theirs, "rouge1")
        bounds = "" if math.isnan(found.low) else f" [{found.low:+.4f}, {found.high:+.4f}]"
        sentences.append(f"rouge1, speculative less {method}: {found.estimate:+.4f}{bounds}")
    return sentences if ours else []


def _speed_columns(rows: Sequence[Row], baseline: Sequence[Row]) -> dict[str, float]:
    decode = metrics.speedup(baseline, rows)
    end_to_end = metrics.speedup(baseline, rows, with_prefill=True)
    return {
        "tokens/s": metrics.tokens_per_second(rows),
        **_interval_columns("speedup", decode.of_totals),
        **_interval_columns("end-to-end speedup", end_to_end.of_totals),
        "draft acceptance rate": metrics.draft_acceptance_rate(rows),
        "block efficiency": metrics.block_efficiency(rows),
        "time outside forwards": metrics.overhead_share(rows),
    }


def _interval_columns(name: str, interval: metrics.Interval) -> dict[str, float]:
    return {name: interval.estimate, f"{name} low": interval.low, f"{name} high": interval.high}


def _as_text(name: str, value: Any) -> str:
    """One cell of column `name`."""
    if value == "" or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if name.startswith("pass@") or name in ("draft acceptance rate", "time outside forwards"):
        return f"{value:.1%}"
    if name in metrics.ROUGE_NAMES:
        return f"{value:.3f}"
    if name == "tokens/s":
        return f"{value:.1f}"
    if name == "n":
        return f"{value:.0f}"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _new_figure() -> tuple[Figure, Axes]:
    """A figure that pyplot has forgotten: a notebook then shows it once, where it is returned."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    plt.close(figure)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
