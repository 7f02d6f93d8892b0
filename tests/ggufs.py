"""Writes a folder as the GGUF file that llama.cpp's converter would write, for tests alone.

The keys, their order and the tensors' layout are those of `conversion/base.py`, `llama.py`,
`qwen.py`, `gpt2.py` and `granite.py`; nothing here is taken from the code under test.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "granite": gguf.MODEL_ARCH.GRANITE,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gpt2": gguf.MODEL_ARCH.GPT2,
}
INTERLEAVED = ("llama", "mistral", "granite")
Extra = Callable[[gguf.GGUFWriter], None]


def write_gguf(
    folder: Path,
    path: Path,
    pre: str = "gpt-2",
    quantization: gguf.GGMLQuantizationType | None = None,
    extra: Extra = lambda writer: None,
    without: str = "\0",
    kind: str = "gpt2",
) -> Path:
    """Write a folder's model and tokenizer.

    Args:
        folder: as `save_pretrained` makes it.
        path: of the file.
        pre: what the header calls the tokenizer's splits; "" for none.
        quantization: of matrices; None keeps float32.
        extra: adds keys and tensors.
        without: keys and tensors that contain this are left out.
        kind: of the tokenizer: "gpt2" or "llama".
    """
    config = AutoConfig.from_pretrained(folder)
    architecture = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    _add_sizes(writer, config)
    if getattr(config, "rope_parameters", None):
        _add_positions(writer, config)
    if kind == "gpt2":
        _add_byte_level(writer, folder, config.vocab_size, pre)
    else:
        _add_sentence_piece(writer, folder)
    extra(writer)
    for part in writer.kv_data:
        for key in [key for key in part if without in f".{key}"]:
            del part[key]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    tied = set(model.all_tied_weights_keys) if config.tie_word_embeddings else set()
    for name, tensor in model.state_dict().items():
        stem, _, suffix = name.rpartition(".")
        ours = f"{names.get_name(stem)}.{suffix}"
        if name in tied or without in f".{ours}":
            continue
        values = _as_the_converter_has_it(config, name, tensor).contiguous().numpy()
        if quantization is None or values.ndim < 2:
            writer.add_tensor(ours, values)
        else:
            packed = gguf.quantize(values, quantization)
            writer.add_tensor(ours, packed, raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_sizes(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_type("model")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_file_type(0)
    if config.model_type == "gpt2":
        writer.add_feed_forward_length(4 * config.n_embd)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    head_dim = getattr(config, "head_dim", None)
    if head_dim is not None:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim or config.hidden_size // config.num_attention_heads)
    if config.model_type == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)


def _add_positions(writer: gguf.GGUFWriter, config: Any) -> None:
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        if "beta_fast" in rope:
            writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        if "beta_slow" in rope:
            writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
    elif rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(config))


def llama3_factors(config: Any) -> np.ndarray:
    """Each frequency of transformers' plain positions over that of its scaled ones."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    head_dim = 2 * len(scaled)
    theta = config.rope_parameters["rope_theta"]
    plain = 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    return (plain / scaled).numpy()


def _add_byte_level(writer: gguf.GGUFWriter, folder: Path, vocab_size: int, pre: str) -> None:
    written = json.loads((folder / "tokenizer.json").read_text())
    added = {token["id"]: token for token in written["added_tokens"]}
    spelled = {number: token for token, number in written["model"]["vocab"].items()}
    tokens, types = [], []
    for number in range(vocab_size):
        if number in added:
            token, is_special = added[number]["content"], added[number]["special"]
            types.append(gguf.TokenType.CONTROL if is_special else gguf.TokenType.USER_DEFINED)
        elif number in spelled:
            token = spelled[number]
            types.append(gguf.TokenType.NORMAL)
        else:
            token = f"[PAD{number}]"
            types.append(gguf.TokenType.UNUSED)
        tokens.append(token)
    writer.add_tokenizer_model("gpt2")
    if pre:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = written["model"]["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    _add_special(writer, folder, tokens)


def _add_sentence_piece(writer: gguf.GGUFWriter, folder: Path) -> None:
    """A vocabulary whose scores are its merges' ranks, as SentencePiece trains it."""
    written = json.loads((folder / "tokenizer.json").read_text())
    ranks: dict[str, float] = {}
    for rank, merge in enumerate(written["model"]["merges"]):
        first, second = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault(first + second, -float(rank))
    tokens, scores, types = [], [], []
    special = {token["content"] for token in written["added_tokens"]}
    vocabulary = sorted(written["model"]["vocab"].items(), key=lambda item: item[1])
    for token, _ in vocabulary:
        tokens.append(token)
        scores.append(ranks.get(token, -1e6))
        if token in special:
            unknown = token == written["model"]["unk_token"]
            types.append(gguf.TokenType.UNKNOWN if unknown else gguf.TokenType.CONTROL)
        elif token.startswith("<0x"):
            types.append(gguf.TokenType.BYTE)
        else:
            types.append(gguf.TokenType.NORMAL)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    _add_special(writer, folder, tokens)


def _add_special(writer: gguf.GGUFWriter, folder: Path, tokens: list[str]) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for name, add in (
        ("bos_token", writer.add_bos_token_id),
        ("eos_token", writer.add_eos_token_id),
        ("unk_token", writer.add_unk_token_id),
        ("pad_token", writer.add_pad_token_id),
    ):
        if config.get(name) in tokens:
            add(tokens.index(config[name]))
    if config.get("add_bos_token") is not None:
        writer.add_add_bos_token(config["add_bos_token"])
    template = folder / "chat_template.jinja"
    if template.is_file():
        writer.add_chat_template(template.read_text())


def _as_the_converter_has_it(config: Any, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Rows of queries and keys in pairs, GPT-2's matrices the other way round."""
    if config.model_type == "gpt2" and name.endswith(
        ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    ):
        return tensor.T
    if config.model_type in INTERLEAVED:
        for part, heads in (
            (".q_proj.", config.num_attention_heads),
            (".k_proj.", config.num_key_value_heads),
        ):
            if part in name:
                halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
                return halves.swapaxes(1, 2).reshape(tensor.shape)
    return tensor
