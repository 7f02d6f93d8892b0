"""The embedded pair itself: minutes of decoding, and a model from the package index."""

from __future__ import annotations

import re
import time

import pytest
import torch
from scipy.stats import chisquare
from test_end_to_end import run
from test_sampled_decoding import DishonestDraft
from transformers import AutoModelForCausalLM

from autoregressive import autoregressive
from specsampling.config import HumanEvalConfig
from specsampling.method.drafts import CompositeDraft, ModelDraft, NgramDraft, first_layers
from specsampling.method.sampling import Sampling
from specsampling.models.checkpoint import load_model
from specsampling.models.exactness import check_exactness
from specsampling.models.load import load_draft, load_pair, model_location
from specsampling.tasks.humaneval import HumanEval
from speculative import speculative

pytestmark = [pytest.mark.slow, pytest.mark.network]

CPU = torch.device("cpu")
DRAFT = "embedded:smollm2-135m-draft"
PAPERS_SAMPLING = {  # of programs and of summaries
    "def add(a, b):\n    ": Sampling(temperature=0.8, top_p=0.95),
    "The weather in spring is": Sampling(temperature=1.0, top_p=0.8),
}
TIE = 1e-4  # a top-2 logit gap below this is a tie: other kernels may break it another way


@pytest.fixture(scope="module")
def task():
    return HumanEval(HumanEvalConfig("chat", (), timeout_seconds=3.0, memory_mb=1024))


@pytest.mark.parametrize(("profile", "limit"), [("smollm2-cpu", 8), ("qwen-coder-cpu", 3)])
def test_memory_is_known_before_it_is_spent(profile, limit, tmp_path):
    """The estimate, with what the process has before it loads, and the peak: within 10%."""
    options = ("--profile", profile, "--limit", limit, "--output", tmp_path / "rows.jsonl")
    short = ("--set", "decoding.max_new_tokens=64", "--set", "decoding.compile=off")
    code, _, errors = run(*options, *short)
    assert code == 0, errors
    line = next(line for line in errors.splitlines() if "peak memory:" in line)
    peak, expected = (float(part) for part in re.findall(r"([0-9.]+) GB", line))
    assert expected == pytest.approx(peak, rel=0.1, abs=0.1)  # both rounded to 0.1 GB


def same_or_tied(model, prompt, ids, other_ids) -> bool:
    """Equal, or parted at a near-tie of the target's logits."""
    if ids == other_ids:
        return True
    at = next(i for i, pair in enumerate(zip(ids, other_ids, strict=False)) if len(set(pair)) > 1)
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + ids[:at]])).logits[0, -1]
    first, second = logits.topk(2).values.tolist()
    print(f"parted at new token {at}: top-2 gap {first - second:.2e}")
    return first - second < TIE


def test_float32_outputs_equal_hugging_faces(task):
    """20 problems x K in {2, 4, 7}: speculative == autoregressive == generate."""
    pair = load_pair("embedded:smollm2-135m", dtype="float32", device="cpu")
    location = model_location("embedded:smollm2-135m")
    huggingface = AutoModelForCausalLM.from_pretrained(location, dtype=torch.float32)
    options = {"max_new_tokens": 128, "eos_ids": pair.eos_ids}
    drafts = {2: NgramDraft(), 4: ModelDraft(first_layers(pair.target, 3)), 7: NgramDraft()}
    for example in task.examples()[:20]:
        prompt = task.prompt(example, pair, max_tokens=1024).token_ids
        ids = torch.tensor([prompt])
        theirs = huggingface.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=128, do_sample=False
        )[0, len(prompt) :].tolist()
        baseline = autoregressive(pair.target, prompt, **options).token_ids
        assert same_or_tied(pair.target, prompt, theirs, baseline), example.id
        reference = autoregressive(pair.target, prompt, width=8, **options).token_ids
        assert same_or_tied(pair.target, prompt, theirs, reference), example.id
        for k, draft in drafts.items():
            generation = speculative(pair.target, draft, prompt, k=k, width=8, **options)
            assert generation.token_ids == reference, (example.id, k)
        print(example.id, len(theirs), theirs == baseline == reference)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_shipped_draft_is_lossless_and_useful(dtype, task, all_threads):
    """Alone and behind a lookup: the target's very tokens, in fewer calls."""
    pair = load_pair("embedded:smollm2-135m", DRAFT, dtype=dtype, device="cpu")
    composite = CompositeDraft(NgramDraft(3, 2), pair.draft)
    drafts = ((3, pair.draft), (7, pair.draft), (7, composite))
    assert tokens_per_call_of_equal_texts(pair, task, range(30, 36), drafts) > 2


def test_sampled_tokens_have_the_targets_distribution(all_threads):
    """Chi-squared over the next token, sampled as the paper does; with a lie it rejects."""
    pair = load_pair("embedded:smollm2-135m", DRAFT, dtype="float32", device="cpu")
    for text, sampling in PAPERS_SAMPLING.items():
        assert p_value(pair, pair.draft, text, sampling) > 0.01 / len(PAPERS_SAMPLING), text
    assert p_value(pair, DishonestDraft(pair.draft), text, sampling) < 0.01 / len(PAPERS_SAMPLING)


def p_value(pair, draft, text, sampling, num=1000) -> float:
    """Return how likely the target gives tokens like those of `num` speculative samples."""
    prefix, generator = pair.encode(text), torch.Generator().manual_seed(0)
    with torch.inference_mode():
        logits = pair.target(torch.tensor([prefix])).logits[0, -1].double()
    probs, order = (logits / sampling.temperature).softmax(-1).sort(descending=True)
    probs *= probs.cumsum(-1) - probs < sampling.top_p  # the mass before it does not reach top_p
    probs = torch.zeros_like(probs).scatter(0, order, probs / probs.sum())
    options = {"k": 1, "max_new_tokens": 2, "sampling": sampling, "generator": generator}
    options["is_stop"] = lambda new_ids: True  # the first token is enough
    drawn = [speculative(pair.target, draft, prefix, **options).token_ids[0] for _ in range(num)]
    counts = torch.bincount(torch.tensor(drawn), minlength=len(probs)).double()
    assert not counts[probs == 0].any()
    common = probs * num >= 5
    rare = (probs > 0) & ~common
    groups = [*common.nonzero(), *([rare] if rare.any() else [])]
    observed, expected = (
        [float(values[group].sum()) for group in groups] for values in (counts, probs * num)
    )
    return chisquare(observed, expected).pvalue


def test_loading_the_shipped_draft_takes_little_time(all_threads):
    """Under a second without its proof, which takes some calls of the model twice."""
    target, dtype = load_model("embedded:smollm2-135m", torch.bfloat16, CPU), torch.bfloat16
    model_location(DRAFT)  # made once
    start = time.perf_counter()
    load_draft(DRAFT, target, dtype)
    assert time.perf_counter() - start < 5


def test_bfloat16_outputs_are_bit_exact(task):
    pair = load_pair("embedded:smollm2-135m", dtype="bfloat16", device="cpu")
    assert check_exactness(pair.target, width=8, capacity=512).is_exact
    shallow = ModelDraft(first_layers(pair.target, 3))
    drafts = ((3, NgramDraft()), (7, NgramDraft()), (4, shallow))
    tokens_per_call_of_equal_texts(pair, task, range(20, 26), drafts)


def tokens_per_call_of_equal_texts(pair, task, numbers, drafts) -> float:
    """The tokens for each of the target's calls, over drafts whose texts are all the target's."""
    options = {"max_new_tokens": 96, "eos_ids": pair.eos_ids, "width": 8}
    num_tokens = num_calls = 0
    for number in numbers:
        prompt = task.prompt(task.examples()[number], pair, max_tokens=1024).token_ids
        expected = autoregressive(pair.target, prompt, **options).token_ids
        for k, draft in drafts:
            generation = speculative(pair.target, draft, prompt, k=k, **options)
            assert generation.token_ids == expected, (number, k)
            num_tokens += len(expected)
            num_calls += generation.target_calls
    return num_tokens / num_calls
