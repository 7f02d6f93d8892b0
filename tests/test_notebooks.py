"""The notebooks run on synthetic rows, and hold neither logic nor errors."""

import ast
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from test_report import META, make_run, score_every_fourth

from specsampling.records import RunFile, write_scores

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "Benchmarks").glob("*.ipynb"))


def write_results(folder: Path, rows) -> Path:
    path = folder / "Results" / "results2.jsonl"
    with RunFile.open(path, META) as file:
        for row in rows:
            file.append(row)
    return path


def execute(name: str, project: Path, working_folder: Path, monkeypatch) -> nbformat.NotebookNode:
    """Run a copy of a notebook in `project`, as Jupyter or nbconvert would."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (project / "Benchmarks").mkdir()
    copy = Path(shutil.copy(ROOT / "Benchmarks" / name, project / "Benchmarks"))
    notebook = nbformat.read(copy, as_version=4)
    resources = {"metadata": {"path": str(working_folder)}}
    return NotebookClient(notebook, timeout=120, resources=resources).execute()


def outputs_of(notebook: nbformat.NotebookNode, kind: str) -> list[str]:
    """What the cells showed, of one MIME type; printed text counts as text/plain."""
    shown = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if kind == "text/plain" and output.output_type == "stream":
                shown.append(output.text)
            elif kind in output.get("data", {}):
                shown.append(output.data[kind])
    return shown


def test_bench2_shows_table_figures_and_identical_outputs(tmp_path, monkeypatch):
    rows = make_run()
    write_scores(write_results(tmp_path, rows), score_every_fourth(rows))
    notebook = execute("bench2.ipynb", tmp_path, tmp_path / "Benchmarks", monkeypatch)
    text = "\n".join(outputs_of(notebook, "text/plain"))
    (table,) = (html for html in outputs_of(notebook, "text/html") if "35.0%" in html)
    for number in ("12/12", "37.5%", "2.00 [2.00, 2.00]", "25.0% [", "greedy", "2.52"):
        assert number in table
    assert "A Processor (cpu), bfloat16" in text
    assert "12 of 12 speculative outputs have the token ids of method reference" in text
    assert "mean of per-problem ratios" in text
    assert len(outputs_of(notebook, "image/png")) == 3
    saved = {path.name for path in (tmp_path / "Results" / "figures").iterdir()}
    names = ("exp2_accepted", "exp2_speedup", "exp2_tokens_per_second")
    assert saved == {f"{name}.{suffix}" for name in names for suffix in ("png", "svg")}


def test_bench2_runs_from_the_root_on_an_unscored_run_without_reference(tmp_path, monkeypatch):
    """Stopped before the scoring, and under a profile whose target is not bit-exact."""
    rows = make_run(methods=("autoregressive", "speculative"))
    write_results(tmp_path, rows[:-1])
    notebook = execute("bench2.ipynb", tmp_path, tmp_path, monkeypatch)
    text = "\n".join(outputs_of(notebook, "text/plain"))
    assert "11 of 11 speculative outputs have the token ids of method autoregressive" in text
    assert "1 rows left out" in text


def test_bench2_without_results_says_which_command_makes_them(tmp_path, monkeypatch):
    with pytest.raises(CellExecutionError) as stopped:
        execute("bench2.ipynb", tmp_path, tmp_path / "Benchmarks", monkeypatch)
    assert stopped.value.ename == "SystemExit"
    assert "`python main_exp2.py` makes them" in stopped.value.evalue


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_load_call_and_show(path):
    """Logic lives in the package, where it is tested."""
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            kinds = {type(node) for node in ast.walk(ast.parse(cell.source))}
            assert not kinds & {ast.FunctionDef, ast.ClassDef, ast.Lambda}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_committed_notebooks_are_valid_and_hold_no_errors(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert all(output.output_type != "error" for output in outputs)
