"""Writes a folder as the GGUF file that llama.cpp's converter would write, for tests alone.

The keys, their order and the tensors' layout are those of `conversion/base.py`, `llama.py`,
`qwen.py`, `gpt2.py` and `granite.py`; nothing here is taken from the code under test.
"""

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
    _add(writer, _sizes(config) | _positions(config))
    if getattr(config, "rope_parameters", {}).get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(config))
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
        kept = None if values.ndim < 2 else quantization
        packed = values if kept is None else gguf.quantize(values, kept)
        writer.add_tensor(ours, packed, raw_dtype=kept)
    for write in ("write_header", "write_kv_data", "write_tensors"):
        getattr(writer, f"{write}_to_file")()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, values: dict[str, Any]) -> None:
    for name, value in values.items():
        getattr(writer, f"add_{name}")(value)


def _sizes(config: Any) -> dict[str, Any]:
    sizes = {"type": "model", "name": "tiny", "block_count": config.num_hidden_layers}
    sizes |= {"context_length": config.max_position_embeddings}
    sizes |= {"embedding_length": config.hidden_size, "head_count": config.num_attention_heads}
    sizes["file_type"] = 0
    if config.model_type == "gpt2":
        feed_forward = {"feed_forward_length": 4 * config.n_embd}
        return sizes | feed_forward | {"layer_norm_eps": config.layer_norm_epsilon}
    sizes |= {"feed_forward_length": config.intermediate_size, "vocab_size": config.vocab_size}
    sizes |= {
        "head_count_kv": config.num_key_value_heads,
        "layer_norm_rms_eps": config.rms_norm_eps,
    }
    head_dim = getattr(config, "head_dim", None)
    if head_dim is not None:
        sizes |= {"key_length": head_dim, "value_length": head_dim}
    sizes["rope_dimension_count"] = head_dim or config.hidden_size // config.num_attention_heads
    if config.model_type == "granite":
        sizes |= {"attention_scale": config.attention_multiplier}
        sizes |= {"embedding_scale": config.embedding_multiplier}
        sizes |= {
            "residual_scale": config.residual_multiplier,
            "logit_scale": config.logits_scaling,
        }
    return sizes


def _positions(config: Any) -> dict[str, Any]:
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        return {}
    keys = {"rope_freq_base": rope["rope_theta"]}
    if rope["rope_type"] in ("linear", "yarn"):
        keys["rope_scaling_type"] = gguf.RopeScalingType(rope["rope_type"])
        keys["rope_scaling_factor"] = rope["factor"]
    if rope["rope_type"] == "yarn":
        keys["rope_scaling_orig_ctx_len"] = rope["original_max_position_embeddings"]
        keys |= {f"rope_scaling_yarn_{n}": rope[n] for n in ("beta_fast", "beta_slow") if n in rope}
    return keys


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
    kinds, tokens, types = gguf.TokenType, [], []
    for number in range(vocab_size):
        if number in added:
            tokens.append(added[number]["content"])
            types.append(kinds.CONTROL if added[number]["special"] else kinds.USER_DEFINED)
        else:
            tokens.append(spelled.get(number, f"[PAD{number}]"))
            types.append(kinds.NORMAL if number in spelled else kinds.UNUSED)
    merges = written["model"]["merges"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    header = {"tokenizer_model": "gpt2"} | ({"tokenizer_pre": pre} if pre else {})
    _add(writer, header | {"token_list": tokens, "token_types": types, "token_merges": merges})
    _add_special(writer, folder, tokens)


def _add_sentence_piece(writer: gguf.GGUFWriter, folder: Path) -> None:
    """A vocabulary whose scores are its merges' ranks, as SentencePiece trains it."""
    written = json.loads((folder / "tokenizer.json").read_text())
    ranks: dict[str, float] = {}
    for rank, merge in enumerate(written["model"]["merges"]):
        first, second = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault(first + second, -float(rank))
    vocabulary = written["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.get)
    special = {token["content"]: gguf.TokenType.CONTROL for token in written["added_tokens"]}
    special[written["model"]["unk_token"]] = gguf.TokenType.UNKNOWN
    kinds = (gguf.TokenType.NORMAL, gguf.TokenType.BYTE)
    types = [special.get(token, kinds[token.startswith("<0x")]) for token in tokens]
    _add(writer, {"tokenizer_model": "llama", "tokenizer_pre": "default", "token_list": tokens})
    scores = [ranks.get(token, -1e6) for token in tokens]
    _add(writer, {"token_scores": scores, "token_types": types})
    _add_special(writer, folder, tokens)


def _add_special(writer: gguf.GGUFWriter, folder: Path, tokens: list[str]) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        if config.get(name) in tokens:
            _add(writer, {f"{name}_id": tokens.index(config[name])})
    if config.get("add_bos_token") is not None:
        writer.add_add_bos_token(config["add_bos_token"])
    template = folder / "chat_template.jinja"
    if template.is_file():
        writer.add_chat_template(template.read_text())


def _as_the_converter_has_it(config: Any, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Rows of queries and keys in pairs, GPT-2's matrices the other way round."""
    turned = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    if config.model_type == "gpt2" and name.endswith(turned):
        return tensor.T
    if config.model_type in INTERLEAVED and (".q_proj." in name or ".k_proj." in name):
        heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
        halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
        return halves.swapaxes(1, 2).reshape(tensor.shape)
    return tensor
