"""plan.py: arithmetic that is right, shapes that are the models', predictions that are measured."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import PROJECT, make_model
from helpers import refused
from transformers import AutoConfig, AutoModelForCausalLM

from specsampling.method.text import Generation
from specsampling.models.checkpoint import make_fast

sys.path.insert(0, str(PROJECT / "Benchmarks"))
import plan

SIZES = {  # parameters, in millions
    **{"deepseek-coder-6.7b": 6741, "deepseek-coder-1.3b": 1346, "gpt-neo-1.3b": 1316},
    **{"gpt-neo-125m": 125, "qwen2.5-coder-0.5b": 494, "qwen2.5-coder-1.5b": 1544},
    "qwen2.5-coder-7b": 7616,
}
TINY = ["--device=cpu", "--dtype=float32", "--prompt-tokens=20"]


@pytest.mark.parametrize("name", plan.CONFIGS)
def test_shipped_configurations_have_the_models_sizes(name):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**plan.CONFIGS[name]))
    assert round(model.num_parameters() / 1e6) == SIZES[name]


@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("k", [1, 4, 9])
def test_expected_tokens_are_the_sum_of_a_cycles_chances(acceptance, k):
    expected = sum(acceptance**i for i in range(k + 1))
    assert plan.expected_tokens(acceptance, k) == pytest.approx(expected)


def calls(draft, baseline=10.0, call=11.0):
    return plan.Calls(draft, baseline, dict.fromkeys(range(1, 9), call), prefill=0.0)


def test_a_draft_that_costs_nothing_is_asked_for_all_and_pays_early():
    free = calls(0.0)
    assert free.best_k(0.8) == 8
    assert free.speedup(0.8) == pytest.approx(plan.expected_tokens(0.8, 8) * 10 / 11)
    assert free.break_even() == pytest.approx(0.095, abs=0.006)  # 1.1 tokens a cycle


def test_a_draft_as_slow_as_its_target_never_pays():
    assert calls(10.0).break_even() is None
    assert plan.advice(calls(10.0)).startswith("Do not")
    assert "pays only if" in plan.advice(calls(7.0))
    assert plan.advice(calls(1.0)).startswith("Speculation pays if more")


@pytest.fixture
def folders(tmp_path):
    for seed, name in enumerate(("target", "draft")):
        make_model("llama", seed, context=1024).config.save_pretrained(tmp_path / name)
    return [f"--{name}={tmp_path / name}" for name in ("target", "draft")]


def test_a_pair_by_its_configurations_is_measured_and_validated(folders, capsys):
    assert plan.main([*folders, *TINY, "--k=4", "--new-tokens=40", "--validate"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("measured / predicted") == len(plan.VALIDATED)
    assert "differ" not in printed
    assert "the target alone" in printed and "peak memory" in printed


@pytest.mark.parametrize("is_kernel", [True, False])
def test_calls_have_the_rows_that_a_cycle_feeds(is_kernel, monkeypatch):
    """In the kernel every call was timed with one row, so drafting seemed to cost nothing."""
    fed = []
    score = plan.Session.score

    def record(session, tokens, last):
        fed.append((len(tokens) - session.length, last))
        return score(session, tokens, last)

    monkeypatch.setattr(plan.Session, "score", record)
    target = make_model("llama", context=128)
    target = make_fast(target, "int8") if is_kernel else target
    calls = plan.measure(target, make_model("llama", 1, context=128), 9, 40)
    expected = {1, *range(2, 11)} if is_kernel else {1, 8, 16}
    assert {rows for rows, _ in fed} == {last for _, last in fed} == expected
    assert set(plan.some_sizes(calls)) == ({2, 4, 8, 10} if is_kernel else {8, 16})


def test_predictions_are_of_calls_timed_before_and_after_the_text(monkeypatch):
    """A machine's pace drifted by a third: predictions timed once were off by a fifth."""
    slow = iter([plan.Calls(1.0, 1.0, dict.fromkeys(range(1, 9), 2.0), 0.0)] * 99)
    slower = iter([plan.Calls(3.0, 1.0, dict.fromkeys(range(1, 9), 4.0), 0.0)] * 99)
    timings = (calls for both in zip(slow, slower) for calls in both)
    done = Generation([1, 2, 3], "length", accepted=[1, 0], drafted=[1, 1], decode_seconds=8.0)
    monkeypatch.setattr(plan, "measure", lambda *_: next(timings))
    monkeypatch.setattr(plan, "autoregressive", lambda *_, **__: done)
    monkeypatch.setattr(plan, "speculative", lambda *_, **__: done)
    calls = plan.Calls(0.1, 1.0, dict.fromkeys(range(1, 9), 1.0), 0.0)
    for line in plan.validate(None, None, calls, [1], 3):  # (6 + 14) / 2 s predicted
        assert "measured / predicted 1.25 (1 of 2 accepted in 2 cycles)" in line


def test_time_per_token_is_drawn_over_context_and_k(folders, tmp_path, capsys):
    figure = f"--figure={tmp_path / 'made'}"
    assert plan.main([*folders, *TINY, "--k=9", "--new-tokens=8", figure]) == 0
    assert "context 128: draft call" in capsys.readouterr().err
    assert (tmp_path / "made" / "contexts.png").stat().st_size > 10_000
    assert plan.contexts_of(1024) == [128, 256, 512, 952]  # they double up to the limit
    assert plan.contexts_of(200) == [128]


def test_scripted_acceptance_is_what_it_was_told(folders):
    target, draft = make_model("llama", 0), make_model("llama", 1)
    prompt = list(range(1, 20))
    own = plan.autoregressive(target, prompt, max_new_tokens=100, width=8)
    script = plan.ScriptedDraft(draft, prompt + own.token_ids, 0.7)
    done = plan.speculative(target, script, prompt, k=3, max_new_tokens=100, width=8)
    assert done.token_ids == own.token_ids
    tested = sum(a + (a < d) for a, d in zip(done.accepted, done.drafted))
    assert 0.5 < sum(done.accepted) / tested < 0.9


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--target=no/such", "--draft=gpt-neo-125m"], "must name a configuration"),
        (["--target=gpt-neo-125m"], "must come together"),
        (["--k=0"], "--k must be an integer from 2"),
        (["--k=x"], "--k must be an integer"),
    ],
)
def test_mistakes_are_one_line(arguments, words, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert words in refused(plan.main, [*arguments, "--device=cpu"], capsys)


def test_what_a_finished_run_would_take_here():
    path = Path(PROJECT, "Results/published/smollm2/results1.jsonl")
    lines = plan.what_rows_would_take(path, calls(1.0))
    names = [line.partition(": ")[0] for line in lines]
    assert names == ["autoregressive", "speculative", "speculative:ngram"]
    assert all("(32 rows)" in line for line in lines)
