"""A distribution over the vocabulary, by the tokens that may be drawn from it.

Greedy choices, n-gram proposals and nuclei have few tokens: `Few` keeps these in a dictionary, and
plain arithmetic does the rest. A model's call leaves cold caches behind, and then a tensor
operation on eight numbers takes 30 to 60 microseconds. A plain softmax gives every token some
probability: `Full` keeps a tensor. Both answer the same questions, so one rule serves both.
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
    """A distribution made of logits that are NaN or infinite: nothing can be drawn from it."""

    def __init__(self, whose: str = "target"):
        super().__init__(
            f"the {whose}'s logits are not finite (NaN or infinity, as when float16 overflows); "
            "choose dtype bfloat16 or float32"
        )


class Distribution(ABC):
    """A probability, or another mass, for each token of a vocabulary.

    Attributes:
        mass: the sum over all tokens: 1, up to rounding, unless it is of an `excess`.
    """

    mass: float

    @abstractmethod
    def at(self, token: int) -> float:
        """The probability of a token."""

    @abstractmethod
    def excess(self, other: Distribution, weight: float = 1.0) -> Distribution:
        """(weight * self - other)+: where this distribution has more than the other."""

    @abstractmethod
    def normalised(self) -> Distribution:
        """The same, with a mass of 1."""

    @abstractmethod
    def token_at(self, share: float) -> int:
        """The first token at which the cumulated mass reaches a share of the whole, in (0, 1].

        A token without probability adds no mass, so it is never the first.

        Raises:
            NonFiniteError: a probability is NaN.
        """

    @abstractmethod
    def dense(self, vocab_size: int) -> Tensor:
        """[vocab_size] float32: the probability of every token."""


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
        return Few({token: mass for token, mass in left.items() if not mass <= 0})  # keeps nan

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
        return float(self.probs[token])

    def excess(self, other: Distribution, weight: float = 1.0) -> Full:
        if isinstance(other, Few):
            left = self.probs.clone() if weight == 1 else weight * self.probs
            for token, prob in other.probs.items():
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
        if token == len(cumulated):  # where NaN stands: behind all numbers
            raise NonFiniteError
        return token

    def dense(self, vocab_size: int) -> Tensor:
        missing = vocab_size - len(self.probs)  # of a draft's smaller vocabulary
        return functional.pad(self.probs, (0, missing)) if missing else self.probs


def one_hot(tokens: Sequence[int]) -> list[Distribution]:
    """A distribution for each token, sure of it."""
    return [Few({token: 1.0}) for token in tokens]
