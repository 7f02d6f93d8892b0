"""What each new token says of the rule that chose it: evidence for `results/audit.py`.

If a token was drawn from the target's distribution given the text before it, its randomised
probability integral transform is uniform on (0, 1) and independent of all before (Rosenblatt 1952;
Brockwell 2007 for discrete variables). If it was chosen greedily, no other logit is larger.
Knows only tensors.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from specsampling.method.sampling import Sampling

TIE_BREAK = 1e-6  # per probability: orders what has one ratio, and hardly anything else
IMPOSSIBLE = -1.0  # the transform of a token that the target cannot emit


class Evidence:
    """Of one text, a number per new token.

    Attributes:
        transforms: when sampling; see `transform`.
        gaps: when greedy; see `gap`.
    """

    def __init__(self, sampling: Sampling, generator: torch.Generator | None):
        self.transforms: list[float] = []
        self.gaps: list[float] = []
        self._is_greedy = sampling.is_greedy
        self._is_sparse = sampling.top_k > 0 or sampling.top_p < 1
        # A stream of its own: the texts are the same whether or not somebody looks on.
        self._random = random.Random(generator.initial_seed() if generator else 0)

    def add(
        self,
        tokens: Sequence[int],
        logits: Tensor,
        target_probs: Tensor,
        draft_probs: Tensor | None = None,
    ) -> None:
        """Look at a cycle's new tokens.

        Args:
            tokens: n of them.
            logits: [>= n, V] of the target, row i before token i.
            target_probs: [>= n, V] float32, what these logits were warped to.
            draft_probs: [k, V] float32, what the first k proposals were drawn from, if any.
        """
        n = len(tokens)
        index = torch.tensor(tokens, device=logits.device)[:, None]  # [n, 1]
        if self._is_greedy:
            self.gaps += [round(value, 4) for value in gap(logits[:n], index).tolist()]
            return
        uniforms = torch.tensor([self._random.random() for _ in tokens], device=logits.device)
        if draft_probs is None:
            draft_probs = target_probs[:0]
        target_probs, draft_probs = target_probs[:n], draft_probs[:n]
        if self._is_sparse and n > 1:  # a few hundred columns instead of 50,000: no other has mass
            support = target_probs.amax(0)
            support[index[:, 0]] = 1.0
            columns = support.nonzero()[:, 0]
            index = torch.searchsorted(columns, index)
            target_probs, draft_probs = target_probs[:, columns], draft_probs[:, columns]
        values = transform(index, target_probs, draft_probs, uniforms)
        self.transforms += [round(value, 6) for value in values.tolist()]


def gap(logits: Tensor, index: Tensor) -> Tensor:
    """By how much a token's logit is above every other's: [n, V], [n, 1] -> [n].

    Negative for a token that is not the argmax.
    """
    logits = logits.float()
    others = logits.scatter(-1, index, -torch.inf).amax(-1)
    return logits.gather(-1, index)[:, 0] - others


def transform(index: Tensor, target_probs: Tensor, draft_probs: Tensor, uniforms: Tensor) -> Tensor:
    """F(y-) + u q(y) of each token y, with F the target's cumulated probability.

    F is over an order in which wrong rules show: first what the draft has more of than the
    target, by the ratio; tokens of one ratio, and all where nothing was drafted, from the most
    probable on. It is known before the token is, so that the transform is uniform all the same.

    Args:
        index: [n, 1] token ids.
        target_probs: [n, V] float32.
        draft_probs: [<= n, V] float32, of the first tokens.
        uniforms: [n] in [0, 1).

    Returns:
        [n] in [0, 1]; `IMPOSSIBLE` where the target's probability is 0.
    """
    token_probs = target_probs.gather(-1, index)  # [n, 1]
    k = len(draft_probs)
    if k:
        order = torch.empty_like(target_probs)  # [n, V], nan where neither has any
        torch.div(draft_probs, target_probs[:k], out=order[:k])
        order[:k].add_(target_probs[:k], alpha=TIE_BREAK)
        order[k:] = target_probs[k:]
        order.sub_(order.gather(-1, index))
    else:
        order = target_probs - token_probs
    share = order.heaviside_(uniforms[:, None])  # 1 before the token, u at it, 0 after it
    values = torch.linalg.vecdot(share, target_probs)
    return torch.where(token_probs[:, 0] > 0, values, IMPOSSIBLE)
