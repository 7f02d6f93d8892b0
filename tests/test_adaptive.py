"""k: auto. As exact as any number of drafted tokens, and soon about as fast as the best of them."""

import gc
import random
import weakref
from dataclasses import dataclass
from operator import attrgetter

import pytest
import torch
from test_sampled_decoding import FALSE_ALARM, p_value
from test_sampled_decoding import pair as pair  # a fixture

from autoregressive import autoregressive
from specsampling.method.adaptive import AdaptiveDraft
from specsampling.method.drafts import CompositeDraft, DraftTerms, ModelDraft, NgramDraft
from specsampling.method.experience import CallSeconds, Cycle, Experience, SecondsByRows, Times
from specsampling.method.sampling import Sampling
from speculative import speculative

PROMPT = [1, 4, 2, 1, 4]


KINDS = ("lookup", "model", "both")


def draft_of(kind: str, model) -> AdaptiveDraft:
    lookup = NgramDraft(3, 1)
    either = {"lookup": lookup, "model": ModelDraft(model, max_k=2)}
    return AdaptiveDraft.of(either.get(kind) or CompositeDraft(lookup, ModelDraft(model)))


@pytest.mark.parametrize("width", [None, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_texts_are_the_targets_own(model_of, kind, width):
    target, draft = model_of("llama"), draft_of(kind, model_of("llama", 1))
    for prompt in (PROMPT, [3], list(range(30))):
        expected = autoregressive(target, prompt, max_new_tokens=60, width=width)
        for _ in range(3):  # with more experience each time
            done = speculative(target, draft, prompt, k=7, max_new_tokens=60, width=width)
            assert done.token_ids == expected.token_ids
    assert any(pace.estimate > 0 for pace in draft.experience.times.pace.values())


@pytest.mark.parametrize("kind", KINDS)
def test_sampled_texts_have_the_targets_distribution(pair, kind):
    target, model = pair
    assert p_value(target, draft_of(kind, model), None) > FALSE_ALARM


def best_fixed(alpha: float, draft: float, slope: float, most: int, step: float = 0.0) -> float:
    """Tokens per second of the best K, a target call of one row taking one second."""
    return max(
        sum(alpha**i for i in range(k + 1)) / (1 + k * (draft + slope) + step * (k > 0))
        for k in range(most + 1)
    )


def decode(alphas, draft, slope=0.0, *, step=0.0, most=7) -> float:
    """Tokens per second of a simulated model draft whose confidence is the chance of acceptance."""
    seen, chance = Experience(), random.Random(0)
    tokens = seconds = 0.0
    for turn in range(4000):
        confidences, so_far = [], 1.0
        starts = seen.is_model_due or seen.turn_pays(most)
        while len(confidences) < most * starts:
            confidences.append(chance.choice(alphas))
            so_far *= seen.chance(confidences[-1])
            if not seen.one_more_pays(so_far):
                break
        num = len(confidences)
        rejected = (i for i, alpha in enumerate(confidences) if chance.random() >= alpha)
        accepted = next(rejected, num)
        cycle = Cycle(num, confidences=confidences, draft_calls=num, draft_seconds=draft * num)
        cycle.seconds = 1 + slope * num + step * (num > 0) + draft * num
        seen.learn(cycle, accepted)
        if turn >= 300:
            tokens, seconds = tokens + accepted + 1, seconds + cycle.seconds
    return tokens / seconds


def lookups(matched, accepted, num_proposed=7, seconds=1.0):
    return Cycle(num_proposed, matched, lookup_matched=matched, seconds=seconds), accepted


def with_model(num, draft_seconds, seconds, confidence=0.9, matched=0):
    """A cycle of the model's tokens, with the number that was accepted: all."""
    timed = {"draft_seconds": draft_seconds, "seconds": seconds, "draft_calls": num}
    return Cycle(num, matched, confidences=[confidence] * num, **timed), num


@pytest.mark.parametrize(
    ("alpha", "draft", "slope", "step"),
    [
        *((a, draft, 0, 0) for a in (0.3, 0.5, 0.7, 0.9, 0.98) for draft in (0.05, 0.2, 0.5)),
        (0.8, 0.05, 0.15, 0),  # rows cost something
        # One line through calls of all sizes took the second row's step for every row's.
        *((a, 0.05, 0.03, step) for a in (0.3, 0.6, 0.8, 0.9) for step in (0.3, 1.0)),
    ],
)
def test_it_reaches_97_percent_of_the_best_fixed_k(alpha, draft, slope, step):
    best = best_fixed(alpha, draft, slope, 7, step)
    assert decode([alpha], draft, slope, step=step) > 0.97 * best


def test_a_lookup_is_not_cut_for_the_second_rows_price():
    """Behind short ones each row seemed to cost half of the step, so that they stayed short."""
    seen = Experience()
    for turn in range(100):
        seen.learn(Cycle(0, seconds=1.0), 0)
        num = 2 if turn == 0 else seen.lookup_plan(5, 15)[0]
        seen.learn(*lookups(5, num * (turn % 2), num_proposed=num, seconds=2 + 0.01 * num))
    assert seen.lookup_plan(5, 15)[0] == 15


def test_where_confidence_varies_it_beats_every_fixed_k_and_may_fall_silent():
    mixed = [0.99, 0.99, 0.99, 0.2]
    assert decode(mixed, 0.2) > 1.05 * best_fixed(sum(mixed) / 4, 0.2, 0.0, 7)
    assert decode([0.1], 0.5) > 0.97


def test_a_machine_that_stays_slow_is_believed():
    seen = Experience()
    for seconds in [1.0] * 50 + [5.0] * 150:
        cycle = Cycle(2, confidences=[0.9], draft_calls=2, draft_seconds=0.2, seconds=seconds)
        seen.learn(cycle, 2)
    assert seen.times.target_call.at(3) > 3.5
    assert seen.times.pace[0].estimate < 3 / 3.5


def test_the_model_drafts_where_it_pays_however_fast_lookups_are_elsewhere():
    """One pace for a whole run silenced it on code, as if its time could be spent on lookups."""
    seen = Experience()
    for _ in range(100):
        seen.learn(*lookups(5, accepted=15, num_proposed=15))
        seen.learn(*with_model(4, 1.2, 2.2))
    assert seen.one_more_pays(0.9) and not seen.one_more_pays(0.9, matched=5)


def test_a_lookup_that_is_seldom_right_leaves_the_turn_to_the_model():
    seen = Experience()
    for _ in range(60):
        seen.learn(*lookups(1, accepted=0))
        seen.learn(*lookups(3, accepted=6))
        seen.learn(*with_model(4, 0.4, 1.4))
    assert seen.prefers_model(1, *seen.lookup_plan(1, 7))
    assert not seen.prefers_model(3, *seen.lookup_plan(3, 7))
    for _ in range(40):  # nobody is forgotten
        seen.learn(*with_model(4, 0.4, 1.4))
    assert not seen.prefers_model(1, *seen.lookup_plan(1, 7))


def test_lookups_are_tried_beside_a_model_that_is_always_right():
    """They were not for 40 cycles of 11 tokens each: on code, that was a whole run without them."""
    seen = Experience()
    model = Cycle(14, 3, confidences=[0.99] * 13, draft_calls=14, draft_seconds=0.45, seconds=0.57)
    num_with_model = 0
    for _ in range(30):
        num, expected = seen.lookup_plan(3, 15)
        if seen.prefers_model(3, num, expected):
            num_with_model += 1
            seen.learn(model, 14)
        else:
            seen.learn(*lookups(3, num, num_proposed=num, seconds=0.12))
    assert 1 <= num_with_model <= 3


def test_lookups_that_are_always_wrong_are_soon_left():
    seen, num_lookups = Experience(), 0
    for _ in range(300):
        is_model = seen.prefers_model(2, *seen.lookup_plan(2, 7))
        model = with_model(4, 0.02, 0.05, matched=2)
        seen.learn(*(model if is_model else lookups(2, 0, seconds=0.03)))
        num_lookups += not is_model
    assert 0.03 * num_lookups < 0.05 * 300 * 0.05


def test_a_lookup_is_cut_where_rows_cost_more_than_they_bring():
    seen = Experience()
    for turn in range(60):
        rows = 1 + turn % 7
        accepted = min(1, rows)
        seen.learn(*lookups(2, accepted, num_proposed=rows, seconds=1 + 0.1 * rows))
    assert seen.times.target_call.slope == pytest.approx(0.1, abs=0.01)
    num, expected = seen.lookup_plan(2, 7)
    assert 1 <= num <= 3 and 0.5 < expected < 2


def terms_of(model) -> DraftTerms:
    return DraftTerms.of(model, 60, Sampling(), None)


def test_a_lookup_goes_on_from_what_the_model_has_drafted(model_of, monkeypatch):
    """The model drafted all of a text that it repeated, though after 3 tokens a lookup had it."""
    model = model_of("llama")
    terms = terms_of(model)
    drafted = iter([4, 2, 6])
    monkeypatch.setattr("specsampling.method.drafts.sample", lambda probs, *_: next(drafted))
    tokens = [1, 4, 2, 9, 8, 5, 1]
    proposer = AdaptiveDraft.of(CompositeDraft(NgramDraft(3, 3), ModelDraft(model))).start(terms)
    times = proposer._experience.times
    times.num_model_cycles = times.target_call.num_of_one = 2
    proposer.prefill(tokens[:-1])
    proposed, draft_probs = proposer.propose(tokens, 7)
    assert proposed == [4, 2, 9, 8, 5, 1, 4] and proposer.num_calls == 2
    assert len(draft_probs) == 7
    assert [of.probs for of in draft_probs[2:]] == [{token: 1.0} for token in proposed[2:]]
    proposer.rollback(len(tokens) + 4)
    seen = proposer._experience
    assert seen.tail.estimate == pytest.approx(2 / 2)
    assert [seen.by_position[3, i].estimate(0.5) for i in (0, 2)] == [pytest.approx(0.6), 0.4]


def test_a_proposer_and_its_cache_are_let_go_of_with_their_text(model_of):
    """Proposers that knew each other kept a batch's places, until the garbage collector ran."""
    model = model_of("llama")
    draft = AdaptiveDraft.of(CompositeDraft(NgramDraft(3, 1), ModelDraft(model)))
    gc.disable()
    try:
        proposer = draft.start(terms_of(model))
        proposer.prefill(PROMPT[:-1])
        proposer.propose(PROMPT, 4)
        session = weakref.ref(proposer._model._session)
        del proposer
        assert session() is None
    finally:
        gc.enable()


def test_a_token_is_worth_what_lookups_add_behind_it():
    """Where they added much, the model was silent: all of it counted as pace, none as its own."""
    seen = Experience()
    cycle = Cycle(15, 0, 3, 3, confidences=[0.9] * 3, draft_calls=3, draft_seconds=0.6, seconds=1.6)
    for _ in range(20):
        seen.learn(cycle, 15)
    assert seen.tail.estimate == pytest.approx(4)
    assert seen.times.pace[0].estimate * seen.times.draft_call.estimate > 1
    assert seen.one_more_pays(1.0)


def test_what_a_lookup_may_propose_is_found_out_over_all_positions():
    """Each position had to prove itself alone: lookups that were never wrong stayed short."""
    seen = Experience()
    for num in (2, 8):  # rows cost something
        seen.learn(*lookups(5, num, num_proposed=num, seconds=1 + 0.04 * num))
    for _ in range(4):
        num, _ = seen.lookup_plan(5, 15)
        seen.learn(*lookups(5, num, num_proposed=num, seconds=1 + 0.04 * num))
    assert seen.lookup_plan(5, 15)[0] == 15


def test_a_line_through_equal_times_is_level_and_never_falls():
    line = SecondsByRows()
    for x, y in ((1, 5.0), (8, 5.0), (3, 5.0)):
        line.see(x, y)
    assert line.slope == pytest.approx(0, abs=1e-9) and line.at(4) == pytest.approx(5)
    for _ in range(50):
        line.see(1, 6.0)
        line.see(8, 4.0)
    assert line.slope == 0


def test_calls_of_a_size_that_was_not_seen_are_not_guessed_from_one_row():
    """Seen from one row, every call of a machine on which eight take four times as long stalled."""
    calls = CallSeconds()
    assert calls.at(1) == calls.at(8) == calls.step == calls.slope == 0
    calls.see(1, 1.0)
    assert calls.at(1) == 1 and calls.at(8) == calls.step == 0
    calls.see(8, 4.0)
    assert calls.at(8) == 4 and calls.step == pytest.approx(3)
    calls.see(2, 2.8)
    assert calls.slope == pytest.approx(0.2, abs=0.01) and calls.step == pytest.approx(1.6, abs=0.1)


def test_a_draft_that_is_cut_to_two_tokens_is_free_again():
    model = torch.nn.Linear(1, 1)
    assert AdaptiveDraft.of(ModelDraft(model, max_k=2)).model.max_k is None


@dataclass
class Machine:
    """Decodes by an experience's plans, on clocks that a factor slows down.

    A target call takes 1 + 0.02 for each row behind the first, a draft call 0.1. Three in four
    tokens of the model are accepted, and four in five of a lookup, which finds something in every
    other cycle.
    """

    kind: str
    seen: Experience
    chance: random.Random
    turn: int = 0

    def cycle(self, slowness: float = 1.0) -> Cycle:
        self.turn += 1
        cycle, sure, rate = Cycle(), 0, 0.8
        matched = 5 * (self.turn % 2) * (self.kind != "model")
        num, expected = self.seen.lookup_plan(matched, 7) if matched else (0, 0.0)
        has_model = self.kind != "lookup"
        if has_model and num and self.seen.prefers_model(matched, num, expected):
            num = 0
        if num:
            cycle = Cycle(num, matched, 0, matched)
        elif has_model and (self.seen.is_model_due or self.seen.turn_pays(7, matched)):
            confidences, so_far = [0.75], self.seen.chance(0.75)
            while len(confidences) < 7 and self.seen.one_more_pays(so_far, matched):
                confidences.append(0.75)
                so_far *= self.seen.chance(0.75)
            num, rate = len(confidences), 0.75
            cycle = Cycle(num, matched, num, 0, confidences, num, 0.1 * num * slowness)
        while sure < num and self.chance.random() < rate:
            sure += 1
        cycle.matched = matched
        cycle.seconds = (1 + 0.02 * num) * slowness + cycle.draft_seconds
        self.seen.learn(cycle, sure)
        return cycle

    def plans(self, num: int = 60) -> list[int]:
        """How many tokens are proposed in each of the next cycles, while the machine is quiet."""
        return [self.cycle().num_proposed for _ in range(num)]


def plan(times: Times) -> list[int]:
    """Tokens of the model and of a lookup at these times, at the acceptance rates of the start."""
    seen = Experience(times)
    num_drafted = sum(seen.one_more_pays(0.75**num) for num in range(7)) if seen.turn_pays(7) else 0
    return [num_drafted, seen.lookup_plan(5, 7)[0]]


def machine(kind: str, seed: int) -> Machine:
    return Machine(kind, Experience(), random.Random(seed))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_slow", [1, 2, 3, 7, 40, 300])
def test_a_busy_start_is_forgotten_within_eight_cycles(kind, num_slow):
    """It drafted nothing for four quiet texts: a row seemed to cost 660 times what it did."""
    for seed in range(20):
        after, fresh = machine(kind, seed), machine(kind, seed)
        for _ in range(num_slow):
            after.cycle(slowness=10 * 70 ** after.chance.random())  # 10 to 700 times
        soon = after.plans(8)
        assert sum(num > 1 for num in soon) >= 2, (seed, soon)
        fresh.plans(8)
        for of in (after, fresh):
            of.plans(200)
        assert plan(after.seen.times) == pytest.approx(plan(fresh.seen.times), abs=1), seed
        for estimate in ("target_call.slope", "target_call.step", "draft_call.estimate"):
            values = [attrgetter(estimate)(of.seen.times) for of in (after, fresh)]
            assert values[0] == pytest.approx(values[1], rel=0.01, abs=1e-3), (estimate, seed)


@pytest.mark.parametrize("kind", ["lookup", "model", "both"])
@pytest.mark.parametrize("num_slow", [1, 2])
@pytest.mark.parametrize("when", range(5, 45, 3))
def test_a_pause_silences_nobody_for_long(kind, num_slow, when):
    """One slow cycle is left out. Two in a row are believed until the next evidence."""
    paused, other = machine(kind, when), machine(kind, when)
    for of, slowness in ((paused, 300.0), (other, 1.0)):
        of.plans(when)
        for _ in range(num_slow):
            of.cycle(slowness)
    if num_slow == 1:
        assert sum(num > 1 for num in paused.plans(6)) >= 2
    for of in (paused, other):
        of.plans(200)
    assert plan(paused.seen.times) == pytest.approx(plan(other.seen.times), abs=1)


@pytest.mark.parametrize("kind", ["lookup", "model", "both"])
def test_ordinary_noise_is_no_news(kind):
    """Times that vary by a third start the estimates anew in less than 1 of 500 cycles."""
    noisy, num_news = machine(kind, 0), 0
    noisy.plans(20)
    for _ in range(5000):
        times = noisy.seen.times
        noisy.cycle(slowness=noisy.chance.lognormvariate(0, 0.3))
        num_news += noisy.seen.times is not times
    assert num_news < 10
