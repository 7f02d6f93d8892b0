"""Generates the target's answers to many prompts at once, with its hidden state at each token.

A draft learns from the target's final hidden states. From these states and the head, all of the
target's next-token distributions follow. They come for free while the target generates.

This module knows nothing about texts, files or training.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from specsampling.method.forward import PreallocatedLayer


@dataclass
class Sequences:
    """Token sequences with the target's hidden states.

    Attributes:
        tokens: each sequence's ids, [length] long.
        hidden: each sequence's final hidden states of the target, [length - 1, d]. Row i predicts
            token i + 1.
        num_prompt_tokens: how many of a sequence's ids the target was given.
    """

    tokens: list[Tensor]
    hidden: list[Tensor]
    num_prompt_tokens: list[int]


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    temperatures: Sequence[float],
    max_new_tokens: int,
    eos_ids: Collection[int],
    generator: torch.Generator,
) -> Sequences:
    """Answer every prompt once per temperature, all in one batch.

    Prompts are padded on the left, so prompts of about the same length waste least. Answers that
    have ended leave the batch.

    Args:
        model: a Llama-like model.
        prompts: P lists of token ids.
        temperatures: 0 is greedy.
        eos_ids: ids that end an answer, and stay in the answer.
        generator: source of randomness, on the model's device.

    Returns:
        P * len(temperatures) sequences, grouped by temperature.
    """
    device = model.device
    longest = max(len(prompt) for prompt in prompts)
    padding = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)
    num_layers = model.config.num_hidden_layers
    layers = [PreallocatedLayer(longest + max_new_tokens) for _ in range(num_layers)]
    cache = Cache(layers=[*layers])
    hidden = _prefill(model, prompts, padding, cache)

    copies = len(temperatures)
    num_rows = copies * len(prompts)
    starts = padding.tolist() * copies
    tokens = [list(prompt) for _ in temperatures for prompt in prompts]
    states = [[hidden[row % len(prompts), starts[row] :]] for row in range(num_rows)]
    alive = torch.arange(num_rows, device=device)
    _keep_rows(layers, torch.arange(len(prompts), device=device).repeat(copies))
    padding = padding.repeat(copies)
    temperature = torch.tensor(temperatures, device=device).repeat_interleave(len(prompts))
    newest = hidden[:, -1].repeat(copies, 1)  # [rows, d]
    is_eos = torch.zeros(model.config.vocab_size, dtype=torch.bool, device=device)
    is_eos[list(eos_ids)] = True
    for step in range(max_new_tokens):
        chosen = _choose(model.lm_head(newest), temperature, generator)
        for row, token in zip(alive.tolist(), chosen.tolist(), strict=True):
            tokens[row].append(token)
        going = ~is_eos[chosen]
        if step == max_new_tokens - 1 or not going.any():
            break
        if not going.all():
            kept = going.nonzero()[:, 0]
            _keep_rows(layers, kept)
            alive, padding, temperature = alive[kept], padding[kept], temperature[kept]
            chosen = chosen[kept]
        for layer in layers:
            layer.length = longest + step
        column = torch.arange(longest + step + 1, device=device)
        newest = model.base_model(
            input_ids=chosen[:, None],
            attention_mask=(column >= padding[:, None])[:, None, None],
            position_ids=(longest + step - padding)[:, None],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, 0]
        for row, state in zip(alive.tolist(), newest, strict=True):
            states[row].append(state[None])
    return Sequences(
        [torch.tensor(ids) for ids in tokens],
        [torch.cat(parts).cpu() for parts in states],
        [len(prompt) for _ in temperatures for prompt in prompts],
    )


def _prefill(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], padding: Tensor, cache: Cache
) -> Tensor:
    """Feed P prompts with `padding` tokens on their left; return hidden states, [P, length, d]."""
    longest, device = len(prompts[0]) + int(padding[0]), model.device
    ids = torch.zeros(len(prompts), longest, dtype=torch.long, device=device)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt, device=device)
    column = torch.arange(longest, device=device)
    sees = (column <= column[:, None]) & (column >= padding[:, None, None])
    sees |= torch.eye(longest, dtype=torch.bool, device=device)  # else padding is NaN
    hidden: Tensor = model.base_model(
        input_ids=ids,
        attention_mask=sees[:, None],
        position_ids=(column - padding[:, None]).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    return hidden


@torch.inference_mode()
def read(model: PreTrainedModel, texts: Sequence[Sequence[int]]) -> Sequences:
    """Return the target's hidden states on token sequences of one length, [P, length]."""
    ids = torch.tensor(texts, device=model.device)
    hidden = model.base_model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    return Sequences(list(ids.cpu()), list(hidden.cpu()), [1] * len(ids))


def _choose(logits: Tensor, temperature: Tensor, generator: torch.Generator) -> Tensor:
    """Choose [rows] ids by [rows, V] logits and [rows] temperatures."""
    greedy = logits.argmax(-1)
    drawn = temperature > 0
    if not drawn.any():
        return greedy
    probs = (logits[drawn].float() / temperature[drawn, None]).softmax(-1)
    uniform = torch.rand(len(probs), 1, generator=generator, device=logits.device)
    sums = probs.cumsum(-1)
    sampled = torch.searchsorted(sums, uniform * sums[:, -1:])[:, 0]
    greedy[drawn] = sampled.clamp(max=logits.shape[1] - 1)
    return greedy


def _keep_rows(layers: Sequence[PreallocatedLayer], rows: Tensor) -> None:
    for layer in layers:
        assert layer.keys is not None and layer.values is not None
        layer.keys, layer.values = layer.keys[rows], layer.values[rows]
