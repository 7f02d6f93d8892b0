"""What changed between two runs of one task: scores, texts, and where texts part.

    python Benchmarks/compare.py Results/qwen2.5-coder/results2.jsonl \\
        Results/qwen2.5-coder-int8/results2.jsonl --methods speculative

For two runs that differ in a precision, a target, a version: each method that both have is compared
over the (example, sample) pairs that both have. Speeds are not: two runs are two hours.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    from specsampling.edge import catch_signals

    catch_signals()

from specsampling.config import ConfigError
from specsampling.console import Parser, exit_code
from specsampling.results.compare import compare_runs, format_comparison
from specsampling.results.records import read_run


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("run", metavar="FILE", type=Path, help="rows of a run")
    parser.add_argument("other", metavar="OTHER", type=Path, help="rows of the one before it")
    parser.add_argument("--methods", metavar="A,B", help="only these of the methods in both")
    options = parser.parse_args(arguments)
    runs = read_run(options.run), read_run(options.other)
    shared = [m for m in dict.fromkeys(row.method for row in runs[0].rows) if m in methods_of(runs)]
    chosen = options.methods.split(",") if options.methods else shared
    for method in chosen:
        if method not in shared:
            raise ConfigError(
                f"--methods must be of those in both files: {', '.join(shared) or 'none'} (got "
                f"{method}); name others, or other files"
            )
    if not chosen:
        raise ConfigError(
            f"{options.run} and {options.other} must have a method in common (got none); "
            "choose other files"
        )
    table = compare_runs(*runs, chosen)
    if not table["n"].any():
        raise ConfigError(
            f"{options.run} and {options.other} must have examples in common (got none); choose "
            "runs of one task"
        )
    print(format_comparison(table))
    return 0


def methods_of(runs: Sequence) -> set[str]:
    """Those that every run has."""
    return set.intersection(*({row.method for row in run.rows} for run in runs))


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
