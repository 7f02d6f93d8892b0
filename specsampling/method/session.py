"""A model with its KV cache: score tokens, roll back.

A session holds one sequence. Its cache is preallocated, and rolling back is
setting `length`: what lies behind it is overwritten by the next call.

The newest token is never in the cache. `score` gets the whole sequence, feeds
what the cache does not hold yet and returns the last rows of logits. So a fully
accepted cycle needs no special case: the next call feeds two tokens.

With a `width` every decode call has the same shape: `width` rows (real tokens
first, padding after) over the cache's whole capacity. Each row's bits then no
longer depend on how the tokens were grouped into calls, which is what makes
greedy speculative decoding bit-exact in 16 bit. Without one, a call has as many
rows as there are new tokens and sees only the filled part of the cache: the
fastest way, used by the baseline that speedups are measured against.

Knows nothing of sampling, drafting or text.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin


class PreallocatedLayer(CacheLayerMixin):
    """One layer's keys and values, [batch, heads, capacity, head_dim], made at the first call."""

    is_sliding = False  # sliding-window models keep every key; their mask hides the old ones
    is_compileable = False  # a one-row call's mask may be dropped; not one over the whole capacity

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity = capacity
        self.length = 0
        self.shows_capacity = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # Zeros, not empty: a masked nan is still a nan once it is multiplied by its weight of 0.
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


class Session:
    """One sequence in a model: its KV cache, its length, its calls and their time.

    Attributes:
        length: number of tokens the cache holds; set it lower to roll back.
        num_calls: forward calls after the prefill.
        forward_seconds: time inside the model, prefill included.
    """

    def __init__(self, model: PreTrainedModel, capacity: int, width: int | None = None):
        """Prepare a cache for `capacity` tokens.

        Args:
            model: a decoder-only model with ordinary attention in every layer.
            capacity: the longest sequence that will be scored, in tokens.
            width: rows of every decode call, or None for as many as there are new tokens.
        """
        if width is not None:
            # A padded last call writes up to `width` rows; 64 keeps the kernels' blocks whole.
            capacity = -(-(capacity + width) // 64) * 64
        self.model = model
        self.device = model.device
        self.width = width
        self.capacity = capacity
        self.num_calls = 0
        self.forward_seconds = 0.0
        num_layers = model.config.get_text_config().num_hidden_layers
        self._context = context_limit(model)
        self._layers = [PreallocatedLayer(capacity) for _ in range(num_layers)]
        self._cache = Cache(layers=[*self._layers])

    @property
    def length(self) -> int:
        return self._layers[0].length

    @length.setter
    def length(self, length: int) -> None:
        for layer in self._layers:
            layer.length = length

    def prefill(self, tokens: Sequence[int]) -> None:
        """Feed the prompt less its newest token, in one call and without computing logits."""
        if tokens:
            self._forward(self.model.base_model, list(tokens))
            self.length = len(tokens)

    def score(self, tokens: Sequence[int], last: int) -> Tensor:
        """Feed the tokens that the cache does not hold; logits of the `last` newest.

        Args:
            tokens: the whole sequence; `tokens[:length]` must be what the cache holds.
            last: how many of the newest tokens' rows to return.

        Returns:
            [last, V] logits in the model's dtype; row -1 predicts the token after `tokens`.

        Raises:
            ValueError: nothing new to feed, more than `width` tokens, or beyond the capacity.
        """
        new = list(tokens[self.length :])
        rows = self.width or len(new)
        if not last <= len(new) <= rows or not new or self.length + rows > self.capacity:
            raise ValueError(
                f"cannot feed {len(new)} tokens after {self.length} for {last} rows "
                f"(width {self.width}, capacity {self.capacity})"
            )
        if self.width is None:
            logits = self._forward(self.model, new, logits_to_keep=last).logits[0]
        else:
            # The head runs on every row too: its kernel must not depend on `last`.
            padded = new + new[-1:] * (rows - len(new))
            with self._whole_capacity():
                logits = self._forward(self.model, padded).logits[0, len(new) - last : len(new)]
        self.num_calls += 1
        self.length = len(tokens)
        return logits

    def _forward(self, module: torch.nn.Module, fed: list[int], **options: Any) -> Any:
        start = synchronized_seconds(self.device)
        context = self._context
        if self.length + len(fed) > context:  # padding behind the last position there is
            positions = torch.arange(self.length, self.length + len(fed), device=self.device)
            options["position_ids"] = positions.clamp(max=context - 1)[None]
        with torch.inference_mode(), _attention_kernels(self.device):
            outputs = module(
                input_ids=torch.tensor([fed], device=self.device),
                past_key_values=self._cache,
                use_cache=True,
                **options,
            )
        self.forward_seconds += synchronized_seconds(self.device) - start
        return outputs

    @contextlib.contextmanager
    def _whole_capacity(self) -> Iterator[None]:
        """Let attention see the cache's whole capacity, the unfilled part masked."""
        for layer in self._layers:
            layer.shows_capacity = layer.is_compileable = True
        try:
            with _gpt_neo_masks(self.model, self.length, self.width or 0, self.capacity):
                yield
        finally:
            for layer in self._layers:
                layer.shows_capacity = layer.is_compileable = False


def _attention_kernels(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Leave cuDNN's attention out on a GPU: it makes a plan for every new number of keys.

    A decode call of width 1 sees a key more each time, and took 50 ms for that on an H100, where
    one of a fixed width takes 12: a baseline that slow would flatter every speedup.
    """
    if device.type != "cuda":
        return contextlib.nullcontext()
    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(kernels)


@contextlib.contextmanager
def _gpt_neo_masks(
    model: PreTrainedModel, length: int, width: int, capacity: int
) -> Iterator[None]:
    """Put GPT-Neo's own causal and local masks where a fixed-size cache needs them.

    GPT-Neo takes rows [keys - queries, keys) of its `bias` buffer: it believes that the
    newest key is the cache's last. Here the queries stand at `length`, so for the time of
    a call the buffers are replaced by ones whose last `width` rows are those of `length`.
    """
    if model.config.model_type != "gpt_neo":
        yield
        return
    blocks: Any = model.base_model.h
    attentions = [block.attn.attention for block in blocks]
    originals = [attention.bias for attention in attentions]
    key = torch.arange(capacity, device=model.device)
    query = torch.arange(length, length + width, device=model.device)[:, None]
    causal = key <= query  # [width, capacity]
    masks = {"global": causal, "local": causal & (key > query - model.config.window_size)}
    padded = {kind: _as_last_rows(mask, capacity) for kind, mask in masks.items()}
    try:
        for attention in attentions:
            attention.bias = padded[attention.attention_type]
        yield
    finally:
        for attention, original in zip(attentions, originals, strict=True):
            attention.bias = original


def _as_last_rows(mask: Tensor, num_rows: int) -> Tensor:
    """[width, capacity] -> [1, 1, num_rows, capacity]; only the last rows are looked at."""
    rows = mask.new_empty(1, 1, num_rows, mask.shape[1])
    rows[0, 0, num_rows - len(mask) :] = mask
    return rows


CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "seq_length", "max_seq_len")
WINDOW_NAMES = ("sliding_window", "window_size", "attention_chunk_size")


def context_limit(model: PreTrainedModel) -> int:
    """The most tokens a text can have here.

    That is how far the model's positions reach, or the edge at which it changes the frequencies
    of all of them (LongRoPE, dynamic NTK): a key that is cached keeps its old one, and a call
    that reaches over the edge with its padding alone would rotate its tokens by new ones.

    Raises:
        ValueError: the configuration names no limit.
    """
    config = model.config.get_text_config(decoder=True)
    named = [getattr(config, name, None) for name in CONTEXT_NAMES]
    limits = [limit for limit in named if isinstance(limit, int)]
    if not limits:
        raise ValueError(f"names no context limit ({', '.join(CONTEXT_NAMES)})")
    return min([limits[0], *_frequency_edges(config)])


def _frequency_edges(config: Any) -> list[int]:
    """Text lengths beyond which positions are rotated by other frequencies than before."""
    rope = getattr(config, "rope_parameters", None) or {}
    by_layer_kind = [part for part in rope.values() if isinstance(part, dict)]
    changing = [p for p in (rope, *by_layer_kind) if p.get("rope_type") in ("longrope", "dynamic")]
    edges = [part.get("original_max_position_embeddings") for part in changing]
    return [edge for edge in edges if isinstance(edge, int)]


def attention_windows(model: PreTrainedModel) -> list[int]:
    """How many keys a query of a sliding or chunked layer sees, as far as the model has such."""
    config = model.config.get_text_config(decoder=True)
    named = [getattr(config, name, None) for name in WINDOW_NAMES]
    return [window for window in named if isinstance(window, int) and window > 1]


def synchronized_seconds(device: torch.device) -> float:
    """The clock, read after all work queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()
