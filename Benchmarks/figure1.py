"""Figure 1 of Chen et al. 2023: time per token, acceptance rate and loop time over K.

    python Benchmarks/figure1.py               the demo pair, K from 0 to 8
    python Benchmarks/figure1.py --limit 2     a first look; without it, the same goes on from there

Each cell (XSum and HumanEval, the paper's nucleus and greedily) is one run of main_exp1.py or
main_exp2.py whose methods are the baseline, the same at the width of all other calls (`reference`),
`speculative@K` for every K, and `speculative@auto`, so that all take turns. The draft is the
profile's model, without lookups before it and without a stop where it is unsure: K tokens every
time, as in the paper. Texts end after 64 tokens. Rows go to figure1/ in the output folder. A rerun
continues where the last one stopped; Benchmarks/figure1.ipynb shows the tables and the figure.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    from specsampling.edge import catch_signals

    catch_signals()

from Benchmarks.table1 import (
    CELLS,
    cell_overrides,
    cell_parser,
    chosen_cells,
    require_cells,
    run_cells,
    short_texts,
)
from specsampling.config import ConfigError, load_config
from specsampling.console import exit_code, option_value
from specsampling.loading import baselines
from specsampling.results.figure1 import figure1, figure1_paths, format_figure1
from specsampling.results.figures import save_figure


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_options(arguments)
    paths = figure1_paths(options.output_folder)
    paths = {cell: paths[cell] for cell in options.cells}
    require_cells(paths, options)
    overrides = {cell: overrides_of(cell, options) for cell in paths}
    if runs := run_cells(paths, overrides, options):
        print(f"\nFigure 1\n{format_figure1(runs)}")
        save_figure(figure1(runs), options.output_folder / "figures", "figure1")
    return 0


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = cell_parser(__doc__, num_samples=1)
    parser.add_argument("--k", metavar="N", default="8", help="largest K (default: 8)")
    parser.add_argument("--cells", metavar="A,B", default=",".join(CELLS), help="some of them")
    options = parser.parse_args(arguments)
    options.k = option_value("speculation.k", options.k)
    if not isinstance(options.k, int) or not 1 <= options.k <= 64:
        raise ConfigError(f"--k must be an integer from 1 to 64 (got {options.k})")
    options.cells = chosen_cells(options.cells)
    return options


def overrides_of(cell: str, options: argparse.Namespace) -> list[str]:
    """What a cell changes in the profile: table1's, and one method for each K."""
    config = load_config(options.config, options.profile)
    is_lookup, _, model = config.models.draft.partition("+")
    draft = model if is_lookup == "ngram" and model else config.models.draft
    # The formula takes a call of K + 1 rows for as long as one of 1: so are `reference`'s calls.
    is_bit_exact = config.decoding.bit_exact
    methods = [
        *baselines(config),
        *(f"speculative@{k}" for k in [*range(1, options.k + 1), "auto"]),
    ]
    return [
        *cell_overrides(CELLS[cell], options),
        f"models.draft={draft}",
        f"speculation.k={options.k}",
        "speculation.model_k=null",
        short_texts(config),
        "speculation.min_confidence=0",
        "speculation.verifier=token",
        f"decoding.bit_exact={json.dumps(is_bit_exact)}",
        "decoding.width=0",
        f"run.methods=[{', '.join(methods)}]",
    ]


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
