"""Figure 1 of Chen et al. 2023: time per token, acceptance rate and loop time over K.

    python Benchmarks/figure1.py               the demo pair, K from 0 to 8
    python Benchmarks/figure1.py --limit 2     a first look; without it, the same goes on from there

Each cell (XSum and HumanEval, the paper's nucleus and greedily) is one run of main_exp1.py or
main_exp2.py whose methods are the baseline and `speculative@K` for every K, so that all take turns.
The draft is the profile's model, without lookups before it and without a stop where it is unsure:
K tokens every time, as in the paper. Rows go to figure1/ in the output folder. A rerun continues
where the last one stopped; Benchmarks/figure1.ipynb shows the tables and the figure.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    from specsampling.edge import catch_signals

    catch_signals()

from Benchmarks.table1 import CELLS, cell_overrides
from specsampling.config import Config, ConfigError, load_config, require_task
from specsampling.console import PROJECT, Parser, exit_code, option_value
from specsampling.results.figure1 import figure1, figure1_paths, format_figure1, over_k
from specsampling.results.figures import save_figure
from specsampling.results.records import check_output, read_run


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_options(arguments)
    paths = {
        cell: path
        for cell, path in figure1_paths(options.output_folder).items()
        if cell in options.cells
    }
    overrides = {cell: overrides_of(cell, options) for cell in paths}
    for cell in paths:  # a mistake is told before hours of decoding
        config = load_config(options.config, options.profile, overrides[cell])
        require_task(config, CELLS[cell].task)
    for path in paths.values():
        path.parent.mkdir(parents=True, exist_ok=True)
        check_output(path)
    for cell, path in paths.items():
        print(f"\n{cell}", flush=True)
        cell_arguments = ["--config", str(options.config), "--output", str(path)]
        if options.profile is not None:
            cell_arguments += ["--profile", options.profile]
        for override in overrides[cell]:
            cell_arguments += ["--set", override]
        CELLS[cell].main(cell_arguments + ["--fresh"] * options.fresh)
    tables = {cell: over_k(read_run(path)) for cell, path in paths.items()}
    print(f"\nFigure 1\n{format_figure1(tables)}")
    save_figure(figure1(tables), options.output_folder / "figures", "figure1")
    return 0


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--config", metavar="FILE", type=Path, default=PROJECT / "config.yaml")
    parser.add_argument(
        "--profile", metavar="NAME", help="a profile with the blocks xsum and humaneval"
    )
    parser.add_argument("--limit", metavar="N", help="only the first N examples of each benchmark")
    parser.add_argument("--num-samples", metavar="N", default="1", help="of nucleus (default: 1)")
    parser.add_argument("--k", metavar="N", default="8", help="largest K (default: 8)")
    parser.add_argument(
        "--cells", metavar="A,B", default=",".join(CELLS), help=f"of {', '.join(CELLS)}"
    )
    parser.add_argument(
        "--output-folder",
        metavar="PATH",
        type=Path,
        default=Path("Results"),
        help="folder of the rows (default: Results)",
    )
    parser.add_argument("--fresh", action="store_true", help="start the cells' files over")
    options = parser.parse_args(arguments)
    options.k = option_value("speculation.k", options.k)
    if not isinstance(options.k, int) or not 1 <= options.k <= 64:
        raise ConfigError(f"--k must be an integer from 1 to 64 (got {options.k})")
    options.cells = options.cells.split(",")
    for cell in options.cells:
        if cell not in CELLS:
            raise ConfigError(f"--cells must be of {', '.join(CELLS)} (got {cell})")
    return options


def overrides_of(cell: str, options: argparse.Namespace) -> list[str]:
    """What a cell changes in the profile: table1's, and one method for each K."""
    config: Config = load_config(options.config, options.profile)
    is_lookup, _, model = config.models.draft.partition("+")
    draft = model if is_lookup == "ngram" and model else config.models.draft
    baselines = ["autoregressive"]
    if CELLS[cell].temperature == 0 and config.decoding.bit_exact:
        baselines.append("reference")
    methods = [*baselines, *(f"speculative@{k}" for k in range(1, options.k + 1))]
    return [
        *cell_overrides(CELLS[cell], options),
        f"models.draft={draft}",
        f"speculation.k={options.k}",
        "speculation.model_k=null",
        "speculation.min_confidence=0",
        "decoding.width=0",
        f"run.methods=[{', '.join(methods)}]",
    ]


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
