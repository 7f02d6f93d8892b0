"""Benchmarks/compare.py: two runs of one task beside each other."""

from __future__ import annotations

import dataclasses

import pytest
from test_notebooks import write_results
from test_records import ROW

from Benchmarks import compare as script
from specsampling.console import exit_code
from specsampling.results.compare import compare_runs
from specsampling.results.records import Run, write_scores

TEXTS = {"a": ([1, 2, 3, 4], [1, 2, 3, 4]), "b": ([1, 2, 3, 4], [1, 2, 9]), "c": ([5, 6], [5])}


def rows(which: int, method: str = "speculative"):
    return [
        dataclasses.replace(ROW, example_id=name, method=method, token_ids=texts[which])
        for name, texts in TEXTS.items()
    ]


def score(example: str, passed: bool, method: str = "speculative") -> dict:
    key = {"example_id": example, "method": method, "sample_index": 0}
    return {**key, "passed": passed, "result": "passed" if passed else "failed: NameError"}


def test_equal_texts_and_tokens_before_the_first_difference():
    extra = dataclasses.replace(ROW, example_id="only here", method="speculative")
    table = compare_runs(Run([*rows(0), extra], {}, None), Run(rows(1), {}, None), ["speculative"])
    (line,) = table.to_dict("records")
    assert (line["n"], line["equal"]) == (3, 1)
    assert line["before"] == pytest.approx((4 + 2 + 1) / 10)
    assert not any("pass@1" in name for name in line)


def test_scores_are_compared_over_what_both_have(tmp_path, capsys):
    paths = []
    for which, passed in ((0, "ab"), (1, "a")):
        folder = tmp_path / str(which)
        write_results(folder, rows(which), "results2")
        paths.append(next(folder.rglob("results2.jsonl")))
        write_scores(paths[-1], [score(name, name in passed) for name in TEXTS])
    assert script.main([str(path) for path in paths]) == 0
    printed = capsys.readouterr().out
    assert "66.7% [" in printed and "33.3% [" in printed and "70.0%" in printed
    assert exit_code(script.main, [*map(str, paths), "--methods", "reference"]) == 2
    assert "--methods must be of those in both files: speculative" in capsys.readouterr().err
    assert exit_code(script.main, [str(paths[0]), str(tmp_path / "none.jsonl")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_runs_of_other_examples_cannot_be_compared(tmp_path, capsys):
    ours = write_results(tmp_path / "a", rows(0), "results2")
    others = [dataclasses.replace(row, example_id="x" + row.example_id) for row in rows(1)]
    theirs = write_results(tmp_path / "b", others, "results2")
    assert exit_code(script.main, [str(ours), str(theirs)]) == 2
    assert "must have examples in common" in capsys.readouterr().err
