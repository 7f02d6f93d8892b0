"""Distributions over the vocabulary: `Few` for a few possible tokens, `Full` for any number.

Greedy choices, n-gram proposals and nuclei (top-p) have few possible tokens. `Few` keeps these in a
dictionary and computes with plain numbers. After a model's call, a tensor operation on eight
numbers would take tens of microseconds. A plain softmax gives every token some probability, so
`Full` keeps a tensor.
Both have the same methods, so one acceptance rule serves both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional


class NonFiniteError(ArithmeticError):
    """The error for logits that are NaN or infinite, from which no token can be drawn."""

    def __init__(self, whose: str = "target"):
        super().__init__(
            f"the {whose}'s logits are not finite (NaN or infinity, as when float16 overflows); "
            "choose dtype bfloat16 or float32"
        )


class Distribution(ABC):
    """A probability, or another mass, for each token of a vocabulary.

    Attributes:
        mass: the sum over all tokens. It is 1, up to rounding, except for an `excess`.
    """

    mass: float

    @abstractmethod
    def at(self, token: int) -> float:
        """Return the probability of a token."""

    @abstractmethod
    def excess(self, other: Distribution, weight: float = 1.0) -> Distribution:
        """Return (weight * self - other)+: by how much this distribution exceeds the other."""

    @abstractmethod
    def normalised(self) -> Distribution:
        """Return the same distribution with a mass of 1."""

    @abstractmethod
    def token_at(self, share: float) -> int:
        """Find the first token at which the cumulated mass reaches a share, in (0, 1], of all.

        A token of probability 0 adds no mass, so it is never found.

        Raises:
            NonFiniteError: a probability is NaN.
        """

    @abstractmethod
    def dense(self, vocab_size: int) -> Tensor:
        """Return the probability of every token, [vocab_size] float32."""


class Few(Distribution):
    """A distribution over a few tokens.

    Attributes:
        probs: the probability of each token, by ascending id; every other token has 0.
    """

    __slots__ = ("probs",)

    def __init__(self, probs: Mapping[int, float]):
        self.probs = probs

    @property
    def mass(self) -> float:  # type: ignore[override]
        return sum(self.probs.values())

    def at(self, token: int) -> float:
        return self.probs.get(token, 0.0)

    def excess(self, other: Distribution, weight: float = 1.0) -> Few:
        left = {token: weight * prob - other.at(token) for token, prob in self.probs.items()}
        return Few({token: mass for token, mass in left.items() if not mass <= 0})  # and nan

    def normalised(self) -> Few:
        mass = self.mass
        return Few({token: prob / mass for token, prob in self.probs.items()})

    def token_at(self, share: float) -> int:
        cumulated = list(accumulate(self.probs.values()))
        if not cumulated[-1] > 0:
            raise NonFiniteError
        return list(self.probs)[bisect_left(cumulated, share * cumulated[-1])]

    def dense(self, vocab_size: int) -> Tensor:
        probs = torch.zeros(vocab_size)
        probs[list(self.probs)] = torch.tensor(list(self.probs.values()), dtype=torch.float32)
        return probs


class Full(Distribution):
    """A distribution that may give every token some probability.

    Attributes:
        probs: [V] float32.
    """

    __slots__ = ("probs",)

    def __init__(self, probs: Tensor):
        self.probs = probs

    @property
    def mass(self) -> float:  # type: ignore[override]
        return float(self.probs.sum())

    def at(self, token: int) -> float:
        return float(self.probs[token]) if token < len(self.probs) else 0.0

    def excess(self, other: Distribution, weight: float = 1.0) -> Full:
        if isinstance(other, Few):
            left = self.probs.clone() if weight == 1 else weight * self.probs
            for token, prob in other.probs.items():
                if token < len(left):  # a draft's vocabulary may be smaller, or larger
                    left[token] -= prob
        else:
            probs = self.probs if weight == 1 else weight * self.probs
            left = probs - other.dense(len(probs))
        return Full(left.clamp_(min=0))

    def normalised(self) -> Full:
        return Full(self.probs / self.probs.sum())

    def token_at(self, share: float) -> int:
        precise = torch.float32 if self.probs.device.type == "mps" else torch.float64
        cumulated = self.probs.cumsum(-1, dtype=precise)
        token = int(torch.searchsorted(cumulated, share * cumulated[-1]))
        if token == len(cumulated):  # nan is sorted behind all numbers
            raise NonFiniteError
        return token

    def dense(self, vocab_size: int) -> Tensor:
        missing = vocab_size - len(self.probs)  # a draft's vocabulary may be smaller
        return functional.pad(self.probs, (0, missing)) if missing else self.probs


def one_hot(tokens: Sequence[int]) -> list[Distribution]:
    """Make for each token a distribution that gives it probability 1."""
    return [Few({token: 1.0}) for token in tokens]
