"""Who proposes: a model, n-grams of the text itself, or both.

A `Draft` is loaded once and starts a `Proposer` for each text. A proposer sees only
the text that the target has accepted and its own proposals, and hands the verifier
the distributions that its proposals were really drawn from.
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
from specsampling.method.forward import RUNNER, Model, is_exact
from specsampling.method.sampling import (
    GREEDY,
    Randomness,
    Sampling,
    probs_from_logits,
    sample,
)
from specsampling.method.session import Session, context_limit


class Proposer(Protocol):
    """Proposes for one text."""

    @property
    def num_calls(self) -> int:
        """Forward calls after the prefill."""

    @property
    def forward_seconds(self) -> float:
        """Time inside a model, prefill included."""

    def prefill(self, tokens: Sequence[int]) -> None:
        """See the prompt less its newest token."""

    def propose(self, tokens: Sequence[int], k: int) -> tuple[list[int], list[Distribution]]:
        """Propose what comes after `tokens`.

        Returns:
            At most k token ids, and as many distributions: what each was drawn from.
        """

    def rollback(self, length: int) -> None:
        """Forget all but the first `length` tokens."""


@dataclass(frozen=True)
class DraftTerms:
    """What a target asks of whoever drafts for one of its texts.

    Attributes:
        capacity: the longest the text can grow, in tokens.
        vocab_size: width of the target's logits; a draft proposes no token beyond it.
        device: where the target lies.
        sampling: the warp, the target's own.
        source: where all randomness comes from.
    """

    capacity: int
    vocab_size: int
    device: torch.device
    sampling: Sampling
    source: Randomness

    @classmethod
    def of(
        cls,
        target: Model,
        capacity: int,
        sampling: Sampling,
        source: Randomness,
    ) -> DraftTerms:
        return cls(capacity, num_logits(target), target.device, sampling, source)


class Draft(Protocol):
    """Something that can propose for many texts."""

    def start(self, terms: DraftTerms) -> Proposer:
        """A proposer for one text."""


@dataclass(frozen=True)
class ModelDraft:
    """A smaller model, warped and sampled from as the target is.

    Attributes:
        model: the model.
        max_k: the most tokens that it proposes in a cycle; None for as many as it is asked for.
        min_confidence: a cycle's proposals end with the first for which the model gave no token
            this probability (before the warp); 0 is off. Each token proposed is verified, so
            where they end may depend on the model.
        is_greedy: propose the most probable tokens, also where the target samples. They are
            accepted when the target draws the very same.
    """

    model: Model
    max_k: int | None = None
    min_confidence: float = 0.0
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
        k = min(k, self._draft.max_k or k)
        k = max(0, min(k, self._longest - len(tokens) + 1))  # a full context is silent
        sequence = list(tokens)
        terms = self._terms
        draft_probs: list[Distribution] = []
        for i in range(k):
            logits = self._session.score(self._known(sequence), last=1)
            # Vocabularies may be padded to different sizes: the target's decides. Cut before
            # the warp, so that the distribution reported is the one sampled from.
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
        """Whether to draft another token behind a sequence whose last has [1, V] logits."""
        limit = self._draft.min_confidence
        if limit == 0:
            return True
        logits = logits.float()
        return float(logits.max() - logits.logsumexp(-1)) >= math.log(limit)

    def rollback(self, length: int) -> None:
        self._session.length = min(self._session.length, length)

    def _known(self, tokens: Sequence[int]) -> list[int]:
        """Ids the model can embed; a padding id of a wider target is fed as its last one."""
        if self._knows_all:
            return list(tokens)
        return [min(token, self._last_id) for token in tokens]


@dataclass(frozen=True)
class NgramDraft:
    """Looks the newest tokens up in the text so far and proposes what followed them.

    Also called prompt lookup. Its distributions are one-hot, so the verifier accepts a
    token with exactly the target's probability for it.

    Attributes:
        longest: first looks for the last `longest` tokens, then for fewer.
        shortest: down to this many.
    """

    longest: int = 3
    shortest: int = 1

    def start(self, terms: DraftTerms) -> NgramProposer:
        return NgramProposer(self.longest, self.shortest)


class NgramProposer:
    num_calls = 0  # no model, no calls
    forward_seconds = 0.0

    def __init__(self, longest: int, shortest: int):
        self._lengths = range(shortest, longest + 1)
        self._follower: dict[tuple[int, ...], int] = {}  # n-gram -> where its last follower stands
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
        """Propose behind tokens that may be no more than proposals themselves."""
        sequence = list(tokens)
        matched, follower = self.find(tokens)
        for i in range(follower, follower + k) if matched else ():
            sequence.append(sequence[i])  # may be one of its own
        proposed = sequence[len(tokens) :]
        return proposed, one_hot(proposed)

    def find(self, tokens: Sequence[int]) -> tuple[int, int]:
        """How many of the last tokens are in the text before, and where their follower is."""
        for n in reversed(self._lengths):
            follower = self._follower.get(tuple(tokens[-n:]))
            if follower is not None:
                return n, follower
        return 0, 0

    def rollback(self, length: int) -> None:
        """Nothing to forget: only accepted text is looked up."""


@dataclass(frozen=True)
class CompositeDraft:
    """Looks up first, and asks the model where the text so far has no answer.

    A lookup costs nothing, so it may propose all k tokens of a cycle; each of the model's
    takes a call, so `max_k` may hold it back. Who proposes depends on the accepted text
    alone, and each proposal comes with the distribution it was drawn from: as exact as either.
    """

    lookup: NgramDraft
    model: ModelDraft

    def start(self, terms: DraftTerms) -> CompositeProposer:
        return CompositeProposer(self.lookup.start(terms), self.model.start(terms))


class CompositeProposer:
    def __init__(self, lookup: Proposer, model: Proposer):
        self._lookup = lookup
        self._model = model

    @property
    def num_calls(self) -> int:
        return self._model.num_calls

    @property
    def forward_seconds(self) -> float:
        return self._model.forward_seconds

    def prefill(self, tokens: Sequence[int]) -> None:
        self._lookup.prefill(tokens)
        self._model.prefill(tokens)

    def propose(self, tokens: Sequence[int], k: int) -> tuple[list[int], list[Distribution]]:
        proposed, draft_probs = self._lookup.propose(tokens, k)
        return (proposed, draft_probs) if proposed else self._model.propose(tokens, k)

    def rollback(self, length: int) -> None:
        self._lookup.rollback(length)
        self._model.rollback(length)


def first_layers(model: Model, num_layers: int) -> Model:
    """A shallow model cut from `model`: its first layers, final norm and head.

    It shares the tensors, so it needs no memory of its own. Untrained for its depth, it
    is a weak draft; what it proposes is as exact as any other.

    Raises:
        ValueError: `num_layers` is not between 1 and the model's own number.
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
    """`model` with another module at a path, the modules on the way copied, the rest shared."""
    clone = _shallow_copy(model)
    if isinstance(getattr(model, "config", None), PreTrainedConfig):
        is_whole = model.config.model_type == config.model_type
        clone.config = config if is_whole else config.get_text_config(decoder=True)
    name, *rest = path
    setattr(clone, name, _with_part(getattr(model, name), rest, part, config) if rest else part)
    return clone


def _shallow_copy(module: Any) -> Any:
    """A new module over the same children and tensors."""
    clone = copy.copy(module)
    clone.__dict__.pop(RUNNER, None)  # it runs the original
    clone._modules = dict(module._modules)
    return clone


def num_logits(model: Model) -> int:
    """Width of the model's output, padding included."""
    head: Any = model.get_output_embeddings()
    return head.out_features
