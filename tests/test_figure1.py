"""Benchmarks/figure1.py and its arithmetic: a run per cell, a method per K, predictions."""

import dataclasses

import pytest
from helpers import mistake
from test_end_to_end import run
from test_notebooks import execute, outputs_of, write_results
from test_records import ROW
from test_results import META
from test_table1 import config as config  # a fixture

from Benchmarks import figure1 as grid
from specsampling.results.records import Run, read_meta, read_rows

DRAFT, TARGET, REST = 0.002, 0.010, 0.0005  # seconds


def rows_of(k: int, example: str):
    """Four cycles of K tokens of which 2 are accepted, or all where there are fewer."""
    accepted, cycles = min(2, k), 4 if k else 12
    seconds = {"target": cycles * TARGET, "draft": cycles * k * DRAFT, "rest": cycles * REST}
    return dataclasses.replace(
        ROW,
        example_id=example,
        method=f"speculative@{k}" if k else "autoregressive",
        token_ids=[1] * (cycles * (accepted + 1)),
        accepted=[accepted] * cycles if k else [],
        drafted=[k] * cycles if k else [],
        target_calls=cycles,
        draft_calls=cycles * k,
        decode_seconds=sum(seconds.values()),
        target_call_seconds=seconds["target"],
        draft_call_seconds=seconds["draft"] if k else None,
    )


@pytest.fixture
def made() -> Run:
    rows = [rows_of(k, example) for example in ("a", "b") for k in range(5)]
    return Run(rows, META, None)


def test_a_line_per_k_with_loop_time_acceptance_and_prediction(made):
    table = grid.over_k(made).set_index("K")
    assert list(table.index) == [0, 1, 2, 3, 4]
    assert table["ms/token"].tolist() == pytest.approx([10.5, 6.25, 14.5 / 3, 16.5 / 3, 18.5 / 3])
    assert table["accepted"][1:].tolist() == pytest.approx([1, 1, 2 / 3, 0.5])
    alpha, speedup = 2 / 3, 10.5 / (16.5 / 3)
    predicted = (1 - alpha**4) / ((1 - alpha) * (3 * 0.2 + 1))
    expected = {"alpha": alpha, "c": 0.2, "loop ms": 16.5, "draft ms": 6, "rest ms": 0.5}
    expected |= {"predicted": predicted, "speedup": speedup}
    expected["measured / predicted"] = speedup / predicted
    assert {name: table[name][3] for name in expected} == pytest.approx(expected)
    assert grid.best_k(grid.over_k(made)) == 2


def test_the_k_found_while_decoding_is_held_against_the_best_fixed_one(made):
    assert grid.found_k(made) is None
    found = [
        dataclasses.replace(row, method="speculative@auto", decode_seconds=2 * row.decode_seconds)
        for row in made.rows
        if row.method == "speculative@2"
    ]
    both = Run([*made.rows, *found], META, None)
    assert grid.found_k(both).estimate == pytest.approx(0.5)
    assert grid.over_k(both).equals(grid.over_k(made))
    (panel, *_) = grid.figure1({"xsum-greedy": both}).axes
    assert panel.lines[-1].get_xdata() == [2]  # a star, at the mean of what was drafted
    line = "fastest at K = 2, 2.17; K found while decoding: 0.50 [0.50, 0.50] of the best fixed "
    line += "K's pace; loop time 10.5 + 2.00 K ms (R^2 1.000)"
    assert grid.describe_cell("xsum-greedy", both) == f"xsum-greedy: {line}"


def test_calls_of_one_width_are_predicted_over_the_reference(made):
    reference = [
        dataclasses.replace(row, method="reference", decode_seconds=2 * row.decode_seconds)
        for row in made.rows
        if row.method == "autoregressive"
    ]
    wide = grid.over_k(Run([*made.rows, *reference], META, None)).set_index("K")
    plain = grid.over_k(made).set_index("K")
    assert wide["speedup"].tolist() == plain["speedup"].tolist()
    ratio = wide["measured / predicted"] / plain["measured / predicted"]
    assert ratio[1:].tolist() == pytest.approx([2] * 4)


def test_the_figure_has_the_papers_three_panels(made):
    figure = grid.figure1({"xsum-greedy": made, "humaneval-greedy": made})
    assert [axes.get_xlabel() for axes in figure.axes] == ["K"] * 3
    assert [len(axes.lines) for axes in figure.axes] == [4, 2, 2]
    figure.draw_without_rendering()


def test_rows_of_two_machines_have_no_fastest_k(made):
    """Half of a cell may have been decoded elsewhere, with --on-another-machine."""
    rows = [dataclasses.replace(row, device=("A", "B")[i % 2]) for i, row in enumerate(made.rows)]
    text = grid.format_figure1({"xsum-greedy": dataclasses.replace(made, rows=rows)})
    assert "xsum-greedy: rows of several machines, whose speeds cannot be compared" in text


def test_the_notebook_shows_table_and_figure(made, tmp_path, monkeypatch):
    write_results(tmp_path, made.rows, "figure1/humaneval-greedy")
    notebook = execute("figure1.ipynb", tmp_path, tmp_path / "Benchmarks", monkeypatch)
    text = "\n".join(outputs_of(notebook, "text/plain"))
    assert "humaneval-greedy: fastest at K = 2" in text and "xsum-greedy\nno rows yet" in text
    (table,) = outputs_of(notebook, "text/html")
    assert "measured / predicted" in table
    assert len(outputs_of(notebook, "image/png")) == 1


def test_the_script_leaves_a_run_per_cell_with_every_k(config, tmp_path):
    arguments = ["--config", config, "--limit", 2, "--k", 2, "--output-folder", tmp_path / "deep"]
    cells = ["--cells", "xsum-nucleus,humaneval-greedy"]
    code, printed, errors = run(*arguments, *cells, script="Benchmarks/figure1.py")
    assert code == 0, errors
    paths = grid.figure1_paths(tmp_path / "deep")
    assert not paths["xsum-greedy"].exists()
    for cell in ("xsum-nucleus", "humaneval-greedy"):
        rows = read_rows(paths[cell])
        assert len(rows) == 2 * (1 + 3)
        for k in (1, 2):
            drafted = [row.drafted for row in rows if row.method == f"speculative@{k}"]
            assert max(max(of_row, default=0) for of_row in drafted) == k
        settings = read_meta(paths[cell])["config"]["speculation"]
        assert (settings["model_k"], settings["min_confidence"]) == (None, 0)
        assert settings["verifier"] == "token"  # the formula's
        assert f"{cell}: fastest at K = " in printed and "K found while decoding: " in printed
    assert (tmp_path / "deep" / "figures" / "figure1.png").exists()
    again, _, _ = run(*arguments, *cells, script="Benchmarks/figure1.py")
    assert again == 0 and len(read_rows(paths["xsum-nucleus"])) == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--profile", "gpt-neo-rtx3050"], "humaneval must be a block of profile gpt-neo-rtx3050"),
        (["--k", "0"], "--k must be an integer from 1 to 64 (got 0)"),
        (["--k", "many"], "--k must be an integer"),
        (["--cells", "xsum"], "--cells must be of xsum-greedy"),
    ],
)
def test_a_mistake_is_one_line_before_anything_runs(arguments, message, tmp_path, capsys):
    output = ["--output-folder", tmp_path / "out"]
    assert message in mistake(grid.main, [*arguments, *output], capsys)
    assert not (tmp_path / "out").exists()
