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
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    from specsampling.edge import catch_signals

    catch_signals()

import main_exp1
import main_exp2
from specsampling.config import Config, ConfigError, load_config, require_task
from specsampling.console import PROJECT, Parser, exit_code, option_value
from specsampling.edge import rank
from specsampling.loading import baselines
from specsampling.results.records import Run, read_run
from specsampling.results.runfile import check_output
from specsampling.results.table1 import COUPLED, format_table1, table1, table1_paths

SHORT_TEXT = 64  # tokens


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
        CELLS[name].main(cell_arguments + ["--fresh"] * options.fresh)
    return {} if rank() else {name: read_run(path) for name, path in paths.items()}


def cell_parser(doc: str, num_samples: int) -> Parser:
    """The options of a script that runs cells of the grid."""
    parser = Parser(doc)
    parser.add_argument("--config", metavar="FILE", type=Path, default=PROJECT / "config.yaml")
    parser.add_argument(
        "--profile", metavar="NAME", help="a profile with the blocks xsum and humaneval"
    )
    parser.add_argument("--limit", metavar="N", help="only the first N examples of each benchmark")
    parser.add_argument(
        "--num-samples",
        metavar="N",
        default=str(num_samples),
        help=f"samples per example in the nucleus cells (default: {num_samples})",
    )
    parser.add_argument(
        "--output-folder",
        metavar="PATH",
        type=Path,
        default=Path("Results"),
        help="folder of the rows (default: Results)",
    )
    parser.add_argument("--fresh", action="store_true", help="start the cells' files over")
    return parser


def chosen_cells(text: str) -> list[str]:
    """The cells named in `--cells A,B`."""
    for cell in text.split(","):
        if cell not in CELLS:
            raise ConfigError(f"--cells must be of {', '.join(CELLS)} (got {cell}); name some")
    return text.split(",")


def cell_overrides(cell: Cell, options: argparse.Namespace) -> list[str]:
    """What a cell changes in the profile, as `--set` takes it."""
    num_samples = json.dumps(option_value("sampling.num_samples", options.num_samples))
    is_greedy = cell.temperature == 0
    config = load_config(options.config, options.profile)
    methods = [*(baselines(config) if is_greedy else ["autoregressive"]), "speculative"]
    if not is_greedy:
        methods.append(COUPLED)
    overrides = [
        f"sampling.temperature={cell.temperature}",
        "sampling.top_k=0",
        f"sampling.top_p={cell.top_p}",
        f"sampling.num_samples={1 if is_greedy else num_samples}",
        f"run.methods=[{', '.join(methods)}]",
    ]
    if not is_greedy:  # the paper's rule, in calls as wide as they need be
        overrides += ["speculation.verifier=token", "decoding.bit_exact=false", "decoding.width=0"]
    if options.limit is not None:
        limit = json.dumps(option_value("run.limit", options.limit))  # which YAML reads as it is
        overrides.append(f"run.limit={limit}")
    return overrides


def short_texts(config: Config) -> str:
    """What ends a text early where many methods are timed beside each other."""
    return f"decoding.max_new_tokens={min(SHORT_TEXT, config.decoding.max_new_tokens)}"


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
