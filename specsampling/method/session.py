"""Joins a model with its KV cache, scores tokens, and rolls back.

A session holds one sequence in a preallocated cache. Rolling back means setting `length`: the next
call overwrites what lies behind it.

The newest token is never in the cache. `score` gets the whole sequence, feeds the tokens that the
cache does not hold, and returns the last rows of logits. So a fully accepted cycle needs no special
case: the next call feeds two tokens.

With a `width`, every decode call has the same shape. It has `width` rows, real tokens first and
padding after them, and sees the cache's whole capacity. Then a row's bits do not depend on how
tokens were grouped into calls, and greedy speculative decoding is bit-exact in 16 bit. A model
whose rows never meet (`forward.ExactModel`) ignores the width.

Without a width, a call has as many rows as there are new tokens and sees only the filled part of
the cache. This is the fastest way, and speedups are measured against it. A model in a runner
(`forward.Runner`) has calls of only a few sizes, and takes the smallest size that holds the new
tokens.

This module knows nothing of sampling, drafting or text.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from specsampling.method.forward import Model, Runner, forward_of, is_exact


class Session:
    """One sequence in a model: its KV cache, its length, its calls and their time.

    Attributes:
        length: number of tokens the cache holds; set it lower to roll back.
        num_calls: forward calls after the prefill.
        forward_seconds: time inside the model, prefill included.
    """

    def __init__(self, model: Model, capacity: int, width: int | None = None):
        """Prepare a cache for `capacity` tokens.

        Args:
            model: a decoder-only model with ordinary attention in every layer.
            capacity: the longest sequence that will be scored, in tokens.
            width: rows of every decode call, or None for as many as there are new tokens.
        """
        if is_exact(model):
            width = None
        if width is not None:
            # A padded last call writes up to `width` rows. A multiple of 64 keeps blocks whole.
            capacity = -(-(capacity + width) // 64) * 64
        runner = model if isinstance(model, Runner) else None
        if runner is not None:
            capacity = max(capacity, runner.capacity)
        self.model = model
        self.device = model.device
        self.width = width
        self.capacity = capacity
        self.length = 0
        self.num_calls = 0
        self.forward_seconds = 0.0
        self._runner = runner
        self._forward = forward_of(model, capacity, context_limit(model))

    def prefill(self, tokens: Sequence[int]) -> None:
        """Feed the prompt without its newest token, in one call that computes no logits."""
        if tokens:
            with self._timed():
                self._forward.prefill(list(tokens))
            self.length = len(tokens)

    def score(self, tokens: Sequence[int], last: int) -> Tensor:
        """Feed the tokens that the cache does not hold, and score the `last` newest.

        Args:
            tokens: the whole sequence; `tokens[:length]` must be what the cache holds.
            last: how many of the newest tokens' rows to return.

        Returns:
            [last, V] logits in the model's dtype; row -1 predicts the token after `tokens`.

        Raises:
            ValueError: nothing new to feed, more than `width` tokens, or beyond the capacity.
        """
        new = list(tokens[self.length :])
        width = self.width
        if width is None and self._runner is not None:
            width = self._runner.num_rows(len(new))
            while len(new) - last >= width:  # many tokens, if the draft was unused for some cycles
                self._call(new[:width], width, 1)
                new = new[width:]
            width = self._runner.num_rows(len(new))
        return self._call(new, width, last)

    def _call(self, new: list[int], width: int | None, last: int) -> Tensor:
        """Feed `new` in one call, and return the logits of its `last` rows."""
        rows = width or len(new)
        if not last <= len(new) <= rows or not new or self.length + rows > self.capacity:
            raise ValueError(
                f"cannot feed {len(new)} tokens after {self.length} for {last} rows "
                f"(width {width}, capacity {self.capacity})"
            )
        with self._timed():
            if width is None:
                logits = self._forward.over_filled(new, self.length, last)
            else:
                padded = new + new[-1:] * (rows - len(new))
                logits = self._padded_call(padded)[len(new) - last : len(new)]
        self.num_calls += 1
        self.length += len(new)
        return logits

    def _padded_call(self, ids: list[int]) -> Tensor:
        return self._forward.over_capacity(ids, self.length)

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        start = synchronized_seconds(self.device)
        with torch.inference_mode(), _attention_kernels(self.device):
            yield
        self.forward_seconds += synchronized_seconds(self.device) - start


def _attention_kernels(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Leave cuDNN's attention out on a GPU: it makes a plan for every new number of keys.

    Each decode call of width 1 sees one key more than the last, so each would need a new plan. That
    makes calls several times slower, and so slow a baseline would flatter every speedup.
    """
    if device.type != "cuda":
        return contextlib.nullcontext()
    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(kernels)


CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "seq_length", "max_seq_len")
WINDOW_NAMES = ("sliding_window", "window_size", "attention_chunk_size")


def context_limit(model: Model) -> int:
    """Return the most tokens that a text can have.

    Texts end at the model's last position. Some models change all rotary frequencies beyond an
    earlier position (LongRoPE, dynamic NTK). Their texts end at that position. Otherwise cached
    keys would keep the old frequencies, and padding beyond it would already bring the new ones.

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
    """List the text lengths beyond which all positions are rotated by other frequencies."""
    rope = getattr(config, "rope_parameters", None) or {}
    by_layer_kind = [part for part in rope.values() if isinstance(part, dict)]
    changing = [p for p in (rope, *by_layer_kind) if p.get("rope_type") in ("longrope", "dynamic")]
    edges = [part.get("original_max_position_embeddings") for part in changing]
    return [edge for edge in edges if isinstance(edge, int)]


def attention_windows(model: Model) -> list[int]:
    """List how many keys a query sees in the model's sliding or chunked layers, if it has any."""
    config = model.config.get_text_config(decoder=True)
    named = [getattr(config, name, None) for name in WINDOW_NAMES]
    return [window for window in named if isinstance(window, int) and window > 1]


def synchronized_seconds(device: torch.device) -> float:
    """Read the clock after all work queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()
