"""Checks from a finished run's records whether its tokens are the target's own.

In sampled runs the transforms of `method/evidence.py` must be uniform (Kolmogorov-Smirnov) and
uncorrelated from one token to the next. In greedy runs every token must be the argmax.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from specsampling.results.metrics import num_equal_tokens, paired
from specsampling.results.records import Row

FALSE_ALARM = 0.001  # probability that a correct rule is called wrong
POWER = 0.95


@dataclass(frozen=True)
class SampledAudit:
    """The tests of one method's sampled tokens, with their p-values.

    An error of `noticeable` in a cumulative probability is noticed with probability `POWER`
    (Dvoretzky-Kiefer-Wolfowitz).
    """

    num_tokens: int
    num_impossible: int  # tokens to which the target gives probability 0
    uniform_p: float  # p-value of the hypothesis that the transforms are uniform
    serial_p: float  # p-value for neighbouring tokens' transforms being uncorrelated
    noticeable: float

    @property
    def p_value(self) -> float:
        """The p-value of both tests together (Bonferroni)."""
        return 0.0 if self.num_impossible else min(1.0, 2 * min(self.uniform_p, self.serial_p))

    @property
    def is_lossless(self) -> bool:
        return self.p_value >= FALSE_ALARM

    def __str__(self) -> str:
        if self.num_impossible:
            impossible = f"{self.num_impossible} of {self.num_tokens:,} tokens are impossible"
            return f"NOT lossless: {impossible}"
        verdict = "lossless" if self.is_lossless else "NOT lossless"
        return (
            f"{verdict} over {self.num_tokens:,} tokens: uniform p = {self.uniform_p:.2g}, serial "
            f"p = {self.serial_p:.2g}; a distribution off by {self.noticeable:.1%} would show"
        )


@dataclass(frozen=True)
class GreedyAudit:
    """The test of one method's greedy tokens; `shortfalls` are of tokens below the argmax."""

    num_tokens: int
    shortfalls: tuple[float, ...]

    @property
    def is_lossless(self) -> bool:
        return not self.shortfalls

    def __str__(self) -> str:
        if self.is_lossless:
            return f"all {self.num_tokens:,} tokens are the target's argmax"
        return (
            f"NOT lossless: {len(self.shortfalls)} of {self.num_tokens:,} tokens are not the "
            f"target's argmax, by up to {max(self.shortfalls):.3g}"
        )


Audit = SampledAudit | GreedyAudit


def audit(rows: Sequence[Row]) -> Audit | None:
    """Audit the tokens of one method's rows; None if nothing was recorded."""
    if gaps := [gap for row in rows for gap in row.gaps or ()]:
        return GreedyAudit(len(gaps), tuple(-gap for gap in gaps if gap < 0))
    texts = [row.transforms for row in rows if row.transforms]
    return audit_transforms(texts) if texts else None


def audit_transforms(texts: Sequence[Sequence[float]]) -> SampledAudit:
    """Audit the transforms of tokens, given text by text and in order."""
    from scipy import stats

    values = np.concatenate([np.asarray(text, dtype=float) for text in texts])
    possible = values[values >= 0]
    pairs = np.array([pair for text in texts for pair in zip(text, text[1:])], dtype=float)
    before, behind = pairs.reshape(-1, 2)[(pairs.reshape(-1, 2) >= 0).all(axis=1)].T
    has_pairs = len(before) > 2 and np.ptp(before) > 0 and np.ptp(behind) > 0
    spread = math.sqrt(math.log(2 / (FALSE_ALARM / 2))) + math.sqrt(-math.log(1 - POWER))
    return SampledAudit(
        num_tokens=len(values),
        num_impossible=len(values) - len(possible),
        uniform_p=float(stats.kstest(possible, "uniform").pvalue) if len(possible) else 1.0,
        serial_p=float(stats.pearsonr(before, behind).pvalue) if has_pairs else 1.0,
        noticeable=min(1.0, spread / math.sqrt(2 * max(len(values), 1))),
    )


def partings(rows: Sequence[Row], others: Sequence[Row]) -> list[float]:
    """List, for each text, the smaller of two greedy methods' gaps where their texts first differ.

    A small gap is a near-tie, which rounding decides.
    """
    found = []
    for row, other in paired(rows, others):
        mine, theirs, place = row.gaps or [], other.gaps or [], num_equal_tokens(row, other)
        if place < min(len(mine), len(theirs)):
            found.append(min(mine[place], theirs[place]))
    return found


def describe_partings(gaps: Sequence[float], num_texts: int) -> str:
    return (
        f"{len(gaps)} of {num_texts} texts differ from reference's. At the first difference, the "
        f"two best logits are {statistics.median(gaps):.2g} apart (median), at most {max(gaps):.2g}"
    )
