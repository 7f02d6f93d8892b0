"""Whether a finished run's tokens are the target's own, by what was recorded of each.

Sampled runs: the transforms of `method/evidence.py` must be uniform (Kolmogorov-Smirnov) and
uncorrelated from one token to the next. Greedy runs: every token the argmax.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from specsampling.results.records import Row

FALSE_ALARM = 0.001  # how often a right rule is called wrong
POWER = 0.95


@dataclass(frozen=True)
class SampledAudit:
    """Of one method's sampled tokens.

    Attributes:
        num_tokens: looked at.
        num_impossible: of them, with target probability 0.
        uniform_p: that right transforms are no more uniform than these.
        serial_p: that those of neighbouring tokens are no less correlated.
        noticeable: a cumulated probability that is off by this much somewhere is noticed with
            probability `POWER` (Dvoretzky-Kiefer-Wolfowitz).
    """

    num_tokens: int
    num_impossible: int
    uniform_p: float
    serial_p: float
    noticeable: float

    @property
    def p_value(self) -> float:
        """Of both tests together (Bonferroni)."""
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
    """Of one method's greedy tokens: those that are not the target's argmax, and how far off."""

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


def audit(rows: Sequence[Row]) -> SampledAudit | GreedyAudit | None:
    """What the tokens of one method's rows say; None where nothing was recorded."""
    if gaps := [gap for row in rows for gap in row.gaps or ()]:
        return GreedyAudit(len(gaps), tuple(-gap for gap in gaps if gap < 0))
    texts = [row.transforms for row in rows if row.transforms]
    return audit_transforms(texts) if texts else None


def audit_transforms(texts: Sequence[Sequence[float]]) -> SampledAudit:
    """Of the transforms of some texts' tokens, each text's in its order."""
    from scipy import stats

    values = np.concatenate([np.asarray(text, dtype=float) for text in texts])
    possible = values[values >= 0]
    before = np.concatenate([np.asarray(text[:-1], dtype=float) for text in texts])
    behind = np.concatenate([np.asarray(text[1:], dtype=float) for text in texts])
    pairs = (before >= 0) & (behind >= 0)
    before, behind = before[pairs], behind[pairs]
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
    """Where two greedy methods' texts of one prompt part: the smaller gap of the two there.

    A small one is a near-tie, which rounding decides.
    """
    by_key = {(row.example_id, row.sample_index): row for row in others}
    found = []
    for row in rows:
        other = by_key.get((row.example_id, row.sample_index))
        if other is None or not row.gaps or not other.gaps:
            continue
        pairs = enumerate(zip(row.token_ids, other.token_ids))
        place = next((i for i, (mine, theirs) in pairs if mine != theirs), None)
        if place is not None:
            found.append(min(row.gaps[place], other.gaps[place]))
    return found


def describe_partings(gaps: Sequence[float], num_texts: int) -> str:
    return (
        f"{len(gaps)} of {num_texts} texts part from reference's, where its two best logits are "
        f"{statistics.median(gaps):.2g} apart (median) and at most {max(gaps):.2g}"
    )
