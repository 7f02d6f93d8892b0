"""The whole decoder, enumerated: every way that its random decisions can fall, with its chance.

`test_verify.py` enumerates a cycle of a rule. Here the decoder itself runs once for each sequence
of decisions (a drafted token, a uniform on either side of its threshold, a correction), so drafts,
caches, rolling back, who drafts how much, and where a text ends are held to the same 1e-6. What the
texts must be comes from the target alone, without a cache.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sampled_decoding import DishonestDraft
from test_verify import (
    THRESHOLDS,
    accept_argmax,
    accept_by_position,
    accept_regardless_of_draft,
    correct_from_target,
    dense,
    largest_error,
)

import specsampling.method.drafts as drafts_module
import specsampling.method.verify as verify_module
from specsampling.method.adaptive import AdaptiveDraft
from specsampling.method.drafts import CompositeDraft, ModelDraft, NgramDraft, first_layers
from specsampling.method.sampling import Sampling, probs_from_logits
from specsampling.method.verify import VERIFIERS
from speculative import speculative

VOCAB = 3
PROMPT = [2, 1, 2]  # ends with a token that it has before: lookups find something
WARPS = {
    "softmax": Sampling(1.0),
    "cold": Sampling(0.4),
    "top-k": Sampling(1.3, top_k=2),
    "nucleus": Sampling(0.8, top_p=0.75),
    "greedy": Sampling(0.0),
}
ENDINGS = {
    "length": {},
    "eos": {"eos_ids": (1,)},
    "stop": {"is_stop": lambda new: list(new[-2:]) == [0, 2]},
}
Decide = Callable[[Sequence[float]], int]


class Way:
    """One way that a process's decisions fall: those of `path` first, then each time the first."""

    def __init__(self, path: Sequence[int]):
        self._path = path
        self._made: list[int] = []
        self.chance = 1.0
        self.others: list[list[int]] = []  # paths that part from this one

    def decide(self, weights: Sequence[float]) -> int:
        place = len(self._made)
        if place < len(self._path):
            choice = self._path[place]
        else:
            choice, *others = (i for i, weight in enumerate(weights) if weight > 0)
            self.others += [[*self._made, other] for other in others]
        self._made.append(choice)
        self.chance *= weights[choice]
        return choice


def every_way(process: Callable[[Decide], tuple]) -> Iterator[tuple[tuple, float]]:
    """What a process yields for each way that its decisions can fall, and how likely that is."""
    pending: list[list[int]] = [[]]
    while pending:
        way = Way(pending.pop())
        yield process(way.decide), way.chance
        pending += way.others


def wanted_texts(target, sampling: Sampling, num: int, eos_ids=(), is_stop=None) -> dict:
    """Every text that the target alone would give, with its probability."""
    done: dict[tuple, float] = {}
    open_texts = {(): 1.0}
    while open_texts:
        text, mass = open_texts.popitem()
        is_over = text and (text[-1] in eos_ids or (is_stop is not None and is_stop(text)))
        if is_over or len(text) == num:
            done[text] = mass
            continue
        with torch.inference_mode():
            logits = target(torch.tensor([PROMPT + list(text)])).logits[0, -1:]
        for token, probability in enumerate(
            probs_from_logits(logits, sampling)[0].dense(VOCAB).tolist()
        ):
            if probability:
                open_texts[(*text, token)] = mass * probability
    return done


@pytest.fixture
def decoded_texts(monkeypatch):
    """A function: every text of the speculative decoder, with its probability."""
    turn: dict = {}
    # What is found while decoding looks at clocks; each way has to see the same ones.
    clock = SimpleNamespace(perf_counter=lambda: float(next(turn["ticks"])))
    monkeypatch.setattr("specsampling.method.adaptive.time", clock)
    monkeypatch.setattr("specsampling.method.session.time", clock)

    def sample(probs, generator, position=0):
        return turn["decide"](probs.dense(VOCAB).tolist())

    monkeypatch.setattr(drafts_module, "sample", sample)
    monkeypatch.setattr(verify_module, "sample", sample)
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: torch.tensor(turn["uniforms"]))

    def decoded(target, make_draft, name: str, num: int, **options) -> dict:
        def verifier(target_probs, draft_probs, drafted, generator, position):
            sides = [
                ((threshold / 2, (threshold + 1) / 2), [threshold, 1 - threshold])
                for threshold in THRESHOLDS[name](dense(target_probs), dense(draft_probs), drafted)
            ]
            turn["uniforms"] = [points[turn["decide"](chances)] for points, chances in sides]
            return VERIFIERS[name](target_probs, draft_probs, drafted, generator)

        def process(decide: Decide) -> tuple:
            turn.update(decide=decide, ticks=itertools.count())
            done = speculative(
                target,
                make_draft(),
                PROMPT,
                max_new_tokens=num,
                verifier=verifier,
                generator=torch.Generator().manual_seed(0),
                **options,
            )
            return tuple(done.token_ids)

        texts: dict[tuple, float] = defaultdict(float)
        for text, chance in every_way(process):
            texts[text] += chance
        return texts

    return decoded


def models(model_of, seed: int = 0):
    return model_of("llama", seed, VOCAB), model_of("qwen2", seed + 1, VOCAB)


def drafts_of(target, model) -> dict[str, Callable[[], object]]:
    """Who drafts, and how much. Made anew for each way: what one has seen is not another's."""
    lookup = NgramDraft(2, 1)
    both = CompositeDraft(lookup, ModelDraft(model, max_k=1))
    return {
        "model": lambda: ModelDraft(model),
        "first layer": lambda: ModelDraft(first_layers(target, 1)),
        "lookup": lambda: lookup,
        "lookup, then model": lambda: both,
        "model, until unsure": lambda: ModelDraft(model, min_confidence=0.6),
        "model, k auto": lambda: AdaptiveDraft.of(ModelDraft(model)),
        "lookup, k auto": lambda: AdaptiveDraft.of(lookup),
        "lookup, then model, k auto": lambda: AdaptiveDraft.of(both),
    }


KINDS = list(drafts_of(None, None))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", VERIFIERS)
def test_the_decoders_texts_have_the_targets_distribution(name, kind, model_of, decoded_texts):
    target, model = models(model_of)
    make_draft = drafts_of(target, model)[kind]
    cases = itertools.product((1, 2, 3), WARPS.values())
    for (k, sampling), ending in zip(cases, itertools.cycle(ENDINGS.values())):
        options = {"num": 3, "sampling": sampling, **ending}
        found = decoded_texts(target, make_draft, name, k=k, **options)
        assert_is_wanted(found, wanted_texts(target, **options))


def assert_is_wanted(found: dict, wanted: dict) -> None:
    assert sum(found.values()) == pytest.approx(1, abs=1e-5)
    assert found.keys() <= wanted.keys()
    assert largest_error(found, wanted) < 1e-6


def test_so_they_have_for_any_models_and_warp(model_of, decoded_texts):
    @settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @given(
        name=st.sampled_from(list(VERIFIERS)),
        kind=st.sampled_from(KINDS),
        seed=st.integers(0, 9),
        k=st.integers(1, 3),
        width=st.sampled_from([None, 8]),
        ending=st.sampled_from(list(ENDINGS)),
        temperature=st.floats(0.2, 3.0),
        top_k=st.integers(0, VOCAB - 1),
        top_p=st.floats(0.05, 1.0),
        num=st.integers(1, 3),
    )
    def check(name, kind, seed, k, width, ending, num, **warp):
        target, model = models(model_of, seed)
        options = {"num": num, "sampling": Sampling(**warp), **ENDINGS[ending]}
        make_draft = drafts_of(target, model)[kind]
        found = decoded_texts(target, make_draft, name, k=k, width=width, **options)
        assert_is_wanted(found, wanted_texts(target, **options))

    check()


@pytest.mark.parametrize(
    "wrong_rule",
    [accept_by_position, correct_from_target, accept_argmax, accept_regardless_of_draft],
)
def test_a_decoder_with_a_wrong_rule_is_rejected(wrong_rule, model_of, decoded_texts, monkeypatch):
    monkeypatch.setitem(VERIFIERS, "wrong", wrong_rule)
    monkeypatch.setitem(THRESHOLDS, "wrong", THRESHOLDS["token"])
    target, model = models(model_of)
    options = {"num": 3, "sampling": Sampling(1.3, top_k=2)}
    found = decoded_texts(target, lambda: ModelDraft(model), "wrong", k=2, **options)
    assert largest_error(found, wanted_texts(target, **options)) > 1e-3


def test_a_draft_that_misreports_its_distribution_is_rejected(model_of, decoded_texts):
    target, model = models(model_of)
    options = {"num": 3, "sampling": Sampling(1.3, top_k=2)}
    dishonest = DishonestDraft(ModelDraft(model))
    found = decoded_texts(target, lambda: dishonest, "token", k=2, **options)
    assert largest_error(found, wanted_texts(target, **options)) > 1e-3
