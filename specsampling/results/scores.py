"""Reads and writes scores. Their file lies beside the rows and is always replaced as a whole."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict, get_type_hints

from specsampling.results.files import RecordsError, one_line_errors, read_file, replace_file
from specsampling.results.lines import is_torn, line_of, parse


class ScoredRow(TypedDict):
    """The names of the row that a score belongs to."""

    example_id: str
    method: str
    sample_index: int


class Score(ScoredRow):
    """The verdict on one row; `result` is such as `passed`, `timed out`, `failed: NameError`."""

    passed: bool
    result: str
    form: str | None  # the form that passed, "" for none; None if not recorded


class RougeScore(ScoredRow):
    """The ROUGE F1 of one row, in [0, 1]."""

    rouge1: float
    rouge2: float
    rougeL: float


Scores = Sequence[Score] | Sequence[RougeScore]  # the task of a run decides the kind


def scores_path(path: str | Path) -> Path:
    return Path(path).with_suffix(".scores.jsonl")


def write_scores(path: str | Path, scores: Scores) -> None:
    """Write the scores of the rows in `path` beside them, in place of earlier ones."""
    beside = scores_path(path)
    require_own_scores(path)
    with one_line_errors(beside, "written"):
        replace_file(beside, b"".join(map(line_of, scores)))


def read_scores(path: str | Path) -> list[Score] | list[RougeScore]:
    """Read the scores of the rows in `path`; the first line shows their kind."""
    beside = scores_path(path)
    data = read_file(beside)
    kind = RougeScore if b'"rouge1"' in data.partition(b"\n")[0] else Score
    scores: Any = parse(beside, data, get_type_hints(kind))[0]
    return scores


def require_own_scores(path: str | Path) -> None:
    """Raise a RecordsError if the scores of `path` would replace lines that are no scores."""
    beside = scores_path(path)
    if beside.is_file() and not all(map(_is_score, read_file(beside).splitlines())):
        raise RecordsError(
            f"{beside} holds lines that are no scores, and scores would replace them; move it "
            "away, or choose another file for the rows"
        )


def _is_score(line: bytes) -> bool:
    """Tell whether a line is a score, whole or torn."""
    try:
        names = set(json.loads(line))
    except (ValueError, TypeError, RecursionError):
        return is_torn(line)
    return names >= get_type_hints(ScoredRow).keys() and bool(names & {"passed", "rouge1"})
