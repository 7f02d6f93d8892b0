"""The rejection rule emits exactly the target's distribution: enumerated, not sampled."""

from __future__ import annotations

import functools
import itertools
import math
from collections import defaultdict

import pytest
import torch

import specsampling.method.verify as module
from specsampling.method.distribution import Distribution, Few, Full, NonFiniteError, one_hot
from specsampling.method.sampling import GREEDY, Sampling, probs_from_logits
from specsampling.method.verify import VERIFIERS, Verdict, residual, verify, verify_block

VOCAB = 3
STRATA = 2  # representative uniforms in each of the cells "accept" and "reject"


def few(probs: torch.Tensor) -> Few:
    """The same distribution by its tokens."""
    return Few({token: prob for token, prob in enumerate(probs.tolist()) if prob})


FORMS = {"few": few, "full": Full}
"""How a distribution may be held: each rule must be right for all pairs of them."""
ALL_FORMS = pytest.mark.parametrize("forms", list(itertools.product(FORMS, FORMS)), ids="-".join)


def dense(distributions) -> torch.Tensor:
    """[n, VOCAB] float32."""
    rows = (distribution.dense(VOCAB)[None] for distribution in distributions)
    return torch.cat([torch.zeros(0, VOCAB), *rows])


def conditional_table(k: int, seed: int, sampling: Sampling) -> dict[tuple, torch.Tensor]:
    """A random distribution after every text of up to k tokens."""
    generator = torch.Generator().manual_seed(seed)
    table = {}
    for length in range(k + 1):
        for text in itertools.product(range(VOCAB), repeat=length):
            logits = torch.randn(1, VOCAB, generator=generator) * 1.5
            table[text] = probs_from_logits(logits, sampling)[0].dense(VOCAB)
    return table


def joint(table: dict[tuple, torch.Tensor], length: int) -> dict[tuple, float]:
    """Probability of every text of `length` tokens."""
    return {
        text: float(torch.stack([table[text[:i]][text[i]] for i in range(length)]).prod())
        for text in itertools.product(range(VOCAB), repeat=length)
    }


def token_thresholds(target_probs, draft_probs, drafted) -> list[float]:
    """Below which uniform each token is accepted: Chen et al. 2023, Algorithm 2."""
    return [
        min(1.0, float(target_probs[i][token] / draft_probs[i][token]))
        for i, token in enumerate(drafted)
    ]


def block_thresholds(target_probs, draft_probs, drafted) -> list[float]:
    """Below which uniform each beginning is: Sun et al. 2025, Algorithm 2, as it stands there."""
    weight, thresholds = 1.0, []
    for i, token in enumerate(drafted):
        weight = min(1.0, weight * float(target_probs[i][token] / draft_probs[i][token]))
        if i + 1 == len(drafted):
            thresholds.append(weight)
        else:
            mass = float((weight * target_probs[i + 1] - draft_probs[i + 1]).clamp(min=0).sum())
            whole = mass + 1 - weight
            thresholds.append(mass / whole if whole > 0 else 0.0)
    return thresholds


THRESHOLDS = {"token": token_thresholds, "block": block_thresholds}


def never(text: tuple) -> bool:
    return False


def blocks(draft, k: int, stop=never, text: tuple = (), mass: float = 1.0):
    """Every drafted text with its probability: k tokens, or as many as until a stop."""
    if len(text) == k or (text and stop(text)):
        yield text, mass
        return
    for token, probability in enumerate(draft[text].tolist()):
        if probability:
            yield from blocks(draft, k, stop, (*text, token), mass * probability)


def verdicts(
    rule, thresholds_of, target, draft, k: int, monkeypatch, stop=never, forms=("full", "full")
):
    """Every cycle that a rule can have: drafted text, tokens accepted, what is sampled, its mass.

    Each uniform is put on both sides of its threshold, at STRATA points a side, and weighted
    with the side's size. What the rule samples from is taken whole instead of being sampled.
    """
    sampled_from = []
    monkeypatch.setattr(module, "sample", lambda probs, generator: sampled_from.append(probs) or 0)
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: uniforms)
    for drafted, draft_mass in blocks(draft, k, stop):
        num = len(drafted)
        target_probs = [target[drafted[:i]] for i in range(num + 1)]
        draft_probs = [draft[drafted[:i]] for i in range(num)]
        cells = [
            [*points(0.0, threshold), *points(threshold, 1.0)]
            for threshold in thresholds_of(target_probs, draft_probs, drafted)
        ]
        for chosen in itertools.product(*cells):
            uniforms = torch.tensor([point for point, _ in chosen])
            weight = draft_mass * math.prod(size for _, size in chosen)
            sampled_from.clear()
            rows = zip(forms, (target_probs, draft_probs))
            probs = (list(map(FORMS[form], of)) for form, of in rows)
            num_accepted = rule(*probs, list(drafted), None).num_accepted
            yield drafted, num_accepted, sampled_from[-1].dense(VOCAB), weight


def points(low: float, high: float) -> list[tuple[float, float]]:
    """The middles of STRATA parts of a range, each with the part's size."""
    size = (high - low) / STRATA
    return [(low + size * (j + 0.5), size) for j in range(STRATA) if size > 0]


def emitted_joint(
    rule, target, draft, k: int, monkeypatch, thresholds_of=token_thresholds, **options
) -> dict[tuple, float]:
    """Distribution of k + 1 tokens: one cycle of `rule`, completed by the target."""
    result: dict[tuple, float] = defaultdict(float)
    every = verdicts(rule, thresholds_of, target, draft, k, monkeypatch, **options)
    for drafted, num_accepted, probs, weight in every:
        for token, mass in enumerate((probs / probs.sum()).tolist()):
            text = (*drafted[:num_accepted], token)
            complete(result, target, text, weight * mass, k + 1)
    return result


def expected_accepted(name: str, target, draft, k: int, monkeypatch) -> float:
    every = verdicts(VERIFIERS[name], THRESHOLDS[name], target, draft, k, monkeypatch)
    return sum(num_accepted * weight for _, num_accepted, _, weight in every)


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
        "one-hot": {text: one_hot([sum(text) % VOCAB])[0].dense(VOCAB) for text in other},
        # All its mass where the target has least: no overlap where the warp leaves a zero.
        "opposite": {text: one_hot([int(target[text].argmin())])[0].dense(VOCAB) for text in other},
    }


STOPS = {
    "never": never,
    "after token 1": lambda text: text[-1] == 1,
    "after one token": lambda text: True,
}


@pytest.mark.parametrize("draft_name", ["other", "identical", "one-hot", "opposite"])
@pytest.mark.parametrize("warp", WARPS)
@pytest.mark.parametrize("k", [1, 2, 3])
@ALL_FORMS
@pytest.mark.parametrize("rule", VERIFIERS)
def test_emitted_distribution_is_the_targets(rule, forms, k, warp, draft_name, monkeypatch):
    """Wherever the draft stops, as long as the text drafted so far decides it."""
    sampling = WARPS[warp]
    target = conditional_table(k, seed=1, sampling=sampling)
    draft = drafts(k, sampling, target)[draft_name]
    options = {"thresholds_of": THRESHOLDS[rule], "forms": forms}
    for stop in STOPS.values() if k > 1 else [never]:
        emitted = emitted_joint(
            VERIFIERS[rule], target, draft, k, monkeypatch, stop=stop, **options
        )
        assert sum(emitted.values()) == pytest.approx(1, abs=1e-5)
        assert largest_error(emitted, joint(target, k + 1)) < 1e-6


def test_the_block_rule_accepts_at_least_as_much_and_mostly_more(monkeypatch):
    """The same for one token; beyond that, what is gained depends on the pair."""
    gains = []
    for seed in range(20):
        target = conditional_table(3, seed=seed, sampling=Sampling(1.0))
        draft = conditional_table(3, seed=100 + seed, sampling=Sampling(1.0))
        for k in (1, 2, 3):
            token, block = (
                expected_accepted(name, target, draft, k, monkeypatch) for name in VERIFIERS
            )
            assert block > token - 1e-6
            if k == 1:
                assert block == pytest.approx(token, abs=1e-6)
            else:
                gains.append(block / token - 1)
    assert sum(gain > 1e-4 for gain in gains) > 0.9 * len(gains)


def test_the_papers_two_symbols(monkeypatch):
    """Sun et al. 2025, section 3: 11/9 tokens of two accepted, where token by token it is 10/9."""
    texts = [text for length in range(3) for text in itertools.product(range(2), repeat=length)]
    target = dict.fromkeys(texts, torch.tensor([1 / 3, 2 / 3]))
    draft = dict.fromkeys(texts, torch.tensor([2 / 3, 1 / 3]))
    for name, accepted in (("token", 10 / 9), ("block", 11 / 9)):
        found = expected_accepted(name, target, draft, 2, monkeypatch)
        assert found == pytest.approx(accepted, abs=1e-6)


@pytest.mark.parametrize("warp", WARPS)
def test_with_one_hot_drafts_both_rules_are_one(warp, monkeypatch):
    """Greedy decoding and n-grams: the same tokens accepted, equally often."""
    target = conditional_table(3, seed=1, sampling=WARPS[warp])
    draft = drafts(3, WARPS[warp], target)["one-hot"]
    chances = []
    for name in VERIFIERS:
        chance: dict[tuple, float] = defaultdict(float)
        every = verdicts(VERIFIERS[name], THRESHOLDS[name], target, draft, 3, monkeypatch)
        for _, num_accepted, probs, weight in every:
            for token, mass in enumerate((probs / probs.sum()).tolist()):
                chance[num_accepted, token] += weight * mass
        chances.append(chance)
    assert largest_error(*chances) < 1e-6 and largest_error(*reversed(chances)) < 1e-6


def test_a_row_of_nan_ends_a_block():
    target = torch.tensor([[0.5, 0.5], [torch.nan, torch.nan], [0.5, 0.5]])
    draft = torch.full((2, 2), 0.5)
    for form in FORMS.values():
        with pytest.raises(NonFiniteError):
            verify_block(*(list(map(form, of)) for of in (target, draft)), [0, 1], None)


def wrong(correct, accepts):
    """A rule of which tokens are accepted, and of what the correction is drawn from."""

    @functools.wraps(accepts)
    def rule(target_probs, draft_probs, draft_tokens, generator):
        target_probs, draft_probs = dense(target_probs), dense(draft_probs)
        k = len(draft_tokens)
        accepted = accepts(target_probs[:k], draft_probs, torch.tensor(draft_tokens)[:, None])
        n = int(accepted.long().cumprod(0).sum())
        probs = Full(target_probs[n])
        if n < k:
            probs = correct(probs, Full(draft_probs[n]))
        return Verdict(n, module.sample(probs, None))

    return rule


@functools.partial(wrong, residual)
def accept_by_position(target_probs, draft_probs, draft_tokens):
    """The ratio indexed by position where the token id belongs."""
    rows = torch.arange(len(draft_tokens))
    return torch.rand(len(rows)) < (target_probs / draft_probs)[rows, rows % VOCAB]


@functools.partial(wrong, lambda target, draft: target)
def correct_from_target(target_probs, draft_probs, draft_tokens):
    """The correction from the target instead of the residual."""
    ratio = target_probs.gather(1, draft_tokens) / draft_probs.gather(1, draft_tokens)
    return torch.rand(len(draft_tokens)) < ratio[:, 0]


@functools.partial(wrong, residual)
def accept_argmax(target_probs, draft_probs, draft_tokens):
    """Accept what the target would have chosen greedily: right when greedy, wrong when sampling."""
    return draft_tokens[:, 0] == target_probs.argmax(-1)


@functools.partial(wrong, residual)
def accept_regardless_of_draft(target_probs, draft_probs, draft_tokens):
    """Accept with the target's probability alone."""
    return torch.rand(len(draft_tokens)) < target_probs.gather(1, draft_tokens)[:, 0]


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


def held(forms, *probs: list[float]) -> list[Distribution]:
    return [FORMS[form](torch.tensor(of)) for form, of in zip(forms, probs, strict=True)]


@ALL_FORMS
@pytest.mark.parametrize(
    ("target", "draft", "expected"),
    [
        ([0.5, 0.3, 0.2], [0.2, 0.6, 0.2], [1, 0, 0]),
        ([0.25, 0.75], [0.25, 0.75], [0.25, 0.75]),  # zero everywhere gave nan
        ([0.25] * 4, [0.5] * 2, [0, 0, 0.5, 0.5]),  # a draft with a smaller vocabulary
        ([0.5] * 2, [0.25] * 4, [0.5] * 2),  # one with a larger
    ],
)
def test_residual_is_the_normalised_positive_part(forms, target, draft, expected):
    probs = residual(*held(forms, target, draft))
    assert probs.dense(len(expected)).tolist() == pytest.approx(expected)


RULES = pytest.mark.parametrize("rule", VERIFIERS.values(), ids=VERIFIERS)


@RULES
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_what_the_target_excludes_is_never_accepted(rule, form, monkeypatch):
    """0/0 is nan, which min(1, nan) accepted; u <= 0 accepted such a token once in 2^24 draws."""
    target = [form(torch.tensor(probs)) for probs in ([0.0, 1.0], [0.5, 0.5])]
    draft = [form(torch.tensor([0.0, 1.0]))]
    assert rule(target, draft, [0], torch.Generator().manual_seed(0)) == Verdict(0, 1)
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: torch.zeros(*shape))
    assert rule(target, one_hot([0]), [0], None) == Verdict(0, 1)


@RULES
def test_greedy_accepts_the_argmax_always_and_nothing_else(rule):
    """Argmax drafts judged by random acceptance are neither greedy nor sampling."""
    target, draft = one_hot([2, 0, 1]), one_hot([2, 1])
    assert rule(target[:1], [], [], torch.Generator()) == Verdict(0, 2)
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        assert rule(target, draft, [2, 1], generator) == Verdict(1, 0)
        assert rule(target[:2], draft[:1], [2], generator) == Verdict(1, 0)


def test_the_generator_runs_on_from_cycle_to_cycle():
    """A generator reseeded inside the acceptance loop judges every token by the same uniform."""
    generator = torch.Generator().manual_seed(0)
    target, draft = [Full(torch.full((2,), 0.5))] * 2, one_hot([0])
    verdicts = [verify(target, draft, [0], generator).num_accepted for _ in range(40)]
    assert 5 < sum(verdicts) < 35  # fails by chance with probability < 1e-6


@ALL_FORMS
@pytest.mark.parametrize("num_kept", [1, 3, 40, 400])
def test_what_one_distribution_has_more_of_than_another(forms, num_kept):
    generator = torch.Generator().manual_seed(num_kept)
    target, draft = torch.rand(2, 400, generator=generator) ** 4
    target[num_kept:] = 0
    target, draft = (probs[torch.randperm(400, generator=generator)] for probs in (target, draft))
    weight = float(torch.rand((), generator=generator))
    expected = (weight * target - draft).clamp(min=0)
    ours, other = (FORMS[form](probs) for form, probs in zip(forms, (target, draft)))
    assert ours.excess(other, weight).dense(400).tolist() == pytest.approx(
        expected.tolist(), abs=1e-7
    )
    assert ours.excess(other, weight).mass == pytest.approx(float(expected.sum()), rel=1e-5)
    target[7] = torch.nan
    assert not FORMS[forms[0]](target).excess(other).mass >= 0


@pytest.mark.parametrize("share", [1e-9, 0.1, 0.25, 0.5, 0.9, 1.0])
def test_a_share_of_the_mass_is_one_token_in_every_form(share):
    probs = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    assert few(probs).token_at(share) == Full(probs).token_at(share) in {1, 3, 4}


def test_a_draft_of_a_smaller_vocabulary_is_sure_that_the_other_tokens_do_not_come():
    target, draft = held(("full", "full"), [0.25] * 4, [0.5] * 2)
    assert residual(target, draft).dense(4).tolist() == [0, 0, 0.5, 0.5]
