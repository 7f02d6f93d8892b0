"""Benchmarks/table1.py as a user runs it: the grid over a tiny pair, resuming, mistakes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import write_config
from helpers import refused
from test_end_to_end import run
from test_ranks import finish_ranks, start_ranks

from Benchmarks import identity, table1
from Benchmarks.table1 import table1_paths
from specsampling.config import load_config
from specsampling.console import exit_code
from specsampling.results.records import read_meta, read_rows
from specsampling.results.scores import read_scores

# Each cell has two examples. Greedy cells have two methods and a sample, the others three of each.
NUM_ROWS = {"xsum-greedy": 4, "xsum-nucleus": 18, "humaneval-greedy": 4, "humaneval-nucleus": 18}
PAPERS_SAMPLING = dict(zip(NUM_ROWS, ((0, 1), (1, 0.8), (0, 1), (0.8, 0.95))))


@pytest.fixture(scope="module")
def config(tmp_path_factory, model_folders) -> Path:
    """The demo profile over the tiny Llama pair and three articles of its own."""
    folder = tmp_path_factory.mktemp("config")
    articles = [
        {"id": f"article-{number}", "document": f"def f(x): return {number}", "summary": "return"}
        for number in range(3)
    ]
    (folder / "articles.jsonl").write_text("".join(json.dumps(a) + "\n" for a in articles))
    blocks = {"decoding": {"max_new_tokens": 8}, "run": {"warmup": 0}}
    blocks["xsum"] = {"dataset": str(folder / "articles.jsonl")}
    return write_config(folder, "demo", "llama", model_folders, blocks)


def grid_of(config: Path, folder: Path) -> list[object]:
    return ["--config", config, "--limit", 2, "--num-samples", 3, "--output-folder", folder]


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """A finished grid over two examples each, and what the script printed."""
    folder = tmp_path_factory.mktemp("grid") / "deep"
    code, printed, errors = run(*grid_of(config, folder), script="Benchmarks/table1.py")
    assert code == 0, errors
    return folder, printed, errors


def test_the_grid_leaves_a_run_per_cell_with_the_papers_sampling(finished):
    folder, _, errors = finished
    assert "Traceback" not in errors
    for name, num_rows in NUM_ROWS.items():
        path = table1_paths(folder)[name]
        sampling = read_meta(path)["config"]["sampling"]
        assert (sampling["temperature"], sampling["top_p"]) == PAPERS_SAMPLING[name]
        rows = read_rows(path)
        assert len(rows) == len(read_scores(path)) == num_rows
        coupled = {"speculative@coupled"} if name.endswith("nucleus") else set()
        assert {row.method for row in rows} == {"autoregressive", "speculative"} | coupled
        assert coupled <= {"speculative@coupled" for row in rows if row.noise}


def test_two_processes_make_the_grid(config, finished, tmp_path):
    ranks = start_ranks(*grid_of(config, tmp_path), script="Benchmarks/table1.py")
    code, printed, errors = finish_ranks(ranks)
    assert code == 0, errors
    assert printed.count("\nTable 1\n") == 1
    for name, num_rows in NUM_ROWS.items():
        rows, alone = (read_rows(table1_paths(folder)[name]) for folder in (tmp_path, finished[0]))
        assert [row.key for row in rows] == [row.key for row in alone]
        assert {row.rank for row in rows} == {0, 1} and len(rows) == num_rows
        if name.endswith("-greedy"):
            assert [row.token_ids for row in rows] == [row.token_ids for row in alone]


def test_the_table_comes_last_with_the_papers_below(finished):
    table = finished[1].split("\nTable 1\n")[1]
    ours, theirs = table.split("published by Chen et al. 2023")
    headings = [line for line in ours.splitlines() if line.startswith(("XSum", "HumanEval"))][:4]
    assert headings == [
        "XSum (ROUGE-2), temperature 1, top-p 0.8",
        "XSum (ROUGE-2), greedy",
        "HumanEval (pass@1), temperature 0.8, top-p 0.95",
        "HumanEval (pass@1), greedy",
    ]
    assert ours.count("2/2") == 2  # greedy speculative outputs have the baseline's token ids
    assert ours.count("6/6") == 2  # and so have sampled ones of the rule `coupled`
    assert "autoregressive has a pass@3 of " in theirs
    assert "2.46" in theirs


def test_a_rerun_goes_on_where_the_last_one_stopped(finished, config, tmp_path, capsys):
    """Stopped in the third cell: what is finished stays, and only the rest is decoded."""
    names, paths = list(NUM_ROWS), table1_paths(tmp_path)
    for name in names[:3]:
        for path in finished[0].glob(f"{paths[name].stem}.*"):
            shutil.copy(path, tmp_path)
    third = paths[names[2]]
    third.with_suffix(".scores.jsonl").unlink()
    lines = third.read_text().splitlines(keepends=True)
    third.write_text("".join(lines[:3]))
    before = {name: paths[name].read_bytes() for name in names[:3]}
    assert exit_code(table1.main, list(map(str, grid_of(config, tmp_path)))) == 0
    for name, num_rows in NUM_ROWS.items():
        path = paths[name]
        assert len(read_rows(path)) == len(read_scores(path)) == num_rows
        assert path.read_bytes().startswith(before.get(name, b""))
    assert paths["xsum-greedy"].read_bytes() == before["xsum-greedy"]
    assert "it has 3 already" in capsys.readouterr().err


def changed(config: Path, block: str, **values: object) -> Path:
    """A configuration beside another, with other values of a block."""
    whole = json.loads(config.read_text())
    whole["profiles"]["demo"][block] |= values
    path = config.with_name("changed.yaml")
    path.write_text(json.dumps(whole))
    return path


def test_without_bit_exact_decoding_nothing_is_compared_with_reference(config):
    """The method `reference` is an error then, and the option to leave it out is not ours."""
    path = changed(config, "decoding", bit_exact=False)
    path = changed(path, "run", methods=["autoregressive", "speculative"])
    options = table1.cell_parser("", 4).parse_args(["--config", str(path)])
    overrides = table1.cell_overrides(table1.CELLS["xsum-greedy"], options)
    assert load_config(path, None, overrides).run.methods == ("autoregressive", "speculative")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--profile", "gpt-neo-rtx3050"], "humaneval must be a block of profile gpt-neo-rtx3050"),
        (["--profile", "smollm2-cp"], "did you mean smollm2-cpu"),
        (["--num-samples", "0"], "sampling.num_samples must be"),
        (["--limit", "some"], "run.limit must be"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2_before_anything_runs(
    arguments, message, tmp_path, capsys
):
    """A profile without the second benchmark ran the first one's cells before it said so."""
    out = ["--output-folder", tmp_path / "out"]
    assert message in refused(table1.main, [*arguments, *out], capsys)
    assert not (tmp_path / "out").exists()


def test_rows_of_another_configuration_are_not_mixed_in(finished, config, capsys):
    other = changed(config, "sampling", seed=1)
    arguments = ["--config", str(other), "--limit", "2", "--output-folder", str(finished[0])]
    assert exit_code(table1.main, arguments) == 2
    assert "sampling.seed was 0, is now 1" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("script", [table1.cell_parser("", 1), identity.runs_parser("")])
def test_each_run_gets_the_way_out_that_a_refused_one_names(script):
    """A run that another machine began said "add --on-another-machine", which no script knew."""
    options = script.parse_args(["--on-another-machine"])
    assert table1.flags_of(options) == ["--on-another-machine"]
    assert table1.flags_of(script.parse_args([])) == []
