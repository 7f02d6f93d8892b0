"""Every draft, rule and choice of K beside each other, on both tasks, greedily and sampled.

    python Benchmarks/methods.py --limit 20                     the demo pair
    python Benchmarks/methods.py --limit 20 --profile exp2-cpu  Qwen2.5-Coder 1.5B with 0.5B

Drafts: the profile's model, n-grams, both, and the target's own first layers. K: the profile's
largest, and found while decoding. Rules: token by token, and, where they differ (sampling, and a
draft that has a distribution), the block as a whole. Each cell of the grid is one run whose
methods take turns, over texts of 64 tokens. Rows go to methods/ in the output folder; a rerun
continues, and Benchmarks/methods.ipynb shows the table and a figure.
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

from Benchmarks.table1 import (
    CELLS,
    cell_overrides,
    cell_parser,
    chosen_cells,
    require_cells,
    run_cells,
    short_texts,
)
from specsampling.config import load_config
from specsampling.console import exit_code
from specsampling.loading import baselines
from specsampling.results.methods import format_methods, methods_paths, methods_table


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_options(arguments)
    paths = methods_paths(options.output_folder)
    paths = {cell: paths[cell] for cell in options.cells}
    require_cells(paths, options)
    overrides = {cell: overrides_of(cell, options) for cell in paths}
    for cell, run in run_cells(paths, overrides, options).items():
        print(f"\n{cell}\n{format_methods(methods_table(run))}")
    return 0


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = cell_parser(__doc__, num_samples=1)
    parser.add_argument("--cells", metavar="A,B", default=",".join(CELLS), help="some of them")
    parser.add_argument(
        "--layers", metavar="N", default="4", help="the target's first N as a draft; 0: none"
    )
    options = parser.parse_args(arguments)
    options.cells = chosen_cells(options.cells)
    return options


def overrides_of(cell: str, options: argparse.Namespace) -> list[str]:
    """What a cell changes in the profile: table1's, and a method for each combination."""
    config = load_config(options.config, options.profile)
    model = config.models.draft.removeprefix("ngram+")
    drafts = ["ngram"] if model == "ngram" else ["ngram", model, f"ngram+{model}"]
    if options.layers != "0":
        drafts.append(f"target-layers:{options.layers}")
    is_greedy = CELLS[cell].temperature == 0
    methods = baselines(config) if is_greedy else ["autoregressive"]
    k = config.largest_k
    for draft in drafts:
        choices = [f"{k}@token", "auto@token"]
        if not is_greedy and draft != "ngram":
            choices += [f"{k}@block", "auto@block"]
        methods += [f"speculative:{draft}@{choice}" for choice in choices]
    listed = ", ".join(f'"{method}"' for method in methods)
    return [
        *cell_overrides(CELLS[cell], options),
        short_texts(config),
        f"run.methods=[{listed}]",
    ]


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
