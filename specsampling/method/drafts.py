"""Drafts: a model, n-grams of the text itself, or both.

A `Draft` is loaded once and starts a `Proposer` for each text. A proposer sees only its own
proposals and the text that the target has accepted. With each proposal it gives the verifier the
distribution from which the proposal was really drawn.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from specsampling.method.distribution import Distribution, NonFiniteError, one_hot
from specsampling.method.forward import Model, is_exact
from specsampling.method.sampling import GREEDY, Randomness, Sampling, probs_from_logits, sample
from specsampling.method.session import Session, context_limit


class Proposer(Protocol):
    """A draft at work on one text."""

    @property
    def num_calls(self) -> int: ...  # after the prefill

    @property
    def forward_seconds(self) -> float: ...  # inside a model, prefill included

    def prefill(self, tokens: Sequence[int]) -> None:
        """Take in the prompt without its newest token."""

    def propose(self, tokens: Sequence[int], k: int) -> tuple[list[int], list[Distribution]]:
        """Propose at most k ids behind `tokens`, each with the distribution it was drawn from."""

    def rollback(self, length: int) -> None:
        """Forget all but the first `length` tokens."""


@dataclass(frozen=True)
class DraftTerms:
    """The terms on which a draft works on one of a target's texts."""

    capacity: int  # the most tokens that the text can have
    vocab_size: int  # the number of the target's logits; a draft proposes no id beyond them
    device: torch.device  # the target's
    sampling: Sampling  # the target's warp
    source: Randomness  # of all draws

    @classmethod
    def of(cls, target: Model, capacity: int, sampling: Sampling, source: Randomness) -> DraftTerms:
        return cls(capacity, num_logits(target), target.device, sampling, source)


class Draft(Protocol):
    """A loaded draft, which can propose for many texts."""

    def start(self, terms: DraftTerms) -> Proposer:
        """Start a proposer for one text."""


@dataclass(frozen=True)
class ModelDraft:
    """A smaller model, with the target's warp.

    The confidence in a proposal is the model's largest probability before the warp. A cycle's
    proposals end after the first one whose confidence is below `min_confidence`. That proposal is
    verified like all others, so the output stays exact. If `is_greedy`, the model proposes its most
    probable tokens even if the target samples. Each proposal is then accepted as often as the
    target would draw it.
    """

    model: Model
    max_k: int | None = None  # the most tokens of a cycle; None for no limit but `k`
    min_confidence: float = 0.0  # 0 is off
    is_greedy: bool = False

    def start(self, terms: DraftTerms) -> ModelProposer:
        return ModelProposer(self, terms)


class ModelProposer:
    def __init__(self, draft: ModelDraft, terms: DraftTerms):
        self._draft = draft
        self._terms = replace(terms, sampling=GREEDY) if draft.is_greedy else terms
        self._longest = min(terms.capacity, context_limit(draft.model))
        self._session = Session(draft.model, self._longest)
        embeddings: Any = draft.model.get_input_embeddings()
        self._last_id: int = embeddings.num_embeddings - 1
        self._knows_all = embeddings.num_embeddings >= terms.vocab_size

    @property
    def num_calls(self) -> int:
        return self._session.num_calls

    @property
    def forward_seconds(self) -> float:
        return self._session.forward_seconds

    def prefill(self, tokens: Sequence[int]) -> None:
        self._session.prefill(self._known(tokens[: self._longest]))

    def propose(self, tokens: Sequence[int], k: int) -> tuple[list[int], list[Distribution]]:
        room = self._longest - len(tokens) + 1  # 0 or less if the context is full
        k = max(0, min(k, self._draft.max_k or k, room))
        sequence = list(tokens)
        terms = self._terms
        draft_probs: list[Distribution] = []
        for i in range(k):
            logits = self._session.score(self._known(sequence), last=1)
            # The draft's vocabulary may be padded to another size than the target's. The cut comes
            # before the warp, so that tokens are drawn from the reported distribution.
            logits = logits[:, : terms.vocab_size]
            (probs,) = probs_from_logits(logits, terms.sampling)
            try:
                sequence.append(sample(probs, terms.source, len(sequence)))
            except NonFiniteError:
                raise NonFiniteError("draft") from None
            draft_probs.append(probs)
            if i + 1 < k and not self._goes_on(sequence, logits):
                break
        return sequence[len(tokens) :], draft_probs

    def _goes_on(self, sequence: Sequence[int], logits: Tensor) -> bool:
        """Say whether to draft another token. The last one was drawn from `logits`, [1, V]."""
        limit = self._draft.min_confidence
        if limit == 0:
            return True
        logits = logits.float()
        return float(logits.max() - logits.logsumexp(-1)) >= math.log(limit)

    def rollback(self, length: int) -> None:
        self._session.length = min(self._session.length, length)

    def _known(self, tokens: Sequence[int]) -> list[int]:
        """Replace ids that only a larger target can embed, its padding, by the model's last id."""
        if self._knows_all:
            return list(tokens)
        return [min(token, self._last_id) for token in tokens]


@dataclass(frozen=True)
class NgramDraft:
    """A lookup, which searches the text so far for its newest tokens.

    It proposes the tokens that followed the match. This is also called prompt lookup. The
    distributions are one-hot, so the verifier accepts a token with exactly the probability that the
    target gives it.
    """

    longest: int = 3  # tokens of the n-gram that is searched first
    shortest: int = 1  # tokens of the n-gram that is searched last

    def start(self, terms: DraftTerms) -> NgramProposer:
        return NgramProposer(self.longest, self.shortest)


class NgramProposer:
    num_calls = 0  # a lookup calls no model
    forward_seconds = 0.0

    def __init__(self, longest: int, shortest: int):
        self._lengths = range(shortest, longest + 1)
        self._follower: dict[tuple[int, ...], int] = {}  # n-gram -> index of the token behind it
        self._num_seen = 0

    def prefill(self, tokens: Sequence[int]) -> None:
        for end in range(self._num_seen + 1, len(tokens)):
            for n in self._lengths:
                if n <= end:
                    self._follower[tuple(tokens[end - n : end])] = end
            self._num_seen = end

    def propose(self, tokens: Sequence[int], k: int) -> tuple[list[int], list[Distribution]]:
        self.prefill(tokens)
        return self.go_on(tokens, k)

    def go_on(self, tokens: Sequence[int], k: int) -> tuple[list[int], list[Distribution]]:
        """Propose the tokens after `tokens`, whose last ones may be proposals themselves."""
        sequence = list(tokens)
        matched, follower = self.find(tokens)
        for i in range(follower, follower + k) if matched else ():
            sequence.append(sequence[i])  # may be a token appended here
        proposed = sequence[len(tokens) :]
        return proposed, one_hot(proposed)

    def find(self, tokens: Sequence[int]) -> tuple[int, int]:
        """Search for the last tokens; return how many match and the index of the next token."""
        for n in reversed(self._lengths):
            follower = self._follower.get(tuple(tokens[-n:]))
            if follower is not None:
                return n, follower
        return 0, 0

    def rollback(self, length: int) -> None:
        """Forget nothing, because only accepted text is kept."""


@dataclass(frozen=True)
class CompositeDraft:
    """A lookup, and a model that drafts if the lookup finds no matching n-gram.

    A lookup costs nothing, so it may propose all k tokens of a cycle. Each of the model's tokens
    takes a call, so `max_k` may limit them. The output is exact for two reasons: who proposes
    depends only on the accepted text, and each proposal comes with its distribution.
    """

    lookup: NgramDraft
    model: ModelDraft

    def start(self, terms: DraftTerms) -> CompositeProposer:
        return CompositeProposer(self.lookup.start(terms), self.model.start(terms))


class JointProposer:
    """Several proposers for one text, which count, prefill and roll back together."""

    def __init__(self, *parts: Proposer | None):
        self._parts = [part for part in parts if part is not None]

    @property
    def num_calls(self) -> int:
        return sum(part.num_calls for part in self._parts)

    @property
    def forward_seconds(self) -> float:
        return sum(part.forward_seconds for part in self._parts)

    def prefill(self, tokens: Sequence[int]) -> None:
        for part in self._parts:
            part.prefill(tokens)

    def rollback(self, length: int) -> None:
        for part in self._parts:
            part.rollback(length)


class CompositeProposer(JointProposer):
    def propose(self, tokens: Sequence[int], k: int) -> tuple[list[int], list[Distribution]]:
        lookup, model = self._parts
        proposed, draft_probs = lookup.propose(tokens, k)
        return (proposed, draft_probs) if proposed else model.propose(tokens, k)


def first_layers(model: Model, num_layers: int) -> Model:
    """Cut a shallow model from `model`: its first layers, final norm and head.

    The shallow model shares the tensors, so it needs no memory of its own. It was not trained for
    its depth, so few of its proposals are accepted.

    Raises:
        ValueError: `num_layers` is not between 1 and the model's own number of layers.
    """
    config = copy.deepcopy(model.config)
    text_config = config.get_text_config(decoder=True)
    total = text_config.num_hidden_layers
    if not 1 <= num_layers <= total:
        raise ValueError(f"the number of layers must be between 1 and {total} (got {num_layers})")
    if is_exact(model):
        return model.first_layers(num_layers)
    text_config.num_hidden_layers = num_layers
    assert isinstance(model, PreTrainedModel)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == total:
            return _with_part(model, name.split("."), module[:num_layers], config)
    raise ValueError(f"{config.model_type} models have no list of {total} layers to cut")


def _with_part(model: Any, path: list[str], part: nn.Module, config: Any) -> Any:
    """Copy a model, with another module at a path. Modules off the path are shared."""
    clone = copy.copy(model)
    clone._modules = dict(model._modules)  # the same children and tensors
    if isinstance(getattr(model, "config", None), PreTrainedConfig):
        is_whole = model.config.model_type == config.model_type
        clone.config = config if is_whole else config.get_text_config(decoder=True)
    name, *rest = path
    setattr(clone, name, _with_part(getattr(model, name), rest, part, config) if rest else part)
    return clone


def num_logits(model: Model) -> int:
    """Count the logits in a row of a model's output, padding included."""
    head: Any = model.get_output_embeddings()
    return head.out_features
