"""Turns logits into probabilities, and probabilities into a token.

Every decoder and every draft gets its distributions here. So target and draft are warped alike,
and a draft reports the distribution that it sampled from. This module knows no tokenizer, no
model and no cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import torch
from torch import Tensor

from specsampling.method.distribution import Distribution, Few, Full
from specsampling.method.noise import Noise


@dataclass(frozen=True)
class Sampling:
    """The warp of a distribution, before a token is drawn from it.

    Attributes:
        temperature: 0 is greedy decoding, a one-hot distribution.
        top_k: keep the `top_k` most probable tokens; 0 keeps all.
        top_p: keep the smallest set of tokens whose mass reaches `top_p`; 1 keeps all.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        """Raise a ValueError in one line if a value is out of range."""
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be >= 0 (got {self.temperature}); 0 is greedy")
        if self.top_k < 0:
            raise ValueError(f"top_k must be >= 0 (got {self.top_k}); 0 keeps every token")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be > 0 and <= 1 (got {self.top_p}); 1 keeps every token")

    @property
    def is_greedy(self) -> bool:
        return self.temperature < NO_TEMPERATURE


# Below the first number, the division by the temperature may overflow unless the largest logit has
# been subtracted. Below the second number, the temperature itself is no normal float32.
SMALL_TEMPERATURE, NO_TEMPERATURE = 1e-3, 1.2e-38

GREEDY = Sampling()


# A nucleus is searched among the tokens at least as probable as the first floor, then the second.
FLOORS = (1e-3, 3e-5)
SMALLEST = 1e-45  # no float32 above 0 is smaller
MANY = 4096  # more tokens than this are kept in a tensor, not in a dictionary


def probs_from_logits(logits: Tensor, sampling: Sampling) -> Sequence[Distribution]:
    """Warp logits to probabilities, in float32 whatever the model's precision.

    The warp applies the temperature, then top-k, then top-p (nucleus), as Hugging Face does.

    Args:
        logits: [n, V], any floating dtype.
        sampling: the warp; temperature 0 gives one-hot distributions.

    Returns:
        n distributions. If a row's largest logit is NaN or infinite, its distribution holds NaN,
        which `verify` never accepts and `sample` refuses.
    """
    return RowByRow(logits, sampling) if logits.device.type == "cpu" else _warped(logits, sampling)


class RowByRow(Sequence[Distribution]):
    """The distributions of logits on a CPU, each made when it is first looked at.

    After a rejection, a call's other rows are never looked at. Each row alone fits into the core's
    own cache, so making all rows one by one takes no longer than making them together.
    """

    def __init__(self, logits: Tensor, sampling: Sampling):
        self._logits, self._sampling = logits, sampling
        self._made: dict[int, Distribution] = {}

    def __len__(self) -> int:
        return len(self._logits)

    @overload
    def __getitem__(self, index: int) -> Distribution: ...

    @overload
    def __getitem__(self, index: slice) -> list[Distribution]: ...

    def __getitem__(self, index: int | slice) -> Distribution | list[Distribution]:
        rows = range(len(self))[index]
        if isinstance(rows, range):
            return [self[row] for row in rows]
        if rows not in self._made:
            (self._made[rows],) = _warped(self._logits[rows : rows + 1], self._sampling)
        return self._made[rows]


def _warped(logits: Tensor, sampling: Sampling) -> list[Distribution]:
    logits = logits.float()
    if sampling.is_greedy:
        largest, tokens = _first_maxima(logits)
        masses = [1.0 if math.isfinite(value) else math.nan for value in largest]
        return [Few({token: mass}) for token, mass in zip(tokens, masses)]
    if sampling.temperature < SMALL_TEMPERATURE:
        logits = logits - logits.amax(dim=-1, keepdim=True)
    if sampling.temperature != 1:
        logits = logits / sampling.temperature
    has_top_k = 0 < sampling.top_k < logits.shape[-1]
    if has_top_k:
        kth_largest = logits.topk(sampling.top_k, dim=-1).values[:, -1:]  # [n, 1]
        logits = logits.masked_fill(logits < kth_largest, -torch.inf)
    probs = logits.softmax(dim=-1)
    if sampling.top_p < 1:
        return _nuclei(probs, sampling.top_p)
    if has_top_k and sampling.top_k <= MANY:
        rows = zip(probs, _at_least(SMALLEST, probs))
        return [Few(found) if found else Full(row) for row, found in rows]
    return [Full(row) for row in probs]


def _first_maxima(logits: Tensor) -> tuple[list[float], list[int]]:
    """Find the largest logit of each row, [n, V] float32, and the first token that has it."""
    if logits.device.type != "cpu":
        largest, tokens = logits.max(dim=-1)
        return largest.tolist(), tokens.tolist()
    rows = logits.numpy()  # NumPy is several times as fast on a CPU
    first = rows.argmax(-1)
    return rows[range(len(rows)), first].tolist(), first.tolist()


def _nuclei(probs: Tensor, top_p: float, floors: Sequence[float] = FLOORS) -> list[Distribution]:
    """Find in each row the smallest set of tokens whose mass reaches `top_p`; [n, V] float32 -> n.

    Ordering all V tokens would take longer than everything else in a cycle. So only the tokens
    above a floor are ordered first. If their mass reaches `top_p`, they contain the set. Among
    equally probable tokens, those with lower ids come first.
    """
    nuclei: list[Distribution] = []
    for row, found in zip(probs, _at_least(floors[0], probs)):
        if sum(found.values()) >= top_p:
            nuclei.append(_nucleus(found, top_p))
        elif len(floors) > 1:
            nuclei += _nuclei(row[None], top_p, floors[1:])
        else:
            nuclei.append(_wide_nucleus(row, top_p))
    return nuclei


def _nucleus(probs: dict[int, float], top_p: float) -> Few:
    kept, mass = [], 0.0
    for token in sorted(probs, key=probs.__getitem__, reverse=True):
        if mass >= top_p:
            break
        kept.append(token)
        mass += probs[token]
    return Few({token: probs[token] / mass for token in sorted(kept)})


def _wide_nucleus(probs: Tensor, top_p: float) -> Full:
    ordered, order = probs.sort(descending=True, stable=True)  # [V]
    kept = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0.0)
    return Full(torch.zeros_like(probs).scatter_(-1, order, kept / kept.sum()))


def _at_least(floor: float, probs: Tensor) -> list[dict[int, float]]:
    """Find the tokens of each row that reach a probability, by ascending id: [n, V] -> n."""
    if probs.device.type == "cpu":  # NumPy finds them five times as fast
        values = probs.numpy()
        flat = np.flatnonzero(values >= floor)
        places, masses = flat.tolist(), values.reshape(-1)[flat].tolist()
    else:
        found = (probs >= floor).flatten().nonzero()[:, 0]
        places, masses = found.tolist(), probs.flatten()[found].tolist()
    rows: list[dict[int, float]] = [{} for _ in probs]
    for place, mass in zip(places, masses):
        row, token = divmod(place, probs.shape[-1])
        rows[row][token] = mass
    return rows


def uniforms(num: int, generator: torch.Generator | None) -> list[float]:
    """Draw random numbers in [0, 1)."""
    return torch.rand(num, generator=generator, device=_device(generator)).tolist()


Randomness = torch.Generator | Noise | None
"""A source of randomness: drawn in sequence, or tied to positions and tokens."""


def sample(probs: Distribution, source: Randomness, position: int = 0) -> int:
    """Draw one token id from a distribution.

    Args:
        probs: the distribution.
        source: a generator, which draws the token by inversion, or noise, with which the token is
            the winner of the position's race.
        position: where the token will stand in its text.

    Raises:
        NonFiniteError: the distribution holds NaN.
    """
    if isinstance(source, Noise):
        return source.winner(probs, position)
    device = _device(source)
    precise = torch.float32 if device.type == "mps" else torch.float64  # mps has no other
    uniform = torch.rand((), generator=source, dtype=precise, device=device)
    return probs.token_at(1 - float(uniform))


def _device(generator: torch.Generator | None) -> torch.device:
    return generator.device if generator else torch.device("cpu")
