"""Noise that belongs to a position and a token, not to a call.

A token is drawn as the winner of an exponential race. Every token v gets a time E(v) / p(v), where
E(v) has the exponential distribution of mean 1. The smallest time wins. Token v wins with
probability p(v). E(v) depends on nothing but a key, the position in the text and the token. So a
text depends neither on how its tokens were grouped into calls, nor on who drafted them.

The noise is counter-based: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as
1, 2, 3") turns a counter into random bits, and no state is kept.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from specsampling.method.distribution import Distribution, Few, Full, NonFiniteError

MASK = 0xFFFFFFFF
ROUNDS = 10
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
STEPS = 0x9E3779B9, 0xBB67AE85  # added to the key in each round
FEW = 12  # up to so many tokens, plain integers are faster than arrays


def philox(counter: Sequence[Any], key: tuple[int, int]) -> tuple[Any, Any, Any, Any]:
    """Compute Philox4x32-10: four words of 32 bits from a counter of four and a key of two.

    Args:
        counter: four integers, or four arrays of uint64 that hold 32 bits each.
        key: two words.

    Returns:
        Four integers, or four such arrays.
    """
    a, b, c, d = counter
    for i in range(ROUNDS):
        left, right = MULTIPLIERS[0] * a, MULTIPLIERS[1] * c
        first, second = ((word + i * step) & MASK for word, step in zip(key, STEPS))
        a, b = (right >> 32) ^ b ^ first, right & MASK
        c, d = (left >> 32) ^ d ^ second, left & MASK
    return a, b, c, d


class Race(Protocol):
    """A function that finds the winner of a race: `race`, or a compiled function in its place."""

    def __call__(
        self, key: tuple[int, int], position: int, tokens: np.ndarray | None, probs: np.ndarray
    ) -> int:
        """Find the winner; see `race`."""


def uniforms_at(key: tuple[int, int], position: int, tokens: Any) -> Any:
    """Compute a number in (0, 1) for each token: an odd multiple of 2^-53.

    Args:
        key: the text's.
        position: where the token will stand in the text.
        tokens: an id, or an array of uint64.
    """
    first, second, _, _ = philox((tokens, position & MASK, position >> 32, 0), key)
    high, low = first >> 6, second >> 6  # 26 bits each
    return (2 * (high * 2**26 + low) + 1) * 2.0**-53


def race(key: tuple[int, int], position: int, tokens: np.ndarray | None, probs: np.ndarray) -> int:
    """Find the token v with the smallest E(v) / p(v), where E(v) = -log(1 - u(v)).

    The smallest u is 2^-53. So the race follows p to a relative error of 2^-53 / p(v). A token of
    probability 0 never wins. Of two tokens with the same time, the lower id wins.

    Args:
        key: the text's.
        position: where the token will stand in the text.
        tokens: [n] ids, ascending; None for 0 to n - 1.
        probs: [n] float32 or float64, none of them NaN.

    Returns:
        A token id.
    """
    masses = probs.astype(np.float64)
    ids = np.arange(len(masses), dtype=np.uint64) if tokens is None else tokens.astype(np.uint64)
    top = int(masses.argmax())
    best = _time(float(uniforms_at(key, position, int(ids[top]))), float(masses[top]))
    found = uniforms_at(key, position, ids)
    near = np.flatnonzero(found <= best * masses)  # E >= u, so no other token wins
    near = near[masses[near] > 0]
    times = [(_time(float(found[i]), float(masses[i])), int(ids[i])) for i in near]
    return min(times, default=(best, int(ids[top])))[1]


def _time(uniform: float, prob: float) -> float:
    return -math.log1p(-uniform) / prob


@dataclass(frozen=True)
class Noise:
    """The noise of one text.

    Attributes:
        key: two words of 32 bits.
        race: finds a race's winner.
    """

    key: tuple[int, int]
    race: Race = race

    @classmethod
    def of(cls, *names: object, race: Race = race) -> Noise:
        """Make a text's noise from what identifies it, such as seed, problem and sample."""
        digest = hashlib.sha256("|".join(map(str, names)).encode()).digest()
        return cls((int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:8], "big")), race)

    def initial_seed(self) -> int:
        """Return the key as one number. The name is that of `torch.Generator`."""
        return self.key[0] << 32 | self.key[1]

    def winner(self, probs: Distribution, position: int) -> int:
        """Draw the token of a position from a distribution.

        Args:
            probs: the distribution.
            position: where the token will stand in its text.

        Raises:
            NonFiniteError: the distribution holds NaN.
        """
        if isinstance(probs, Few):
            masses = list(probs.probs.values())
            if not math.isfinite(sum(masses)) or not max(masses, default=0.0) > 0:
                raise NonFiniteError
            if len(masses) == 1:
                return next(iter(probs.probs))
            if len(masses) <= FEW:
                return min(
                    (_time(uniforms_at(self.key, position, token), mass), token)
                    for token, mass in probs.probs.items()
                    if mass > 0
                )[1]
            tokens = np.fromiter(probs.probs, np.uint64, len(masses))
            return self.race(self.key, position, tokens, np.array(masses))
        assert isinstance(probs, Full)
        masses_of_all = probs.probs.cpu().numpy()
        if not math.isfinite(float(masses_of_all.sum())):
            raise NonFiniteError
        return self.race(self.key, position, None, masses_of_all)
