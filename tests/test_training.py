"""The draft's recipe: what goes in, what the target says to it, what a kill changes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).parent.parent / "training"))

import corpus
import train
from corpus import Decontamination
from data import batches_by_length, evaluation_articles, evaluation_problems, make_data
from distill import claim, main, tokens_per_call
from generate import generate, read
from train import Sample, load_samples
from transformers import AutoModelForCausalLM

from autoregressive import autoregressive
from specsampling.config import read_blocks
from specsampling.console import exit_code

SETTINGS = Path(__file__).parent.parent / "training" / "distill.yaml"


@pytest.fixture(scope="module")
def settings():
    return read_blocks(SETTINGS)


@pytest.fixture(scope="module")
def decontamination():
    examples = [*evaluation_problems(), *evaluation_articles()]
    return Decontamination([text for example in examples for text in example])


def test_every_evaluation_text_is_found_and_the_recipes_exercises_are_clean(
    settings, decontamination
):
    """Whole, and in another layout: line breaks, capitals and signs hide nothing."""
    for prompt, solution, _ in evaluation_problems():
        assert decontamination.finds(prompt) and decontamination.finds(solution)
        assert decontamination.finds(f"x = 1\n{prompt.upper()}".replace("\n", " ; "))
    for document, summary in evaluation_articles():
        assert decontamination.finds(f"They said: {document}") and decontamination.finds(summary)
    assert not any(decontamination.finds(text) for text in settings["exercises"])


def test_ten_words_in_a_row_are_found_and_nine_are_not():
    words = [f"w{i}" for i in range(30)]
    decontamination = Decontamination([" ".join(words)])
    assert decontamination.finds(f"so {', '.join(words[7:17])} it goes")
    assert not decontamination.finds(f"so {', '.join(words[7:16])} it goes")
    assert not decontamination.finds(" ".join(reversed(words)))


def test_heads_of_functions_and_prose_are_cut_out():
    source = (
        'import os\n\ndef join(parts: list[str], by=",") -> str:\n'
        '    """Join parts with a sign between them, none at the end."""\n'
        "    return by.join(parts)\n"
        "def silent(x):\n    return x\n"
    )
    assert corpus.documented_functions(source) == [
        "def join(parts: list[str], by=',') -> str:\n"
        '    """ Join parts with a sign between them, none at the end.\n    """'
    ]
    assert corpus.documented_functions("def broken(:") == []
    prose = " ".join(["This module reads what other people wrote down."] * 12)
    code = ">>> f(x)[1:2] == {'a': 1}"
    assert corpus.english_paragraphs(f'"""{prose}\n\n{code}\n"""') == [prose]


def test_an_invented_exercise_is_a_whole_head(settings):
    request = corpus.exercise_requests(settings["exercises"], 1, seed=0)[0]
    assert request.endswith("\n\ndef")
    head = ' f(x):\n    """ Return twice the number that was given.\n    """'
    assert corpus.invented_exercise(f"{head}\n    return 2 * x") == f"def{head}"
    assert corpus.invented_exercise(' f(x):\n    """ Return twice the number') is None
    assert corpus.invented_exercise(" of them all, the longest.") is None


def test_batches_hold_every_prompt_once():
    prompts = [[i] * (i % 7 + 1) for i in range(50)]
    made = [prompt for batch in batches_by_length(prompts, 8, seed=0) for prompt in batch]
    assert sorted(made) == sorted(prompts)


PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3], [11], [20, 21, 22, 23]]


def test_batched_answers_are_the_targets_greedy_ones(llama):
    """Padding on the left, rows that end early, positions: each would change what is said."""
    eos_ids = {autoregressive(llama, PROMPTS[2], max_new_tokens=9).token_ids[5]}
    made = generate(llama, PROMPTS, [0, 0], 20, eos_ids, torch.Generator())
    lengths = set()
    for row, tokens in enumerate(made.tokens):
        prompt = PROMPTS[row % len(PROMPTS)]
        expected = autoregressive(llama, prompt, max_new_tokens=20, eos_ids=eos_ids).token_ids
        assert tokens.tolist() == prompt + expected
        assert made.num_prompt_tokens[row] == len(prompt)
        with torch.inference_mode():
            hidden = llama.model(tokens[None, :-1]).last_hidden_state[0]
        torch.testing.assert_close(made.hidden[row], hidden, atol=1e-4, rtol=1e-4)
        lengths.add(len(expected))
    assert len(lengths) > 1  # some ended early


def test_sampled_answers_follow_the_seed_and_the_distribution(llama):
    prompt, num = [3, 1, 4], 4000
    made = [
        generate(llama, [prompt] * num, [2.0], 1, [], torch.Generator().manual_seed(seed)).tokens
        for seed in (0, 0, 1)
    ]
    drawn = [torch.stack(tokens)[:, -1] for tokens in made]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    with torch.inference_mode():
        probs = (llama(torch.tensor([prompt])).logits[0, -1] / 2.0).softmax(-1)
    counts = torch.bincount(drawn[0], minlength=len(probs))
    chi2 = ((counts - num * probs) ** 2 / (num * probs)).sum()
    assert chi2 < len(probs) + 5 * (2 * len(probs)) ** 0.5  # a false alarm in a million


def test_reading_gives_the_targets_hidden_states(llama):
    made = read(llama, [[1, 2, 3, 4], [9, 8, 7, 6]])
    with torch.inference_mode():
        expected = llama.model(torch.tensor([[9, 8, 7]])).last_hidden_state[0]
    torch.testing.assert_close(made.hidden[1], expected)
    assert made.num_prompt_tokens == [1, 1]


def test_the_loss_has_autograds_value_and_gradient():
    """The gradient is written out by hand, in parts of a few rows."""
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(40, 12, generator=generator)
    target_states = torch.randn(600, 12, generator=generator)
    ours = torch.randn(600, 12, generator=generator, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    loss, divergence = train.loss_of(ours, target_states, head, 0.1)
    loss.backward()
    expected = torch.nn.functional.kl_div(
        (theirs @ head.T).log_softmax(-1),
        (target_states @ head.T).log_softmax(-1),
        reduction="batchmean",
        log_target=True,
    )
    torch.testing.assert_close(divergence, expected)
    (expected + 0.1 * torch.nn.functional.smooth_l1_loss(theirs, target_states)).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_one_epoch_has_every_sample_once():
    samples = [Sample(torch.arange(n % 50 + 2), torch.zeros(n % 50 + 1, 4), 0) for n in range(700)]
    made = list(train.batches(samples, 200, seed=0, epoch=3))
    assert sorted(id(sample) for batch in made for sample in batch) == sorted(map(id, samples))
    for batch in made:
        assert len(batch) * max(len(sample.tokens) for sample in batch) <= 200


def test_tokens_per_call_counts_the_corrections():
    right = [True, True, False, True, False, False]
    assert tokens_per_call([right], 1) == 6 / 4  # TT F... : 2, 1, 2, 1
    assert tokens_per_call([right], 2) == 6 / 3  # TTF, TF, F
    assert tokens_per_call([[True] * 8], 3) == 8 / 2


def test_a_mistake_is_one_line(tmp_path, settings, capsys):
    """Shards are found by their names: another recipe's would silently be trained on."""
    work, changed = tmp_path / "work", tmp_path / "changed.yaml"
    claim(work, settings)
    claim(work, settings)
    changed.write_text(json.dumps(settings | {"seed": 1}))
    for recipe, message in (
        (changed, "begun with others"),
        (tmp_path / "none.yaml", "No such file"),
        (SETTINGS, "run the stages in order"),  # nothing was trained that could be exported
    ):
        options = ["export", "--config", str(recipe), "--work", str(work)]
        assert exit_code(main, options) == 2
        errors = capsys.readouterr().err
        assert message in errors and errors.count("\n") == 1


@pytest.fixture(scope="module")
def small(tmp_path_factory, settings, model_folders):
    """A small recipe and the folder of its data. One source holds an evaluation problem."""
    data = {"num_files": 6, "max_new_tokens": 8, "python_tokens": 1024, "english_tokens": 0}
    data |= dict.fromkeys(("batch", "exercises", "articles", "code_prompts", "documents"), 4)
    training = {"steps": 12, "batch_tokens": 512, "warmup_steps": 2, "checkpoint_every": 4}
    small = settings | {
        "target": str(model_folders["llama-target"]),
        "data": settings["data"] | data | {"text_length": 64},
        "draft": {"layers": [0], "head_size": 100},
        "training": settings["training"] | training,
    }
    work = tmp_path_factory.mktemp("work")
    problem, articles = evaluation_problems()[0], evaluation_articles()
    planted = work / "planted.py"
    planted.write_text((problem[0] + problem[1]) * 2)
    files = [planted, *sorted(Path(json.__file__).parent.glob("*.py"))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.source_files", lambda packages, seed: files)
        patch.setattr("data.evaluation_problems", lambda: [problem])
        patch.setattr("data.evaluation_articles", lambda: articles[:2])
        make_data(small, work)
        yield small, work


def test_data_is_the_same_after_a_kill(small, tmp_path):
    settings, work = small
    made = {path.name: path.read_bytes() for path in (work / "data").iterdir()}
    kinds = {*train.EVALUATIONS, "articles", "exercises", "code", "summaries", "python"}
    assert {name.rsplit("-", 1)[0] for name in made} >= kinds
    (tmp_path / "data").mkdir()
    for name in sorted(made)[::2]:  # what a killed run had left
        (tmp_path / "data" / name).write_bytes(made[name])
    make_data(settings, tmp_path)
    assert {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()} == made


def test_no_evaluation_text_is_trained_on(small, tokenizer):
    _, work = small
    texts = [tokenizer.decode(s.tokens) for s in load_samples(train.training_paths(work / "data"))]
    clean = Decontamination(evaluation_problems()[0])
    assert texts and not any(clean.finds(text) for text in texts)
    with safe_open(work / "data" / "python-000.safetensors", "pt") as shard:
        assert int(shard.metadata()["num_overlapping"]) >= 4  # the planted problem's passages
    assert not any(path.name.startswith("eval-") for path in train.training_paths(work / "data"))


def test_training_learns_and_survives_a_kill(small, tmp_path):
    """Killed in the middle and started again, it ends with the very same weights and log."""
    settings, work = small
    target = AutoModelForCausalLM.from_pretrained(settings["target"])
    train.train(settings, target, work)
    whole = torch.load(work / "draft.pt", weights_only=True)
    log = [json.loads(line) for line in (work / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [4, 8, 12]
    assert log[-1]["divergence"] < log[0]["divergence"]

    (tmp_path / "data").symlink_to(work / "data")
    killed = {**settings, "training": settings["training"] | {"checkpoint_every": 5}}
    rate = train.learning_rate

    def interrupted(options, at):
        if at == 10:
            raise KeyboardInterrupt
        return rate(options, at)

    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "learning_rate", interrupted)
        train.train(killed, target, tmp_path)
    train.train(killed, target, tmp_path)
    resumed = torch.load(tmp_path / "draft.pt", weights_only=True)
    assert torch.equal(resumed["head_ids"], whole["head_ids"])
    for name, tensor in whole["student"].items():
        assert torch.equal(tensor, resumed["student"][name]), name


def test_the_targets_own_layers_agree_with_it(small):
    """All of the target's layers and the whole vocabulary: what is counted is agreement."""
    settings, work = small
    target = AutoModelForCausalLM.from_pretrained(settings["target"])
    student = train.new_student(target, [0, 1])
    student.lm_head, untied = target.lm_head, target.lm_head.weight
    student.model.embed_tokens.weight.data.copy_(target.model.embed_tokens.weight)
    samples = load_samples(sorted((work / "data").glob("eval-code-*")))
    rows = train.evaluate_rows(student, samples, torch.arange(len(untied)))
    assert sum(map(len, rows)) == sum(len(s.hidden) - s.first_row for s in samples)


def test_frequent_tokens_are_counted_in_answers_only():
    samples = [Sample(torch.tensor([1, 1, 1, 1, 5, 7, 5, 7, 3]), torch.zeros(8, 2), 3)]
    assert train.frequent_tokens(samples, 2, 10).tolist() == [5, 7]
