"""From logits to probabilities to a token.

Knows only tensors: no tokenizer, no model, no cache. Every decoder and every
draft gets its distribution here, so target and draft are warped the same way,
and the distribution a draft reports is the one it sampled from.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


class NonFiniteError(ArithmeticError):
    """A distribution made of logits that are NaN or infinite: nothing can be drawn from it."""

    def __init__(self, whose: str = "target"):
        super().__init__(
            f"the {whose}'s logits are not finite (NaN or infinity, as when float16 overflows); "
            "choose dtype bfloat16 or float32"
        )


@dataclass(frozen=True)
class Sampling:
    """How a distribution is warped before a token is drawn from it.

    Attributes:
        temperature: 0 is greedy decoding, a one-hot distribution.
        top_k: keep the `top_k` most probable tokens; 0 keeps all.
        top_p: keep the smallest set of tokens whose mass reaches `top_p`; 1 keeps all.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    @property
    def is_greedy(self) -> bool:
        return self.temperature < NO_TEMPERATURE


# Below the first, dividing by the temperature may overflow unless the largest logit is taken
# off before; below the second the temperature itself is no float32 any more.
SMALL_TEMPERATURE, NO_TEMPERATURE = 1e-3, 1.2e-38

GREEDY = Sampling()


def probs_from_logits(logits: Tensor, sampling: Sampling) -> Tensor:
    """Warped probabilities, in float32 whatever the model's precision.

    Temperature first, then top-k, then top-p (nucleus), as Hugging Face does.

    Args:
        logits: [n, V], any floating dtype.
        sampling: the warp; temperature 0 gives one-hot rows.

    Returns:
        [n, V] float32, each row sums to 1. A row whose largest logit is NaN or infinite holds
        NaN, which `verify` never accepts and `sample` refuses.
    """
    if sampling.is_greedy:
        # As float32: the same first maximum, found three times as fast on a CPU as in bfloat16.
        largest, tokens = logits.float().max(dim=-1)
        return one_hot(tokens, logits.shape[-1], torch.where(largest.isfinite(), 1.0, torch.nan))
    logits = logits.float()
    if sampling.temperature < SMALL_TEMPERATURE:
        logits = logits - logits.amax(dim=-1, keepdim=True)
    if sampling.temperature != 1:
        logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        kth_largest = logits.topk(sampling.top_k, dim=-1).values[:, -1:]  # [n, 1]
        logits = logits.masked_fill(logits < kth_largest, -torch.inf)
    probs = logits.softmax(dim=-1)
    if sampling.top_p < 1:
        probs = _nucleus(probs, sampling.top_p)
    return probs


def _nucleus(probs: Tensor, top_p: float, num_sorted: int = 64) -> Tensor:
    """The smallest set of tokens whose mass reaches `top_p`, normalised; [n, V] -> [n, V].

    Of each row the `num_sorted` most probable tokens are ordered, of those where that is not
    enough sixteen times as many, and so on: ordering them all takes thirty times as long.
    """
    ordered, order = probs.topk(min(num_sorted, probs.shape[-1]), dim=-1)
    kept = ordered.masked_fill(ordered.cumsum(dim=-1) - ordered >= top_p, 0.0)
    mass = kept.sum(dim=-1, keepdim=True)
    nucleus = torch.zeros_like(probs).scatter_(-1, order, kept / mass)
    is_short = mass[:, 0] < top_p  # not a row of NaN, which no ordering makes whole
    if num_sorted < probs.shape[-1] and is_short.any():
        nucleus[is_short] = _nucleus(probs[is_short], top_p, 16 * num_sorted)
    return nucleus


def one_hot(tokens: Tensor, vocab_size: int, mass: Tensor | None = None) -> Tensor:
    """[n] token ids -> [n, V] float32 rows that are sure of their token; `mass` [n] is 1."""
    probs = torch.zeros(len(tokens), vocab_size, device=tokens.device)
    ones = torch.ones(len(tokens), device=tokens.device) if mass is None else mass
    return probs.scatter_(-1, tokens[:, None], ones[:, None])


def sample(probs: Tensor, generator: torch.Generator | None) -> int:
    """Draw one token id from a [V] float32 distribution.

    By inversion: the first token at which the cumulated mass reaches a uniform share of the
    whole, in (0, 1]. A token of probability 0 adds no mass, so it is never the first. (Ten
    times as fast as `torch.multinomial` over 49,152 tokens on a CPU; where one token has all
    of the mass, as in greedy decoding, finding that is three times as fast again.)

    Raises:
        NonFiniteError: the distribution holds NaN.
    """
    precise = torch.float32 if probs.device.type == "mps" else torch.float64  # mps has no other
    uniform = torch.rand((), generator=generator, dtype=precise, device=probs.device)
    # Not elsewhere, where looking is a wait for the device.
    if probs.device.type == "cpu" and probs.amax(-1) == 1:
        return int(probs.argmax(-1))
    mass = probs.cumsum(-1, dtype=precise)
    token = int(torch.searchsorted(mass, (1 - uniform) * mass[-1]))
    if token == len(mass):  # where NaN stands: behind all numbers
        raise NonFiniteError
    return token
