"""Benchmarks/methods.py: a method for each draft, K and rule, and what the tables say of them."""

from __future__ import annotations

import dataclasses

import pytest
from test_end_to_end import run
from test_notebooks import execute, outputs_of, write_results
from test_records import ROW
from test_results import META
from test_table1 import config as config  # a fixture

from Benchmarks import methods as grid
from Benchmarks import methods as script
from specsampling.console import exit_code
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
    text = grid.methods_text(grid.methods_table(made))
    assert text[["draft", "K", "rule"]].to_numpy().tolist() == [
        ["autoregressive", "", ""],
        ["a/b", "7", "token"],
        ["a/b", "auto", "block"],
    ]
    assert text["speedup [95%]"].tolist()[1:] == ["2.00 [2.00, 2.00]", "2.50 [2.50, 2.50]"]
    grid.methods_figure(grid.methods_table(made), "x").draw_without_rendering()


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


def test_the_notebook_shows_each_cell(made, tmp_path, monkeypatch):
    write_results(tmp_path, made.rows, "methods/humaneval-greedy")
    notebook = execute("methods.ipynb", tmp_path, tmp_path / "Benchmarks", monkeypatch)
    (table,) = outputs_of(notebook, "text/html")
    assert "2.50 [2.50, 2.50]" in table
    assert len(outputs_of(notebook, "image/png")) == 1


def test_the_script_runs_every_combination(config, tmp_path, model_folders):
    code, printed, errors = run(
        *("--config", config, "--limit", 1, "--layers", 1, "--output-folder", tmp_path),
        *("--cells", "xsum-nucleus,humaneval-greedy"),
        script="Benchmarks/methods.py",
    )
    assert code == 0, errors
    model = model_folders["llama-draft"]
    paths = grid.methods_paths(tmp_path)
    sampled = {row.method for row in read_rows(paths["xsum-nucleus"])}
    greedy = {row.method for row in read_rows(paths["humaneval-greedy"])}
    assert greedy == {"autoregressive"} | {
        f"speculative:{draft}@{k}@token"
        for draft in ("ngram", model, f"ngram+{model}", "target-layers:1")
        for k in (7, "auto")
    }
    assert sampled - greedy == {
        f"speculative:{draft}@{k}@block"
        for draft in (model, f"ngram+{model}", "target-layers:1")
        for k in (7, "auto")
    }
    assert greedy <= sampled
    assert "humaneval-greedy" in printed and "1.00 [" in printed


def test_mistakes_are_one_line(tmp_path, capsys):
    arguments = ["--cells", "xsum", "--output-folder", str(tmp_path / "out")]
    assert exit_code(script.main, arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1
