"""What each new token says of the rule that chose it: evidence for `results/audit.py`.

If a token was drawn from the target's distribution given the text before it, its randomised
probability integral transform is uniform on (0, 1) and independent of all before (Rosenblatt 1952;
Brockwell 2007 for discrete variables). If it was chosen greedily, no other logit is larger.
Knows only tensors and distributions.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor

from specsampling.method.distribution import Distribution, Few, Full
from specsampling.method.sampling import Randomness, Sampling

TIE_BREAK = 1e-6  # per probability: orders what has one ratio, and hardly anything else
IMPOSSIBLE = -1.0  # the transform of a token that the target cannot emit


class Evidence:
    """Of one text, a number per new token.

    Attributes:
        transforms: when sampling; see `transform`.
        gaps: when greedy; see `gap`.
    """

    def __init__(self, sampling: Sampling, source: Randomness):
        self.transforms: list[float] = []
        self.gaps: list[float] = []
        self._is_greedy = sampling.is_greedy
        # A stream of its own: the texts are the same whether or not somebody looks on.
        self._random = random.Random(source.initial_seed() if source else 0)

    def add(
        self,
        tokens: Sequence[int],
        logits: Tensor,
        target_probs: Sequence[Distribution],
        draft_probs: Sequence[Distribution] = (),
    ) -> None:
        """Look at a cycle's new tokens.

        Args:
            tokens: n of them.
            logits: [>= n, V] of the target, row i before token i.
            target_probs: at least n, what these logits were warped to.
            draft_probs: k of them, what the first k proposals were drawn from, if any.
        """
        if self._is_greedy:
            rows = zip(logits[: len(tokens)], tokens)
            self.gaps += [round(gap(row, token), 4) for row, token in rows]
            return
        for i, token in enumerate(tokens):
            draft = draft_probs[i] if i < len(draft_probs) else None
            value = transform(token, target_probs[i], draft, self._random.random())
            self.transforms.append(round(value, 6))


def gap(logits: Tensor, token: int) -> float:
    """By how much a token's logit is above every other's: [V].

    Negative for a token that is not the argmax.
    """
    logits = logits.float()
    if logits.device.type == "cpu":  # NumPy needs no copy
        row = logits.numpy()
        others = (row[:token], row[token + 1 :])
        largest_other = max(part.max(initial=-math.inf) for part in others)
        return float(row[token]) - float(largest_other)
    index = torch.tensor(token, device=logits.device)
    return float(logits[token] - logits.index_fill(0, index, -torch.inf).amax())


def transform(
    token: int, target: Distribution, draft: Distribution | None, uniform: float
) -> float:
    """F(y-) + u q(y) of a token y, with F the target's cumulated probability.

    F is over an order in which wrong rules show: first what the draft has more of than the
    target, by the ratio; tokens of one ratio, and all where nothing was drafted, from the most
    probable on. It is known before the token is, so that the transform is uniform all the same.

    Args:
        token: id of y.
        target: what y should have been drawn from.
        draft: what was drawn from in its place; None where nothing was drafted.
        uniform: u, in [0, 1).

    Returns:
        A number in [0, 1]; `IMPOSSIBLE` where the target's probability is 0.
    """
    if not target.at(token) > 0:
        return IMPOSSIBLE
    if isinstance(target, Few):
        return _transform_few(token, target, draft, uniform)
    assert isinstance(target, Full)
    probs = order = target.probs  # [V]
    if draft is not None:
        ratios = draft.dense(len(probs)).to(probs.device) / probs  # nan where neither has any
        order = ratios.add_(probs, alpha=TIE_BREAK)
    # 1 before the token, u at it, 0 after it
    share = (order - order[token]).heaviside_(probs.new_tensor(uniform))
    return float(torch.dot(share, probs))


def _transform_few(token: int, target: Few, draft: Distribution | None, uniform: float) -> float:
    order = target.probs
    if draft is not None:
        order = {other: draft.at(other) / prob + TIE_BREAK * prob for other, prob in order.items()}
    own = order[token]
    before = beside = 0.0
    for other, prob in target.probs.items():
        if order[other] > own:
            before += prob
        elif order[other] == own:
            beside += prob
    return before + uniform * beside
