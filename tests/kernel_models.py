"""Tiny random models of what the kernel knows, and how tests pack, call and compile them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    GPTNeoConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from specsampling.kernel import engine, weights
from specsampling.kernel.build import FLAGS_VARIABLE
from specsampling.models.packing import pack_model, why_not

PLAIN_FORMATS = ("float32", "float16", "bfloat16", "int8", "Q4_0")
CONTEXT = 4096


def _sizes(hidden: int, inner: int, heads: int, key_heads: int, dim: int, vocab: int) -> dict:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "head_dim": dim,
        "vocab_size": vocab,
        "num_hidden_layers": 3,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": False,
    }


def _rope(kind: str, **values: Any) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **values}}


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# No size is a multiple of what the kernel pads to, where an architecture allows it.
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**_sizes(40, 72, 4, 2, 8, 75)),
    "llama-biases": LlamaConfig(**_sizes(54, 90, 6, 3, 20, 83), attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**_sizes(72, 100, 4, 1, 16, 101), sliding_window=24),
    "qwen2": Qwen2Config(**_sizes(80, 136, 6, 2, 32, 131)),
    "qwen2-window": Qwen2Config(
        **_sizes(44, 68, 4, 4, 20, 90),
        use_sliding_window=True,
        sliding_window=19,
        max_window_layers=1,
    ),
    "qwen3": Qwen3Config(**_sizes(70, 110, 4, 2, 64, 93)),
    "gpt_neo": GPTNeoConfig(
        vocab_size=77,
        hidden_size=60,
        num_layers=4,
        num_heads=3,
        bos_token_id=0,
        eos_token_id=0,
        attention_types=[[["global", "local"], 2]],
        window_size=21,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
    ),
}
OTHERS: dict[str, Any] = {
    "tied": LlamaConfig(**_sizes(40, 72, 4, 2, 8, 75) | {"tie_word_embeddings": True}),
    "gpt_neo-tied": GPTNeoConfig(
        vocab_size=77,
        hidden_size=96,
        num_layers=2,
        num_heads=3,
        bos_token_id=0,
        eos_token_id=0,
        attention_types=[[["global", "local"], 1]],
        window_size=21,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
    ),
    "llama3": LlamaConfig(**_sizes(64, 96, 4, 2, 16, 80), **_rope("llama3", **LLAMA3)),
    "linear": LlamaConfig(**_sizes(64, 96, 4, 2, 16, 80), **_rope("linear", factor=4.0)),
    "yarn": Qwen2Config(
        **_sizes(64, 96, 4, 2, 16, 80),
        **_rope("yarn", factor=64.0, original_max_position_embeddings=64),
    ),
    "wide-heads": LlamaConfig(**_sizes(64, 96, 2, 1, 256, 80)),
}


def make_model(config: Any, seed: int = 0) -> PreTrainedModel:
    """A random model in which biases and norms differ from what they begin with."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight.normal_(std=0.8 / weight.shape[1] ** 0.5 if "embed" not in name else 0.6)
            else:
                weight.normal_(mean=0.0 if name.endswith("bias") else 1.0, std=0.3)
    return model


def pack(
    model: PreTrainedModel,
    library: Any,
    format: str,
    head_tokens: torch.Tensor | None = None,
) -> engine.Model:
    """A model in the kernel's form, all of its layers in one format."""
    assert why_not(model) == ""
    packer = weights.Packer(library, 1)
    head = model.get_output_embeddings()
    if head_tokens is not None:
        trimmed = torch.nn.Linear(head.in_features, len(head_tokens), bias=False)
        trimmed.weight.data = head.weight.data[head_tokens]
        head = trimmed

    def packed(name, linear, rows=None, columns=None):
        return packer.plain(linear.weight.data, format, linear.bias, rows, columns)

    return pack_model(model, library, packed, head, head_tokens)


def score(model: engine.Model, *requests: tuple) -> list[torch.Tensor]:
    """Logits of requests: (cache, ids, where they start, how many are scored)."""
    return model.run([engine.Request(*request) for request in requests])


def feed(
    model: engine.Model, ids: Sequence[int], widths: Iterator[int], cache=None
) -> torch.Tensor:
    """[n, vocabulary] logits of a text, fed in calls of the given numbers of rows."""
    cache = cache or model.make_cache(len(ids))
    found, at = [], 0
    while at < len(ids):
        part = ids[at : at + next(widths)]
        found += score(model, (cache, part, at, len(part)))
        at += len(part)
    return torch.cat(found)


def always(width: int) -> Iterator[int]:
    while True:
        yield width


def random_widths(rng: np.random.Generator, most: int = 32) -> Iterator[int]:
    while True:
        yield int(rng.integers(1, most + 1))


def random_ids(model: engine.Model, num: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, model.sizes["vocabulary"], num).tolist()


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


# What a variant of the kernel is compiled with, and what a processor must have for it.
VARIANTS = {
    "AVX2": ("-march=haswell", {"avx2", "fma", "f16c"}),
    "AVX2 with VNNI": ("-march=alderlake", {"avx2", "fma", "f16c", "avx_vnni", "gfni", "vaes"}),
    "AVX-512 without AMX": (
        "-march=native -mno-amx-tile -mno-amx-int8 -mno-amx-bf16",
        {"avx512_vnni", "amx_int8"},
    ),
    "plain C": ("-march=x86-64-v3 -DPLAIN_C", {"avx2", "fma"}),
    "plain C, no FMA": ("-march=x86-64 -DPLAIN_C", {"sse2"}),
}


def processor_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(next((line for line in lines if line.startswith("flags")), "").split())


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """Variables of the environment, for as long as the block runs."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def compiled(folder: Path, flags: str) -> Any:
    """The kernel for another processor than this one."""
    with environment(**{FLAGS_VARIABLE: flags}):
        return engine.library(folder)
