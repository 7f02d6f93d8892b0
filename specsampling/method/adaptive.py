"""Decides while decoding how many tokens to draft and who drafts them: `speculation.k: auto`.

A model drafts until a lookup finds what it has drafted. The lookup then goes on from there. Every
choice is made to raise the expected tokens per second (`experience.py`).

The output is still exact. Before a token is drawn, it is decided whether a token is proposed there,
and by whom. The decision depends on the earlier tokens, past verdicts, clocks, and the draft's
distributions for the earlier tokens. It never depends on the new token itself. A rule that dropped
unlikely tokens would draw from another distribution than the verifier is told. Clocks therefore
decide which texts are sampled, but not how they are distributed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from specsampling.method.distribution import Distribution
from specsampling.method.drafts import (
    CompositeDraft,
    Draft,
    DraftTerms,
    JointProposer,
    ModelDraft,
    ModelProposer,
    NgramDraft,
    NgramProposer,
)
from specsampling.method.experience import Cycle, Experience


@dataclass(frozen=True)
class AdaptiveDraft:
    """A draft made of a lookup, a model, or both. Experience decides who proposes how much."""

    lookup: NgramDraft | None
    model: ModelDraft | None
    experience: Experience = field(default_factory=Experience, compare=False)

    @classmethod
    def of(cls, draft: Draft) -> AdaptiveDraft:
        """Make an adaptive draft from the lookup and the model of a draft with a fixed k."""
        if isinstance(draft, NgramDraft):
            return cls(draft, None)
        if isinstance(draft, CompositeDraft):
            return cls(draft.lookup, replace(draft.model, max_k=None))
        assert isinstance(draft, ModelDraft)
        return cls(None, replace(draft, max_k=None))

    def start(self, terms: DraftTerms) -> AdaptiveProposer:
        return AdaptiveProposer(self, terms)


class Turn:
    """Decides whose turn it is to propose the next token of a cycle.

    This is a separate object, because proposers that refer to each other would keep their caches in
    memory for too long.
    """

    def __init__(self, lookup: NgramProposer | None, has_model: bool, experience: Experience):
        self._lookup, self._has_model, self._experience = lookup, has_model, experience
        self.longest = 0  # tokens that the text may have after this cycle

    def is_for_lookup(self, sequence: Sequence[int]) -> bool:
        """Say whether the lookup, not the model, should propose the token after a sequence."""
        matched = self._lookup.find(sequence)[0] if self._lookup else 0
        num, expected = self._experience.lookup_plan(matched, self.longest - len(sequence))
        if not (matched and num):
            return False
        return not (self._has_model and self._experience.prefers_model(matched, num, expected))


class AdaptiveProposer(JointProposer):
    """Lets the model draft while that pays. Then a lookup goes on if that is worth more.

    Who proposes a token, if anyone does, is decided before the token is drawn.
    """

    def __init__(self, draft: AdaptiveDraft, terms: DraftTerms):
        self._experience = draft.experience
        self._lookup = draft.lookup.start(terms) if draft.lookup else None
        model = draft.model
        turn = self._turn = Turn(self._lookup, model is not None, draft.experience)
        self._model = CarefulProposer(model, terms, draft.experience, turn) if model else None
        super().__init__(self._lookup, self._model)
        self._cycle: Cycle | None = None  # the one under way

    def propose(self, tokens: Sequence[int], k: int) -> tuple[list[int], list[Distribution]]:
        cycle = self._cycle = Cycle()
        self._started, self._num_tokens = time.perf_counter(), len(tokens)
        self._turn.longest = len(tokens) + k
        if self._lookup:
            self._lookup.prefill(tokens)
            cycle.matched = self._lookup.find(tokens)[0]
        is_for_lookup = self._turn.is_for_lookup(tokens)
        proposed: list[int] = []
        draft_probs: list[Distribution] = []
        chance = 1.0
        if self._model and not is_for_lookup:
            calls, seconds = self._model.num_calls, self._model.forward_seconds
            self._model.matched = cycle.matched
            proposed, draft_probs = self._model.propose(tokens, k)
            chance = self._model.chance
            cycle.draft_calls = self._model.num_calls - calls
            cycle.draft_seconds = self._model.forward_seconds - seconds
            cycle.confidences = self._model.confidences
        cycle.lookup_from = len(proposed)
        if self._lookup and (proposed or is_for_lookup):
            sequence = [*tokens, *proposed]
            matched = self._lookup.find(sequence)[0]
            num, _ = self._experience.lookup_plan(matched, k - len(proposed), chance)
            more, more_probs = self._lookup.go_on(sequence, num)
            cycle.lookup_matched = matched if more else 0
            proposed, draft_probs = proposed + more, draft_probs + more_probs
        cycle.num_proposed = len(proposed)
        return proposed, draft_probs

    def rollback(self, length: int) -> None:
        super().rollback(length)
        if self._cycle:
            self._cycle.seconds = time.perf_counter() - self._started
            # If the text ended before some accepted tokens, these tokens are not counted.
            num_accepted = max(0, min(length - self._num_tokens, self._cycle.num_proposed))
            self._experience.learn(self._cycle, num_accepted)
            self._cycle = None


class CarefulProposer(ModelProposer):
    """Drafts with a model as long as one more token pays and no lookup is worth more."""

    def __init__(self, draft: ModelDraft, terms: DraftTerms, experience: Experience, turn: Turn):
        super().__init__(draft, terms)
        self._experience, self._turn = experience, turn
        self.matched = 0  # tokens that a lookup found again at this cycle's start
        self.confidences: list[float] = []  # one for each proposal of this cycle
        self.chance = 1.0  # the chance that all these proposals are accepted

    def propose(self, tokens: Sequence[int], k: int) -> tuple[list[int], list[Distribution]]:
        self.confidences, self.chance = [], 1.0
        pays = self._experience.is_model_due or self._experience.turn_pays(k, self.matched)
        return super().propose(tokens, k if pays else 0)

    def _goes_on(self, sequence: Sequence[int], logits: Tensor) -> bool:
        confidence = float(logits.float().softmax(-1).amax())
        self.confidences.append(confidence)
        self.chance *= self._experience.chance(confidence)
        pays = self._experience.one_more_pays(self.chance, self.matched)
        return pays and not self._turn.is_for_lookup(sequence)
