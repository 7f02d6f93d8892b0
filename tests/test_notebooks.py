"""The notebooks run on synthetic rows, and hold neither logic nor errors."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import nbformat
import pytest
import tomllib
from conftest import write_config
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from test_results import META, SEVEN, make_grid, make_rouge_scores, make_run, score_every_fourth

from Benchmarks import report
from Benchmarks.table1 import TABLE1_FILES
from specsampling.results.records import newest_run, read_rows, read_run
from specsampling.results.runfile import RunFile
from specsampling.results.scores import RougeScore, write_scores
from specsampling.results.tables import METHODS

ROUGE = {"rouge1": 0.2, "rouge2": 0.1, "rougeL": 0.05}
ROOT = Path(__file__).parent.parent
NAMED_ANEW = re.compile(r"at 0x[0-9a-f]+|T_[0-9a-f]{5}")  # whenever pandas styles a table
NOTEBOOKS = sorted((ROOT / "Benchmarks").glob("*.ipynb"))


def write_results(folder: Path, rows, name="results2", meta=META) -> Path:
    path = folder / "Results" / f"{name}.jsonl"
    with RunFile.open(path, meta) as file:
        for row in rows:
            file.append(row)
    return path


def execute(name: str, project: Path, working_folder: Path, monkeypatch) -> nbformat.NotebookNode:
    """Run a copy of a notebook in `project`, as Jupyter or nbconvert would."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("SPECSAMPLING_RESULTS", raising=False)
    (project / "Benchmarks").mkdir()
    copy = Path(shutil.copy(ROOT / "Benchmarks" / name, project / "Benchmarks"))
    notebook = nbformat.read(copy, as_version=4)
    resources = {"metadata": {"path": str(working_folder)}}
    return NotebookClient(notebook, timeout=120, resources=resources).execute()


class Shown:
    """What a notebook shows, of each MIME type."""

    def __init__(self, notebook: nbformat.NotebookNode):
        self.text = "\n".join(outputs_of(notebook, "text/plain"))
        self.pages = outputs_of(notebook, "text/html")
        self.images = outputs_of(notebook, "image/png")

    def page_with(self, words: str) -> str:
        (page,) = (page for page in self.pages if words in page)
        return page


@pytest.fixture
def show(tmp_path, monkeypatch):
    return lambda name, folder="Benchmarks": Shown(
        execute(f"{name}.ipynb", tmp_path, tmp_path / folder, monkeypatch)
    )


def figures_of(path: Path) -> set[str]:
    return {figure.name for figure in (path.parent / "figures").iterdir()}


def three_figures(name: str) -> set[str]:
    kinds = ("accepted", "speedup", "tokens_per_second")
    return {f"{name}_{kind}.{suffix}" for kind in kinds for suffix in ("png", "svg")}


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


@pytest.mark.parametrize("name", report.NOTEBOOKS)
def test_a_committed_notebook_shows_what_its_rows_give(name, tmp_path, monkeypatch):
    """Three notebooks showed the rows of an earlier run, and so did their figures."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for folder in ("Benchmarks", "Results/published/smollm2"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    now = nbformat.reads(report.run_notebook(name, tmp_path), as_version=4)
    committed = nbformat.read(ROOT / "Benchmarks" / f"{name}.ipynb", as_version=4)
    for kind in ("text/html", "text/plain"):
        shown, ours = ("\n".join(outputs_of(notebook, kind)) for notebook in (committed, now))
        assert NAMED_ANEW.sub("", shown) == NAMED_ANEW.sub("", ours)


def test_bench2_shows_table_figures_and_identical_outputs(tmp_path, show):
    rows = make_run()
    path = write_results(tmp_path, rows)
    write_scores(path, score_every_fourth(rows))
    shown = show("bench2")
    table = shown.page_with("35.0%")
    for number in ("12/12", "37.5%", "2.00 [2.00, 2.00]", "25.0% [", "greedy", "2.52"):
        assert number in table
    for column in ("with prefill", "draft accepted", "tokens/call", "outside calls"):
        assert f"<th>{column}</th>" in table  # as in the terminal
    assert shown.text.startswith("The run: Results/results2.jsonl\n")
    assert "A Processor (cpu), bfloat16" in shown.text
    assert "identical outputs have the token ids of method reference" in shown.text
    assert "mean of per-problem ratios" in shown.text
    assert len(shown.images) == 3
    assert figures_of(path) == three_figures("results2")


def test_bench2_runs_from_the_root_on_an_unscored_run_without_reference(tmp_path, show):
    """Stopped before the scoring, and under a profile whose target is not bit-exact."""
    write_results(tmp_path, make_run(methods=("autoregressive", "speculative"))[:-1])
    shown = show("bench2", ".")
    assert "identical outputs have the token ids of method autoregressive" in shown.text
    assert "1 rows are left out" in shown.text
    assert shown.page_with("<td>11/11</td>")


@pytest.mark.parametrize(
    "methods",
    [("autoregressive",), ("autoregressive", "speculative:ngram"), SEVEN],
    ids=["no draft", "no plain speculative", "seven methods"],
)
@pytest.mark.parametrize("number", [1, 2])
def test_notebooks_show_any_methods(number, methods, tmp_path, show, model_folders):
    """A run without plain `speculative` showed "0 of 0" and axes from NaN to NaN."""
    rows = [
        replace(row, method=method)
        for method in methods
        for row in make_run(methods=(method if method in METHODS else "speculative",))
    ]
    if number == 1:
        path = write_xsum_results(tmp_path, model_folders["llama-target"], rows)
        names = ("example_id", "method", "sample_index")
        scores = [RougeScore(**dict(zip(names, row.key)), **ROUGE) for row in rows]
    else:
        path, scores = write_results(tmp_path, rows), score_every_fourth(rows)
    write_scores(path, scores)
    shown = show(f"bench{number}")
    words = "\n".join([shown.text, *shown.pages])
    assert "0 of 0" not in words and "NaN" not in words and "nan" not in words.split()
    assert all(f"<th>{method}</th>" in words for method in methods[1:])
    assert len(shown.images) == 3


def test_the_newest_run_of_the_task_is_shown(tmp_path, show):
    """The notebook looked for one file name, and showed the published rows beside a new run."""
    rows = make_run(num_problems=2)
    paths = [write_results(tmp_path, rows, name) for name in ("a/new", "results2", "b/old")]
    xsum = {**META, "config": {**META["config"], "humaneval": None, "xsum": {}}}
    other = write_results(tmp_path, rows, "results1", xsum)
    write_results(tmp_path, [], "empty")
    for age, path in enumerate([other, *paths]):
        os.utime(path, (1e9 - age, 1e9 - age))
    published = tmp_path / "published.jsonl"
    folder = tmp_path / "Results"
    assert newest_run(folder, "humaneval", published) == paths[0]
    assert newest_run(folder, "xsum", published) == other
    assert newest_run(tmp_path / "nothing", "xsum", published) == published
    assert show("bench2", ".").text.startswith("The run: Results/a/new.jsonl\n")
    assert (paths[0].parent / "figures" / "new_speedup.svg").exists()  # beside the run


@pytest.mark.parametrize(
    ("name", "command"),
    [("bench1", "main_exp1.py"), ("bench2", "main_exp2.py"), ("table1", "Benchmarks/table1.py")],
)
def test_without_results_a_notebook_says_which_command_makes_them(name, command, show):
    with pytest.raises(CellExecutionError) as stopped:
        show(name)
    assert stopped.value.ename == "SystemExit"
    assert f"`python {command}` makes them" in stopped.value.evalue


def test_without_a_run_of_ones_own_the_published_one_is_shown(tmp_path, show):
    """Its figures do not take the place of the published ones."""
    write_results(tmp_path, make_run(), "published/smollm2/results2")
    said = "The published run, for want of your own: Results/published/smollm2/results2.jsonl\n"
    assert show("bench2").text.startswith(said)
    assert len(figures_of(tmp_path / "Results" / "any")) == 6
    assert not (tmp_path / "Results" / "published" / "smollm2" / "figures").exists()


def write_xsum_results(folder: Path, tokenizer_folder: Path, rows) -> Path:
    """Rows of a run from `folder`, over articles in a file there; one summary each."""
    articles = [
        {"id": name, "document": f"Document <{name}>.", "summary": "Short."}
        for name in dict.fromkeys(row.example_id for row in rows)
    ]
    text = "".join(json.dumps(article) + "\n" for article in articles)
    (folder / "articles.jsonl").write_text(text)
    config = META["config"] | {
        "models": {"target": str(tokenizer_folder), "draft": "ngram", "tokenizer": None},
        "xsum": {"dataset": "articles.jsonl", "split": "test"},
    }
    rows = [replace(row, reference="Short.", completion=f"By {row.method}.") for row in rows]
    return write_results(folder, rows, "results1", META | {"config": config})


def test_bench1_shows_rouge_examples_and_where_tokens_came_from(tmp_path, show, model_folders):
    path = write_xsum_results(tmp_path, model_folders["llama-target"], make_run())
    write_scores(path, make_rouge_scores(autoregressive=0.1))
    shown = show("bench1")
    table = shown.page_with("earlier attempt")
    for number in ("12/12", "37.5%", "2.50", "2.00 [2.00, 2.00]", "0.200 [", "0.159", "1.84"):
        assert number in table
    assert "-0.0500 [-0.0500, -0.0500]" in shown.page_with("rougeL difference")
    assert "identical outputs have the token ids of method reference" in shown.text
    examples = shown.page_with("reference summary")
    for words in ("Document &lt;HumanEval/2&gt;.", "By autoregressive.", "By speculative."):
        assert words in examples
    assert "By reference." not in examples  # with greedy decoding the speculative text again
    tokens = shown.page_with("after a rejection")
    # Ids 1 to 4 of the tiny tokenizer are the first of its alphabet: ! " # $.
    assert tokens.index("&quot;") < tokens.index("<u>#</u>") < tokens.index("<i>$</i>")
    assert len(shown.images) == 3
    assert figures_of(path) == three_figures("results1")


def test_bench1_runs_on_an_unscored_run_without_speculative_rows(tmp_path, show, model_folders):
    """The articles are those of all rows."""
    path = write_xsum_results(tmp_path, model_folders["llama-target"], make_run())
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if '"speculative"' not in line))
    assert "The rows are not scored yet" in show("bench1", ".").text


def test_table1_shows_our_grid_beside_the_papers(tmp_path, show):
    names = ("xsum-nucleus", "humaneval-nucleus", "humaneval-greedy")
    for name, run in zip(names, make_grid(), strict=True):
        path = write_results(tmp_path, run.rows, Path(TABLE1_FILES[name]).stem, run.meta)
        write_scores(path, run.scores)
    write_results(tmp_path, [], "results1")  # stopped before its first row
    shown = show("table1")
    (table,) = shown.pages
    for words in ("XSum (ROUGE-2)", "+0.1000 [+0.1000", "12.50", "7.52", "2.46", "not measured"):
        assert words in table
    assert "xsum-greedy\nno rows yet" in shown.text
    assert "16 TPU v4" in shown.text and "A Processor (cpu)" in shown.text
    assert len(shown.images) == 1
    assert figures_of(tmp_path / "Results" / "any") == {"table1_speedup.png", "table1_speedup.svg"}


@pytest.fixture
def repository(tmp_path, model_folders) -> Path:
    """This project as a repository with a tag, whose T4 profile has a tiny pair on a CPU."""
    folder = tmp_path / "origin"
    leave_out = shutil.ignore_patterns(".*", "docs", "findings", "Results", "tests", "training")
    shutil.copytree(ROOT, folder, ignore=leave_out)
    blocks = {"models": {"target_quantization": "none"}, "decoding": {"max_new_tokens": 24}}
    write_config(folder, "deepseek-t4", "llama", model_folders, blocks)
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@localhost"]
    for command in ("init --quiet", "add --all", "commit --quiet --message=all", "tag a-tag"):
        subprocess.run([*git, *command.split()], check=True)
    return folder


def test_t4_runs_from_the_clone_to_the_tables(repository, tmp_path, show, monkeypatch):
    """Only the GPU and pip's downloads are left out: pip plans an installation without an index.

    It would replace nothing that is here, because pyproject's ranges hold the tested versions.
    """
    given = {"REPOSITORY": str(repository), "TAG": "a-tag", "LIMIT": "2"}
    for name, value in (given | {"ALLOW_WEAK_SANDBOX": "true"}).items():
        monkeypatch.setenv(f"SPECSAMPLING_{name}", value)
    for name, value in {"DRY_RUN": "1", "NO_INDEX": "1", "NO_BUILD_ISOLATION": "0"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    shown = show("t4", ".")
    assert f"torch=={version('torch')}\n" in shown.text and "Error" not in shown.text
    results = tmp_path / "repository" / "Results" / "deepseek-t4"
    assert {row.num_new_tokens <= 16 for row in read_rows(results / "dry.jsonl")} == {True}
    run = read_run(results / "results2.jsonl")
    assert len(run.rows) == len(run.scores or ()) == 2 * len(run.meta["config"]["run"]["methods"])
    assert f"commit {run.meta['git_commit']}, " in shown.text
    table = shown.page_with("speedup")
    assert "autoregressive" in table and "speculative" in table


def test_t4_names_this_version():
    """Its tag is what a release is tagged with."""
    notebook = nbformat.read(ROOT / "Benchmarks" / "t4.ipynb", as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    number = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f'"v{number}"' in first.source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_load_call_and_show_without_errors(path):
    """Logic lives in the package, where it is tested."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert all(output.output_type != "error" for output in cell.get("outputs", []))
        if cell.cell_type == "code":
            python = TransformerManager().transform_cell(cell.source)  # its magics too
            kinds = {type(node) for node in ast.walk(ast.parse(python))}
            assert not kinds & {ast.FunctionDef, ast.ClassDef, ast.Lambda}
