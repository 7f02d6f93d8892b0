"""The rejection rule emits exactly the target's distribution: enumerated, not sampled."""

from __future__ import annotations

import itertools
from collections import defaultdict

import pytest
import torch

import specsampling.method.verify as module
from specsampling.method.sampling import GREEDY, Sampling, one_hot, probs_from_logits
from specsampling.method.verify import Verdict, residual, verify

VOCAB = 3
STRATA = 2  # representative uniforms in each of the cells "accept" and "reject"


def conditional_table(k: int, seed: int, sampling: Sampling) -> dict[tuple, torch.Tensor]:
    """A random distribution after every text of up to k tokens."""
    generator = torch.Generator().manual_seed(seed)
    table = {}
    for length in range(k + 1):
        for text in itertools.product(range(VOCAB), repeat=length):
            logits = torch.randn(1, VOCAB, generator=generator) * 1.5
            table[text] = probs_from_logits(logits, sampling)[0]
    return table


def joint(table: dict[tuple, torch.Tensor], length: int) -> dict[tuple, float]:
    """Probability of every text of `length` tokens."""
    return {
        text: float(torch.stack([table[text[:i]][text[i]] for i in range(length)]).prod())
        for text in itertools.product(range(VOCAB), repeat=length)
    }


def emitted_joint(rule, target, draft, k: int, monkeypatch) -> dict[tuple, float]:
    """Distribution of k + 1 tokens: one cycle of `rule`, completed by the target.

    Every draft text is enumerated. Each uniform is put on both sides of the threshold that
    Algorithm 2 names, at STRATA points a side, and weighted with the side's size. What the
    rule samples from is taken whole instead of being sampled.
    """
    sampled_from = []
    monkeypatch.setattr(module, "sample", lambda probs, generator: sampled_from.append(probs) or 0)
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: uniforms)
    result: dict[tuple, float] = defaultdict(float)
    for drafted, draft_mass in joint(draft, k).items():
        if not draft_mass:
            continue
        target_probs = torch.stack([target[drafted[:i]] for i in range(k + 1)])
        draft_probs = torch.stack([draft[drafted[:i]] for i in range(k)])
        cells = []
        for i, token in enumerate(drafted):
            threshold = min(1.0, float(target_probs[i, token] / draft_probs[i, token]))
            sides = [(0.0, threshold), (threshold, 1.0)]
            cells.append(
                [
                    (low + (high - low) * (j + 0.5) / STRATA, (high - low) / STRATA)
                    for low, high in sides
                    if high > low
                    for j in range(STRATA)
                ]
            )
        for chosen in itertools.product(*cells):
            uniforms = torch.tensor([point for point, _ in chosen])
            weight = draft_mass
            for _, size in chosen:
                weight *= size
            sampled_from.clear()
            num_accepted = rule(target_probs, draft_probs, list(drafted), None).num_accepted
            prefix = drafted[:num_accepted]
            for token, mass in enumerate(sampled_from[-1].tolist()):
                complete(result, target, (*prefix, token), weight * mass, k + 1)
    return result


def complete(result, target, text: tuple, mass: float, length: int) -> None:
    if not mass:
        return
    if len(text) == length:
        result[text] += mass
        return
    for token, probability in enumerate(target[text].tolist()):
        complete(result, target, (*text, token), mass * probability, length)


def largest_error(emitted: dict[tuple, float], wanted: dict[tuple, float]) -> float:
    return max(abs(emitted.get(text, 0.0) - mass) for text, mass in wanted.items())


WARPS = {
    "softmax": Sampling(1.0),
    "cold": Sampling(0.3),
    "top-k": Sampling(1.0, top_k=2),
    "nucleus": Sampling(0.8, top_p=0.7),
    "greedy": GREEDY,
}


def drafts(k: int, sampling: Sampling, target):
    other = conditional_table(k, seed=2, sampling=sampling)
    return {
        "other": other,
        "identical": target,
        "one-hot": {text: one_hot(torch.tensor([sum(text) % VOCAB]), VOCAB)[0] for text in other},
        # All its mass where the target has least: no overlap where the warp leaves a zero.
        "opposite": {text: one_hot(target[text].argmin()[None], VOCAB)[0] for text in other},
    }


@pytest.mark.parametrize("draft_name", ["other", "identical", "one-hot", "opposite"])
@pytest.mark.parametrize("warp", WARPS)
@pytest.mark.parametrize("k", [1, 2, 3])
def test_emitted_distribution_is_the_targets(k, warp, draft_name, monkeypatch):
    sampling = WARPS[warp]
    target = conditional_table(k, seed=1, sampling=sampling)
    draft = drafts(k, sampling, target)[draft_name]
    emitted = emitted_joint(verify, target, draft, k, monkeypatch)
    assert sum(emitted.values()) == pytest.approx(1, abs=1e-5)
    assert largest_error(emitted, joint(target, k + 1)) < 1e-6


def accept_by_position(target_probs, draft_probs, draft_tokens, generator):
    """The ratio indexed by position where the token id belongs."""
    k = len(draft_tokens)
    index = torch.arange(k) % VOCAB
    rows = torch.arange(k)
    accepted = torch.rand(k) < target_probs[rows, index] / draft_probs[rows, index]
    return finish(target_probs, draft_probs, accepted, residual)


def correct_from_target(target_probs, draft_probs, draft_tokens, generator):
    """The correction from the target instead of the residual."""
    index = torch.tensor(draft_tokens)[:, None]
    ratio = target_probs[:-1].gather(1, index) / draft_probs.gather(1, index)
    accepted = torch.rand(len(draft_tokens)) < ratio[:, 0]
    return finish(target_probs, draft_probs, accepted, lambda target, draft: target)


def accept_argmax(target_probs, draft_probs, draft_tokens, generator):
    """Accept what the target would have chosen greedily: right when greedy, wrong when sampling."""
    accepted = torch.tensor(draft_tokens) == target_probs[:-1].argmax(-1)
    return finish(target_probs, draft_probs, accepted, residual)


def accept_regardless_of_draft(target_probs, draft_probs, draft_tokens, generator):
    """Accept with the target's probability alone."""
    at_token = target_probs[:-1].gather(1, torch.tensor(draft_tokens)[:, None])[:, 0]
    return finish(target_probs, draft_probs, torch.rand(len(draft_tokens)) < at_token, residual)


def finish(target_probs, draft_probs, accepted, correct):
    k = len(accepted)
    n = int(accepted.long().cumprod(0).sum())
    probs = target_probs[k] if n == k else correct(target_probs[n], draft_probs[n])
    return Verdict(n, module.sample(probs, None))


@pytest.mark.parametrize(
    "wrong_rule",
    [accept_by_position, correct_from_target, accept_argmax, accept_regardless_of_draft],
)
def test_wrong_rules_are_rejected(wrong_rule, monkeypatch):
    """The negative control: the enumeration can tell a wrong rule from the right one."""
    sampling = Sampling(1.0)
    target = conditional_table(2, seed=1, sampling=sampling)
    draft = conditional_table(2, seed=2, sampling=sampling)
    emitted = emitted_joint(wrong_rule, target, draft, 2, monkeypatch)
    assert largest_error(emitted, joint(target, 3)) > 1e-3


def test_residual_is_the_normalised_positive_part():
    target, draft = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.6, 0.2])
    assert residual(target, draft).tolist() == pytest.approx([1, 0, 0])


def test_residual_of_equal_distributions_is_the_target():
    """A residual that is zero everywhere gave nan."""
    probs = torch.tensor([0.25, 0.75])
    assert residual(probs, probs).tolist() == [0.25, 0.75]


def test_nothing_over_nothing_rejects():
    """0/0 is nan, and min(1, nan) accepted a token that the target never emits."""
    target = torch.tensor([[0.0, 1.0], [0.5, 0.5]])
    draft = torch.tensor([[0.0, 1.0]])
    verdict = verify(target, draft, [0], torch.Generator().manual_seed(0))
    assert verdict == Verdict(0, 1)


def test_a_uniform_of_zero_does_not_accept_what_the_target_excludes(monkeypatch):
    """u <= 0 accepted a token of probability 0 once in 2^24 draws."""
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: torch.zeros(1))
    target = torch.tensor([[0.0, 1.0], [0.5, 0.5]])
    assert verify(target, torch.tensor([[1.0, 0.0]]), [0], None) == Verdict(0, 1)


def test_greedy_accepts_the_argmax_always_and_nothing_else():
    """Argmax drafts judged by random acceptance are neither greedy nor sampling."""
    target = one_hot(torch.tensor([2, 0, 1]), VOCAB)
    draft = one_hot(torch.tensor([2, 1]), VOCAB)
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        assert verify(target, draft, [2, 1], generator) == Verdict(1, 0)
        assert verify(target[:2], draft[:1], [2], generator) == Verdict(1, 0)


def test_no_draft_tokens_is_plain_sampling():
    target = torch.tensor([[0.0, 0.0, 1.0]])
    assert verify(target, torch.zeros(0, 3), [], torch.Generator()) == Verdict(0, 2)


def test_the_generator_runs_on_from_cycle_to_cycle():
    """A generator reseeded inside the acceptance loop judges every token by the same uniform."""
    generator = torch.Generator().manual_seed(0)
    target, draft = torch.full((2, 2), 0.5), torch.tensor([[1.0, 0.0]])
    verdicts = [verify(target, draft, [0], generator).num_accepted for _ in range(40)]
    assert 5 < sum(verdicts) < 35  # fails by chance with probability < 1e-6
