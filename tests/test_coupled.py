"""The coupled rule: the text of one seed is the same with any draft, and it is a fair sample."""

from collections import Counter
from functools import cache

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, make_model
from scipy.stats import chi2
from test_decoders import all_drafts

from autoregressive import autoregressive
from Benchmarks.identity import coupled_chance
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


TARGET, DRAFT = 1, 2
NUM_TOKENS = 3
DRAFTS = ("model", "greedy", "n-gram", "composite")


@cache
def table(model: int, whose: int, text: tuple[int, ...]) -> Few:
    """A random model: its target's or its draft's distribution, which depends on the text."""
    rng = np.random.default_rng([model, whose, len(text), *text])
    return Few(dict(enumerate(rng.dirichlet(np.ones(NUM_TOKENS)).tolist())))


@cache
def draft_table(model: int, draft: str, text: tuple[int, ...]) -> Few:
    """What a draft proposes from behind a text; a lookup knows an answer to some texts only."""
    probs = table(model, DRAFT, text).probs
    is_lookup = draft == "n-gram" or (draft == "composite" and sum(text) % 2)
    if draft == "greedy" or is_lookup:
        return Few({max(probs, key=probs.__getitem__): 1.0})
    return Few(probs)


def three_tokens(model: int, draft: str, k: int, noise_of) -> tuple[int, ...]:
    """The first three tokens that cycles of the rule write; `noise_of` gives a call's noise."""
    text: tuple[int, ...] = ()
    num_calls = 0
    while len(text) < 3:
        noise = noise_of(num_calls)
        num_calls += 1
        drafted: tuple[int, ...] = ()
        while len(drafted) < k:
            probs = draft_table(model, draft, text + drafted)
            drafted += (sample(probs, noise, len(text) + len(drafted)),)
        rows = [table(model, TARGET, text + drafted[:i]) for i in range(k + 1)]
        verdict = verify_coupled(rows, rows[:-1], drafted, noise, len(text))
        text = (*text, *drafted[: verdict.num_accepted], verdict.token)
    return text[:3]


def statistic(model: int, texts: Counter) -> float:
    """The chi-squared of texts of three tokens, with 26 degrees of freedom."""
    num, total = sum(texts.values()), 0.0
    for text in np.ndindex((NUM_TOKENS,) * 3):
        mass = 1.0
        for i, token in enumerate(text):
            mass *= table(model, TARGET, text[:i]).at(token)
        total += (texts[text] - num * mass) ** 2 / (num * mass)
    return total


@pytest.mark.parametrize("k", range(1, 6))
def test_three_tokens_have_the_targets_joint_distribution(k):
    """200,000 texts over all K, each draft with a random model of its own."""
    total = 0.0
    for model, draft in enumerate(DRAFTS, start=10 * k):
        texts = Counter(
            three_tokens(model, draft, k, lambda call, i=i: Noise((i, 77))) for i in range(10_000)
        )
        total += statistic(model, texts)
    assert chi2.sf(total, 26 * len(DRAFTS)) > 1e-4  # a false alarm in 10,000


class SamePlace(Noise):
    """Noise that forgets the position: a wrong one."""

    def winner(self, probs, position):
        return super().winner(probs, 0)


@pytest.mark.parametrize("draft", DRAFTS)
def test_wrong_noise_is_seen(draft):
    """Noise keyed by the call makes fair samples too, but others with each K."""
    texts = Counter(
        three_tokens(3, draft, 2, lambda call, i=i: SamePlace((i, 77))) for i in range(2000)
    )
    assert chi2.sf(statistic(3, texts), 26) < 1e-8
    by_call = [lambda call, i=i: Noise((i, call)) for i in range(200)]
    by_text = [lambda call, i=i: Noise((i, 5)) for i in range(200)]
    for noises, least, most in ((by_call, 20, 200), (by_text, 0, 0)):
        texts = [[three_tokens(3, draft, k, n) for k in (0, 2)] for n in noises]
        assert least <= sum(one != other for one, other in texts) <= most


@pytest.mark.parametrize("model", range(5))
def test_acceptance_follows_the_closed_form(model):
    target, draft = table(model, TARGET, ()), table(model, DRAFT, ())
    wanted = coupled_chance(*(np.array(list(of.probs.values())) for of in (target, draft)))
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
