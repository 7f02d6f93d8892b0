"""Two runs of one task beside each other: equal texts, where the others part, scores.

Knows runs as `records` reads them.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from specsampling.results import metrics
from specsampling.results.records import Row, Run
from specsampling.results.scores import RougeScore, Score, ScoredRow
from specsampling.results.tables import aligned

NOTE = (
    "equal: texts of the same token ids. before: the share of the first run's tokens that stand "
    "before the first one that differs, in all texts. Scores and their difference (first less "
    "other) with 95% intervals over the texts that both runs have"
)


def compare_runs(run: Run, other: Run, methods: Sequence[str]) -> pd.DataFrame:
    """A line per method, over the (example, sample) pairs that both runs have.

    `table.attrs["notes"]` is a list of sentences that belong under the table.
    """
    table = pd.DataFrame([_compare(run, other, method) for method in methods])
    table.attrs["notes"] = [*_other_prompts(run.rows, other.rows, methods), NOTE]
    return table


def _other_prompts(rows: Sequence[Row], others: Sequence[Row], methods: Sequence[str]) -> list[str]:
    """A sentence on the examples whose prompts are not the same in both runs, if there are any."""
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
    theirs = {_sample(row): row for row in other.rows if row.method == method}
    pairs = [
        (row, theirs[_sample(row)])
        for row in run.rows
        if row.method == method and _sample(row) in theirs
    ]
    num_tokens = sum(row.num_new_tokens for row, _ in pairs)
    num_before = sum(_num_before(row, their) for row, their in pairs)
    line: dict[str, object] = {
        "method": method,
        "n": len(pairs),
        "equal": sum(row.token_ids == their.token_ids for row, their in pairs),
        "before": num_before / num_tokens if num_tokens else float("nan"),
    }
    shared = {_sample(row) for row, _ in pairs}
    scores, others = (
        [score for score in of.scores or () if score["method"] == method and _at(score) in shared]
        for of in (run, other)
    )
    if scores and others:
        line |= _scores(scores, others)
    return line


def _num_before(row: Row, other: Row) -> int:
    pairs = enumerate(zip(row.token_ids, other.token_ids))
    shorter = min(row.num_new_tokens, other.num_new_tokens)
    return next((i for i, (mine, theirs) in pairs if mine != theirs), shorter)


def _scores(scores: Sequence, others: Sequence) -> dict[str, object]:
    """Both means and their difference, of the task's first measure."""
    if "rouge1" in scores[0]:
        rouge: Sequence[RougeScore] = scores
        values = [metrics.rouge_interval(of, "rouge1") for of in (rouge, others)]
        name, difference = "ROUGE-1", metrics.rouge_difference(rouge, others, "rouge1")
    else:
        passed: Sequence[Score] = scores
        values = [metrics.pass_at_k_interval(of, 1) for of in (passed, others)]
        name, difference = "pass@1", metrics.pass_at_k_difference(passed, others, 1)
    intervals = dict(zip((name, f"other's {name}", f"{name}, less other's"), (*values, difference)))
    return {
        column: f"{value.estimate:.1%} [{value.low:.1%}, {value.high:.1%}]"
        for column, value in intervals.items()
    }


def _sample(row: Row) -> tuple[str, int]:
    return row.example_id, row.sample_index


def _at(score: ScoredRow) -> tuple[str, int]:
    return score["example_id"], score["sample_index"]


def format_comparison(table: pd.DataFrame) -> str:
    """A `compare_runs` for a terminal."""
    text = table.fillna("").astype(str)
    text["before"] = [f"{value:.1%}" for value in table["before"]]
    return "\n".join([*aligned(text), "", *table.attrs["notes"]])
