"""A table of tiny random models: every architecture that a user may name, and what must happen.

Each is two layers of a few dozen numbers, made from its configuration alone, with weights large
enough that a greedy text varies, saved as a user's folder is. Knows what transformers calls the
architectures; knows nothing of how this package decodes them.
"""

import inspect
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB_SIZE = 120
CONTEXT = 128
WINDOW = 16  # of the sliding layers: shorter than most prompts
WEIGHT_SCALE = 0.3
TIED_SCALE = 0.02

EQUAL = "equal to generate"
REFUSED = "refused"

# What a configuration is told of these, where it knows the word.
SMALL = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": CONTEXT,
    "sliding_window": WINDOW,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "initializer_range": WEIGHT_SCALE,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


@dataclass(frozen=True)
class Architecture:
    """One line of the table.

    Attributes:
        name: how the tests call it.
        model_type: transformers' word for it.
        settings: what its configuration is told besides `SMALL`.
        expected: `EQUAL` or `REFUSED`.
        word: what the line of the refusal must contain; None for anything.
        is_common: it runs in the default suite.
        has_encoder: saved as an encoder with its decoder, of which a user loads the decoder.
    """

    name: str
    model_type: str
    settings: dict[str, Any] = field(default_factory=dict)
    expected: str = EQUAL
    word: str | None = None
    is_common: bool = False
    has_encoder: bool = False

    @property
    def exists(self) -> bool:
        """Whether this transformers knows it."""
        return self.model_type in (
            CONFIG_MAPPING if self.has_encoder else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        )

    def config(self) -> PreTrainedConfig:
        """The tiny configuration."""
        config_class = CONFIG_MAPPING[self.model_type]
        known = _known_words(config_class)
        small = {word: value for word, value in SMALL.items() if word in known}
        return config_class(**{**small, **self.settings})

    def model(self, seed: int = 0) -> PreTrainedModel:
        """A random float32 model."""
        torch.manual_seed(seed)
        factory = AutoModelForSeq2SeqLM if self.has_encoder else AutoModelForCausalLM
        model = factory.from_config(self.config()).eval()
        enlarge_weights(model, seed)
        model.generation_config = GenerationConfig(pad_token_id=0)  # nothing forced, no end
        return model

    def save(self, folder: Path, seed: int = 0) -> None:
        """The model and a tokenizer, as `save_pretrained` writes them."""
        self.model(seed).save_pretrained(folder)
        make_character_tokenizer().save_pretrained(folder)


def _known_words(config_class: type[PreTrainedConfig]) -> set[str]:
    """The names that a configuration takes; others would be kept and mean nothing."""
    known = set(inspect.signature(config_class.__init__).parameters)
    known |= set(config_class.attribute_map)
    for parent in config_class.__mro__:
        known |= set(getattr(parent, "__annotations__", {}))
    return known


def enlarge_weights(model: PreTrainedModel, seed: int) -> None:
    """Random matrices of one scale: as they are made, many architectures repeat one token."""
    generator = torch.Generator().manual_seed(seed)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head.weight if head.weight is embedding.weight else None
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2 and parameter.is_floating_point():
                # A large tied embedding makes each token its own most probable successor.
                scale = TIED_SCALE if parameter is tied else WEIGHT_SCALE
                parameter.normal_(0.0, scale, generator=generator)


def make_character_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each printable character, fewer than the models have."""
    vocabulary = {token: i for i, token in enumerate(["<unk>", *string.printable[:95]])}
    characters = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=characters, unk_token="<unk>")


def rope(kind: str, **settings: Any) -> dict[str, Any]:
    """Rotary positions scaled in one of transformers' ways."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **settings}}


def long_rope(original: int) -> dict[str, Any]:
    """LongRoPE for six frequencies, one table up to `original` tokens and another beyond."""
    factors = {"short_factor": [1.0] * 6, "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 4.0]}
    original_length = {"original_max_position_embeddings": original}
    return rope("longrope", **factors, **original_length, factor=CONTEXT / original)


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
SLIDING_FIRST = {"layer_types": ["sliding_attention", "full_attention"]}
PER_LAYER = {"vocab_size_per_layer_input": VOCAB_SIZE, "hidden_size_per_layer_input": 16}
SHARED = {"num_hidden_layers": 4, "num_kv_shared_layers": 2}
SHARED |= {"layer_types": SLIDING_FIRST["layer_types"] * 2}
HALF_ROTARY = rope("default", partial_rotary_factor=0.5)
LATENT = {"num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 24}  # attention
LATENT |= {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12}
GROUPED_EXPERTS = {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
SOME_IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
UNUSED_HEADS = {"num_key_value_heads": 2}  # a word that the architecture does not know
INDEXED = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": WINDOW}  # sparse attention
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 12, "mamba_d_state": 16, "mamba_chunk_size": 16}
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}  # gated delta rule
LINEAR |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
LINEAR |= {"linear_key_head_dim": 12, "linear_value_head_dim": 12}
PARALLEL = {"use_parallel_residual": True, "qk_layernorm": True}
LONGCAT = {"head_dim": 8, "num_layers": 2, "ffn_hidden_size": 96, "expert_ffn_hidden_size": 32}
LONGCAT |= {"moe_topk": 2, "zero_expert_num": 2}
ALIBI = {"alibi": True, "multi_query": False, "bias": True}
CHUNKED = {"intermediate_size_mlp": 96, "interleave_moe_layer_step": 2}
CHUNKED |= {"attention_chunk_size": WINDOW, "no_rope_layers": [1, 0]}
CHUNKED |= {"layer_types": ["chunked_attention", "full_attention"]}
COMPRESSED = ["compressed_sparse_attention", "heavily_compressed_attention"]
DEEPSEEK_V4 = {"q_lora_rank": 24, "o_lora_rank": 16, "o_groups": 2, "num_key_value_heads": 1}
DEEPSEEK_V4 |= {"index_n_heads": 2, "index_head_dim": 12, "hc_mult": 2}
DEEPSEEK_V4 |= {"partial_rotary_factor": 0.5, "mlp_layer_types": ["hash_moe", "moe"]}
DEEPSEEK_V4 |= {"layer_types": COMPRESSED, "compress_rates": dict(zip(COMPRESSED, (4, 8)))}
ZAMBA2 = {"num_hidden_layers": 3, "layers_block_type": ["mamba", "mamba", "hybrid"]}
ZAMBA2 |= {"n_mamba_heads": 8, "mamba_d_state": 16, "chunk_size": 16, "adapter_rank": 8}
GRIFFIN = {"num_hidden_layers": 3, "attention_window_size": WINDOW, "lru_width": 48}


SMALL_ENCODER = {"encoder_layers": 1, "encoder_ffn_dim": 48, "encoder_attention_heads": 4}
SMALL_ENCODER |= {"decoder_layers": 2, "decoder_ffn_dim": 96, "decoder_attention_heads": 4}
T5 = {"d_model": 48, "d_kv": 12, "d_ff": 96, "num_layers": 2, "num_heads": 4}


def common(name: str, model_type: str, **settings: Any) -> Architecture:
    return Architecture(name, model_type, settings, is_common=True)


def rare(name: str, model_type: str, **settings: Any) -> Architecture:
    return Architecture(name, model_type, settings)


def refused(
    name: str, model_type: str, word: str | None = None, is_common: bool = False, **settings: Any
) -> Architecture:
    return Architecture(name, model_type, settings, REFUSED, word, is_common)


def plain(kind: Callable[..., Architecture], names: str) -> Iterator[Architecture]:
    """Architectures without settings of their own, by `name` or `name=model_type`."""
    for name, _, model_type in (word.partition("=") for word in names.split()):
        yield kind(name, model_type or name.replace("-", "_").replace(".", "_"))


DECODED = (
    rare("llama-linear", "llama", **rope("linear", factor=2.0)),
    rare("llama-dynamic", "llama", **rope("dynamic", factor=2.0)),
    rare("llama-yarn", "llama", **rope("yarn", factor=4.0, original_max_position_embeddings=32)),
    common("llama3", "llama", **rope("llama3", factor=8.0, **LLAMA3)),
    rare("llama-longrope", "llama", **long_rope(96)),
    rare("llama-tied", "llama", tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    rare("mistral", "mistral", sliding_window=None),
    common("qwen2-sliding", "qwen2", use_sliding_window=True, max_window_layers=1, **SLIDING_FIRST),
    rare("qwen3-sliding", "qwen3", use_sliding_window=True, **SLIDING_FIRST),
    common("gemma3", "gemma3_text", **SLIDING_FIRST),
    rare("gemma3n", "gemma3n_text", **SHARED, **PER_LAYER, laurel_rank=8),
    rare("gemma4", "gemma4_text", **SLIDING_FIRST, **PER_LAYER),
    rare("gemma4-shared", "gemma4_text", **SHARED, **PER_LAYER, global_head_dim=24),
    common("phi3-longrope", "phi3", **long_rope(96), original_max_position_embeddings=96),
    rare("gpt-neo", "gpt_neo", attention_types=[[["global", "local"], 1]], window_size=WINDOW),
    rare("gpt-j", "gptj", rotary_dim=8),
    common("gpt-neox-unused-heads", "gpt_neox", **UNUSED_HEADS),
    rare("persimmon-unused-heads", "persimmon", **UNUSED_HEADS),
    rare("biogpt-unused-heads", "biogpt", **UNUSED_HEADS),
    common("opt", "opt", ffn_dim=96, word_embed_proj_dim=48),
    rare("opt-projected", "opt", ffn_dim=96, word_embed_proj_dim=24),
    common("bloom", "bloom", seq_length=CONTEXT),
    common("falcon-new", "falcon", new_decoder_architecture=True, num_kv_heads=2),
    rare("stablelm", "stablelm", **HALF_ROTARY),
    rare("stablelm-parallel", "stablelm", **HALF_ROTARY, **PARALLEL),
    rare("granite-moe-shared", "granitemoeshared", shared_intermediate_size=32),
    rare("olmo3", "olmo3", **SLIDING_FIRST),
    common("cohere2", "cohere2", **SLIDING_FIRST),
    rare("gpt-bigcode-heads", "gpt_bigcode", multi_query=False, n_head=4),
    # Its configuration says 12 key heads where the layers have 4.
    rare("gpt-bigcode-misnamed-heads", "gpt_bigcode", multi_query=False, num_attention_heads=4),
    common("mpt", "mpt", max_seq_len=CONTEXT),
    rare("glm4-moe", "glm4_moe", first_k_dense_replace=1),
    rare("smollm3", "smollm3", no_rope_layers=[1, 0]),
    rare("deepseek-v2", "deepseek_v2", **LATENT, first_k_dense_replace=1),
    common("deepseek-v3", "deepseek_v3", **LATENT, **GROUPED_EXPERTS),
    rare("minicpm3", "minicpm3", **LATENT),
    common("jetmoe", "jetmoe", kv_channels=12, num_key_value_heads=2),
    rare("doge-window", "doge", keep_window_size=WINDOW),
    rare("longcat-flash", "longcat_flash", **LATENT, **LONGCAT),
    rare("llama4", "llama4_text", **CHUNKED),
    rare("codegen", "codegen", rotary_dim=8),
    rare("xglm", "xglm", ffn_dim=96),
    rare("exaone4", "exaone4", **SLIDING_FIRST),
    rare("ernie4.5-moe", "ernie4_5_moe", moe_k=2, moe_num_experts=4, moe_layer_start_index=0),
    rare("dots1", "dots1", first_k_dense_replace=1, n_shared_experts=1),
    rare("ctrl", "ctrl", dff=96),
    rare("exaone-moe", "exaone_moe", first_k_dense_replace=1),
    rare("glm4-moe-lite", "glm4_moe_lite", **LATENT),
    rare("youtu", "youtu", **LATENT),
    rare("modernbert-decoder", "modernbert-decoder", local_attention=WINDOW, **SOME_IDS),
    rare("bart-decoder", "bart", **SMALL_ENCODER),
    rare("bert-decoder", "bert", is_decoder=True),
    *plain(
        common,
        "llama mistral-sliding=mistral qwen2 qwen3 mixtral gemma2 phi3 gpt2 gpt-neox gpt-oss",
    ),
    *plain(
        rare,
        "ministral qwen2-moe qwen3-moe olmoe gemma phi gpt-neox-japanese persimmon biogpt "
        "falcon-multi-query=falcon granite granite-moe=granitemoe granite-swa olmo olmo2 "
        "cohere starcoder2 gpt-bigcode glm glm4 doge nemotron arcee ernie4.5 helium apertus "
        "phimoe seed-oss hunyuan=hunyuan_v1_dense diffllama bitnet nanochat vaultgemma "
        "minimax-m2 flex-olmo afmoe ministral3 cohere2-moe mimo-v2-flash "
        "hunyuan-moe=hunyuan_v1_moe solar-open laguna jais2",
    ),
)

UNDECODABLE = (
    refused("falcon-alibi", "falcon", "preallocated cache", True, **ALIBI),
    refused("deepseek-v4", "deepseek_v4", **DEEPSEEK_V4),
    # Their indexers keep keys of their own.
    refused("deepseek-v3.2", "deepseek_v32", **LATENT, **GROUPED_EXPERTS, **INDEXED),
    refused("glm-dsa", "glm_moe_dsa", **LATENT, **INDEXED),
    refused("lfm2", "lfm2", is_common=True, layer_types=["conv", "full_attention"]),
    refused("jamba", "jamba", attn_layer_offset=1, attn_layer_period=2, use_mamba_kernels=False),
    refused("bamba", "bamba", attn_layer_indices=[1], **MAMBA),
    refused("granite-hybrid", "granitemoehybrid", layer_types=["mamba", "attention"], **MAMBA),
    refused("falcon-h1", "falcon_h1", mamba_d_ssm=96, **MAMBA),
    refused("qwen3-next", "qwen3_next", is_common=True, **LINEAR),
    refused("qwen3.5", "qwen3_5_text", **LINEAR),
    refused("qwen3.5-moe", "qwen3_5_moe_text", **LINEAR),
    refused("minimax", "minimax", block_size=16),
    refused("zamba2", "zamba2", **ZAMBA2, use_mamba_kernels=False),
    refused("recurrent-gemma", "recurrent_gemma", is_common=True, **GRIFFIN),
    refused("rwkv", "rwkv", is_common=True, context_length=CONTEXT),
    refused("mamba", "mamba", is_common=True),
    refused("mamba2", "mamba2", num_heads=8, n_groups=2, state_size=16, chunk_size=16),
    refused("xlstm", "xlstm", num_heads=4),
    refused("openai-gpt", "openai-gpt", is_common=True),
    refused("bert", "bert", is_common=True),
    refused("roberta", "roberta", max_position_embeddings=CONTEXT + 2, pad_token_id=1),
    refused("electra", "electra", embedding_size=48),
    refused("xlnet", "xlnet", n_head=4, d_head=12, d_inner=96),
    Architecture("bart", "bart", SMALL_ENCODER, REFUSED, has_encoder=True),
    Architecture("pegasus", "pegasus", SMALL_ENCODER, REFUSED, has_encoder=True),
    Architecture("t5", "t5", T5, REFUSED, "are encoder-decoders", True, has_encoder=True),
    refused("lfm2-moe", "lfm2_moe", layer_types=["conv", "full_attention"], num_dense_layers=1),
    refused("olmo-hybrid", "olmo_hybrid", **LINEAR),
    refused("kimi-linear", "kimi_linear", **LATENT, layer_types=LINEAR["layer_types"]),
    *plain(refused, "falcon-mamba xlm nemotron-h"),
)

# "target-layers:N" need not know where their layers are; it must say so in one line.
NO_SELF_DRAFT = frozenset({"gemma3n", "gemma4", "gemma4-shared", "longcat-flash"})

SMALL_DRAFT = Architecture("small-draft", "llama", {"num_hidden_layers": 1})

ARCHITECTURES = {architecture.name: architecture for architecture in (*DECODED, *UNDECODABLE)}

# The table of frequencies changes within the text: beyond 64 tokens, or at the context's end.
CROSSING = {
    architecture.name: architecture
    for architecture in (
        rare("phi3-longrope", "phi3", **long_rope(64), original_max_position_embeddings=64),
        rare("llama-longrope", "llama", **long_rope(64)),
        rare("llama-dynamic", "llama", **rope("dynamic", factor=2.0)),
    )
}
