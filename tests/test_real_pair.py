"""The embedded pair itself: minutes of decoding, and a model from the package index."""

from __future__ import annotations

import pytest
import torch

from autoregressive import autoregressive
from specsampling.config import HumanEvalConfig
from specsampling.drafts import ModelDraft, NgramDraft, first_layers
from specsampling.exactness import check_exactness
from specsampling.models import load_pair
from specsampling.tasks.humaneval import HumanEval
from speculative import speculative

pytestmark = [pytest.mark.slow, pytest.mark.network]

TIE = 1e-4  # a top-2 logit gap below this is a tie: other kernels may break it another way


@pytest.fixture(scope="module")
def task():
    return HumanEval(HumanEvalConfig("chat", (), timeout_seconds=3.0, memory_mb=1024))


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
    options = {"max_new_tokens": 128, "eos_ids": pair.eos_ids}
    drafts = {2: NgramDraft(), 4: ModelDraft(first_layers(pair.target, 3)), 7: NgramDraft()}
    for example in task.examples()[:20]:
        prompt = task.prompt(example, pair, max_tokens=1024).token_ids
        ids = torch.tensor([prompt])
        theirs = pair.target.generate(
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


def test_bfloat16_outputs_are_bit_exact(task):
    pair = load_pair("embedded:smollm2-135m", dtype="bfloat16", device="cpu")
    assert check_exactness(pair.target, width=8, capacity=512).is_exact
    options = {"max_new_tokens": 96, "eos_ids": pair.eos_ids, "width": 8}
    shallow = ModelDraft(first_layers(pair.target, 3))
    for example in task.examples()[20:26]:
        prompt = task.prompt(example, pair, max_tokens=1024).token_ids
        expected = autoregressive(pair.target, prompt, **options).token_ids
        for k, draft in ((3, NgramDraft()), (7, NgramDraft()), (4, shallow)):
            assert speculative(pair.target, draft, prompt, k=k, **options).token_ids == expected
