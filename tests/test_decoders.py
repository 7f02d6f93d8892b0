"""Greedy decoding: speculative == autoregressive == Hugging Face, token for token."""

import time
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from conftest import ARCHITECTURES, CONTEXT, VOCAB_SIZE

from autoregressive import autoregressive, autoregressive_stream
from specsampling.method.distribution import one_hot
from specsampling.method.drafts import (
    CompositeDraft,
    DraftTerms,
    ModelDraft,
    NgramDraft,
    first_layers,
)
from specsampling.method.sampling import Sampling
from specsampling.method.session import Session
from specsampling.models.checkpoint import load_model
from specsampling.models.exactness import check_exactness
from specsampling.models.kernel_model import KernelModel
from speculative import speculative, speculative_stream

PROMPTS = ([5], [7, 3, 9, 3, 9, 3], list(range(20, 50)))


def hugging_face(model, prompt, num_tokens):
    ids = torch.tensor([prompt])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    return output[0, len(prompt) :].tolist()


def all_drafts(model_of, architecture):
    target = model_of(architecture)
    return {
        "other": ModelDraft(model_of(architecture, seed=1)),
        "itself": ModelDraft(target),
        "first layer": ModelDraft(first_layers(target, 1)),
        "n-gram": NgramDraft(),
        "composite": CompositeDraft(
            NgramDraft(3, 2), ModelDraft(model_of(architecture, seed=1), 3, min_confidence=0.3)
        ),
    }


@pytest.fixture(scope="module")
def texts_of(model_of):
    """What transformers' own greedy decoding makes of each prompt, once for each architecture."""
    return cache(lambda name: [hugging_face(model_of(name), prompt, 20) for prompt in PROMPTS])


@pytest.mark.parametrize("width", [None, 16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_baselines_tokens_are_those_of_generate(architecture, width, model_of, texts_of):
    for prompt, expected in zip(PROMPTS, texts_of(architecture)):
        baseline = autoregressive(model_of(architecture), prompt, max_new_tokens=20, width=width)
        assert baseline.token_ids == expected


@pytest.mark.parametrize("width", [None, 16])
@pytest.mark.parametrize(
    ("architecture", "k"),
    [
        *(("llama", k) for k in range(1, 9)),
        *((name, k) for name in ARCHITECTURES if name != "llama" for k in (1, 4, 8)),
    ],
)
def test_greedy_outputs_are_the_same_tokens(architecture, k, width, model_of, texts_of):
    target = model_of(architecture)
    for prompt, expected in zip(PROMPTS, texts_of(architecture)):
        for name, draft in all_drafts(model_of, architecture).items():
            generation = speculative(target, draft, prompt, k=k, max_new_tokens=20, width=width)
            assert generation.token_ids == expected, name


@pytest.mark.parametrize(
    ("architecture", "quantization"),
    [
        *((name, None) for name in ARCHITECTURES),
        *((name, of) for name in ("llama", "qwen2", "gpt_neo") for of in ("none", "int8", "int4")),
    ],
)
def test_greedy_outputs_are_bit_exact_in_bfloat16(architecture, quantization, model_folders):
    """In PyTorch (None) argmaxes flip at near-ties unless all calls have one width."""
    folder, cpu = str(model_folders[f"{architecture}-target"]), torch.device("cpu")
    if quantization is None:
        target = load_model(folder, torch.bfloat16, cpu, compile="off")  # grouped heads
    else:
        target = load_model(folder, torch.bfloat16, cpu, quantization)
    assert isinstance(target, KernelModel) == (quantization is not None)
    options = {"max_new_tokens": 60, "width": 8 if quantization is None else None}
    assert check_exactness(target, options["width"], capacity=120).is_exact
    drafts = {"n-gram": NgramDraft(), "first layer": ModelDraft(first_layers(target, 1))}
    for prompt in PROMPTS:
        expected = autoregressive(target, prompt, **options).token_ids
        for k in (2, 5, 7) if quantization is None else (1, 2, 7, 15, 30):
            for name, draft in drafts.items():
                generation = speculative(target, draft, prompt, k=k, **options)
                assert generation.token_ids == expected, (name, k)


def test_a_draft_equal_to_the_target_is_always_accepted(llama):
    """A draft cache one token short after a fully accepted cycle spoils the next proposals."""
    generation = speculative(llama, ModelDraft(llama), [1, 2, 3], k=4, max_new_tokens=50)
    assert generation.accepted == generation.drafted
    assert generation.drafted == [4] * 10
    assert generation.target_calls == 10
    assert generation.draft_calls == 40


def test_a_model_stops_drafting_when_it_is_unsure(llama):
    """The token it is unsure of is still proposed, with its distribution; none follows it."""
    sure, unsure = (
        ModelDraft(llama, min_confidence=limit).start(DraftTerms.of(llama, 64, Sampling(), None))
        for limit in (0.0, 0.3)
    )
    tokens, num_shorter = [1, 2, 3], 0
    for _ in range(12):
        all_tokens, _ = sure.propose(tokens, 5)
        proposed, probs = unsure.propose(tokens, 5)
        assert proposed == all_tokens[: len(proposed)] and len(probs) == len(proposed) >= 1
        with torch.inference_mode():
            logits = llama(torch.tensor([tokens + all_tokens])).logits[0, len(tokens) - 1 : -1]
        confident = (logits.softmax(-1).max(-1).values >= 0.3).tolist()
        num_expected = (confident.index(False) if False in confident else 4) + 1
        assert len(proposed) == min(num_expected, 5)
        num_shorter += len(proposed) < 5
        tokens.append(all_tokens[0])
        for proposer in (sure, unsure):
            proposer.rollback(len(tokens) - 1)
    assert num_shorter > 0


def test_no_draft_token_is_fed_twice(llama, model_of):
    draft_model = model_of("llama", seed=1)
    fed = []
    hook = draft_model.model.embed_tokens.register_forward_hook(
        lambda _, inputs, output: fed.append(inputs[0].shape[1])
    )
    generation = speculative(llama, ModelDraft(draft_model), [1, 2, 3], k=3, max_new_tokens=20)
    hook.remove()
    # A cycle's first draft call feeds what the cache lacks (two after full acceptance), others one.
    assert fed[0] == 2
    assert set(fed[1:]) <= {1, 2}
    assert len(fed) == 1 + generation.draft_calls


@pytest.mark.parametrize(("target_vocab", "draft_vocab"), [(100, 104), (104, 100), (100, 90)])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, top_p=0.9)])
def test_vocabularies_of_different_sizes_work(target_vocab, draft_vocab, sampling, model_of):
    """Heads of 151,936 and 152,064 rows met in one subtraction."""
    target = model_of("llama", vocab_size=target_vocab)
    draft = ModelDraft(model_of("llama", seed=1, vocab_size=draft_vocab))
    options = {"max_new_tokens": 60, "sampling": sampling}
    options["generator"] = torch.Generator().manual_seed(0)
    generation = speculative(target, draft, [1, 2], k=3, **options)
    assert len(generation.token_ids) == 60
    if sampling == Sampling():
        assert generation.token_ids == autoregressive(target, [1, 2], **options).token_ids


def test_same_generator_seed_same_text(llama, model_of):
    draft = ModelDraft(model_of("llama", seed=1))
    options = {"k": 3, "max_new_tokens": 30, "sampling": Sampling(1.0)}
    texts = [
        speculative(llama, draft, [1, 2], generator=torch.Generator().manual_seed(seed), **options)
        for seed in (0, 0, 1)
    ]
    assert texts[0].token_ids == texts[1].token_ids != texts[2].token_ids


def test_the_draft_reports_what_it_sampled_from(llama):
    """The warp on one model only, or a reported distribution that is not the sampled one."""
    terms = DraftTerms.of(llama, 64, Sampling(0.7, top_k=5), torch.Generator().manual_seed(0))
    proposer = ModelDraft(llama).start(terms)
    proposer.prefill([1, 2, 3])
    tokens, reported = proposer.propose([1, 2, 3, 4], 6)
    session = Session(llama, 64)
    session.prefill([1, 2, 3])
    for i, probs in enumerate(of.dense(VOCAB_SIZE) for of in reported):
        logits = session.score([1, 2, 3, 4, *tokens[:i]], last=1)[0]
        kept = probs > 0
        assert kept[tokens[i]] and kept.sum() == 5
        assert torch.allclose(probs[kept], (logits[kept] / 0.7).softmax(-1), atol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "k", "longest", "shortest", "expected"),
    [
        ([1, 2, 3, 4, 9, 1, 2, 3, 5, 6, 1, 2, 3], 2, 3, 1, [5, 6]),  # the last occurrence
        ([1, 2, 3, 50, 3, 60, 2, 3], 1, 2, 1, [50]),  # the longer match
        ([8, 1, 2, 1, 2], 5, 3, 1, [1, 2, 1, 2, 1]),  # it runs on into its own proposals
        ([1, 2, 3, 4], 3, 3, 1, []),
        ([1, 2, 3, 9, 3], 3, 3, 2, []),
        ([1], 3, 3, 1, []),
    ],
)
def test_lookup_proposes_what_followed(tokens, k, longest, shortest, expected):
    terms = DraftTerms(64, VOCAB_SIZE, torch.device("cpu"), Sampling(), None)
    ids, probs = NgramDraft(longest, shortest).start(terms).propose(tokens, k)
    assert ids == expected
    assert [of.probs for of in probs] == [{token: 1.0} for token in ids]


@pytest.mark.parametrize("num_layers", [0, 3])
def test_first_layers_must_be_some_of_the_targets(num_layers, llama):
    with pytest.raises(ValueError, match="between 1 and 2"):
        first_layers(llama, num_layers)


@dataclass(frozen=True)
class ScriptedDraft:
    """Proposes a known text, wrong at some positions: chooses what is accepted and corrected."""

    text: tuple[int, ...]
    wrong_at: frozenset[int] = frozenset()
    num_calls = 0
    forward_seconds = 0.0

    def start(self, terms):
        return self

    def prefill(self, tokens):
        pass

    def rollback(self, length):
        pass

    def propose(self, tokens, k):
        at = len(tokens) - len(PROMPT)
        ids = [
            (token + (i in self.wrong_at)) % VOCAB_SIZE
            for i, token in enumerate(self.text[at : at + k], start=at)
        ]
        return ids, one_hot(ids)


PROMPT = [11, 12, 13]


@pytest.fixture
def text(llama):
    """30 greedy tokens, each position distinguishable enough for these tests."""
    return autoregressive(llama, PROMPT, max_new_tokens=30).token_ids


def both(llama, text, wrong_at=(), k=4, **options):
    """Speculative and autoregressive, which must end alike."""
    baseline = autoregressive(llama, PROMPT, **options)
    draft = ScriptedDraft(tuple(text), frozenset(wrong_at))
    generation = speculative(llama, draft, PROMPT, k=k, **options)
    assert generation.token_ids == baseline.token_ids
    assert generation.finish_reason == baseline.finish_reason
    return generation


def first_at(text, position):
    """An end-of-text id that occurs first at or after `position`, and where that is."""
    for i in range(position, len(text)):
        if text[i] not in text[:i]:
            return text[i], i
    raise AssertionError("the text repeats too much for this test")


@pytest.mark.parametrize("kind", ["accepted", "correction", "bonus"])
def test_eos_ends_the_text_whatever_it_is(kind, llama, text):
    """EOS was looked for among accepted tokens only."""
    eos, at = first_at(text, 1)
    options = {"wrong_at": [at] * (kind == "correction"), "k": at if kind == "bonus" else 8}
    generation = both(llama, text, max_new_tokens=30, eos_ids=[eos], **options)
    assert generation.token_ids == text[: at + 1]
    assert generation.kinds()[-1] == kind and generation.finish_reason == "eos"


def test_of_several_eos_ids_the_earliest_position_counts(llama, text):
    """The first id in the list was taken instead of the earliest position."""
    early, at = first_at(text, 1)
    late, _ = first_at(text, at + 1)
    generation = both(llama, text, max_new_tokens=30, eos_ids=[late, early], k=8)
    assert generation.token_ids == text[: at + 1]


@pytest.mark.parametrize("max_new_tokens", range(1, 13))
def test_the_token_limit_is_exact(max_new_tokens, llama, text):
    """The limit was overshot by up to k."""
    generation = both(llama, text, max_new_tokens=max_new_tokens)
    assert generation.token_ids == text[:max_new_tokens]
    assert generation.finish_reason == "length"


@pytest.mark.parametrize("length", range(1, 7))
@pytest.mark.parametrize("end", range(7, 14))
def test_a_stop_is_found_also_when_it_crosses_a_cycles_edge(end, length, llama, text):
    """A stop string that begins in one cycle and ends in the next was missed."""
    wanted = text[end - length : end]

    def is_stop(new_ids):
        return list(new_ids[-length:]) == wanted

    first_end = next(i for i in range(length, end + 1) if text[i - length : i] == wanted)
    generation = both(llama, text, max_new_tokens=30, is_stop=is_stop)
    assert generation.token_ids == text[:first_end]
    assert generation.finish_reason == "stop"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("width", [None, 8])
def test_the_context_limit_is_exact(architecture, width, model_of):
    target = model_of(architecture)
    prompt = [i % VOCAB_SIZE for i in range(CONTEXT - 11)]
    options = {"max_new_tokens": 50, "width": width}
    baseline = autoregressive(target, prompt, **options)
    assert len(baseline.token_ids) == 11
    assert baseline.finish_reason == "context"
    for draft in all_drafts(model_of, architecture).values():
        assert speculative(target, draft, prompt, k=7, **options).token_ids == baseline.token_ids


def test_a_draft_with_a_shorter_context_falls_silent(model_of):
    target = model_of("llama")
    draft_model = model_of("gpt2", seed=1)
    draft_model.config.n_positions = 40
    prompt = list(range(30))
    try:
        generation = speculative(target, ModelDraft(draft_model), prompt, k=4, max_new_tokens=40)
    finally:
        draft_model.config.n_positions = CONTEXT
    assert generation.token_ids == autoregressive(target, prompt, max_new_tokens=40).token_ids
    assert generation.drafted[0] == 4
    assert generation.drafted[-1] == 0


@pytest.mark.parametrize("prompt", [[], list(range(CONTEXT))], ids=["empty", "full context"])
def test_prompts_that_leave_no_room_are_refused(prompt, llama):
    with pytest.raises(ValueError, match="prompt must"):
        autoregressive(llama, prompt, max_new_tokens=5)
    with pytest.raises(ValueError, match="prompt must"):
        speculative(llama, NgramDraft(), prompt, k=2, max_new_tokens=5)


@pytest.mark.parametrize(("k", "width"), [(0, None), (8, 8)])
def test_k_out_of_range_is_refused(k, width, llama):
    with pytest.raises(ValueError, match="k must be"):
        speculative(llama, NgramDraft(), [1], k=k, width=width, max_new_tokens=5)


def test_the_counts_add_up(llama, text):
    generation = both(llama, text, wrong_at=[2, 7, 8, 20], max_new_tokens=25)
    assert sum(generation.accepted) + len(generation.accepted) == 25
    assert generation.target_calls == len(generation.accepted) == len(generation.drafted)
    assert generation.kinds().count("accepted") == sum(generation.accepted)
    assert 0 < generation.forward_seconds < generation.prefill_seconds + generation.decode_seconds


@pytest.mark.parametrize("name", ["other", "n-gram", None])
def test_steps_are_the_text_cycle_by_cycle(model_of, name):
    """The last cycle's step has no token behind the text's end."""
    target = model_of("llama")
    options = {"max_new_tokens": 17, "eos_ids": ()}
    arguments = [target, *([all_drafts(model_of, "llama")[name]] if name else []), PROMPTS[1]]
    options |= {"k": 4} if name else {}
    decode = (speculative_stream, speculative) if name else (autoregressive_stream, autoregressive)
    steps, end = steps_and_end(decode[0](*arguments, **options))
    whole = decode[1](*arguments, **options)
    assert [token for step in steps for token in step.token_ids] == whole.token_ids
    assert [kind for step in steps for kind in step.kinds] == whole.kinds()
    for field in ("token_ids", "accepted", "finish_reason"):
        assert getattr(end, field) == getattr(whole, field)
    assert len(steps) == (len(whole.accepted) or 17)


def steps_and_end(stream, pause=0.0):
    steps = []
    while True:
        try:
            steps.append(next(stream))
            time.sleep(pause)
        except StopIteration as end:
            return steps, end.value


def test_the_clock_stops_between_steps(model_of):
    """Whoever shows a text takes none of its time."""
    stream = autoregressive_stream(model_of("llama"), PROMPTS[1], max_new_tokens=3)
    steps, end = steps_and_end(stream, pause=0.2)
    assert len(steps) == 3 and end.decode_seconds < 0.4


def test_a_bare_model_is_no_draft(model_of):
    with pytest.raises(TypeError, match=r"draft must be a Draft, as ModelDraft\(model\) is"):
        speculative(model_of("llama"), model_of("llama", seed=1), [5], k=2, max_new_tokens=4)
