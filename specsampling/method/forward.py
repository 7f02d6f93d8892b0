"""Calls a model over a preallocated cache in one of three ways.

The ways are the model's own forward, our static step, and transformers' forward. Each way feeds
tokens whose first position is `start`. A call sees either the filled part of the cache, or the
whole capacity with the rest masked. The shape of the second kind does not depend on `start`.

This module knows nothing of lengths, time or rolling back; `session.py` does.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from specsampling.method.step import Buffers, decode_step, has_step, head, hidden_states


class Runner(abc.ABC):
    """A model with a decode step for calls of a few sizes. All other attributes are the model's.

    Attributes:
        model: the model itself.
        capacity: the number of positions in its buffers.
    """

    def __init__(self, model: PreTrainedModel, capacity: int):
        self.model = model
        self.capacity = capacity

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    @abc.abstractmethod
    def num_rows(self, needed: int) -> int:
        """Return the smallest size of call that holds `needed` tokens, or else the largest."""

    @abc.abstractmethod
    def buffers(self, capacity: int, owner: object) -> Buffers:
        """Return a text's buffers. They belong to `owner` as long as it is alive."""

    @abc.abstractmethod
    def __call__(self, ids: Tensor, positions: Tensor, buffers: Buffers) -> Tensor:
        """Return what `decode_step` returns."""


class Forward(Protocol):
    """A model over one text's cache."""

    def prefill(self, ids: list[int]) -> None:
        """Feed a text's first tokens, without logits."""

    def over_filled(self, ids: list[int], start: int, last: int) -> Tensor:
        """Feed tokens over the filled part of the cache; return [last, V] logits."""

    def over_capacity(self, ids: list[int], start: int) -> Tensor:
        """Feed tokens over the whole capacity; return [len(ids), V] logits."""


class ExactModel(Protocol):
    """A model with a forward of its own, in which rows never meet (`models/kernel_model.py`).

    A row's logits are the same in a call of any width, so no call is padded.
    """

    config: Any
    generation_config: Any
    name_or_path: str
    device: torch.device
    dtype: torch.dtype

    def get_input_embeddings(self) -> Any: ...

    def get_output_embeddings(self) -> Any: ...

    def make_forward(self, capacity: int) -> Forward:
        """Make the model's forward over a new cache of `capacity` tokens."""

    def first_layers(self, num_layers: int) -> ExactModel:
        """Cut a shallow model: the first layers, final norm and head."""


Model = PreTrainedModel | ExactModel | Runner


def is_exact(model: Model) -> TypeGuard[ExactModel]:
    """Say whether a model has a forward in which rows never meet."""
    return hasattr(model, "make_forward")


def forward_of(model: Model, capacity: int, context: int) -> Forward:
    """Choose how to call a model of `context` positions, over a new cache of `capacity` tokens."""
    if is_exact(model):
        return model.make_forward(capacity)
    if isinstance(model, Runner):
        return StepForward(model.model, capacity, model)
    assert isinstance(model, PreTrainedModel)
    if has_step(model):
        return StepForward(model, capacity)
    return TransformersForward(model, capacity, context)


class StepForward:
    """Calls a model by our static step."""

    def __init__(self, model: PreTrainedModel, capacity: int, runner: Runner | None = None):
        self._model = model
        self._buffers = runner.buffers(capacity, self) if runner else Buffers.of(model, capacity)
        self._run: Callable[[Tensor, Tensor, Buffers], Tensor] = runner or partial(
            decode_step, model
        )

    def prefill(self, ids: list[int]) -> None:
        hidden_states(self._model, *self._placed(ids, 0), self._buffers.filled(len(ids)), True)

    def over_filled(self, ids: list[int], start: int, last: int) -> Tensor:
        buffers = self._buffers.filled(start + len(ids))
        needs_no_mask = start == 0 or len(ids) == 1
        hidden = hidden_states(self._model, *self._placed(ids, start), buffers, needs_no_mask)
        return head(self._model, hidden[:, -last:])

    def over_capacity(self, ids: list[int], start: int) -> Tensor:
        return self._run(*self._placed(ids, start), self._buffers)

    def _placed(self, ids: list[int], start: int) -> tuple[Tensor, Tensor]:
        """Make tensors of ids and their positions."""
        device = self._model.device
        return (
            torch.tensor(ids, device=device),
            torch.arange(start, start + len(ids), device=device),
        )


class PreallocatedLayer(CacheLayerMixin):
    """One layer's keys and values, [batch, heads, capacity, head_dim], made at the first call."""

    is_sliding = False  # sliding-window models keep every key; their mask hides the old ones
    is_compileable = False  # if False, transformers may drop the mask of a one-row call

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity = capacity
        self.length = 0
        self.shows_capacity = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # Zeros, because a masked nan times its weight of 0 would still be nan.
        batch, heads, _, head_dim = key_states.shape
        self.keys = key_states.new_zeros(batch, heads, self.capacity, head_dim)
        self.values = value_states.new_zeros(batch, heads, self.capacity, value_states.shape[-1])
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self.keys is None or self.values is None:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        num_keys, _ = self.get_mask_sizes(key_states.shape[-2])
        rows = slice(self.length, self.length + key_states.shape[-2])
        self.keys[:, :, rows] = key_states
        self.values[:, :, rows] = value_states
        return self.keys[:, :, :num_keys], self.values[:, :, :num_keys]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (self.capacity if self.shows_capacity else self.length + query_length), 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.capacity


class TransformersForward:
    """Calls any decoder-only model by transformers' own forward."""

    def __init__(self, model: PreTrainedModel, capacity: int, context: int):
        self._model = model
        self._context = context
        num_layers = model.config.get_text_config().num_hidden_layers
        self._layers = [PreallocatedLayer(capacity) for _ in range(num_layers)]
        self._cache = Cache(layers=[*self._layers])

    def prefill(self, ids: list[int]) -> None:
        self._call(self._model.base_model, ids, 0, shows_capacity=False)

    def over_filled(self, ids: list[int], start: int, last: int) -> Tensor:
        return self._call(self._model, ids, start, False, logits_to_keep=last).logits[0]

    def over_capacity(self, ids: list[int], start: int) -> Tensor:
        # The head scores every row, because its kernel must not depend on the rows asked for.
        return self._call(self._model, ids, start, True).logits[0]

    def _call(
        self,
        module: torch.nn.Module,
        ids: list[int],
        start: int,
        shows_capacity: bool,
        **options: Any,
    ) -> Any:
        for layer in self._layers:
            layer.length = start
            layer.shows_capacity = layer.is_compileable = shows_capacity
        if start + len(ids) > self._context:  # padding reaches beyond the last position
            positions = torch.arange(start, start + len(ids), device=self._model.device)
            options["position_ids"] = positions.clamp(max=self._context - 1)[None]
        return module(
            input_ids=torch.tensor([ids], device=self._model.device),
            past_key_values=self._cache,
            use_cache=True,
            **options,
        )
