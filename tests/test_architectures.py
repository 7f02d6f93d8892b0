"""Every architecture of the table decodes as `generate` does, or is refused in one line.

A user's way: a folder on disk, `load_pair`, the self-check, the two decoders. What is compared
with is transformers' own greedy search in a model that this package has not touched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import (
    ARCHITECTURES,
    CONTEXT,
    CROSSING,
    EQUAL,
    NO_SELF_DRAFT,
    REFUSED,
    SMALL_DRAFT,
    VOCAB_SIZE,
    Architecture,
)
from transformers import AutoModelForCausalLM, PreTrainedModel

from autoregressive import autoregressive
from specsampling.method.session import context_limit
from specsampling.method.text import PromptError
from specsampling.models.errors import ModelError
from specsampling.models.exactness import check_exactness
from specsampling.models.load import Pair, load_pair
from speculative import speculative

MAX_NEW_TOKENS = 20
TARGET, DRAFT = 1, 2  # seeds
SELF_DRAFT = "target-layers:1"
CAPACITY = 60  # the longest prompt and what is generated after it
LEAST_GAP = 1e-4  # of the two largest logits: closer ones may change places in float32

Tokens = list[int]
FolderOf = Callable[[Architecture, int], str]


def random_prompts() -> list[Tokens]:
    """Inside one sliding window; beyond two, with something in it to look up."""
    generator = torch.Generator().manual_seed(1)
    short = torch.randint(VOCAB_SIZE, (12,), generator=generator).tolist()
    long = torch.randint(VOCAB_SIZE, (25,), generator=generator).tolist()
    return [short, [*long, *long[:15]]]


PROMPTS = random_prompts()


def named(expected: str) -> list[Any]:
    """The table's lines as parameters of a test; the rare ones are for the slow suite."""
    return [
        pytest.param(line, id=name, marks=[] if line.is_common else [pytest.mark.slow])
        for name, line in ARCHITECTURES.items()
        if line.expected == expected
    ]


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> FolderOf:
    """A saved model of an architecture and a seed, each written once."""
    written: dict[tuple[str, int], str] = {}

    def get(architecture: Architecture, seed: int) -> str:
        if not architecture.exists:
            pytest.skip(f"this transformers has no {architecture.model_type}")
        key = (repr(architecture), seed)
        if key not in written:
            folder = tmp_path_factory.mktemp(architecture.name)
            architecture.save(folder, seed)
            written[key] = str(folder)
        return written[key]

    return get


def drafts(architecture: Architecture, folder_of: FolderOf) -> dict[str, list[Tokens]]:
    """A lookup, another model, the target's own first layer, and the prompts for each.

    The other model is of the target's kind in the slow suite, the smallest there is in the fast.
    """
    other = folder_of(SMALL_DRAFT if architecture.is_common else architecture, DRAFT)
    specs = {"ngram": PROMPTS, other: PROMPTS[1:]}
    return specs if architecture.name in NO_SELF_DRAFT else {**specs, SELF_DRAFT: PROMPTS[1:]}


def load(folder: str, draft: str = "ngram", dtype: str = "float32") -> Pair:
    """A pair as a user loads it; one tokenizer for both, as some kinds come with a class for it."""
    return load_pair(folder, draft, tokenizer=folder, dtype=dtype, device="cpu")


def load_plain(folder: str) -> PreTrainedModel:
    """The same weights in transformers' own layers."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def generate(model: PreTrainedModel, prompt: Tokens) -> Tokens:
    """The new tokens of transformers' own greedy search."""
    ids = torch.tensor([prompt])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
    )
    return output[0, len(prompt) :].tolist()


def greedy(pair: Pair, prompt: Tokens, width: int | None) -> Tokens:
    """The new tokens of the baseline."""
    return autoregressive(pair.target, prompt, max_new_tokens=MAX_NEW_TOKENS, width=width).token_ids


def drafted(pair: Pair, prompt: Tokens, width: int | None, k: int = 3) -> Tokens:
    """The new tokens of the speculative decoder."""
    return speculative(
        pair.target, pair.draft, prompt, k=k, max_new_tokens=MAX_NEW_TOKENS, width=width
    ).token_ids


def parts_at(ours: Tokens, theirs: Tokens) -> int | None:
    """The first position at which two texts differ."""
    if len(ours) != len(theirs):
        return min(len(ours), len(theirs))
    return next((i for i, pair in enumerate(zip(ours, theirs)) if pair[0] != pair[1]), None)


def relative_gap(model: PreTrainedModel, tokens: Tokens) -> float:
    """How far apart the two largest logits after `tokens` are, relative to the largest."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].float()
    first, second = logits.topk(2).values.tolist()
    return (first - second) / max(abs(first), abs(second), 1e-9)


def require_equal(plain: PreTrainedModel, prompt: Tokens, ours: Tokens, theirs: Tokens) -> None:
    """Equal tokens, or a near-tie where they part: behind one, two right texts may differ."""
    position = parts_at(ours, theirs)
    if position is None:
        return
    gap = relative_gap(plain, [*prompt, *theirs[:position]])
    assert gap < LEAST_GAP, f"parts at {position}, gap {gap:.2g}: {ours} is not {theirs}"


@pytest.mark.parametrize("architecture", named(EQUAL))
def test_float32_outputs_are_those_of_generate(architecture, folder_of):
    """Layers chosen by a configuration's words crashed, or gave other tokens in silence."""
    folder = folder_of(architecture, TARGET)
    plain = load_plain(folder)
    texts = [generate(plain, prompt) for prompt in PROMPTS]
    assert max(len(set(text)) for text in texts) > 3, "a text that stands still proves nothing"
    for draft, prompts in drafts(architecture, folder_of).items():
        pair = load(folder, draft)
        for width in (None, 8):
            for prompt in prompts:
                text = texts[PROMPTS.index(prompt)]
                if draft == "ngram":
                    require_equal(plain, prompt, greedy(pair, prompt, width), text)
                require_equal(plain, prompt, drafted(pair, prompt, width), text)


@pytest.mark.parametrize("architecture", named(EQUAL))
def test_bfloat16_outputs_are_those_of_the_reference(architecture, folder_of):
    """In 16 bit another call shape gives other bits, and greedy argmaxes flip at near-ties."""
    folder = folder_of(architecture, TARGET)
    texts: list[Tokens] = []
    for draft, prompts in drafts(architecture, folder_of).items():
        pair = load(folder, draft, "bfloat16")
        texts = texts or [greedy(pair, prompt, width=8) for prompt in PROMPTS]
        for prompt in prompts:
            assert drafted(pair, prompt, width=8) == texts[PROMPTS.index(prompt)], draft


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", named(EQUAL))
def test_the_self_check_refuses_nothing_that_decodes(architecture, dtype, folder_of):
    """It is what a user meets first: one that is too strict loses an architecture."""
    pair = load(folder_of(architecture, TARGET), dtype=dtype)
    check_exactness(pair.target, 8, CAPACITY)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(NO_SELF_DRAFT))
def test_a_self_draft_that_is_not_supported_is_refused_in_one_line(name, folder_of):
    """A cut whose layers had not been found ended in an IndexError, tokens later."""
    with pytest.raises(ModelError) as caught:
        load(folder_of(ARCHITECTURES[name], TARGET), SELF_DRAFT)
    assert SELF_DRAFT in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "architecture", [pytest.param(CROSSING[name], id=name) for name in CROSSING]
)
def test_a_changing_frequency_table_is_never_wrong_in_silence(architecture, folder_of):
    """LongRoPE chose its table by a call's padding; the self-check looked elsewhere and agreed."""
    folder = folder_of(architecture, TARGET)
    try:
        pair = load(folder)
        is_exact = check_exactness(pair.target, 8, CONTEXT).is_exact
    except ModelError as refusal:
        assert "\n" not in str(refusal)
        return
    if is_exact:
        plain, limit = load_plain(folder), context_limit(pair.target)
        for length in (55, CONTEXT - MAX_NEW_TOKENS):
            prompt = (PROMPTS[1] * 3)[:length]
            if length >= limit:
                with pytest.raises(PromptError, match=f"context of {limit} tokens"):
                    greedy(pair, prompt, 8)
                continue
            text = generate(plain, prompt)[: limit - length]
            require_equal(plain, prompt, greedy(pair, prompt, 8), text)
            require_equal(plain, prompt, drafted(pair, prompt, 8), text)


@pytest.mark.parametrize("architecture", named(REFUSED))
def test_what_cannot_be_decoded_is_refused_in_one_line(architecture, folder_of):
    """Some ran to the end and printed a speedup over noise; others ended in a traceback."""
    folder = folder_of(architecture, TARGET)
    with pytest.raises(ModelError) as caught:
        check_exactness(load(folder).target, 8, CAPACITY)
    line = str(caught.value)
    assert "\n" not in line
    assert (architecture.word or "") in line
