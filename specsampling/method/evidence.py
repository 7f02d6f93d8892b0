"""Evidence, for `results/audit.py`, that each new token was chosen by the right rule.

Each token that is drawn from the target's distribution has a randomised probability integral
transform. It is uniform on (0, 1), and independent of the transforms of all earlier tokens
(Rosenblatt 1952; Brockwell 2007 for discrete variables). If a token was chosen greedily, no other
token has a larger logit.
This module knows only tensors and distributions.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor

from specsampling.method.distribution import Distribution, Few, Full
from specsampling.method.sampling import Randomness, Sampling

TIE_BREAK = 1e-6  # times a token's probability: orders tokens of equal ratio
IMPOSSIBLE = -1.0  # the transform of a token that the target cannot emit


class Evidence:
    """A number for each new token of one text.

    Attributes:
        transforms: the numbers of a sampled text; see `transform`.
        gaps: the numbers of a greedy text; see `gap`.
    """

    def __init__(self, sampling: Sampling, source: Randomness):
        self.transforms: list[float] = []
        self.gaps: list[float] = []
        self._is_greedy = sampling.is_greedy
        # Evidence has its own random numbers, so that collecting it does not change the text.
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
            tokens: n token ids.
            logits: the target's, [>= n, V]; row i predicts token i.
            target_probs: at least n distributions, made from these logits.
            draft_probs: k distributions, from which the k proposals were drawn; empty if k is 0.
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
    """Return a token's logit minus the largest other logit, from logits [V].

    The gap is negative for a token that is not the argmax.
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
    """Return F(y-) + u q(y) of a token y, where F cumulates the target's probabilities q.

    F takes the tokens in an order that exposes wrong rules: by the ratio draft / target, largest
    first. Tokens of equal ratio are ordered by probability, and so are all tokens if nothing was
    drafted. The order is known before the token is drawn, so the transform is still uniform.

    Args:
        token: id of y.
        target: the distribution that y should have been drawn from.
        draft: the draft's distribution at this position; None if nothing was drafted.
        uniform: u, in [0, 1).

    Returns:
        A number in [0, 1]; `IMPOSSIBLE` if the target's probability is 0.
    """
    if not target.at(token) > 0:
        return IMPOSSIBLE
    if isinstance(target, Few):
        return _transform_few(token, target, draft, uniform)
    assert isinstance(target, Full)
    probs = order = target.probs  # [V]
    if draft is not None:
        ratios = draft.dense(len(probs)).to(probs.device) / probs  # nan if both are 0
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
