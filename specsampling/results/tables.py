"""Tables and figures of a finished run, as the notebooks and the scripts show them.

Tables are pandas frames of plain numbers (rates are fractions); `printable` and
`format_table` turn them into text with percentages. Figures are matplotlib, made
to be read in greyscale. Knows rows, scores and a run's meta; decodes nothing.
"""

from __future__ import annotations

import html
import math
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from specsampling.method.text import Generation
from specsampling.results import metrics
from specsampling.results.records import RougeScore, Row, Run, Score, Scores

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
    "result": ("result", "[95%]"),
    "difference": ("less autoregressive's", "[95%]"),
    "ms/token": ("ms", "/token"),
}

PUBLISHED = {  # by the earlier attempt at this reproduction: autoregressive, speculative
    "xsum": {
        "rouge1": [0.160, 0.159],
        "speedup": [math.nan, 1.84],
        "draft acceptance rate": [math.nan, 0.32],
    },
    "humaneval": {
        "pass@1": [0.35, 0.40],
        "speedup": [math.nan, 2.52],
        "draft acceptance rate": [math.nan, 0.75],
    },
}

# The grid of Chen et al. 2023, Table 1, and greedy HumanEval, which the paper does not have.
TABLE1_FILES = {  # the greedy cells are the two experiments themselves
    "xsum-nucleus": "results1-nucleus.jsonl",
    "xsum-greedy": "results1.jsonl",
    "humaneval-nucleus": "results2-nucleus.jsonl",
    "humaneval-greedy": "results2.jsonl",
}
TABLE1_KEYS = ["benchmark", "sampling", "method"]
TABLE1_HEADINGS = ["source", "benchmark", "sampling"]  # in a terminal: lines of their own
TABLE1_MEASURES = {"rouge2": "XSum (ROUGE-2)", "pass@1": "HumanEval (pass@1)"}
PAPER = "published by Chen et al. 2023, not measured here"
PAPER_SETUP = "the paper's: Chinchilla 70B, draft of 4B, K = 4, 16 TPU v4; 100 samples on HumanEval"

TOKEN_MARKS = {  # a token by its origin; what is bold or underlined stays apart in greyscale
    "accepted": '<span style="color: #1b7837">{}</span>',
    "correction": '<b style="color: #b2182b"><u>{}</u></b>',
    "bonus": '<b style="color: #2166ac"><i>{}</i></b>',
    "target": "<span>{}</span>",
}
TOKEN_ORIGINS = {
    "accepted": "drafted and accepted",
    "correction": "the target's, after a rejection",
    "bonus": "the target's, with nothing rejected",
    "target": "the target's, without a draft",
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
    for other, differences in _differences(kept, scores or []).items():
        for name, difference in differences.items():
            if name not in ("rouge2", "rougeL"):
                text = _interval_text(f"{name} difference", *astuple(difference))
                notes.append(f"{name}, speculative less {other}: {text}")
    cut = {row.example_id for row in rows if row.num_cut_tokens}
    if cut:
        notes.append(f"documents cut at their end to fit the context: {len(cut)}")
    table = pd.DataFrame(lines)
    table.attrs["notes"] = notes
    return table


def published_table(task: Literal["xsum", "humaneval"]) -> pd.DataFrame:
    """A task as the earlier attempt at this reproduction published it: not our figures."""
    return pd.DataFrame({"method": ["autoregressive", "speculative"], **PUBLISHED[task]})


def rouge_difference_table(rows: Sequence[Row], scores: Scores) -> pd.DataFrame:
    """ROUGE of the speculative outputs less that of each other method, paired by sample.

    One line per method that they are compared with; `reference` must give 0 in a greedy run.
    """
    lines = []
    for other, differences in _differences(_shared_rows(rows), scores).items():
        line: dict[str, Any] = {"speculative less": other}
        for name, difference in differences.items():
            line |= _interval_columns(f"{name} difference", difference)
        lines.append(line)
    return pd.DataFrame(lines)


def example_table(
    rows: Sequence[Row],
    documents: Mapping[str, str],
    num_examples: int = 3,
    num_characters: int = 300,
) -> pd.DataFrame:
    """The first examples side by side: the document's start, the reference, and the outputs.

    Args:
        rows: of the methods wanted; of several samples, the first is shown.
        documents: example id -> text, for any of the examples.
        num_examples: how many to show.
        num_characters: where a document is cut.
    """
    lines: dict[str, dict[str, str | None]] = {}
    for method, of_method in _shared_rows(rows).items():
        for row in [row for row in of_method if row.sample_index == 0][:num_examples]:
            document = documents.get(row.example_id, "")
            start = textwrap.shorten(document, num_characters, placeholder=" ...")
            line = {"document": start, "reference summary": row.reference}
            lines.setdefault(row.example_id, line)[method] = row.completion
    return pd.DataFrame.from_dict(lines, orient="index")


def table1_paths(folder: str | Path) -> dict[str, Path]:
    """Where the rows of each cell of the grid are, in the paper's order."""
    return {cell: Path(folder, file) for cell, file in TABLE1_FILES.items()}


def table1(runs: Sequence[Run]) -> pd.DataFrame:
    """Table 1 of Chen et al. 2023 over our runs: a line per cell of the grid and method.

    A `summary_table` of each run with the paper's measure of quality (ROUGE-2 or pass@1), how
    much higher it is than `autoregressive`'s, and `ms/token`: decode milliseconds / new tokens.
    """
    parts, notes = [], []
    for run in runs:
        config = run.meta["config"]
        measure = "pass@1" if config["xsum"] is None else "rouge2"
        sampling = describe_sampling(config["sampling"])
        rows = [row for row in run.rows if row.method in METHODS]
        part = summary_table(rows, run.scores, sampling)
        notes += [f"{TABLE1_MEASURES[measure]}, {sampling}: {n}" for n in part.attrs["notes"]]
        part["benchmark"] = TABLE1_MEASURES[measure]
        part["ms/token"] = 1000 / part["tokens/s"]
        parts.append(part.join(_quality_differences(run, measure), on="method"))
    columns = [*TABLE1_KEYS, "n"]
    for measure in TABLE1_MEASURES:
        columns += [*_interval_names(measure), *_interval_names(f"{measure} difference")]
    columns += ["ms/token", *_interval_names("speedup"), "identical outputs"]
    ks = {name.removeprefix("pass@") for part in parts for name in part} - {"1"}
    columns += [f"pass@{k}" for k in sorted(filter(str.isdigit, ks), key=int)]
    table = pd.concat([part.reindex(columns=columns) for part in parts], ignore_index=True)
    table.attrs["notes"] = notes
    return table


def paper_table1() -> pd.DataFrame:
    """Table 1 as Chen et al. 2023 published it, in the columns of `table1`: not our figures."""
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
    """A `table1` as text, the paper's own below it; `result` is the benchmark's measure."""
    both = pd.concat(
        {"this run": table.set_index(TABLE1_KEYS), PAPER: paper_table1().set_index(TABLE1_KEYS)},
        names=["source"],
    )
    text = printable(both)
    for position, (name, suffix) in enumerate({"result": "", "difference": " difference"}.items()):
        rouge2, passed = text.pop(f"rouge2{suffix}"), text.pop(f"pass@1{suffix}")
        text.insert(position + 1, name, rouge2.where(rouge2 != "-", passed))
    return text


def printable(table: pd.DataFrame) -> pd.DataFrame:
    """A table as text: percentages, intervals as "1.62 [1.51, 1.74]", "-" where nothing is."""
    columns = {}
    for name in table.columns:
        if name.endswith((" low", " high")):
            continue
        if f"{name} low" in table:
            intervals = zip(*(table[part] for part in _interval_names(name)), strict=True)
            columns[name] = [_interval_text(name, *interval) for interval in intervals]
        else:
            columns[name] = [_as_text(name, value) for value in table[name]]
    return pd.DataFrame(columns, index=table.index)


def format_table(table: pd.DataFrame) -> str:
    """A `summary_table` for a terminal: aligned, notes below, about 120 columns wide."""
    if table.empty:
        return "no rows to show"
    unseen = ["end-to-end speedup low", "end-to-end speedup high"]
    if "rouge1" in table:
        unseen += ["rouge2 low", "rouge2 high", "rougeL", "time outside forwards"]
    text = printable(table.drop(columns=[*unseen, "sampling"]))
    return "\n".join([*_aligned(text), *table.attrs["notes"]])


def format_table1(table: pd.DataFrame) -> str:
    """A `table1` for a terminal, under a heading per cell, and the paper's own below it."""
    text = table1_beside_paper(table).reset_index()
    first, second, rule, *lines = _aligned(text.drop(columns=TABLE1_HEADINGS))
    shown, above = [first, second], ("", "", "")
    headings = text[TABLE1_HEADINGS].itertuples(index=False, name=None)
    for line, heading in zip(lines, headings, strict=True):
        source, benchmark, sampling = heading
        if source != above[0]:
            shown += [rule, f"{source}:"]
        if heading != above:
            shown.append(f"{benchmark}, {sampling}")
        above = heading
        shown.append(line)
    return "\n".join([*shown, rule, *table.attrs["notes"], PAPER_SETUP])


def _aligned(text: pd.DataFrame) -> list[str]:
    """Lines of equal columns: the header's two, a rule, and one per line of `text`."""
    columns = []
    for name in map(str, text):
        cells = [*TERMINAL_HEADERS.get(name, ("", name)), *text[name]]
        width = max(map(len, cells))
        columns.append(
            [f"{cell:<{width}}" if name == "method" else f"{cell:>{width}}" for cell in cells]
        )
    lines = ["  ".join(cells).rstrip() for cells in zip(*columns, strict=True)]
    lines.insert(2, "-" * max(map(len, lines)))
    return lines


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
    """Each example's speedup, sorted, with the ratio of totals and its interval as a line."""
    by_method = _shared_rows(rows)
    compared = metrics.speedup(by_method.get(BASELINE, []), by_method.get("speculative", []))
    ratios = sorted(compared.per_problem.values())
    total = compared.of_totals
    figure, axes = _new_figure()
    axes.plot(range(1, len(ratios) + 1), ratios, ".", color=DARK, label="one example")
    total_label = f"ratio of totals: {_as_text('speedup', total.estimate)}"
    axes.axhline(total.estimate, color=DARK, label=total_label)
    axes.axhspan(total.low, total.high, color=LIGHT, linewidth=0, label="its 95% interval")
    axes.axhline(1, color="black", linestyle="--", linewidth=1, label="as fast as the baseline")
    num_faster = sum(ratio > 1 for ratio in ratios)
    axes.set_title(f"Speculative decoding is faster on {num_faster} of {len(ratios)} examples")
    axes.set_xlabel("examples, sorted by speedup")
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
    """Decoding speed of each method: the spread over examples, and the total."""
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
    num_examples = max(map(len, speeds.values()))
    axes.set_title(f"Decoding speed of each method over {num_examples} examples")
    axes.set_xlabel("box: middle half of the examples and their median; whiskers: 5% to 95%")
    axes.set_ylabel("tokens per second (prefill left out)")
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


def table1_figure(table: pd.DataFrame) -> Figure:
    """The speedup in each cell of a `table1`, with its interval, beside the paper's own."""
    keys = ["benchmark", "sampling"]
    ours, paper = (
        part[part["method"] == "speculative"].set_index(keys) for part in (table, paper_table1())
    )
    paper = paper.reindex(ours.index)
    positions = np.arange(len(ours))
    bounds = [ours["speedup"] - ours["speedup low"], ours["speedup high"] - ours["speedup"]]
    figure, axes = _new_figure()
    axes.errorbar(
        ours["speedup"],
        positions,
        xerr=np.nan_to_num(bounds),
        fmt="D",
        color=DARK,
        capsize=4,
        label="this run, with its 95% interval",
    )
    axes.plot(
        paper["speedup"],
        positions + 0.25,
        "s",
        color=MIDDLE,
        markerfacecolor="white",
        markersize=8,
        label="the paper's, on its own models and hardware",
    )
    for position, speedup, published in zip(positions, ours["speedup"], paper["speedup"]):
        label = _as_text("speedup", speedup)
        axes.annotate(label, (speedup, position - 0.1), ha="center", va="bottom")
        if published > 0:
            label = f"   {_as_text('speedup', published)}"
            axes.annotate(label, (published, position + 0.25), va="center")
    axes.axvline(1, color="black", linestyle="--", linewidth=1, label="as fast as the baseline")
    axes.set_yticks(positions, [",\n".join(map(str, cell)) for cell in ours.index])
    axes.set_title("Speedup of speculative sampling, cell by cell")
    axes.set_xlabel("speedup (baseline s/token ÷ speculative s/token)")
    axes.set_ylabel("benchmark and sampling")
    axes.set_xlim(left=0)
    axes.set_ylim(len(ours) - 0.5, -0.7)
    figure.legend(loc="outside lower center", ncols=1)
    return figure


def save_figure(figure: Figure, folder: str | Path, name: str) -> None:
    """Write `name`.png and `name`.svg into `folder`, which is made if it is not there."""
    import matplotlib as mpl

    Path(folder).mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"svg.hashsalt": name}):  # with no date: same figure, same file
        figure.savefig(Path(folder, f"{name}.png"), dpi=150)
        figure.savefig(Path(folder, f"{name}.svg"), metadata={"Date": None})


# --- tokens --------------------------------------------------------------------------


def text_pieces(
    token_ids: Sequence[int], kinds: Sequence[str], decode: Callable[[Sequence[int]], str]
) -> list[tuple[str, str]]:
    """The text cut into its tokens: (kind, text) of each.

    A character made of several tokens belongs to the token that completes it.
    """
    pieces, shown = [], ""
    for i, kind in enumerate(kinds):
        text = decode(token_ids[: i + 1])
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            pieces.append((kind, text[len(shown) :]))
            shown = text
    return pieces


def tokens_html(row: Row, decode: Callable[[Sequence[int]], str]) -> str:
    """A row's text as HTML, each token coloured by its origin, above a legend with counts.

    Args:
        row: of any method.
        decode: token ids -> text.
    """
    generation = Generation(row.token_ids, row.finish_reason, row.accepted, row.drafted)
    kinds = generation.kinds()
    pieces = text_pieces(row.token_ids, kinds, decode)
    text = "".join(TOKEN_MARKS[kind].format(html.escape(piece)) for kind, piece in pieces)
    counts = Counter(kinds)
    legend = "; ".join(
        f"{TOKEN_MARKS[kind].format(kind)} ({origin}): {counts[kind]}"
        for kind, origin in TOKEN_ORIGINS.items()
        if counts[kind]
    )
    style = "white-space: pre-wrap; background: white; color: black; padding: 0.5em"
    return f'<p style="{style}">{text}</p>\n<p style="{style}">{legend}</p>'


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
    return _interval_columns("pass@1", metrics.pass_at_k_interval(scores, 1)) | larger


def _rouge_columns(scores: Sequence[RougeScore]) -> dict[str, float]:
    """Mean ROUGE F1, each with its interval."""
    columns: dict[str, float] = {}
    for name in metrics.ROUGE_NAMES:
        columns |= _interval_columns(name, metrics.rouge_interval(scores, name))
    return columns


def _differences(
    by_method: Mapping[str, Sequence[Row]], scores: Scores
) -> dict[str, dict[str, metrics.Interval]]:
    """Quality of the speculative method less each other's: method -> measure -> difference."""
    scored = {method: _scores_of(rows, scores) for method, rows in by_method.items()}
    ours = scored.pop("speculative", [])
    names: list[str] = list(metrics.ROUGE_NAMES)
    if not _is_rouge(scores):
        names = [f"pass@{k}" for k in metrics.pass_at_k(ours)]
    return {
        method: {name: _difference(ours, theirs, name) for name in names}
        for method, theirs in scored.items()
        if ours
    }


def _difference(scores: list[Any], others: list[Any], name: str) -> metrics.Interval:
    """How much higher a measure is than another method's: `rouge1`, `pass@1` and so on."""
    if name.startswith("pass@"):
        return metrics.pass_at_k_difference(scores, others, int(name.removeprefix("pass@")))
    (rouge_name,) = (known for known in metrics.ROUGE_NAMES if known == name)
    return metrics.rouge_difference(scores, others, rouge_name)


def _quality_differences(run: Run, measure: str) -> pd.DataFrame:
    """By method: how much higher the paper's measure is than the baseline's."""
    scored = {
        method: _scores_of(rows, run.scores or [])
        for method, rows in _shared_rows(run.rows).items()
    }
    baseline = scored.pop(BASELINE, [])
    lines = {
        method: _interval_columns(f"{measure} difference", _difference(scores, baseline, measure))
        for method, scores in scored.items()
    }
    return pd.DataFrame.from_dict(lines, orient="index")


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
    return dict(zip(_interval_names(name), astuple(interval), strict=True))


def _interval_names(name: str) -> list[str]:
    return [name, f"{name} low", f"{name} high"]


def _interval_text(name: str, estimate: float, low: float, high: float) -> str:
    """An estimate of column `name`, and its bounds if it has any."""
    bounds = "" if math.isnan(low) else f" [{_as_text(name, low)}, {_as_text(name, high)}]"
    return _as_text(name, estimate) + bounds


def _as_text(name: str, value: Any) -> str:
    """One cell of column `name`."""
    if value == "" or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if name.endswith(" difference"):
        return f"{value:+.1%}" if name.startswith("pass@") else f"{value:+.4f}"
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
