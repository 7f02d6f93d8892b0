"""Fused layers against transformers' own."""

import copy

import pytest
import torch
from conftest import CONFIGS
from transformers import AutoModelForCausalLM, LlamaConfig

from specsampling.method.session import Session
from specsampling.models.attention import group_heads
from specsampling.models.fused import FusedLayer, fuse_layers

TOKENS = [(31 * i + 7) % 120 for i in range(60)]
BIASED = {"attention_bias": True, "mlp_bias": True}


def plain_and_fused(config, heads_per_key=2):
    """Two models of the same weights, their biases and norms not those of a fresh model."""
    config.num_key_value_heads = config.num_attention_heads // heads_per_key
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter))
    fused = copy.deepcopy(plain)
    group_heads(fused)
    fuse_layers(fused, lambda layer: None)
    assert all(isinstance(layer, FusedLayer) for layer in fused.model.layers)
    return plain, fused


CASES = {
    "llama": lambda: CONFIGS["llama"](120, 128),
    "qwen2": lambda: CONFIGS["qwen2"](120, 128),
    "llama with biases": lambda: LlamaConfig(**(CONFIGS["llama"](120, 128).to_dict() | BIASED)),
    "llama with wide heads": lambda: LlamaConfig(
        **(CONFIGS["llama"](120, 128).to_dict() | {"head_dim": 24})
    ),
}


@pytest.mark.parametrize("heads_per_key", [1, 2, 4])
@pytest.mark.parametrize("width", [None, 8])
@pytest.mark.parametrize("case", CASES)
def test_fused_layers_compute_what_transformers_do(case, width, heads_per_key):
    plain, fused = plain_and_fused(CASES[case](), heads_per_key)
    with torch.inference_mode():
        expected = plain(torch.tensor([TOKENS])).logits[0]
        torch.testing.assert_close(fused(torch.tensor([TOKENS])).logits[0], expected)
    session = Session(fused, 70, width)
    session.prefill(TOKENS[:20])
    length = 20
    for num_new in (1, 5, 1, 8, 3):
        length += num_new
        logits = session.score(TOKENS[:length], last=num_new)
        torch.testing.assert_close(logits, expected[length - num_new : length])


def test_padded_batches_with_a_mask_of_their_own():
    """As the distillation's data stage runs them."""
    plain, fused = plain_and_fused(CONFIGS["llama"](120, 128))
    ids = torch.tensor([TOKENS[:9], [0, 0, 0, *TOKENS[:6]]])
    padding = torch.tensor([0, 3])
    column = torch.arange(9)
    sees = (column <= column[:, None]) & (column >= padding[:, None, None])
    sees |= torch.eye(9, dtype=torch.bool)
    options = {
        "attention_mask": sees[:, None],
        "position_ids": (column - padding[:, None]).clamp(min=0),
    }
    with torch.inference_mode():
        expected = plain(ids, **options).logits
        torch.testing.assert_close(fused(ids, **options).logits, expected)
