"""Accept, correct, bonus: the rules that keep the target's distribution.

Three rules for one cycle: token by token (`verify`), the block as a whole (`verify_block`), and
equality under noise that target and draft share (`verify_coupled`). They know only distributions:
no tokenizer, no model, no cache. Greedy decoding and n-gram drafts need no code of their own here,
their distributions are sure of one token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from specsampling.method.distribution import Distribution, NonFiniteError
from specsampling.method.noise import Noise
from specsampling.method.sampling import sample, uniforms


class Verdict(NamedTuple):
    """What one cycle yields: `num_accepted` draft tokens, then `token`."""

    num_accepted: int
    token: int  # the bonus if every draft token was accepted, else the correction


def verify(
    target_probs: Sequence[Distribution],
    draft_probs: Sequence[Distribution],
    draft_tokens: Sequence[int],
    generator: torch.Generator | None,
    position: int = 0,
) -> Verdict:
    """One cycle of modified rejection sampling (Chen et al. 2023, Algorithm 2).

    A draft token x is accepted with probability min(1, target(x) / draft(x)). The
    first rejection ends the cycle with a correction from the residual; if there is
    none, the bonus comes from the target's distribution after the last draft token.

    Args:
        target_probs: k + 1 of them; number i is the target's, given the text and the first i
            draft tokens.
        draft_probs: k of them; number i is what draft token i was sampled from.
        draft_tokens: k token ids.
        generator: source of all randomness.
        position: unused; `verify_coupled` needs it.
    """
    k = len(draft_tokens)
    for i, uniform in enumerate(uniforms(k, generator)):
        token, target, draft = draft_tokens[i], target_probs[i], draft_probs[i]
        # uniform < ratio, never <=: where the target has 0, or nan, every uniform must reject.
        if not uniform * draft.at(token) < target.at(token):
            return Verdict(i, sample(residual(target, draft), generator))
    return Verdict(k, sample(target_probs[k], generator))


def verify_block(
    target_probs: Sequence[Distribution],
    draft_probs: Sequence[Distribution],
    draft_tokens: Sequence[int],
    generator: torch.Generator | None,
    position: int = 0,
) -> Verdict:
    """One cycle of block verification (Sun et al. 2025, arXiv 2403.10444, Algorithm 2).

    The first i tokens have the weight w_i = min(1, w_(i-1) target / draft), w_0 = 1: what a token
    is more probable than its draft makes up for one before it. They are accepted with probability
    h_i = m_i / (m_i + 1 - w_i), where m_i is the mass of (w_i target - draft)+ behind them, and
    all k with h_k = w_k. The longest accepted beginning counts, whatever was rejected within it.
    No rule that sees the same accepts more in expectation; with one-hot drafts, so greedily too,
    it is the token by token rule. Arguments and result as `verify`'s.

    Raises:
        NonFiniteError: a target's distribution holds NaN.
    """
    k = len(draft_tokens)
    weight, num_accepted, weight_then = 1.0, 0, 1.0
    for i, uniform in enumerate(uniforms(k, generator)):
        weight = next_weight(weight, target_probs[i], draft_probs[i], draft_tokens[i])
        if weight == 0:
            break
        chance = weight  # of all k
        if i + 1 < k:
            mass = target_probs[i + 1].excess(draft_probs[i + 1], weight).mass
            if not math.isfinite(mass):
                raise NonFiniteError
            chance = mass / (mass + 1 - weight) if mass > 0 else 0.0
        if uniform < chance:
            num_accepted, weight_then = i + 1, weight
    if num_accepted == k:
        return Verdict(k, sample(target_probs[k], generator))
    correction = residual(target_probs[num_accepted], draft_probs[num_accepted], weight_then)
    return Verdict(num_accepted, sample(correction, generator))


def verify_coupled(
    target_probs: Sequence[Distribution],
    draft_probs: Sequence[Distribution],
    draft_tokens: Sequence[int],
    noise: Noise,
    position: int,
) -> Verdict:
    """One cycle of drafter-invariant sampling (Daliri et al. 2024, arXiv 2408.07978, section 3).

    The token of a position is the winner of an exponential race, argmin E(v) / target(v) over the
    tokens v. A draft runs the same race, with the same E and its own distribution. Its tokens are
    accepted as far as they equal the target's winners, and the first that does not is replaced by
    the winner. So the text is the one that the target writes alone. Arguments and result as
    `verify`'s, but for two.

    Args:
        noise: what gives E, in the target as in the draft.
        position: where the first draft token stands in the text.
    """
    k = len(draft_tokens)
    for i, drafted in enumerate(draft_tokens):
        token = sample(target_probs[i], noise, position + i)
        if token != drafted:
            return Verdict(i, token)
    return Verdict(k, sample(target_probs[k], noise, position + k))


Verifier = Callable[
    [Sequence[Distribution], Sequence[Distribution], Sequence[int], Any, int], Verdict
]
VERIFIERS: Mapping[str, Verifier] = {"token": verify, "block": verify_block}  # by rejection
RULES: Mapping[str, Verifier] = {**VERIFIERS, "coupled": verify_coupled}


def next_weight(weight: float, target: Distribution, draft: Distribution, token: int) -> float:
    """min(1, weight * target / draft) at a token; 0 where the target has none, or nan."""
    wanted, drafted = weight * target.at(token), draft.at(token)
    if not wanted > 0:
        return 0.0
    return 1.0 if wanted >= drafted else wanted / drafted


def residual(target: Distribution, draft: Distribution, weight: float = 1.0) -> Distribution:
    """Distribution of the correction token after a rejection.

    (q - p)+ of Chen et al. 2023, section 3, where q is the target.

    Args:
        target: the target's distribution, q.
        draft: the draft's, p.
        weight: of the target, at most 1.

    Returns:
        A distribution of mass 1; the target's where the two are equal.
    """
    left = target.excess(draft, weight)
    return left.normalised() if left.mass > 0 else target
