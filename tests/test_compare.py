"""Benchmarks/compare.py: two runs of one task beside each other."""

import dataclasses

import pandas as pd
import pytest
from helpers import mistake
from test_notebooks import write_results
from test_records import ROW

from Benchmarks import compare as script
from specsampling.results.records import Run, Source
from specsampling.results.scores import write_scores

TEXTS = {"a": ([1, 2, 3, 4], [1, 2, 3, 4]), "b": ([1, 2, 3, 4], [1, 2, 9]), "c": ([5, 6], [5])}


def rows(which: int, method: str = "speculative"):
    return [
        dataclasses.replace(ROW, example_id=name, method=method, token_ids=texts[which])
        for name, texts in TEXTS.items()
    ]


def score(example: str, passed: bool, method: str = "speculative") -> dict:
    key = {"example_id": example, "method": method, "sample_index": 0}
    return {**key, "passed": passed, "result": "passed" if passed else "failed: NameError"}


def compared(first, second, *metas):
    first_meta, second_meta = metas or ({}, {})
    both = Run(first, first_meta, None), Run(second, second_meta, None)
    return script.compare_runs(*both, ["speculative"])


def test_equal_texts_and_tokens_before_the_first_difference():
    extra = dataclasses.replace(ROW, example_id="only here", method="speculative")
    (line,) = compared([*rows(0), extra], rows(1)).to_dict("records")
    assert (line["n"], line["equal"]) == (3, "1/3")
    assert line["before"] == pytest.approx((4 + 2 + 1) / 10)
    assert not any("pass@1" in name for name in line)


def test_speeds_are_compared_on_one_machine_only():
    """`compare.py` said nothing of speeds, and a reader put two machines' tables together."""
    fast = [dataclasses.replace(row, decode_seconds=row.decode_seconds / 2) for row in rows(0)]
    meta = {"device_name": "A processor, 2 cores", "threads": 2}
    others = ({}, {"device_name": "A phone"}, {"threads": 1})
    same, *tables = (compared(rows(0), fast, meta, meta | other) for other in others)
    (line,) = same.to_dict("records")
    assert float(line["other's tokens/s"]) == pytest.approx(2 * float(line["tokens/s"]), abs=0.2)
    assert "small differences in speed mean little" in same.attrs["notes"][1]
    for table in tables:
        assert "tokens/s" not in table
        assert any(note.startswith("Speeds are not compared") for note in table.attrs["notes"])


def test_scores_are_compared_over_what_both_have(tmp_path, capsys):
    paths = []
    for which, passed in ((0, "ab"), (1, "a")):
        folder = tmp_path / str(which)
        write_results(folder, rows(which), "results2")
        paths.append(next(folder.rglob("results2.jsonl")))
        write_scores(paths[-1], [score(name, name in passed) for name in TEXTS])
    csv = tmp_path / "deep" / "table.csv"
    assert script.main([*map(str, paths), "--csv", str(csv)]) == 0
    (line,) = pd.read_csv(csv).to_dict("records")
    assert (line["method"], line["n"]) == ("speculative", 3) and line["pass@1"].startswith("66.7%")
    printed = capsys.readouterr().out
    assert "intervals over fewer than 10 problems mean little" in printed
    assert "66.7% [" in printed and "33.3% [" in printed and "70.0%" in printed
    line = mistake(script.main, [*paths, "--methods", "reference"], capsys)
    assert "--methods must be of those in both files: speculative" in line
    assert "none.meta.json" in mistake(script.main, [paths[0], tmp_path / "none.jsonl"], capsys)


def test_runs_of_other_examples_cannot_be_compared(tmp_path, capsys):
    ours = write_results(tmp_path / "a", rows(0), "results2")
    others = [dataclasses.replace(row, example_id="x" + row.example_id) for row in rows(1)]
    theirs = write_results(tmp_path / "b", others, "results2")
    assert "must have examples in common" in mistake(script.main, [ours, theirs], capsys)


def asked(rows, prompts: dict[str, list[int]] | None):
    """Rows with the prompts that an example had; without them, only their length."""
    return [
        dataclasses.replace(
            row,
            **(Source.of(prompts[row.example_id], None)._asdict() if prompts else {}),
            **({} if prompts else {"num_prompt_tokens": 3}),
        )
        for row in rows
    ]


PROMPTS = {name: [1, 2, place] for place, name in enumerate(TEXTS)}


@pytest.mark.parametrize(
    ("mine", "theirs", "told"),
    [
        (PROMPTS, PROMPTS, ""),
        (PROMPTS, None, ""),
        (None, None, ""),
        (PROMPTS, {**PROMPTS, "b": [1, 2, 9]}, "1 of 3 examples (the first is b)"),
        (PROMPTS, {**PROMPTS, "b": [1, 2]}, "1 of 3 examples (the first is b)"),
        (PROMPTS, {name: [9, *ids[1:]] for name, ids in PROMPTS.items()}, "3 of 3 examples"),
        ({**PROMPTS, "c": [1, 2]}, None, "1 of 3 examples (the first is c)"),
    ],
)
def test_runs_of_other_prompts_say_so_in_one_line(mine, theirs, told, tmp_path, capsys):
    """Runs of two days, whose template prints the day, were "equal 0/2" without a word."""
    both = (asked(rows(0), mine), asked(rows(0), theirs))
    paths = [
        write_results(tmp_path / str(which), of_run, "results2")
        for which, of_run in enumerate(both)
    ]
    assert script.main([str(path) for path in paths]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = [line for line in lines if line.startswith("The two runs have different prompts")]
    assert len(found) == bool(told)
    assert told in "".join(found)


def test_prompts_of_methods_that_are_not_compared_do_not_matter():
    other = {name: [7] for name in TEXTS}
    first = [*asked(rows(0), PROMPTS), *asked(rows(0, "reference"), other)]
    notes = compared(first, asked(rows(1), PROMPTS)).attrs["notes"]
    assert not any("different prompts" in note for note in notes)
