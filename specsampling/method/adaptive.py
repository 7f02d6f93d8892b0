"""How many tokens to draft, and by whom, found out while decoding: `speculation.k: auto`.

A model drafts until a lookup finds what it has drafted, and the lookup goes on from there.
Every choice is made to raise expected tokens per second, from running estimates over all texts of
a run: how often a model's proposals are accepted, by the confidence with which they were made; how
often a lookup's are, by its n-gram's length and their position; and how long calls take. With r the
tokens per second so far, one more drafted token pays if the chance that it is accepted, and all
before it, exceeds r times what it costs (Dinkelbach 1967: the best ratio is where the gain is 0).
There is an r for each length of a lookup's match, and one for none: a text is as long as it is, so
time that is lost where the model must draft cannot be made up where lookups are fast.

Exact all the same: a token is proposed or not, and by whom, before it is drawn. What decides are
the tokens before it, accepted or drafted, past verdicts, clocks, and the draft's distributions up
to the token before, never the token itself: a rule that dropped tokens for being unlikely would
change the distribution that the verifier is told. Sampled texts depend on the clock in this way, as
to which they are; not their distribution.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from specsampling.method.distribution import Distribution
from specsampling.method.drafts import (
    CompositeDraft,
    Draft,
    DraftTerms,
    ModelDraft,
    ModelProposer,
    NgramDraft,
    NgramProposer,
)

MEMORY = 0.99  # of the estimates of times and yields, per cycle: the last hundred or so count
NUM_BINS = 20  # of the draft's confidence
PRIOR = 4.0  # verdicts that a prior counts for
LOOKUP_PRIOR = 0.8  # so that they are tried
MODEL_PRIOR = 0.7  # of a token for which no confidence is known yet; else it is that
CURIOSITY = 0.02  # of the time, for asking again the one who has not been asked for long
TRIALS = 2  # cycles with the model, and with nobody, before it is judged: one may meet a pause
STALL = 3.0  # times as long as expected: the machine paused, unless it is so twice in a row


class Share:
    """How often something came true."""

    def __init__(self) -> None:
        self._hits = self._trials = 0

    def see(self, hit: bool) -> None:
        self._hits += hit
        self._trials += 1

    def estimate(self, prior: float) -> float:
        """The probability, by a prior and what was seen."""
        return (self._hits + PRIOR * prior) / (self._trials + PRIOR)


class Ratio:
    """Something per something else, old terms fading; 0 before anything was seen."""

    def __init__(self) -> None:
        self._upper = self._lower = 0.0

    def see(self, upper: float, lower: float) -> None:
        self._upper = MEMORY * self._upper + upper
        self._lower = MEMORY * self._lower + lower

    @property
    def estimate(self) -> float:
        return self._upper / self._lower if self._lower else 0.0


class Line:
    """A fading least-squares line, never falling; 0 before anything was seen."""

    def __init__(self) -> None:
        self._sums = [0.0] * 5  # of 1, x, y, xx, xy

    def see(self, x: float, y: float) -> None:
        terms = (1.0, x, y, x * x, x * y)
        self._sums = [MEMORY * old + new for old, new in zip(self._sums, terms)]

    @property
    def slope(self) -> float:
        n, x, y, xx, xy = self._sums
        spread = n * xx - x * x
        return max(0.0, (n * xy - x * y) / spread) if spread > 1e-6 * n * n else 0.0

    def at(self, x: float) -> float:
        n, mean_x, mean_y = self._sums[0], self._sums[1], self._sums[2]
        return (mean_y + self.slope * (n * x - mean_x)) / n if n else 0.0


class CallSeconds:
    """Of a target call over its rows: one row's, for which other kernels run, and a line for more.

    One line through all would see the step between them as the price of every row.
    """

    def __init__(self) -> None:
        self._one, self._more = Ratio(), Line()
        self.num_of_one = 0

    def see(self, rows: int, seconds: float) -> None:
        if rows == 1:
            self._one.see(seconds, 1)
            self.num_of_one += 1
        else:
            self._more.see(rows, seconds)

    def at(self, rows: int) -> float:
        """0 where nothing like it was seen."""
        one, more = self._one.estimate, self._more.at(rows)
        if rows == 1:
            return one or more
        return max(one, more) if more else 0.0

    @property
    def slope(self) -> float:
        """Of a row behind the second."""
        return self._more.slope

    @property
    def step(self) -> float:
        """What the second row takes beyond that."""
        one = self._one.estimate
        return max(0.0, self.at(2) - one - self.slope) if one else 0.0


@dataclass
class Cycle:
    """Who proposed how many tokens in a cycle, and what it took.

    Attributes:
        num_proposed: tokens, the model's before a lookup's.
        matched: tokens that a lookup found again at first, whoever then proposes; 0 for none.
        lookup_from: of the proposals, the first that is a lookup's.
        lookup_matched: tokens that it found again there; 0 if it proposes none.
        confidences: the model's largest probability at each of its tokens but perhaps the last.
        draft_calls: of the model.
        draft_seconds: in them.
        seconds: of the whole cycle.
    """

    num_proposed: int = 0
    matched: int = 0
    lookup_from: int = 0
    lookup_matched: int = 0
    confidences: Sequence[float] = ()
    draft_calls: int = 0
    draft_seconds: float = 0.0
    seconds: float = 0.0


@dataclass
class Experience:
    """What a run has seen of its cycles so far."""

    # Tokens per second, by how many tokens a lookup found again.
    pace: dict[int, Ratio] = field(default_factory=lambda: defaultdict(Ratio))
    draft_call: Ratio = field(default_factory=Ratio)  # seconds per call
    target_call: CallSeconds = field(default_factory=CallSeconds)
    model_cycle: Ratio = field(default_factory=Ratio)  # tokens per cycle in which the model drafted
    model_seconds: Ratio = field(default_factory=Ratio)  # seconds per such cycle
    # What lookups add behind the model's tokens, per token of its.
    tail: Ratio = field(default_factory=Ratio)
    model: Share = field(default_factory=Share)
    by_confidence: dict[int, Share] = field(default_factory=lambda: defaultdict(Share))
    # By how many tokens were found again; and by the position behind them, too.
    lookup: dict[int, Share] = field(default_factory=lambda: defaultdict(Share))
    by_position: dict[tuple[int, int], Share] = field(default_factory=lambda: defaultdict(Share))
    num_model_cycles: int = 0
    seconds_without_model: float = 0.0
    seconds_without_lookup: float = 0.0
    was_slow: bool = False  # the cycle before

    def learn(self, cycle: Cycle, num_accepted: int) -> None:
        """From a cycle that is over."""
        if not self._has_stalled(cycle):
            self._learn_times(cycle, num_accepted)
        verdicts = [True] * num_accepted + [False] * (num_accepted < cycle.num_proposed)
        for confidence, is_accepted in zip(cycle.confidences, verdicts):
            self.by_confidence[_bin(confidence)].see(is_accepted)
            self.model.see(is_accepted)
        of_lookup = verdicts[cycle.lookup_from :] if cycle.lookup_matched else []
        for position, is_accepted in enumerate(of_lookup):
            self.lookup[cycle.lookup_matched].see(is_accepted)
            self.by_position[cycle.lookup_matched, position].see(is_accepted)
        if cycle.draft_calls:
            self.tail.see(sum(of_lookup), cycle.draft_calls)
        self.num_model_cycles += cycle.draft_calls > 0
        self.seconds_without_model += cycle.seconds
        self.seconds_without_lookup += cycle.seconds
        if cycle.draft_calls:
            self.seconds_without_model = 0.0
        if cycle.lookup_matched:
            self.seconds_without_lookup = 0.0

    def _has_stalled(self, cycle: Cycle) -> bool:
        """Whether the machine paused in a cycle; one pause would silence the model for long."""
        target_seconds = self.target_call.at(cycle.num_proposed + 1)
        draft_seconds = self.draft_call.estimate * cycle.draft_calls
        is_slow = (
            cycle.seconds - cycle.draft_seconds > STALL * target_seconds > 0
            or cycle.draft_seconds > STALL * draft_seconds > 0
        )
        was_slow, self.was_slow = self.was_slow, is_slow
        return is_slow and not was_slow

    def _learn_times(self, cycle: Cycle, num_accepted: int) -> None:
        self.pace[cycle.matched].see(num_accepted + 1, cycle.seconds)
        self.target_call.see(cycle.num_proposed + 1, cycle.seconds - cycle.draft_seconds)
        if not cycle.draft_calls:
            return
        if STALL * cycle.draft_seconds < self.draft_call.estimate * cycle.draft_calls:
            self.draft_call, self.model_seconds = Ratio(), Ratio()  # those were of a pause
        self.draft_call.see(cycle.draft_seconds, cycle.draft_calls)
        self.model_cycle.see(num_accepted + 1, 1)
        self.model_seconds.see(cycle.seconds, 1)

    @property
    def is_model_due(self) -> bool:
        """Whether it has not been asked for so long that a cycle of it hardly costs anything."""
        is_new = self.num_model_cycles < TRIALS
        return is_new or CURIOSITY * self.seconds_without_model > self.model_seconds.estimate

    def chance(self, confidence: float) -> float:
        """That a token is accepted which was drawn where the draft was so sure of one."""
        index = _bin(confidence)
        return self.by_confidence[index].estimate((index + 0.5) / NUM_BINS)

    def one_more_pays(self, chance_so_far: float, matched: int = 0) -> bool:
        """Whether the model should draft a token behind some that are accepted with a chance.

        Where a lookup found `matched` tokens again.
        """
        return self._gain(chance_so_far, matched) > 0

    def turn_pays(self, most: int, matched: int = 0) -> bool:
        """Whether the model should draft at all, at most so many: a call of more rows than one."""
        if self.target_call.num_of_one < TRIALS:  # who always drafts never learns what it takes
            return False
        chance, gains = 1.0, 0.0
        for _ in range(most):
            gain = self._gain(chance, matched)
            if gain <= 0:
                break
            gains += gain
            chance *= self.model.estimate(MODEL_PRIOR)
        return gains > self.pace[matched].estimate * self.target_call.step

    def _gain(self, chance_so_far: float, matched: int) -> float:
        """Of one more token of the model's, in tokens."""
        expected = chance_so_far * (self.model.estimate(MODEL_PRIOR) + self.tail.estimate)
        cost = self.draft_call.estimate + self.target_call.slope
        return expected - self.pace[matched].estimate * cost

    def lookup_plan(self, matched: int, most: int, chance: float = 1.0) -> tuple[int, float]:
        """How many tokens behind a match of so many to propose, and how many would be accepted.

        Behind tokens that are accepted with a chance; one at least where there are none.
        """
        cost = self.pace[matched].estimate * self.target_call.slope
        usual = self.lookup[matched].estimate(LOOKUP_PRIOR)
        is_first, expected = chance == 1.0, 0.0
        for position in range(most):
            chance *= self.by_position[matched, position].estimate(usual)
            if chance <= cost and not (is_first and position == 0):
                return position, expected
            expected += chance
        return most, expected

    def prefers_model(self, matched: int, num_proposed: int, expected: float) -> bool:
        """Whether the model's turn is worth more than a lookup of so many tokens."""
        lookup_seconds = self.target_call.at(num_proposed + 1)
        if self.is_model_due:
            return True
        is_lookup_due = CURIOSITY * self.seconds_without_lookup > lookup_seconds
        if is_lookup_due or not self.model_seconds.estimate:
            return False
        pace = self.pace[matched].estimate
        lookup_gain = 1 + expected - pace * lookup_seconds
        model_gain = self.model_cycle.estimate - pace * self.model_seconds.estimate
        return model_gain > lookup_gain


def _bin(confidence: float) -> int:
    return min(int(confidence * NUM_BINS), NUM_BINS - 1)


@dataclass(frozen=True)
class AdaptiveDraft:
    """A lookup, a model, or both, asked as experience says."""

    lookup: NgramDraft | None
    model: ModelDraft | None
    experience: Experience = field(default_factory=Experience, compare=False)

    @classmethod
    def of(cls, draft: Draft) -> AdaptiveDraft:
        """The same lookup and model as a draft of fixed numbers."""
        if isinstance(draft, NgramDraft):
            return cls(draft, None)
        if isinstance(draft, CompositeDraft):
            return cls(draft.lookup, replace(draft.model, max_k=None))
        assert isinstance(draft, ModelDraft)
        return cls(None, replace(draft, max_k=None))

    def start(self, terms: DraftTerms) -> AdaptiveProposer:
        return AdaptiveProposer(self, terms)


class Turn:
    """Whose turn it is to propose the next token of a cycle.

    An object of its own: proposers that knew each other would keep their caches for too long.
    """

    def __init__(self, lookup: NgramProposer | None, has_model: bool, experience: Experience):
        self._lookup, self._has_model, self._experience = lookup, has_model, experience
        self.longest = 0  # what the text may grow to in this cycle

    def is_lookups(self, sequence: Sequence[int]) -> bool:
        """Whether a lookup should go on from here, and not the model."""
        matched = self._lookup.find(sequence)[0] if self._lookup else 0
        num, expected = self._experience.lookup_plan(matched, self.longest - len(sequence))
        if not (matched and num):
            return False
        return not (self._has_model and self._experience.prefers_model(matched, num, expected))


class AdaptiveProposer:
    """The model drafts until a lookup is worth more, or nothing; then a lookup goes on from there.

    Who proposes a token, if anyone does, depends on the tokens before it alone.
    """

    def __init__(self, draft: AdaptiveDraft, terms: DraftTerms):
        self._experience = draft.experience
        self._lookup = draft.lookup.start(terms) if draft.lookup else None
        model = draft.model
        turn = self._turn = Turn(self._lookup, model is not None, draft.experience)
        self._model = CarefulProposer(model, terms, draft.experience, turn) if model else None
        self._cycle: Cycle | None = None  # the one under way

    @property
    def num_calls(self) -> int:
        return self._model.num_calls if self._model else 0

    @property
    def forward_seconds(self) -> float:
        return self._model.forward_seconds if self._model else 0.0

    def prefill(self, tokens: Sequence[int]) -> None:
        for proposer in (self._lookup, self._model):
            if proposer:
                proposer.prefill(tokens)

    def propose(self, tokens: Sequence[int], k: int) -> tuple[list[int], list[Distribution]]:
        cycle = self._cycle = Cycle()
        self._started, self._num_tokens = time.perf_counter(), len(tokens)
        self._turn.longest = len(tokens) + k
        if self._lookup:
            self._lookup.prefill(tokens)
            cycle.matched = self._lookup.find(tokens)[0]
        is_lookups = self._turn.is_lookups(tokens)
        proposed: list[int] = []
        draft_probs: list[Distribution] = []
        chance = 1.0
        if self._model and not is_lookups:
            calls, seconds = self._model.num_calls, self._model.forward_seconds
            self._model.matched = cycle.matched
            proposed, draft_probs = self._model.propose(tokens, k)
            chance = self._model.chance
            cycle.draft_calls = self._model.num_calls - calls
            cycle.draft_seconds = self._model.forward_seconds - seconds
            cycle.confidences = self._model.confidences
        cycle.lookup_from = len(proposed)
        if self._lookup and (proposed or is_lookups):
            sequence = [*tokens, *proposed]
            matched = self._lookup.find(sequence)[0]
            num, _ = self._experience.lookup_plan(matched, k - len(proposed), chance)
            more, more_probs = self._lookup.go_on(sequence, num)
            cycle.lookup_matched = matched if more else 0
            proposed, draft_probs = proposed + more, draft_probs + more_probs
        cycle.num_proposed = len(proposed)
        return proposed, draft_probs

    def rollback(self, length: int) -> None:
        for proposer in (self._lookup, self._model):
            if proposer:
                proposer.rollback(length)
        if self._cycle:
            self._cycle.seconds = time.perf_counter() - self._started
            # Less than were accepted, where the text ended before them.
            num_accepted = max(0, min(length - self._num_tokens, self._cycle.num_proposed))
            self._experience.learn(self._cycle, num_accepted)
            self._cycle = None


class CarefulProposer(ModelProposer):
    """Drafts as long as one more token pays, and it is not for a lookup to propose it."""

    def __init__(self, draft: ModelDraft, terms: DraftTerms, experience: Experience, turn: Turn):
        super().__init__(draft, terms)
        self._experience, self._turn = experience, turn
        self.matched = 0  # tokens that a lookup found again before this cycle
        self.confidences: list[float] = []  # of this cycle's proposals
        self.chance = 1.0  # that all of them are accepted

    def propose(self, tokens: Sequence[int], k: int) -> tuple[list[int], list[Distribution]]:
        self.confidences, self.chance = [], 1.0
        pays = self._experience.is_model_due or self._experience.turn_pays(k, self.matched)
        return super().propose(tokens, k if pays else 0)

    def _goes_on(self, sequence: Sequence[int], logits: Tensor) -> bool:
        confidence = float(logits.float().softmax(-1).amax())
        self.confidences.append(confidence)
        self.chance *= self._experience.chance(confidence)
        pays = self._experience.one_more_pays(self.chance, self.matched)
        return pays and not self._turn.is_lookups(sequence)
