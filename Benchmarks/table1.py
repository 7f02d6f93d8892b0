"""Table 1 of Chen et al. 2023: XSum and HumanEval, greedy and nucleus, with and without a draft.

    python Benchmarks/table1.py              the demo pair: some hours on two CPU cores
    python Benchmarks/table1.py --limit 2 --num-samples 1    a first look; without the options
                                             it goes on from there

Each cell of the grid is a run of main_exp1.py or main_exp2.py with the paper's sampling: XSum
with top-p 0.8, HumanEval with top-p 0.95 and temperature 0.8, and both greedily. The nucleus cells
have a twin, whose draft and target share their noise (`speculative@coupled`). The greedy cells
are the experiments as they are: Results/results1.jsonl and results2.jsonl, and what is there
already is not decoded again. The others go to results1-nucleus.jsonl and results2-nucleus.jsonl.
A rerun continues where the last one stopped. The table comes at the end, with the paper's own
below it; Benchmarks/table1.ipynb shows both, and a figure.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    from specsampling.edge import catch_signals

    catch_signals()

import numpy as np
import pandas as pd

import main_exp1
import main_exp2
from specsampling.config import Config, ConfigError, load_config, require_task
from specsampling.console import PROJECT, Parser, exit_code
from specsampling.edge import rank
from specsampling.results import metrics, table_text, tables
from specsampling.results.figures import DARK, MIDDLE, new_figure
from specsampling.results.records import Run, read_run
from specsampling.results.runfile import check_output
from specsampling.results.table_text import as_text, interval_names
from specsampling.results.tables import interval_columns

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHORT_TEXT = 64  # tokens
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


class Cell(NamedTuple):
    """A run of the grid: its script, the block of the profile that it needs, its sampling."""

    main: Callable[[Sequence[str] | None], int]
    task: Literal["xsum", "humaneval"]
    temperature: float
    top_p: float


CELLS = {
    "xsum-greedy": Cell(main_exp1.main, "xsum", 0, 1),
    "xsum-nucleus": Cell(main_exp1.main, "xsum", 1, 0.8),
    "humaneval-greedy": Cell(main_exp2.main, "humaneval", 0, 1),
    "humaneval-nucleus": Cell(main_exp2.main, "humaneval", 0.8, 0.95),
}


def main(arguments: Sequence[str] | None = None) -> int:
    options = cell_parser(__doc__, num_samples=4).parse_args(arguments)
    require_cells(CELLS, options)
    overrides = {name: cell_overrides(cell, options) for name, cell in CELLS.items()}
    paths = table1_paths(options.output_folder)
    if runs := run_cells(paths, overrides, options):
        print(f"\nTable 1\n{format_table1(table1(list(runs.values())))}")
    return 0


def require_cells(cells: Iterable[str], options: argparse.Namespace) -> None:
    """Refuse a profile that is not for the tasks of some cells, before hours of decoding."""
    config = load_config(options.config, options.profile)
    for cell in cells:
        require_task(config, CELLS[cell].task)


def run_cells(
    paths: Mapping[str, Path], overrides: Mapping[str, list[str]], options: argparse.Namespace
) -> dict[str, Run]:
    """Run cells of the grid one after the other, and read their runs: on rank 0, else none."""
    for name in paths:  # so is a mistake in an option
        load_config(options.config, options.profile, overrides[name])
    for path in paths.values() if rank() == 0 else ():
        check_output(path)
    for name, path in paths.items():
        print(f"\n{name}", flush=True)
        cell_arguments = ["--config", str(options.config), "--output", str(path)]
        if options.profile is not None:
            cell_arguments += ["--profile", options.profile]
        for override in overrides[name]:
            cell_arguments += ["--set", override]
        CELLS[name].main(cell_arguments + flags_of(options))
    return {} if rank() else {name: read_run(path) for name, path in paths.items()}


def runs_parser(doc: str | None) -> Parser:
    """The options of a script that makes several runs."""
    parser = Parser(doc)
    parser.add_argument("--config", metavar="FILE", type=Path, default=PROJECT / "config.yaml")
    parser.add_argument(
        "--profile", metavar="NAME", help="a profile with the blocks xsum and humaneval"
    )
    parser.add_argument("--limit", metavar="N", help="only the first N examples of each benchmark")
    parser.add_argument(
        "--output-folder",
        metavar="PATH",
        type=Path,
        default=Path("Results"),
        help="folder of the rows (default: Results)",
    )
    parser.add_argument("--fresh", action="store_true", help="start the runs' files over")
    another = "go on with rows of another machine, whose speeds cannot be compared"
    parser.add_argument("--on-another-machine", action="store_true", help=another)
    return parser


def cell_parser(doc: str | None, num_samples: int) -> Parser:
    """The options of a script that runs cells of the grid."""
    parser = runs_parser(doc)
    parser.add_argument(
        "--num-samples",
        metavar="N",
        default=str(num_samples),
        help=f"samples per example in the nucleus cells (default: {num_samples})",
    )
    return parser


def flags_of(options: argparse.Namespace) -> list[str]:
    """The options without a value that each run of a script gets."""
    flags = {"--fresh": options.fresh, "--on-another-machine": options.on_another_machine}
    return [flag for flag, is_set in flags.items() if is_set]


def chosen_cells(text: str) -> list[str]:
    """The cells named in `--cells A,B`."""
    for cell in text.split(","):
        if cell not in CELLS:
            raise ConfigError(f"--cells must be of {', '.join(CELLS)} (got {cell}); name some")
    return text.split(",")


def cell_overrides(cell: Cell, options: argparse.Namespace) -> list[str]:
    """What a cell changes in the profile, as `--set` takes it."""
    from specsampling.loading import baselines

    is_greedy = cell.temperature == 0
    config = load_config(options.config, options.profile)
    methods = [*(baselines(config) if is_greedy else ["autoregressive"]), "speculative"]
    if not is_greedy:
        methods.append(COUPLED)
    overrides = [
        f"sampling.temperature={cell.temperature}",
        "sampling.top_k=0",
        f"sampling.top_p={cell.top_p}",
        f"sampling.num_samples={1 if is_greedy else options.num_samples}",
        f"run.methods=[{', '.join(methods)}]",
    ]
    if not is_greedy:  # the paper's rule, in calls as wide as they need be
        overrides += ["speculation.verifier=token", "decoding.bit_exact=false", "decoding.width=0"]
    if options.limit is not None:
        overrides.append(f"run.limit={options.limit}")
    return overrides


def short_texts(config: Config) -> str:
    """What ends a text early where many methods are timed beside each other."""
    return f"decoding.max_new_tokens={min(SHORT_TEXT, config.decoding.max_new_tokens)}"


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
    for k in sorted(filter(str.isdigit, ks), key=int):
        columns += interval_names(f"pass@{k}")
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
    text = table_text.printable(both)
    for position, (name, suffix) in enumerate({"result": "", "difference": " difference"}.items()):
        rouge2, passed = text.pop(f"rouge2{suffix}"), text.pop(f"pass@1{suffix}")
        text.insert(position + 1, name, rouge2.where(rouge2 != "-", passed))
    return text


def format_table1(table: pd.DataFrame) -> str:
    """Format a `table1` for a terminal, with headings, and the paper's own below it.

    pass@k of several samples has no room there and stands below.
    """
    text = table1_beside_paper(table).reset_index()
    larger = [
        f"{line.benchmark}, {line.sampling}: {line.method} has a {name} of {value}"
        for name in text.filter(like="pass@")
        for line, value in zip(text.itertuples(), text.pop(name))
        if value != "-"
    ]
    first, second, rule, *lines = table_text.aligned(
        text.drop(columns=TABLE1_HEADINGS), width=math.inf
    )
    shown, above = [first, second], ("", "", "")
    for line, heading in zip(lines, zip(*(text[name] for name in TABLE1_HEADINGS)), strict=True):
        if heading[0] != above[0]:
            shown += [rule, f"{heading[0]}:"]
        if heading != above:
            shown.append(", ".join(heading[1:]))
        above = heading
        shown.append(line)
    return "\n".join([*shown, rule, *larger, *table.attrs["notes"], PAPER_SETUP])


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


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
