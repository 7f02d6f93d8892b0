"""Sampled texts of the whole decoder have the target's distribution.

`test_verify.py` enumerates one cycle's rule; this holds the plumbing around it (rows, caches,
rollback, warps) to the same standard, by a chi-squared test with a fixed seed.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from scipy.stats import chisquare

from specsampling.method.distribution import Full
from specsampling.method.drafts import CompositeDraft, Draft, ModelDraft, NgramDraft
from specsampling.method.sampling import Sampling, probs_from_logits
from specsampling.models.distilled import TrimmedHead
from speculative import speculative

VOCAB = 6
PROMPT = [1, 4, 2]
NUM_TEXTS = 1500
NUM_TOKENS = 3
FALSE_ALARM = 1e-4  # how often a right decoder would fail with another seed
SAMPLING = Sampling(temperature=1.2, top_k=5, top_p=0.95)


@pytest.fixture(scope="module")
def pair(model_of):
    return model_of("llama", vocab_size=VOCAB), model_of("qwen2", 1, vocab_size=VOCAB)


@cache
def exact_distribution(target) -> dict[tuple, float]:
    """Probability of every text of NUM_TOKENS tokens, without any cache."""
    masses = {(): 1.0}
    for _ in range(NUM_TOKENS):
        longer = {}
        for text, mass in masses.items():
            with torch.inference_mode():
                logits = target(torch.tensor([PROMPT + list(text)])).logits[0, -1:]
            (probs,) = probs_from_logits(logits, SAMPLING)
            for token, probability in enumerate(probs.dense(VOCAB).tolist()):
                if probability:
                    longer[(*text, token)] = mass * probability
        masses = longer
    return masses


def p_value(target, draft, width) -> float:
    options = {"k": 2, "max_new_tokens": NUM_TOKENS, "sampling": SAMPLING, "width": width}
    options["generator"] = torch.Generator().manual_seed(0)
    texts = (speculative(target, draft, PROMPT, **options) for _ in range(NUM_TEXTS))
    counts = Counter(tuple(text.token_ids) for text in texts)
    exact = exact_distribution(target)
    if not counts.keys() <= exact.keys():
        return 0.0  # a text that the target never emits
    common = [text for text, mass in exact.items() if mass * NUM_TEXTS >= 5]
    observed = [counts[text] for text in common]
    expected = [exact[text] * NUM_TEXTS for text in common]
    observed.append(NUM_TEXTS - sum(observed))  # the rare texts together
    expected.append(NUM_TEXTS - sum(expected))
    return chisquare(observed, expected).pvalue


@pytest.mark.parametrize("width", [None, 8])
def test_sampled_texts_have_the_targets_distribution(width, pair):
    target, draft = pair
    assert p_value(target, ModelDraft(draft), width) > FALSE_ALARM


def test_a_composite_that_stops_when_unsure_keeps_the_distribution(pair):
    """Who proposes, and how many, depends on the text and on the draft's distributions."""
    target, draft = pair
    composite = CompositeDraft(NgramDraft(2, 1), ModelDraft(draft, min_confidence=0.5))
    assert p_value(target, composite, None) > FALSE_ALARM


def test_a_trimmed_head_keeps_the_distribution(pair):
    """Tokens that the draft can never propose must come out as often as the target wants them."""
    target, draft = pair
    trimmed = copy.deepcopy(draft)
    head = TrimmedHead(draft.get_output_embeddings(), torch.tensor([0, 2, 5]))
    trimmed.set_output_embeddings(head)
    assert p_value(target, ModelDraft(trimmed), None) > FALSE_ALARM


@dataclass(frozen=True)
class DishonestDraft:
    """Samples from a draft and reports a uniform distribution.

    The target then accepts whatever it likes at all. To report one-hot rows would be no lie:
    the rule is exact for any token that is given.
    """

    honest: Draft

    def start(self, terms):
        proposer = self.honest.start(terms)
        propose = proposer.propose
        uniform = Full(torch.full((terms.vocab_size,), 1 / terms.vocab_size))

        def misreport(tokens, k):
            ids, probs = propose(tokens, k)
            return ids, [uniform] * len(probs)

        proposer.propose = misreport
        return proposer


def test_a_draft_that_misreports_its_distribution_is_noticed(pair):
    """The negative control: 1,500 texts are enough to tell a wrong decoder."""
    target, draft = pair
    assert p_value(target, DishonestDraft(ModelDraft(draft)), None) < FALSE_ALARM
