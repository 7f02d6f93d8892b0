"""Several texts at once: each gets the tokens that it gets alone, whoever it is decoded beside."""

import time
from contextlib import suppress
from functools import partial

import pytest
import torch
from architectures import ARCHITECTURES
from conftest import make_model
from test_end_to_end import config as config  # a fixture
from test_end_to_end import run
from test_ranks import without_process

from autoregressive import autoregressive
from specsampling.method.adaptive import AdaptiveDraft
from specsampling.method.batch import BatchRunner, decode_together
from specsampling.method.drafts import CompositeDraft, ModelDraft, NgramDraft
from specsampling.method.sampling import GREEDY, Sampling
from specsampling.models.exactness import check_exactness
from specsampling.results.records import read_rows
from speculative import speculative

PROMPTS = [[1, 4, 2, 1, 4], [3], list(range(30)), [7, 7, 7, 8, 7, 7], [100, 2, 50], [5, 6] * 9]
LONGEST = 30 + 24
WIDTH = 8


@pytest.fixture(scope="module", params=["llama", "qwen2", "gpt_neo", "mistral"])
def pair(request):
    if request.param == "mistral":  # its layers see only the newest 16 keys
        return ARCHITECTURES["mistral-sliding"].model(), make_model("llama", 1)
    return make_model(request.param), make_model("llama", 1)


def drafts_of(model):
    lookup = NgramDraft(3, 1)
    return {
        "model": ModelDraft(model),
        "lookup": lookup,
        "both, until unsure": CompositeDraft(lookup, ModelDraft(model, 3, 0.3)),
        "k auto": AdaptiveDraft.of(CompositeDraft(lookup, ModelDraft(model))),
    }


def jobs_of(target, draft, width, sampling):
    """A decoder for each prompt; each text ends where it ends."""
    for i, prompt in enumerate(PROMPTS):
        shared = {"max_new_tokens": 10 + 2 * i, "sampling": sampling, "eos_ids": (11,)}
        shared["generator"] = torch.Generator().manual_seed(i)
        if draft is None:
            yield partial(autoregressive, target, prompt, width=width, **shared)
        else:
            yield partial(speculative, target, draft, prompt, k=4, width=width, **shared)


def alone(*arguments):
    return [job().token_ids for job in jobs_of(*arguments)]


def together(target, model, size, kind, *arguments):
    target = BatchRunner(target, size, LONGEST, WIDTH, WIDTH)
    draft = drafts_of(BatchRunner(model, size, LONGEST, WIDTH)).get(kind)
    done = list(decode_together(jobs_of(target, draft, *arguments), size))
    return [text.result.token_ids for text in sorted(done)]


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.9, top_p=0.9)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("width", [None, WIDTH])
@pytest.mark.parametrize("kind", ["baseline", *drafts_of(None)])
def test_each_text_is_the_one_it_is_alone(kind, width, sampling, pair):
    target, model = pair
    if kind == "k auto" and not sampling.is_greedy:
        pytest.skip("sampled texts depend on the clock then, as to which they are")
    draft = None if kind == "baseline" else drafts_of(model)[kind]
    expected = alone(target, draft, width, sampling)
    for size in (2, 9):
        assert together(target, model, size, kind, width, sampling) == expected


def test_calls_are_shared(pair, monkeypatch):
    target, model = pair
    sizes = []
    run_batch = BatchRunner.run
    monkeypatch.setattr(
        BatchRunner, "run", lambda self, asked: sizes.append(len(asked)) or run_batch(self, asked)
    )
    together(target, model, 6, "baseline", WIDTH, GREEDY)
    assert max(sizes) == 6 and len(sizes) <= 20  # as many calls as the longest text has tokens


def test_the_seconds_of_texts_add_up_to_the_time_that_passed(pair):
    target, model = (BatchRunner(decoded, 3, LONGEST, WIDTH) for decoded in pair)
    start = time.perf_counter()
    done = list(decode_together(jobs_of(target, ModelDraft(model), None, GREEDY), 3))
    passed = time.perf_counter() - start
    seconds = [
        text.share * (text.result.prefill_seconds + text.result.decode_seconds) for text in done
    ]
    assert sum(seconds) == pytest.approx(passed, rel=0.2)
    assert all(0 < text.share <= 1.01 for text in done)


@pytest.mark.parametrize("error", [0, 1e-6])
def test_bits_are_the_same_among_others_and_the_check_would_see(error, pair, monkeypatch):
    """The negative control: rows of a call of several texts that are off by 1e-6."""
    run_batch = BatchRunner.run
    wrong = lambda self, asked: [rows + error * (len(asked) > 1) for rows in run_batch(self, asked)]  # noqa: E731, E501
    if error:
        monkeypatch.setattr(BatchRunner, "run", wrong)
    check = check_exactness(BatchRunner(pair[0], 5, 64, WIDTH, WIDTH), WIDTH, 64)
    assert check.is_exact == (not error)
    if not error:
        assert check.num_rows >= 16 and check.num_texts == 5 and check.from_alone < 1e-4


def test_a_text_of_nan_leaves_the_others_alone(pair):
    target, _ = pair
    expected = alone(target, None, WIDTH, GREEDY)
    runner = BatchRunner(target, 3, LONGEST, WIDTH)
    run_batch = runner.run
    poisoned = []

    def run(asked):
        logits = run_batch(asked)
        if not poisoned and len(asked) == 3:
            poisoned.append(asked[1].place)
            runner._places[asked[1].place].values[0].fill_(torch.nan)
            logits[1] = torch.full_like(logits[1], torch.nan)
        return logits

    runner.run = run
    done = sorted(decode_together(jobs_of(runner, None, WIDTH, GREEDY), 3))
    results = [text.result for text in done]
    assert poisoned and [result.finish_reason for result in results].count("error") == 1
    for result, tokens in zip(results, expected):
        assert result.finish_reason == "error" or result.token_ids == tokens


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, MemoryError])
def test_texts_that_lack_memory_leave_the_others_alone(kind, pair):
    target, _ = pair
    expected = alone(target, None, WIDTH, GREEDY)
    runner = BatchRunner(target, 3, LONGEST, WIDTH, WIDTH)
    run_batch, num_calls = runner.run, []

    def run(asked):
        num_calls.append(len(asked))
        if len(num_calls) == 4:
            raise kind("no more")
        return run_batch(asked)

    def guarded(job):
        with suppress(kind):
            return job().token_ids

    runner.run = run
    jobs = [partial(guarded, job) for job in jobs_of(runner, None, WIDTH, GREEDY)]
    found = [text.result for text in sorted(decode_together(jobs, 3))]
    assert 1 <= found.count(None) <= 3
    assert all(tokens in (None, wanted) for tokens, wanted in zip(found, expected))


def test_a_run_of_several_at_once_has_the_rows_of_one_by_one(config, tmp_path):
    found = []
    for size in (1, 4):
        arguments = ("--config", config, "--limit", 6, "--output", tmp_path / f"{size}.jsonl")
        code, printed, errors = run(*arguments, "--set", f"run.batch_size={size}")
        assert code == 0, errors
        assert "6/6" in printed and "confirmed" in errors
        rows = without_process(tmp_path / f"{size}.jsonl")
        found.append(sorted(rows, key=lambda row: (row["example_id"], row["method"])))
        for row in rows:  # logits' differences, in float32, by rounding
            row.pop("gaps")
    assert found[0] == found[1]
    assert all(row.decode_seconds > 0 for row in read_rows(tmp_path / "4.jsonl"))
