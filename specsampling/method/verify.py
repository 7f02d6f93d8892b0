"""Accept, correct, bonus: the rejection rule that keeps the target's distribution.

Knows only tensors: no tokenizer, no model, no cache. Greedy decoding and n-gram
drafts need no code of their own here, their distributions are one-hot rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from specsampling.method.sampling import sample


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
    index = torch.tensor(draft_tokens, dtype=torch.long, device=target_probs.device)[:, None]
    target_at_token = target_probs[:k].gather(-1, index).squeeze(-1)  # [k, V] -> [k]
    draft_at_token = draft_probs.gather(-1, index).squeeze(-1)  # [k, V] -> [k]
    uniforms = torch.rand(k, generator=generator, device=target_probs.device)
    # u < ratio, never <=: a ratio of 0, or the nan of 0 / 0, must reject for every u in [0, 1).
    accepted = uniforms < target_at_token / draft_at_token
    num_accepted = int(accepted.long().cumprod(dim=0).sum())
    if num_accepted == k:
        return Verdict(k, sample(target_probs[k], generator))
    correction = residual(target_probs[num_accepted], draft_probs[num_accepted])
    return Verdict(num_accepted, sample(correction, generator))


def residual(target_probs: Tensor, draft_probs: Tensor) -> Tensor:
    """Distribution of the correction token after a rejection.

    (q - p)+ of Chen et al. 2023, section 3, where q is the target.

    Args:
        target_probs: [V] float32, sums to 1.
        draft_probs: [V] float32, sums to 1.

    Returns:
        [V] float32, sums to 1; `target_probs` where the two are equal.
    """
    difference = (target_probs - draft_probs).clamp(min=0)
    mass = difference.sum()
    return torch.where(mass > 0, difference / mass, target_probs)
