"""Learns from past cycles what drafted tokens bring and what they cost, for `adaptive.py`.

It keeps running estimates over all texts of a run:

- how often a model's proposals are accepted, by the confidence with which they were made;
- how often a lookup's proposals are accepted, by the n-gram's length and their position;
- how long calls take.

Let r be the tokens per second so far, and let one more drafted token cost s seconds. In s seconds
the decoder would otherwise produce r * s tokens. So the drafted token pays if the chance that it is
accepted, with all drafted tokens before it, exceeds r * s. (Dinkelbach 1967: the best ratio is
where the gain is 0.) There is an r for each length of a lookup's match, and one for no match. Fast
lookups in one place cannot make up for time that is lost where the model must draft.

The estimates of time describe the machine, and the machine changes. A call may be slow by accident,
so one slow cycle is ignored. A call is never fast by accident. If a cycle is much faster than
expected, the machine was busy before, and all estimates of time begin anew. A drafter that is not
used, because it is too slow, brings no news about its speed. So it is tried again after `PATIENCE`
cycles, then after twice as many, and so on.

This module knows only numbers: no tokens, no tensors, no clock.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

MEMORY = 0.99  # weight of the past in estimates of times and yields, per cycle
NUM_BINS = 20  # of the draft's confidence
PRIOR = 4.0  # number of verdicts that a prior counts for
LOOKUP_PRIOR = 0.8  # acceptance rate before any verdict: high, so that lookups are tried
MODEL_PRIOR = 0.7  # the same for a model's token of unknown confidence
CURIOSITY = 0.02  # share of the time for trying a drafter that has long been silent
PATIENCE = 16  # cycles until a silent drafter is tried again; doubled each time
TRIALS = 2  # cycles with, and cycles without the model, before it is judged: one may meet a pause
STALL = 3.0  # so many times slower than expected is an accident; so many times faster is news
QUICK, QUICK_CYCLES = 2.0, 3  # so many cycles in a row, each faster by this factor, are news too


class AcceptanceRate:
    """Estimates the share of accepted tokens from the verdicts that it sees and a prior."""

    def __init__(self) -> None:
        self._accepted = self._tested = 0

    def see(self, is_accepted: bool) -> None:
        self._accepted += is_accepted
        self._tested += 1

    def estimate(self, prior: float) -> float:
        """Return the share, in [0, 1]. The prior counts as much as `PRIOR` verdicts."""
        return (self._accepted + PRIOR * prior) / (self._tested + PRIOR)


class FadingRate:
    """Estimates an amount per unit, such as seconds per call. Old observations fade."""

    def __init__(self) -> None:
        self._amount = self._units = 0.0

    def see(self, amount: float, units: float) -> None:
        self._amount = MEMORY * self._amount + amount
        self._units = MEMORY * self._units + units

    @property
    def estimate(self) -> float:
        """Return the amount per unit; 0 if nothing has been seen."""
        return self._amount / self._units if self._units else 0.0


class SecondsByRows:
    """Predicts a call's seconds from its rows by a least-squares line that never falls."""

    def __init__(self) -> None:
        self._sums = [0.0] * 5  # of 1, rows, seconds, rows^2, rows * seconds

    def see(self, rows: float, seconds: float) -> None:
        terms = (1.0, rows, seconds, rows * rows, rows * seconds)
        self._sums = [MEMORY * old + new for old, new in zip(self._sums, terms)]

    @property
    def slope(self) -> float:
        """Return the seconds per row; 0 if only calls of one size have been seen."""
        n, x, y, xx, xy = self._sums
        spread = n * xx - x * x
        return max(0.0, (n * xy - x * y) / spread) if spread > 1e-6 * n * n else 0.0

    def at(self, rows: float) -> float:
        """Predict a call's seconds; 0 if nothing has been seen."""
        n, x, y = self._sums[:3]
        return (y + self.slope * (n * rows - x)) / n if n else 0.0


class CallSeconds:
    """Predicts how long a target call takes.

    Calls of one row use other kernels, so they have their own mean. One line through calls of all
    sizes would take the step between one row and two for the price of every row.
    """

    def __init__(self) -> None:
        self._one, self._more = FadingRate(), SecondsByRows()
        self.num_of_one = 0  # calls of one row
        self.most_rows = 0  # the rows of the largest call
        self.least_seconds = 0.0  # the time of the fastest call

    def see(self, rows: int, seconds: float) -> None:
        self.least_seconds = min(self.least_seconds or seconds, seconds)
        self.most_rows = max(self.most_rows, rows)
        if rows == 1:
            self._one.see(seconds, 1)
            self.num_of_one += 1
        else:
            self._more.see(rows, seconds)

    def at(self, rows: int) -> float:
        """Predict a call's seconds; 0 if no such call has been seen."""
        one, more = self._one.estimate, self._more.at(rows)
        if rows == 1:
            return one or more
        return max(one, more) if more else 0.0

    @property
    def slope(self) -> float:
        """Return the seconds of each row after the second."""
        return self._more.slope

    @property
    def step(self) -> float:
        """Return by how many seconds the second row costs more than `slope`."""
        one = self._one.estimate
        return max(0.0, self.at(2) - one - self.slope) if one else 0.0


class Retry:
    """Says when a silent drafter should be tried again. Each wait is twice as long as the last."""

    def __init__(self) -> None:
        self._num_silent, self._patience = 0, PATIENCE

    @property
    def is_due(self) -> bool:
        return self._num_silent >= self._patience

    def see(self, was_asked: bool, is_trial: bool) -> None:
        """Count a cycle. If the drafter was used in earnest, not for a trial, waits begin anew."""
        if was_asked and self.is_due:
            self._patience *= 2
        elif was_asked and not is_trial:
            self._patience = PATIENCE
        self._num_silent = 0 if was_asked else self._num_silent + 1


@dataclass
class Cycle:
    """Who proposed how many tokens in a cycle, and how long it took."""

    num_proposed: int = 0  # by the model first, and then by the lookup
    matched: int = 0  # tokens that a lookup found again at the start, whoever then proposes
    lookup_from: int = 0  # the position of the first proposal that is a lookup's
    lookup_matched: int = 0  # tokens that the lookup found again there; 0 if it proposes nothing
    confidences: Sequence[float] = ()  # the model's largest probabilities; the last may be absent
    draft_calls: int = 0
    draft_seconds: float = 0.0  # in these calls
    seconds: float = 0.0  # of the whole cycle

    @property
    def target_seconds(self) -> float:
        return self.seconds - self.draft_seconds


@dataclass
class Times:
    """Estimates of time, which hold for as long as the machine stays as it is."""

    # Tokens per second, by how many tokens a lookup found again.
    pace: dict[int, FadingRate] = field(default_factory=lambda: defaultdict(FadingRate))
    draft_call: FadingRate = field(default_factory=FadingRate)  # seconds per call
    target_call: CallSeconds = field(default_factory=CallSeconds)
    model_seconds: FadingRate = field(default_factory=FadingRate)  # per cycle with the model
    num_model_cycles: int = 0
    seconds_without_model: float = 0.0
    seconds_without_lookup: float = 0.0
    model_retry: Retry = field(default_factory=Retry)
    rows_retry: Retry = field(default_factory=Retry)  # for calls with more than two rows
    was_slow: bool = False  # whether the cycle before was slow
    num_quick: int = 0  # quick cycles in a row


class Experience:
    """The knowledge that a run has gained from its cycles so far.

    In all methods, `matched` counts the tokens that a lookup found again at the cycle's start.
    """

    def __init__(self, times: Times | None = None) -> None:
        self.times = times or Times()
        self.model_cycle = FadingRate()  # tokens per cycle in which the model drafted
        self.tail = FadingRate()  # what lookups add behind the model's tokens, per such token
        self.model = AcceptanceRate()
        self.by_confidence: dict[int, AcceptanceRate] = defaultdict(AcceptanceRate)
        self.lookup: dict[int, AcceptanceRate] = defaultdict(AcceptanceRate)  # by `matched`
        # By `matched`, and by the position behind these tokens.
        self.by_position: dict[tuple[int, int], AcceptanceRate] = defaultdict(AcceptanceRate)

    def learn(self, cycle: Cycle, num_accepted: int) -> None:
        """Learn from a cycle that is over."""
        if self._is_news(cycle):
            self.times = Times()
        if not self._has_stalled(cycle):
            self._learn_times(cycle, num_accepted)
        verdicts = [True] * num_accepted + [False] * (num_accepted < cycle.num_proposed)
        for confidence, is_accepted in zip(cycle.confidences, verdicts):
            self.by_confidence[_bin(confidence)].see(is_accepted)
            self.model.see(is_accepted)
        lookup_verdicts = verdicts[cycle.lookup_from :] if cycle.lookup_matched else []
        for position, is_accepted in enumerate(lookup_verdicts):
            self.lookup[cycle.lookup_matched].see(is_accepted)
            self.by_position[cycle.lookup_matched, position].see(is_accepted)
        if cycle.draft_calls:
            self.model_cycle.see(num_accepted + 1, 1)
            self.tail.see(sum(lookup_verdicts), cycle.draft_calls)
        self._count(cycle)

    def _count(self, cycle: Cycle) -> None:
        """Count for how long each drafter has been silent."""
        times, has_drafted = self.times, cycle.draft_calls > 0
        is_trial = self.is_model_due or times.rows_retry.is_due
        times.num_model_cycles += has_drafted
        times.seconds_without_model += cycle.seconds
        times.seconds_without_lookup += cycle.seconds
        if has_drafted:
            times.seconds_without_model = 0.0
        if cycle.lookup_matched:
            times.seconds_without_lookup = 0.0
        has_rows = cycle.num_proposed > (0 if times.rows_retry.is_due else 1)
        times.model_retry.see(has_drafted, is_trial)
        times.rows_retry.see(has_rows, is_trial)

    def _expected(self, cycle: Cycle) -> tuple[float, float]:
        """Predict the seconds of a cycle's target call and of its draft calls."""
        draft_seconds = self.times.draft_call.estimate * cycle.draft_calls
        return self.times.target_call.at(cycle.num_proposed + 1), draft_seconds

    def _is_news(self, cycle: Cycle) -> bool:
        """Say whether a cycle shows that the machine is faster than the estimates say.

        A call larger than all before is no evidence, because its expectation is a guess.
        """
        times = self.times
        target_seconds, draft_seconds = self._expected(cycle)
        if cycle.num_proposed + 1 > times.target_call.most_rows:
            target_seconds = 0.0
        # The fitted line may lie below all observed times.
        target_seconds = max(target_seconds, times.target_call.least_seconds)
        is_fast = STALL * cycle.target_seconds < target_seconds
        if is_fast or STALL * cycle.draft_seconds < draft_seconds:
            return True
        if target_seconds:
            is_quick = QUICK * cycle.target_seconds < target_seconds
            times.num_quick = times.num_quick + 1 if is_quick else 0
        return times.num_quick >= QUICK_CYCLES

    def _has_stalled(self, cycle: Cycle) -> bool:
        """Say whether the machine paused in a cycle. Two slow cycles in a row are no pause."""
        target_seconds, draft_seconds = self._expected(cycle)
        is_slow = (
            cycle.target_seconds > STALL * target_seconds > 0
            or cycle.draft_seconds > STALL * draft_seconds > 0
        )
        was_slow, self.times.was_slow = self.times.was_slow, is_slow
        return is_slow and not was_slow

    def _learn_times(self, cycle: Cycle, num_accepted: int) -> None:
        times = self.times
        times.pace[cycle.matched].see(num_accepted + 1, cycle.seconds)
        times.target_call.see(cycle.num_proposed + 1, cycle.target_seconds)
        if cycle.draft_calls:
            times.draft_call.see(cycle.draft_seconds, cycle.draft_calls)
            times.model_seconds.see(cycle.seconds, 1)

    @property
    def is_model_due(self) -> bool:
        """True if the model should draft at any cost, so that its cost becomes known."""
        times = self.times
        if times.num_model_cycles < TRIALS or times.model_retry.is_due:
            return True
        return CURIOSITY * times.seconds_without_model > times.model_seconds.estimate

    @property
    def _seconds_per_row(self) -> float:
        """Return the seconds of a row after the second, or 0 if they should be measured again."""
        times = self.times
        return 0.0 if times.rows_retry.is_due else times.target_call.slope

    def chance(self, confidence: float) -> float:
        """Estimate the chance that a token is accepted, from the draft's confidence in it."""
        index = _bin(confidence)
        return self.by_confidence[index].estimate((index + 0.5) / NUM_BINS)

    def one_more_pays(self, chance_so_far: float, matched: int = 0) -> bool:
        """Say whether the model should draft one more token.

        `chance_so_far` is the chance that all tokens before it are accepted.
        """
        return self._gain(chance_so_far, matched) > 0

    def turn_pays(self, most: int, matched: int = 0) -> bool:
        """Say whether the model should draft at all, up to `most` tokens.

        The target call then has several rows.
        """
        times = self.times
        if times.target_call.num_of_one < TRIALS:  # one row's price is not known yet
            return False
        chance, gains = 1.0, 0.0
        for _ in range(most):
            gain = self._gain(chance, matched)
            if gain <= 0:
                break
            gains += gain
            chance *= self.model.estimate(MODEL_PRIOR)
        step = 0.0 if times.rows_retry.is_due else times.target_call.step
        return gains > times.pace[matched].estimate * step

    def _gain(self, chance_so_far: float, matched: int) -> float:
        """Estimate what one more token of the model adds, in tokens."""
        expected = chance_so_far * (self.model.estimate(MODEL_PRIOR) + self.tail.estimate)
        cost = self.times.draft_call.estimate + self._seconds_per_row
        return expected - self.times.pace[matched].estimate * cost

    def lookup_plan(self, matched: int, most: int, chance: float = 1.0) -> tuple[int, float]:
        """Plan how many tokens a lookup proposes; also return how many it expects accepted.

        The lookup may propose up to `most` tokens. `chance` is the chance that all drafted tokens
        before them are accepted. If there are no such tokens, the chance is 1, and the lookup
        proposes at least one token.
        """
        cost = self.times.pace[matched].estimate * self._seconds_per_row
        usual = self.lookup[matched].estimate(LOOKUP_PRIOR)
        is_first, expected = chance == 1.0, 0.0
        for position in range(most):
            chance *= self.by_position[matched, position].estimate(usual)
            if chance <= cost and not (is_first and position == 0):
                return position, expected
            expected += chance
        return most, expected

    def prefers_model(self, matched: int, num_proposed: int, expected: float) -> bool:
        """Say whether the model's turn is worth more than a lookup.

        The lookup would propose `num_proposed` tokens, of which `expected` would be accepted.
        """
        if self.is_model_due:
            return True
        times = self.times
        lookup_seconds = times.target_call.at(num_proposed + 1)
        is_lookup_due = CURIOSITY * times.seconds_without_lookup > lookup_seconds
        if is_lookup_due or not times.model_seconds.estimate:
            return False
        pace = times.pace[matched].estimate
        lookup_gain = 1 + expected - pace * lookup_seconds
        model_gain = self.model_cycle.estimate - pace * times.model_seconds.estimate
        return model_gain > lookup_gain


def _bin(confidence: float) -> int:
    return min(int(confidence * NUM_BINS), NUM_BINS - 1)
