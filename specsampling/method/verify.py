"""Accept, correct, bonus: the rejection rules that keep the target's distribution.

Two rules for one cycle: token by token (`verify`), and the block as a whole (`verify_block`).
They know only tensors: no tokenizer, no model, no cache. Greedy decoding and n-gram
drafts need no code of their own here, their distributions are one-hot rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from specsampling.method.sampling import NonFiniteError, sample


class Verdict(NamedTuple):
    """What one cycle yields: `num_accepted` draft tokens, then `token`."""

    num_accepted: int
    token: int  # the bonus if every draft token was accepted, else the correction


def verify(
    target_probs: Tensor,
    draft_probs: Tensor,
    draft_tokens: Sequence[int],
    generator: torch.Generator | None,
) -> Verdict:
    """One cycle of modified rejection sampling (Chen et al. 2023, Algorithm 2).

    A draft token x is accepted with probability min(1, target(x) / draft(x)). The
    first rejection ends the cycle with a correction from the residual; if there is
    none, the bonus comes from the target's distribution after the last draft token.

    Args:
        target_probs: [k + 1, V] float32, row i is the target's distribution given
            the text and the first i draft tokens.
        draft_probs: [k, V] float32, row i is what draft token i was sampled from.
        draft_tokens: k token ids.
        generator: source of all randomness, on the tensors' device.
    """
    k = len(draft_tokens)
    uniforms = torch.rand(k, generator=generator, device=target_probs.device)
    # u < ratio, never <=: a ratio of 0, or the nan of 0 / 0, must reject for every u in [0, 1).
    accepted = (uniforms < ratios_at(target_probs, draft_probs, draft_tokens)).tolist()
    num_accepted = (accepted + [False]).index(False)
    if num_accepted == k:
        return Verdict(k, sample(target_probs[k], generator))
    correction = residual(target_probs[num_accepted], draft_probs[num_accepted])
    return Verdict(num_accepted, sample(correction, generator))


def verify_block(
    target_probs: Tensor,
    draft_probs: Tensor,
    draft_tokens: Sequence[int],
    generator: torch.Generator | None,
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
    uniforms = torch.rand(k, generator=generator, device=target_probs.device).tolist()
    weights = [1.0]
    for ratio in ratios_at(target_probs, draft_probs, draft_tokens).tolist():
        weight = weights[-1] * ratio
        weights.append(min(1.0, weight) if weight >= 0 else 0.0)  # nan: 0 / 0, what no draft draws
    masses = mass_left(target_probs.new_tensor(weights[1:k]), target_probs[1:k], draft_probs[1:])
    chances = [
        mass / (mass + 1 - weight) if mass > 0 else 0.0
        for weight, mass in zip(weights[1:], masses.tolist())
    ]
    chances += weights[1:][-1:]  # of all k
    accepted = [i for i, (u, h) in enumerate(zip(uniforms, chances), start=1) if u < h]
    num_accepted = max(accepted, default=0)
    if num_accepted == k:
        return Verdict(k, sample(target_probs[k], generator))
    weighted = weights[num_accepted] * target_probs[num_accepted]
    return Verdict(num_accepted, sample(residual(weighted, draft_probs[num_accepted]), generator))


Verifier = Callable[[Tensor, Tensor, Sequence[int], "torch.Generator | None"], Verdict]
VERIFIERS: Mapping[str, Verifier] = {"token": verify, "block": verify_block}


def ratios_at(target_probs: Tensor, draft_probs: Tensor, draft_tokens: Sequence[int]) -> Tensor:
    """[k] target / draft, at each drafted token."""
    k = len(draft_tokens)
    index = torch.tensor(draft_tokens, dtype=torch.long, device=target_probs.device)[:, None]
    target_at_token = target_probs[:k].gather(-1, index).squeeze(-1)  # [k, V] -> [k]
    draft_at_token = draft_probs.gather(-1, index).squeeze(-1)  # [k, V] -> [k]
    return target_at_token / draft_at_token


def mass_left(weights: Tensor, target_probs: Tensor, draft_probs: Tensor) -> Tensor:
    """[n] sum of (weight target - draft)+ over all tokens, of [n], [n, V] and [n, V].

    Looked at are only those that a target may emit: of a nucleus, a few hundred.

    Raises:
        NonFiniteError: a target's distribution holds NaN.
    """
    if len(weights):
        columns = target_probs.amax(0).nonzero()[:, 0]
        if len(columns) < target_probs.shape[1] // 8:
            target_probs, draft_probs = target_probs[:, columns], draft_probs[:, columns]
    masses = (weights[:, None] * target_probs - draft_probs).clamp(min=0).sum(-1)
    if not masses.isfinite().all():
        raise NonFiniteError
    return masses


def residual(target_probs: Tensor, draft_probs: Tensor) -> Tensor:
    """Distribution of the correction token after a rejection.

    (q - p)+ of Chen et al. 2023, section 3, where q is the target.

    Args:
        target_probs: [V] float32, sums to 1, or to a weight below it.
        draft_probs: [V] float32, sums to 1.

    Returns:
        [V] float32, sums to 1; `target_probs` where the two are equal.
    """
    difference = (target_probs - draft_probs).clamp(min=0)
    mass = difference.sum()
    return torch.where(mass > 0, difference / mass, target_probs)
