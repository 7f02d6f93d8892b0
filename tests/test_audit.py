"""A run tells whether its tokens are the target's: right rules pass, classic mistakes do not."""

import dataclasses
import itertools
import random

import numpy as np
import pytest
import torch
from test_records import ROW

from autoregressive import autoregressive
from specsampling.method.distribution import Few, Full
from specsampling.method.drafts import CompositeDraft, ModelDraft, NgramDraft
from specsampling.method.evidence import Evidence, gap, transform
from specsampling.method.sampling import GREEDY, Sampling, probs_from_logits, sample
from specsampling.method.verify import VERIFIERS, Verdict, residual, verify
from specsampling.results.audit import (
    FALSE_ALARM,
    audit,
    audit_transforms,
    describe_partings,
    partings,
)
from speculative import speculative

VOCAB, K = 30, 3
PLAIN = Sampling(1.0)


def simulate(rule, num_tokens: int, seed: int = 0, *, warp=PLAIN, reported=None, argmax=False):
    """Transforms of a rule's tokens, where every context has other distributions.

    Args:
        rule: a verifier.
        num_tokens: at least so many.
        seed: of everything.
        warp: of target and draft.
        reported: warp of the distributions that the draft says it drew from; None: the true one.
        argmax: the draft proposes its most probable token, and reports its whole distribution.
    """
    generator = torch.Generator().manual_seed(seed)
    evidence = Evidence(warp, generator)
    while len(evidence.transforms) < num_tokens:
        logits = 1.5 * torch.randn(K + 1, VOCAB, generator=generator)
        draft_logits = logits[:K] + torch.randn(K, VOCAB, generator=generator)
        target_probs, draft_probs = (probs_from_logits(of, warp) for of in (logits, draft_logits))
        drafted = [
            int(of.dense(VOCAB).argmax()) if argmax else sample(of, generator) for of in draft_probs
        ]
        if reported is not None:
            draft_probs = probs_from_logits(draft_logits, reported)
        verdict = rule(target_probs, draft_probs, drafted, generator)
        tokens = [*drafted[: verdict.num_accepted], verdict.token]
        evidence.add(tokens, logits, target_probs, draft_probs)
    return evidence.transforms


def accept_by_position(target, draft, tokens, generator):
    return finish(target, draft, ratios_of(target, draft, range(K)), generator)


def correct_from_target(target, draft, tokens, generator):
    ratios = ratios_of(target, draft, tokens)
    return finish(target, draft, ratios, generator, correct=lambda q, p: q)


def bonus_from_draft(target, draft, tokens, generator):
    return finish(target, draft, ratios_of(target, draft, tokens), generator, bonus=draft[-1])


def ratios_of(target_probs, draft_probs, draft_tokens):
    rows = zip(target_probs, draft_probs, draft_tokens)
    at = [(q.at(token), p.at(token)) for q, p, token in rows]
    return torch.tensor([q / p if p else 1.0 for q, p in at])


def finish(target_probs, draft_probs, ratios, generator, correct=residual, bonus=None):
    accepted = torch.rand(K, generator=generator) < ratios
    n = int(accepted.long().cumprod(0).sum())
    if n == K:
        return Verdict(n, sample(target_probs[K] if bonus is None else bonus, generator))
    return Verdict(n, sample(correct(target_probs[n], draft_probs[n]), generator))


COLD = Sampling(0.6, top_p=0.95)
MISTAKES = {
    "acceptance indexed by position": (accept_by_position, {}),
    "correction from the target": (correct_from_target, {}),
    "bonus from the draft": (bonus_from_draft, {}),
    "the draft's distribution before its warp": (verify, {"warp": COLD, "reported": PLAIN}),
    "argmax drafts with random acceptance": (verify, {"argmax": True}),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_the_classic_mistakes_are_noticed_within_5000_tokens(name):
    rule, options = MISTAKES[name]
    for seed in range(3):
        found = audit_transforms([simulate(rule, 5000, seed, **options)])
        assert not found.is_lossless, found
        assert str(found).startswith("NOT lossless")


@pytest.mark.parametrize("warp", [PLAIN, COLD, Sampling(1.3, top_k=5)])
@pytest.mark.parametrize("rule", VERIFIERS)
def test_the_right_rules_pass(rule, warp):
    for seed in range(3):
        found = audit_transforms([simulate(VERIFIERS[rule], 3000, seed, warp=warp)])
        assert found.is_lossless and found.num_impossible == 0, found
        assert 0.03 < found.noticeable < 0.07


def test_a_right_rule_is_seldom_called_wrong():
    """1,000 runs of the right rule: as many alarms as stated, or fewer."""
    values = simulate(verify, 80_000)
    p_values = [audit_transforms([values[80 * i : 80 * i + 80]]).p_value for i in range(1000)]
    for rate in (FALSE_ALARM, 0.05, 0.2):
        alarms = sum(p < rate for p in p_values)
        assert alarms <= 1000 * rate + 4 * (1000 * rate) ** 0.5 + 1
    assert sum(p < 0.2 for p in p_values) > 100  # nor never: the p-values are not all large


def test_tokens_that_depend_on_those_before_are_noticed():
    """Each uniform, and not independent: a generator seeded anew in every cycle."""
    generator = np.random.default_rng(0)
    first = generator.random(1500)
    values = np.stack([first, (first + 0.2 * generator.random(1500)) % 1], axis=1).ravel()
    found = audit_transforms([values.tolist()])
    assert found.uniform_p > FALSE_ALARM > found.serial_p


def test_a_token_that_the_target_excludes_is_enough():
    values = [random.Random(0).random() for _ in range(100)]
    found = audit_transforms([[*values, -1.0]])
    assert not found.is_lossless and "1 of 101 tokens are impossible" in str(found)


def few(probs: list[float]) -> Few:
    return Few({token: prob for token, prob in enumerate(probs) if prob})


# Target, draft, and where a token's transform lies: from low to high, by the uniform number.
TRANSFORMS = {
    # Ratios 5, 0.5 and 0.67: first comes what the draft has too much of.
    "by ratio": (
        *([0.5, 0.3, 0.2, 0.0], [0.1, 0.6, 0.3, 0.0]),
        {1: (0.0, 0.3), 2: (0.3, 0.5), 0: (0.5, 1.0), 3: (-1, -1)},
    ),
    # The first two have one ratio, so the rest: the target's order, and equals share.
    "one ratio": (
        *([0.1, 0.4, 0.2, 0.2, 0.1], [0.2, 0.8, 0.0, 0.0, 0.0]),
        {1: (0.0, 0.4), 0: (0.4, 0.5), 2: (0.5, 0.9), 3: (0.5, 0.9), 4: (0.9, 1.0)},
    ),
    "equals without a draft": ([0.2, 0.4, 0.2, 0.2], None, {1: (0, 0.4), 0: (0.4, 1), 3: (0.4, 1)}),
    "no draft": (
        *([0.1, 0.5, 0.15, 0.25, 0.0], None),
        {1: (0.0, 0.5), 3: (0.5, 0.75), 0: (0.9, 1.0), 4: (-1, -1)},
    ),
    "one-hot": ([0.2, 0.5, 0.3], [0.0, 0.0, 1.0], {2: (0.0, 0.3), 1: (0.3, 0.8), 0: (0.8, 1.0)}),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("uniform", [0.0, 0.4, 0.5])
def test_a_tokens_transform_however_the_distributions_are_held(name, uniform):
    target, draft, spans = TRANSFORMS[name]
    forms = (few, lambda probs: Full(torch.tensor(probs)))
    for token, (low, high) in spans.items():
        for of_target, of_draft in itertools.product(forms, forms):
            drafted = None if draft is None else of_draft(draft)
            found = transform(token, of_target(target), drafted, uniform)
            assert found == pytest.approx(low + uniform * (high - low))


@pytest.fixture(scope="module")
def pair(model_of):
    return model_of("llama", vocab_size=50), model_of("qwen2", 1, vocab_size=50)


def decoded(pair, sampling, seed, **options):
    target, draft = pair
    either = CompositeDraft(NgramDraft(2, 1), ModelDraft(draft))
    terms = {"max_new_tokens": 60, "sampling": sampling, "eos_ids": [7]}
    terms |= {"generator": torch.Generator().manual_seed(seed)} | options
    alone = autoregressive(target, [3, 4, 5, 3, 4], **terms)
    return speculative(target, either, [3, 4, 5, 3, 4], k=3, **terms), alone


@pytest.mark.parametrize("verifier", VERIFIERS.values(), ids=VERIFIERS)
def test_a_decoders_texts_carry_a_transform_per_token_and_pass(pair, verifier):
    made = [decoded(pair, Sampling(1.0, top_p=0.9), seed, width=None) for seed in range(12)]
    for both in made:
        for done in both:
            assert len(done.transforms) == len(done.token_ids) and done.gaps is None
    for texts in zip(*made, strict=True):
        assert audit_transforms([text.transforms for text in texts]).is_lossless


def test_greedy_texts_carry_gaps_of_the_chosen_tokens(pair):
    logits = torch.tensor([1.0, 3.0, 2.5])
    assert [gap(logits, token) for token in range(3)] == [-2, 0.5, -0.5]
    assert gap(logits[:1], 0) == float("inf")  # no other token
    ours, alone = decoded(pair, GREEDY, 0)
    assert ours.token_ids == alone.token_ids
    assert len(ours.gaps) == len(ours.token_ids) and ours.transforms is None
    assert min(ours.gaps) > 0
    assert ours.gaps == pytest.approx(alone.gaps, abs=1e-3)


def row(token_ids, gaps=None, **fields):
    return dataclasses.replace(ROW, token_ids=token_ids, gaps=gaps, **fields)


def test_greedy_tokens_that_are_not_the_argmax_are_counted():
    found = audit([row([1, 2], [0.5, 0.0]), row([1, 2], [0.5, -0.25], example_id="b")])
    assert str(found) == "NOT lossless: 1 of 4 tokens are not the target's argmax, by up to 0.25"
    assert str(audit([row([1, 2], [0.5, 0.0])])) == "all 2 tokens are the target's argmax"
    assert audit([row([1, 2])]) is None  # a run from before they were recorded


def test_where_the_baseline_parts_from_the_reference():
    baseline = [row([1, 2, 3], [1.0, 0.125, 2.0]), row([5], [1.0], example_id="b")]
    reference = [row([1, 4, 3], [1.0, 0.25, 2.0]), row([5], [1.0], example_id="b")]
    gaps = partings(baseline, reference)
    assert gaps == [0.125]
    assert describe_partings(gaps, 2).startswith("1 of 2 texts differ from reference's")


def test_the_tokens_of_a_nucleus_alone_give_the_same_transforms():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4, 500, generator=generator)
    target, draft = probs_from_logits(logits, COLD), probs_from_logits(-logits[:3], COLD)
    assert all(isinstance(of, Few) for of in (*target, *draft))
    tokens = [sample(row, generator) for row in target[:3]] + [int(logits[3].argmin())]
    alone, whole = Evidence(COLD, generator), Evidence(COLD, generator)
    alone.add(tokens, logits, target, draft)
    full = [[Full(of.dense(500)) for of in rows] for rows in (target, draft)]
    whole.add(tokens, logits, *full)
    assert alone.transforms == pytest.approx(whole.transforms, abs=2e-6)
    assert alone.transforms[3] == -1
