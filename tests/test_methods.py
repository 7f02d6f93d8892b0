"""Benchmarks/methods.py: a method for each draft, K and rule, and what the tables say of them."""

from __future__ import annotations

import dataclasses

import pytest
from helpers import refused
from test_end_to_end import run
from test_notebooks import show as show  # a fixture
from test_notebooks import write_results
from test_records import ROW
from test_results import META
from test_table1 import config as config  # a fixture

from Benchmarks import methods as grid
from specsampling.results.records import Run, read_rows

NAMES = {"autoregressive": 1.0, "speculative:a/b@7@token": 0.5, "speculative:a/b@auto@block": 0.4}


@pytest.fixture
def made() -> Run:
    rows = [
        dataclasses.replace(ROW, example_id=example, method=method, decode_seconds=seconds)
        for example in ("a", "b")
        for method, seconds in NAMES.items()
    ]
    return Run(rows, META, None)


def test_a_methods_name_is_taken_apart(made):
    table = grid.methods_table(made)
    text = grid.methods_text(table)
    names = [*text[["draft", "K", "rule"]].itertuples(index=False, name=None)]
    assert names == [("autoregressive", "", ""), ("a/b", "7", "token"), ("a/b", "auto", "block")]
    assert text["speedup [95%]"].tolist()[1:] == ["2.00 [2.00, 2.00]", "2.50 [2.50, 2.50]"]
    grid.methods_figure(table, "x").draw_without_rendering()


def test_a_k_found_while_decoding_is_held_against_the_fastest_fixed_one(made):
    seconds = {"": 0.6, "@3": 0.5, "@auto": 0.4, "@9@block": 0.1}
    rows = [
        dataclasses.replace(row, method=f"speculative{name}", decode_seconds=value)
        for row in made.rows[::3]
        for name, value in seconds.items()
    ]
    text = grid.methods_text(grid.methods_table(Run(rows, META, None)))
    found = text.set_index("K")["auto / fixed [95%]"].to_dict()
    assert found == {"5": "", "3": "", "auto": "1.25 [1.25, 1.25]", "9": ""}
    assert set(text["draft"]) == {"the profile's"} and list(text["rule"]).count("token") == 3
    alone = grid.methods_table(Run([row for row in rows if "auto" in row.method], META, None))
    assert grid.methods_text(alone)["auto / fixed [95%]"].tolist() == [""]


def test_the_notebook_shows_each_cell(made, tmp_path, show):
    write_results(tmp_path, made.rows, "methods/humaneval-greedy")
    shown = show("methods")
    assert shown.page_with("2.50 [2.50, 2.50]") and len(shown.pages) == 1
    assert len(shown.images) == 1


def test_the_script_runs_every_combination(config, tmp_path, model_folders):
    options = ("--config", config, "--limit", 1, "--layers", 1, "--output-folder", tmp_path)
    cells = ("--cells", "xsum-nucleus,humaneval-greedy")
    code, printed, errors = run(*options, *cells, script="Benchmarks/methods.py")
    assert code == 0, errors
    model = model_folders["llama-draft"]
    drafts = (model, f"ngram+{model}", "target-layers:1")
    sampled, greedy = (
        {row.method for row in read_rows(grid.methods_paths(tmp_path)[cell])}
        for cell in ("xsum-nucleus", "humaneval-greedy")
    )
    fixed_and_found = [(draft, k) for draft in drafts for k in (7, "auto")]
    tokens = [*fixed_and_found, ("ngram", 7), ("ngram", "auto")]
    expected = {f"speculative:{draft}@{k}@token" for draft, k in tokens}
    assert greedy == {"autoregressive"} | expected
    assert sampled - greedy == {f"speculative:{draft}@{k}@block" for draft, k in fixed_and_found}
    assert greedy <= sampled
    assert "humaneval-greedy" in printed and "1.00 [" in printed


def test_mistakes_are_one_line(tmp_path, capsys):
    assert refused(grid.main, ["--cells", "xsum", "--output-folder", tmp_path / "out"], capsys)
