"""Compare two runs of one task: scores, speeds, texts, and where texts first differ.

    python Benchmarks/compare.py Results/published/qwen-coder-bf16/results2.jsonl \\
        Results/published/qwen-coder-int8/results2.jsonl --methods speculative

The runs may differ in a precision, a target or a version. Each method of both runs is compared over
the (example, sample) pairs of both. Speeds are compared if both runs were made on one machine.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    from specsampling.edge import catch_signals

    catch_signals()

import pandas as pd

from specsampling.config import ConfigError
from specsampling.console import Parser, exit_code
from specsampling.results import metrics
from specsampling.results.meta import device_names
from specsampling.results.records import Row, Run, read_run
from specsampling.results.table_text import aligned
from specsampling.results.tables import few_notes, scores_of

NOTE = (
    "n counts problems. equal counts the texts with the same token ids. before is the share of the "
    "first run's tokens that come before the first difference, over all texts. Scores and "
    "differences (first run minus other) have 95% intervals over the texts that both runs have"
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("run", metavar="FILE", type=Path, help="rows of a run")
    parser.add_argument("other", metavar="OTHER", type=Path, help="rows of the run to compare with")
    parser.add_argument("--methods", metavar="A,B", help="only these methods")
    parser.add_argument("--csv", metavar="FILE", type=Path, help="write the table to FILE, too")
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
    if options.csv:
        options.csv.parent.mkdir(parents=True, exist_ok=True)
        table.to_csv(options.csv, index=False)
    return 0


def compare_runs(run: Run, other: Run, methods: Sequence[str]) -> pd.DataFrame:
    """Make a table with a line per method, over the (example, sample) pairs of both runs.

    `table.attrs["notes"]` is a list of sentences that belong under the table.
    """
    table = pd.DataFrame([_compare(run, other, method) for method in methods])
    notes = [*_other_prompts(run.rows, other.rows, methods), NOTE, _on_speeds(run, other)]
    table.attrs["notes"] = [*notes, *few_notes(max(table["n"]))]
    return table


def _machine(run: Run) -> str:
    return f"{device_names(run.meta) or 'an unknown machine'}, {run.meta.get('threads')} threads"


def _share_a_machine(run: Run, other: Run) -> bool:
    """Say whether one machine, with one number of threads, has made both runs."""
    return bool(device_names(run.meta)) and _machine(run) == _machine(other)


def _on_speeds(run: Run, other: Run) -> str:
    if _share_a_machine(run, other):
        return "A machine's pace differs between runs, so small differences in speed mean little"
    return (
        f"Speeds are not compared: the runs were made on {_machine(run)}, and on {_machine(other)}"
    )


def _other_prompts(rows: Sequence[Row], others: Sequence[Row], methods: Sequence[str]) -> list[str]:
    """Return a sentence on examples with different prompts in the two runs, if there are any."""
    ours, theirs = (
        {row.example_id: row.source for row in of if row.method in methods} for of in (rows, others)
    )
    shared = [name for name in ours if name in theirs]
    differ = [name for name in shared if not ours[name].has_prompt_of(theirs[name])]
    if not differ:
        return []
    return [
        f"The two runs have different prompts for {len(differ)} of {len(shared)} examples (the "
        f"first is {differ[0]}): their texts and scores there do not answer the same question"
    ]


def _compare(run: Run, other: Run, method: str) -> dict[str, object]:
    rows, others = ([row for row in of.rows if row.method == method] for of in (run, other))
    pairs = metrics.paired(rows, others)
    num_tokens = sum(row.num_new_tokens for row, _ in pairs)
    num_before = sum(metrics.num_equal_tokens(row, their) for row, their in pairs)
    line: dict[str, object] = {
        "method": method,
        "n": metrics.num_problems(row for row, _ in pairs),
        "equal": "{}/{}".format(*metrics.count_identical(rows, others)),
        "before": num_before / num_tokens if num_tokens else float("nan"),
    }
    if _share_a_machine(run, other):
        for name, of in (("tokens/s", 0), ("other's tokens/s", 1)):
            line[name] = f"{metrics.tokens_per_second([pair[of] for pair in pairs]):.1f}"
    scores = scores_of([row for row, _ in pairs], run.scores or [])
    their_scores = scores_of([their for _, their in pairs], other.scores or [])
    if scores and their_scores:
        measure, name = "pass@1", "pass@1"
        if "rouge1" in scores[0]:
            measure, name = "rouge1", "ROUGE-1"
        difference = metrics.quality_difference(scores, their_scores, measure)
        line[name] = f"{metrics.quality(scores, measure):.1%}"
        line[f"other's {name}"] = f"{metrics.quality(their_scores, measure):.1%}"
        line[f"{name}, less other's"] = f"{difference:.1%}"
    return line


def format_comparison(table: pd.DataFrame) -> str:
    """Format the table of `compare_runs` for a terminal."""
    text = table.fillna("").astype(str)
    text["before"] = [f"{value:.1%}" for value in table["before"]]
    return "\n".join([*aligned(text), "", *table.attrs["notes"]])


def methods_of(runs: Sequence) -> set[str]:
    """Name the methods that every run has."""
    return set.intersection(*({row.method for row in run.rows} for run in runs))


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
