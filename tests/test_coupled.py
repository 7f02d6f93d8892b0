"""The coupled rule: the text of one seed is the same with any draft, and it is a fair sample."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, make_model
from scipy.stats import chi2
from test_decoders import all_drafts

from autoregressive import autoregressive
from specsampling.method.adaptive import AdaptiveDraft
from specsampling.method.distribution import Few
from specsampling.method.noise import Noise
from specsampling.method.sampling import Sampling, sample
from specsampling.method.verify import RULES, verify, verify_coupled
from specsampling.models.checkpoint import make_fast
from speculative import speculative

SAMPLINGS = {
    "softmax": Sampling(1.0),
    "nucleus": Sampling(0.8, top_p=0.9),
    "top-k": Sampling(1.3, top_k=5),
    "greedy": Sampling(),
}
PROMPTS = ([5], [7, 3, 9, 3, 9, 3])
NUM_TEXTS = 20_000


def coupled(target, draft, prompt, k, noise, **options):
    return speculative(
        target, draft, prompt, k=k, generator=noise, verifier=verify_coupled, **options
    ).token_ids


@pytest.mark.parametrize("sampling", ["softmax", "nucleus"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_draft_gives_the_text_of_the_baseline(model_of, architecture, sampling):
    target = model_of(architecture)
    drafts = all_drafts(model_of, architecture)
    drafts["adaptive"] = AdaptiveDraft.of(drafts["composite"])
    for seed, prompt in enumerate(PROMPTS):
        noise = Noise.of(seed, "text", 0)
        options = {"max_new_tokens": 8, "sampling": SAMPLINGS[sampling], "width": 17}
        wanted = autoregressive(target, prompt, generator=noise, **options).token_ids
        for name, draft in drafts.items():
            for k in (1, 4, 15):
                assert coupled(target, draft, prompt, k, noise, **options) == wanted, (name, k)


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_in_the_kernel_too(sampling):
    fast = make_fast(make_model("llama"), "int8")
    other = make_fast(make_model("llama", 1), "int8")
    drafts = all_drafts(lambda _, seed=0: other if seed else fast, "llama")
    for seed in range(4):
        noise = Noise.of(seed, "text", 0)
        options = {"max_new_tokens": 20, "sampling": sampling}
        wanted = autoregressive(fast, PROMPTS[1], generator=noise, **options).token_ids
        for name, draft in drafts.items():
            for k in (1, 4, 15):
                assert coupled(fast, draft, PROMPTS[1], k, noise, **options) == wanted, (name, k)


def test_a_text_goes_on_where_it_was_cut(model_of):
    """The noise knows positions, so the rest of a text does not depend on who wrote its start."""
    target, noise = model_of("llama"), Noise.of(3, "text", 0)
    options = {"generator": noise, "sampling": Sampling(1.0), "width": 8}
    whole = autoregressive(target, PROMPTS[1], max_new_tokens=16, **options).token_ids
    for cut in (1, 5, 11):
        start = [*PROMPTS[1], *whole[:cut]]
        rest = autoregressive(target, start, max_new_tokens=16 - cut, **options).token_ids
        assert whole[:cut] + rest == whole


# --- the joint distribution of three tokens ---------------------------------------------


def table(text: tuple[int, ...], salt: int, num_tokens: int = 3) -> Few:
    """A distribution that depends on the text before it."""
    rng = np.random.default_rng([salt, len(text), *text])
    return Few(dict(enumerate(rng.dirichlet(np.ones(num_tokens)).tolist())))


TARGET, DRAFT = 1, 2
TABLES = {
    (salt, text): table(text, salt)
    for salt in (TARGET, DRAFT)
    for length in range(3)
    for text in np.ndindex((3,) * length)
}


def three_tokens(k: int, noise_of, draft_salt: int = DRAFT) -> tuple[int, ...]:
    """A text of three tokens, by cycles of the coupled rule; `noise_of` gives a call's noise."""
    text: tuple[int, ...] = ()
    num_calls = 0
    while len(text) < 3:
        noise = noise_of(num_calls)
        num_calls += 1
        drafted: list[int] = []
        while len(drafted) < min(k, 2 - len(text)):
            place = len(text) + len(drafted)
            probs = TABLES[draft_salt, (*text, *drafted)]
            drafted.append(sample(probs, noise, place))
        rows = [TABLES[TARGET, (*text, *drafted[:i])] for i in range(len(drafted) + 1)]
        verdict = verify_coupled(rows, rows[:-1], drafted, noise, len(text))
        text = (*text, *drafted[: verdict.num_accepted], verdict.token)
    return text[:3]


def p_value(texts: Counter) -> float:
    num = sum(texts.values())
    statistic = 0.0
    for text in np.ndindex(3, 3, 3):
        mass = 1.0
        for i, token in enumerate(text):
            mass *= TABLES[TARGET, text[:i]].at(token)
        statistic += (texts[text] - num * mass) ** 2 / (num * mass)
    return float(chi2.sf(statistic, 26))


@pytest.mark.parametrize("k", [0, 1, 2])
def test_three_tokens_have_the_targets_joint_distribution(k):
    texts = Counter(three_tokens(k, lambda call, i=i: Noise((i, 77))) for i in range(NUM_TEXTS))
    assert p_value(texts) > 1e-4


class SamePlace(Noise):
    """Noise that forgets the position: a wrong one."""

    def winner(self, probs, position):
        return super().winner(probs, 0)


def test_noise_shared_between_positions_is_seen():
    texts = Counter(three_tokens(2, lambda call, i=i: SamePlace((i, 77))) for i in range(2000))
    assert p_value(texts) < 1e-8


def test_noise_keyed_by_the_call_is_seen():
    """Its texts are fair samples too, but others with each draft: identity is what breaks."""
    parted = 0
    for i in range(200):
        noise_of = lambda call, i=i: Noise((i, call))  # noqa: E731
        parted += three_tokens(0, noise_of) != three_tokens(2, noise_of)
    assert parted > 20
    assert all(
        three_tokens(0, lambda call, i=i: Noise((i, 5)))
        == three_tokens(2, lambda call, i=i: Noise((i, 5)))
        for i in range(200)
    )


def test_acceptance_follows_the_closed_form():
    """P(same winner) = sum over v of 1 / sum over w of max(p(w) / p(v), q(w) / q(v))."""
    target, draft = TABLES[TARGET, ()], TABLES[DRAFT, ()]
    wanted = sum(
        1 / sum(max(target.at(w) / target.at(v), draft.at(w) / draft.at(v)) for w in range(3))
        for v in range(3)
    )
    num = 20_000
    same = sum(
        sample(target, noise, 0) == sample(draft, noise, 0)
        for noise in (Noise((i, 9)) for i in range(num))
    )
    error = (wanted * (1 - wanted) / num) ** 0.5
    assert abs(same / num - wanted) < 4 * error


def test_noise_and_rules_that_do_not_fit_are_refused(model_of):
    target = model_of("llama")
    draft = all_drafts(model_of, "llama")["n-gram"]
    for rule, source in ((verify, Noise((0, 0))), (verify_coupled, torch.Generator())):
        with pytest.raises(ValueError, match="verify_coupled needs Noise"):
            speculative(target, draft, [5], k=2, max_new_tokens=4, generator=source, verifier=rule)
    assert RULES["coupled"] is verify_coupled
