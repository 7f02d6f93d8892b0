"""Accept, correct, bonus: the rules that keep the target's distribution.

One of three rules judges a cycle: token by token (`verify`), as a whole (`verify_block`), or by
equality under noise that target and draft share (`verify_coupled`). The rules know only
distributions: no tokenizer, no model, no cache. Greedy decoding and n-gram drafts need no special
code, because their distributions are one-hot.
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
    """The result of one cycle: `num_accepted` draft tokens, then `token`."""

    num_accepted: int
    token: int  # the bonus if every draft token was accepted, else the correction


def verify(
    target_probs: Sequence[Distribution],
    draft_probs: Sequence[Distribution],
    draft_tokens: Sequence[int],
    generator: torch.Generator | None,
    position: int = 0,
) -> Verdict:
    """Run one cycle of modified rejection sampling (Chen et al. 2023, Algorithm 2).

    A draft token x is accepted with probability min(1, target(x) / draft(x)). The first rejection
    ends the cycle with a correction from the residual. If no token is rejected, the bonus comes
    from the target's distribution after the last draft token.

    Args:
        target_probs: k + 1 distributions of the target; number i (from 0) follows the text and the
            first i draft tokens.
        draft_probs: k distributions; draft token i was sampled from number i.
        draft_tokens: k token ids.
        generator: the source of all randomness.
        position: unused; `verify_coupled` needs it.
    """
    k = len(draft_tokens)
    for i, uniform in enumerate(uniforms(k, generator)):
        token, target, draft = draft_tokens[i], target_probs[i], draft_probs[i]
        # The test is uniform < ratio, never <=: a target of 0 or nan must reject every uniform.
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
    """Run one cycle of block verification (Sun et al. 2025, arXiv 2403.10444, Algorithm 2).

    The first i tokens have the weight w_i = min(1, w_(i-1) target / draft), where w_0 = 1. So a
    token that the target prefers makes up for an earlier token that it does not. The first i < k
    tokens are accepted with probability m_i / (m_i + 1 - w_i). Here m_i is the mass of
    (w_i target - draft)+ at the position after them. All k tokens are accepted with probability
    w_k. The longest accepted beginning counts, even if shorter beginnings were rejected. No rule
    that sees the same distributions accepts more in expectation. With one-hot drafts this is the
    rule of `verify`. Arguments and result are those of `verify`.

    Raises:
        NonFiniteError: a target's distribution holds NaN.
    """
    k = len(draft_tokens)
    weight, num_accepted, accepted_weight = 1.0, 0, 1.0
    for i, uniform in enumerate(uniforms(k, generator)):
        weight = next_weight(weight, target_probs[i], draft_probs[i], draft_tokens[i])
        if weight == 0:
            break
        chance = weight  # the chance that all k are accepted
        if i + 1 < k:
            mass = target_probs[i + 1].excess(draft_probs[i + 1], weight).mass
            if not math.isfinite(mass):
                raise NonFiniteError
            chance = mass / (mass + 1 - weight) if mass > 0 else 0.0
        if uniform < chance:
            num_accepted, accepted_weight = i + 1, weight
    if num_accepted == k:
        return Verdict(k, sample(target_probs[k], generator))
    target, draft = target_probs[num_accepted], draft_probs[num_accepted]
    return Verdict(num_accepted, sample(residual(target, draft, accepted_weight), generator))


def verify_coupled(
    target_probs: Sequence[Distribution],
    draft_probs: Sequence[Distribution],
    draft_tokens: Sequence[int],
    noise: Noise,
    position: int,
) -> Verdict:
    """Run a cycle of drafter-invariant sampling (Daliri et al. 2024, arXiv 2408.07978, section 3).

    The token of a position is the winner of an exponential race, argmin E(v) / target(v) over the
    tokens v. A draft runs the same race, with the same E and its own distribution. Draft tokens
    are accepted until one is not the target's winner. The target's winner then replaces this token.
    So the target would write the same text alone. The other arguments are those of `verify`.

    Args:
        noise: the source of E for both target and draft.
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
    """Compute min(1, weight * target / draft) at a token; 0 if the target's is 0 or nan."""
    wanted, drafted = weight * target.at(token), draft.at(token)
    if not wanted > 0:
        return 0.0
    return 1.0 if wanted >= drafted else wanted / drafted


def residual(target: Distribution, draft: Distribution, weight: float = 1.0) -> Distribution:
    """Compute the distribution of the correction token after a rejection.

    The residual is (q - p)+ of Chen et al. 2023, section 3, where q is the target.

    Args:
        target: the target's distribution, q.
        draft: the draft's distribution, p.
        weight: a factor of q, at most 1.

    Returns:
        A distribution of mass 1. It is the target's if the two are equal.
    """
    left = target.excess(draft, weight)
    return left.normalised() if left.mass > 0 else target
