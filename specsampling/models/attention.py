"""Attention of a few queries over a long cache, without copying the keys for grouped heads.

If several query heads share a key head, transformers copies keys and values for each query head
whenever there is a mask. A decode call of fixed width always has a mask. Here the queries that
share a key head become more rows of one head. This gives the same products and needs no copies.
The mask is made with these rows once per call.

Calls that gain nothing from this, such as a prefill's, go to transformers' own "sdpa".
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "grouped_sdpa_{group}"  # group: query heads per key head
MAX_ROWS = 64  # the most of a decode call; a prefill's mask would become `group` times as large
SPECIAL = ("position_bias", "softcap", "s_aux", "cache")  # options of transformers' own attention


def grouped_sdpa(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Compute attention, with the signature of transformers' implementations.

    Args:
        module: the attention layer.
        query: [batch, query heads, rows, head_dim].
        key, value: [batch, key heads, keys, head_dim].
        attention_mask: [batch, 1, rows, keys] or, as `grouped_mask` makes it, [batch, 1,
            query heads / key heads * rows, keys]; True (or 0.0) where a row sees a key. With None,
            the last row sees all keys, and each row before it sees one key less.
        dropout: 0 when decoding.
        scaling: the factor of the products, before the softmax.
        options: passed on to transformers' own attention.

    Returns:
        [batch, rows, query heads, head_dim], and None in place of attention weights.
    """
    batch, num_heads, num_rows, head_dim = query.shape
    group = num_heads // key.shape[1]
    is_grouped = attention_mask is not None and attention_mask.shape[2] == group * num_rows
    is_special = any(options.get(name) is not None for name in SPECIAL)
    is_prefill = num_rows > (1 if attention_mask is None else MAX_ROWS)
    if is_special or group == 1 or is_prefill:
        if attention_mask is not None and is_grouped:
            attention_mask = attention_mask[:, :, :num_rows]
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **options
        )
    if attention_mask is not None and not is_grouped:
        attention_mask = attention_mask.repeat(1, 1, group, 1)
    output = torch.nn.functional.scaled_dot_product_attention(
        query.reshape(batch, -1, group * num_rows, head_dim),
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=dropout,
        scale=scaling,
    )
    return output.reshape(batch, num_heads, num_rows, -1).transpose(1, 2).contiguous(), None


def grouped_mask(
    batch_size: int, q_length: int, *args: Any, group: int, dtype: torch.dtype, **options: Any
) -> Tensor | None:
    """Make a mask with the rows of `grouped_sdpa`: 0 where a row sees a key, else -inf."""
    mask = sdpa_mask(batch_size, q_length, *args, dtype=dtype, **options)
    if mask is None or q_length > MAX_ROWS:
        return mask
    added = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)
    return added.repeat(1, 1, group, 1)


def group_heads(model: PreTrainedModel) -> None:
    """Let a model whose layers share key heads attend by `grouped_sdpa`, in place.

    The caller must prove the model's logits afterwards. The layers are asked, because a
    configuration may carry a number of key heads that its architecture does not use.
    """
    if model.config._attn_implementation != "sdpa" or not model._can_set_attn_implementation():
        return
    named = (getattr(module, "num_key_value_groups", None) for module in model.modules())
    groups = {group for group in named if isinstance(group, int)}
    if len(groups) == 1 and (group := groups.pop()) > 1:
        name = NAME.format(group=group)
        AttentionInterface.register(name, grouped_sdpa)
        AttentionMaskInterface.register(name, partial(grouped_mask, group=group))
        model.set_attn_implementation(name)
