"""A checkpoint is whole, proved and asked before it decodes: never wrong in silence."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model
from helpers import change_json, error_line
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForSeq2SeqLM, T5Config

from autoregressive import autoregressive
from specsampling.kernel.build import KernelError
from specsampling.method.drafts import ModelDraft, NgramDraft, first_layers
from specsampling.method.sampling import Sampling, probs_from_logits
from specsampling.method.session import Session, context_limit
from specsampling.models import attention, checkpoint, exactness, kernel_model, memory
from specsampling.models import tokenizer as models_tokenizer
from specsampling.models.attention import MAX_ROWS, grouped_mask
from specsampling.models.checkpoint import load_model
from specsampling.models.errors import ModelError
from specsampling.models.exactness import check_exactness, prove_decoding, require_decodable
from specsampling.models.kernel_model import KernelModel
from specsampling.models.load import load_pair
from specsampling.models.tokenizer import end_ids, num_appended
from specsampling.tasks.task import StopStrings
from speculative import speculative

CPU = torch.device("cpu")
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def folder(model_folders, tmp_path) -> Path:
    """A copy of a Llama's folder, to be broken."""
    return Path(shutil.copytree(model_folders["llama-target"], tmp_path / "model"))


def change_tensors(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file(change(tensors), path, metadata={"format": "pt"})


def without(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: t for name, t in tensors.items() if part not in name}


def load(folder: Path | str, draft: str = "ngram", dtype: str = "float32", **options: Any) -> Any:
    return load_pair(str(folder), draft, device="cpu", dtype=dtype, **options)


def refusal(folder: Path | str, draft: str = "ngram", dtype: str = "float32") -> str:
    return error_line(ModelError, load, folder, draft, dtype)


# --- every tensor accounted for --------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "settings", "words"),
    [
        (without("lm_head"), {}, "lacks tensors that the model needs (1: lm_head.weight)"),
        (without("layers.1."), {}, "lacks tensors that the model needs (9: model.layers.1."),
        (without("layers.0.mlp.up"), {}, "(1: model.layers.0.mlp.up_proj.weight)"),
        (without("norm"), {}, "lacks tensors"),
        (dict, {"num_hidden_layers": 3}, "lacks tensors that the model needs (9: model.layers.2."),
        (dict, {"num_hidden_layers": 1}, "config.json leaves out (9: model.layers.1."),
        (dict, {"intermediate_size": 80}, "of another shape than its config.json says"),
        (dict, {"vocab_size": 300}, "of another shape than its config.json says"),
    ],
)
def test_a_tensor_left_to_chance_is_refused_by_name(change, settings, words, folder):
    """A checkpoint without a head decoded noise, another text each run, exit code 0."""
    change_tensors(folder, change)
    change_json(folder / "config.json", **settings)
    assert words in refusal(folder)


def test_a_tied_head_needs_no_tensor(folder):
    change_tensors(folder, without("lm_head"))
    change_json(folder / "config.json", tie_word_embeddings=True)
    target = load(folder, compile="off").target
    assert target.lm_head.weight is target.model.embed_tokens.weight


def test_code_of_a_checkpoint_is_not_asked_for(folder, monkeypatch):
    """transformers asked on stdin whether to run it, and waited."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on stdin"))
    auto_map = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    change_json(folder / "config.json", model_type="its-own", auto_map=auto_map)
    assert "auto_map" in refusal(folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("model.safetensors", content) for content in (b"", b"x" * 100)),
        *(("config.json", content) for content in (b"{", b'{"model_type": "nonsense"}')),
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b'{"version": "9.0", "model": {"type": "Later"}}'),
        *(("m.gguf", content) for content in (b"", b"GGUF\x03\0\0\0" + bytes(40), b"nope" * 50)),
    ],
)
def test_broken_files_are_one_line(name, content, folder):
    (folder / name).write_bytes(content)
    assert "cannot load" in refusal(folder / name if name == "m.gguf" else folder)


LOCAL, LIMIT = "download or convert it again", "raise what `ulimit -v` shows"


@pytest.mark.parametrize("part", ["model", "tokenizer"])
@pytest.mark.parametrize(
    ("error", "said", "way_out"),
    [
        (MemoryError(), "out of memory (MemoryError)", LIMIT),
        (RuntimeError("[x.cpp] CPUAllocator: can't allocate memory"), ": out of memory ([x", LIMIT),
        (RuntimeError("unable to mmap 9 bytes: Cannot allocate memory (12)"), ": out of", LIMIT),
        (OSError(12, "Cannot allocate memory"), ": out of memory ([Errno 12]", LIMIT),
        (RuntimeError("can't start new thread"), ": out of memory (can't start", LIMIT),
        (
            ImportError("a.so: failed to map segment from shared file"),
            ": out of memory (a.so",
            LIMIT,
        ),
        (PermissionError(13, "denied", "a.json"), "([Errno 13]", "see that you may read"),
        (ValueError("x: it does not recognize this architecture"), "(x", "-U transformers"),
        (OSError("Error no file named model.safetensors"), "(Error no file", LOCAL),
        (ValueError("Validation error for field 'a':\n  an integer"), "'a': an integer)", LOCAL),
    ],
    ids=lambda value: "",
)
def test_what_fails_has_the_way_out_of_its_cause(part, error, said, way_out, folder, monkeypatch):
    """Too little memory, a missing right and a broken file in a folder: "check the network"."""

    def fail(*_, **__):
        raise error

    module = checkpoint if part == "model" else models_tokenizer
    monkeypatch.setattr(module, f"read_{part}", fail)
    message = refusal(folder)
    assert said in message and way_out in message and "network" not in message


@pytest.mark.parametrize("part", ["read_model", "to_kernel"])
def test_memory_behind_another_error_or_in_fast_layers_is_memory(part, folder, monkeypatch):
    """Libraries say "cannot load", and the model was read again with transformers' layers."""

    def fail(*_, **__):
        try:
            raise MemoryError
        except MemoryError as error:
            raise OSError("unable to load weights") from error

    monkeypatch.setattr(checkpoint, part, fail)
    assert "out of memory (unable to load weights)" in refusal(folder)


@pytest.mark.parametrize(
    "spec",
    ["./models/x", "../x", "/abs/x", "models/a/b/c", "C:\\x", "C:/x", "~/x", "x/", "a/x.gguf"],
)
def test_a_folder_that_is_not_there_is_no_hub_id(spec):
    """ "Repo id must use alphanumeric characters" was said of a path."""
    assert f"cannot load model {spec}: it is not there, seen from {Path.cwd()}" in refusal(spec)


def test_a_file_of_a_model_is_no_model(folder):
    path = folder / "model.safetensors"
    assert f"{path}: it is a file" in refusal(path) and str(folder) in refusal(path)


MISSING = {"weight_map": {"a": "model-1.safetensors"}}


@pytest.mark.parametrize(
    ("index", "words"),
    [
        (MISSING, "model-1.safetensors is missing, which model"),
        ({}, "is no index of weights (KeyError('weight_map'))"),
        ([1], "is no index of weights"),
    ],
)
def test_a_shard_that_the_index_names_and_that_is_missing_is_named(index, words, folder):
    """ "check the name and the network" was said of a folder with a file too few."""
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    message = refusal(folder)
    assert words in message and message.endswith("download it again")


def test_a_newer_librarys_tokenizer_says_what_to_install(folder):
    path = folder / "tokenizer.json"
    change_json(path, pre_tokenizer={"type": "FromTheFuture"})
    assert "pip install -U tokenizers" in refusal(folder)


def test_tokenizers_are_compared_before_weights_are_read(folder, model_folders, tmp_path):
    """Gigabytes were loaded before a draft of another family was refused."""
    other = tmp_path / "other"
    shutil.copytree(model_folders["llama-draft"], other)
    (other / "model.safetensors").unlink()
    change_json(other / "tokenizer.json", pre_tokenizer={"type": "Whitespace"})
    message = refusal(folder, str(other))
    assert "must share its tokenizer" in message and str(other) in message


# --- what can be decoded ---------------------------------------------------------------


def test_an_encoder_decoder_is_refused(tmp_path, tokenizer):
    config = T5Config(d_model=16, d_ff=16, d_kv=8, num_heads=2, num_layers=1, vocab_size=400)
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert "are encoder-decoders" in refusal(tmp_path)


def test_a_model_that_ignores_its_cache_is_refused(model_of):
    """RWKV and OpenAI-GPT take a cache and decode noise without a word."""
    model = make_model("gpt2")
    forward = model.forward
    model.forward = lambda *args, **options: forward(
        *args, **{**options, "past_key_values": None, "use_cache": False, "position_ids": None}
    )
    with pytest.raises(ModelError, match="more than rounding"):
        require_decodable(model, "it")


def test_a_cache_that_keeps_what_was_rolled_back_is_refused():
    """A running state cannot be set back: rows after a rejection were those of another text."""
    model = make_model("llama")
    state = torch.zeros(48)

    def add_state(module, inputs, output):
        nonlocal state
        if len(output[0]) > 30:
            state = torch.zeros(48)
        state = state + 0.1 * output[0].sum(0)
        return output + state

    model.model.layers[0].mlp.register_forward_hook(add_state)
    with pytest.raises(ModelError, match="more than rounding"):
        require_decodable(model, "it")


def test_not_finite_logits_are_told_the_precision(folder):
    """float16 overflow was told to choose another architecture."""
    change_tensors(
        folder,
        lambda t: {n: x * (3e3 if "up_proj" in n or "down_proj" in n else 1) for n, x in t.items()},
    )
    assert "choose bfloat16 or float32" in refusal(folder, dtype="float16")


@pytest.mark.parametrize("context", [9, 16, 47])
def test_short_contexts_are_served(context, folder):
    """The self-check asked for 48 tokens of every model."""
    change_json(folder / "config.json", max_position_embeddings=context)
    pair = load(folder)
    assert check_exactness(pair.target, 8, capacity=context).is_exact
    reference = autoregressive(pair.target, [5, 6], max_new_tokens=99, width=8)
    assert reference.finish_reason == "context" and len(reference.token_ids) == context - 2
    assert speculative(
        pair.target, pair.draft, [5, 6], k=4, max_new_tokens=99, width=8
    ).token_ids == (reference.token_ids)


def test_a_context_without_room_for_a_call_is_refused(folder):
    change_json(folder / "config.json", max_position_embeddings=8)
    assert "context of 8 tokens is too short" in refusal(folder)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_texts_end_where_the_frequencies_of_all_positions_change(kind, folder, caplog):
    """The table was chosen by a call's largest position, padding included, and keys in the cache
    kept the old one: 3 of 6 outputs differed from a reference that was confirmed bit-exact."""
    rope = {"rope_type": kind, "rope_theta": 10000.0, "original_max_position_embeddings": 40}
    factors = {"short_factor": [1.0] * 6, "long_factor": [4.0] * 6, "factor": 4.0}
    change_json(
        folder / "config.json",
        max_position_embeddings=160,
        rope_parameters=rope | (factors if kind == "longrope" else {"factor": 4.0}),
    )
    pair = load(folder)
    assert context_limit(pair.target) == 40
    assert "end at 40 tokens, not at 160" in caplog.text
    prompt = list(range(3, 30))
    reference = autoregressive(pair.target, prompt, max_new_tokens=99, width=8)
    decoded = speculative(pair.target, NgramDraft(), prompt, k=7, max_new_tokens=99, width=8)
    assert decoded.token_ids == reference.token_ids
    assert decoded.finish_reason == "context"


def test_the_self_check_looks_at_the_lengths_of_the_run(folder):
    """It looked at positions 40 to 47 only: what went wrong further on was confirmed."""
    model = load(folder, compile="off").target
    prefilled = []

    def mix_rows_in_long_texts(module, inputs, output):
        prefilled.append(output.shape[1])
        mixed = 1e-3 * output.mean(1, keepdim=True)
        return output + mixed if max(prefilled) > 200 and output.shape[1] == 8 else output

    model.model.layers[0].self_attn.o_proj.register_forward_hook(mix_rows_in_long_texts)
    assert check_exactness(model, 8, capacity=150).is_exact
    check = check_exactness(model, 8, capacity=300)
    assert not check.is_exact and check.num_tokens == 300
    assert max(prefilled) == 300 - 8  # up to the last call


# --- faster layers only where they agree -----------------------------------------------


def test_faster_layers_that_fail_are_left_out(folder, monkeypatch, caplog):
    """JetMoE, Doge and LongCat worked until their layers were made fast, then crashed."""
    monkeypatch.setattr(checkpoint, "group_heads", lambda model: 1 / 0)
    pair = load(folder, compile="off")
    assert not pair.target.config._attn_implementation.startswith("grouped")
    (line,) = [r.getMessage() for r in caplog.records if "keeps transformers" in r.getMessage()]
    assert "ZeroDivisionError" in line and str(folder) in line


def test_faster_layers_that_compute_something_else_are_left_out(folder, monkeypatch, caplog):
    honest = attention.grouped_sdpa
    monkeypatch.setattr(attention, "grouped_sdpa", lambda *a, **o: (1.3 * honest(*a, **o)[0], None))
    pair = load(folder, compile="off")
    assert not pair.target.config._attn_implementation.startswith("grouped")
    assert "give other logits" in caplog.text


def test_faster_layers_that_agree_stay(folder, caplog):
    target = load(folder, compile="off").target
    assert target.config._attn_implementation.startswith("grouped")
    assert isinstance(load(folder).target, KernelModel)
    assert not caplog.records


@pytest.mark.parametrize(("change", "why"), [
    ({"hidden_act": "gelu"}, "the activation gelu"),
    ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
])  # fmt: skip
def test_a_model_that_the_kernel_does_not_know_keeps_pytorch(change, why, folder, caplog):
    change_json(folder / "config.json", **change)
    assert not isinstance(load(folder).target, KernelModel)
    (line,) = [r.getMessage() for r in caplog.records if "without the CPU kernel" in r.getMessage()]
    assert why in line
    with pytest.raises(ModelError, match=r"needs the CPU kernel \(.*\); choose decoding.compile"):
        load(folder, compile="on")
    with pytest.raises(ModelError, match=r"needs the CPU kernel \(.*\); choose none"):
        load(folder, target_quantization="int8")


def test_without_a_compiler_one_line_says_what_to_install(folder, monkeypatch, caplog):
    def nothing(*_: Any) -> None:
        raise KernelError("there is no C compiler; install gcc")

    monkeypatch.setattr(kernel_model, "kernel_library", nothing)
    assert not isinstance(load(folder).target, KernelModel)
    assert "without the CPU kernel: there is no C compiler; install gcc" in caplog.text


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_drafts_rounding_on_a_cpu_is_the_kernels_own(dtype, quantization, model_folders):
    """It needs no bitsandbytes, the draft says nearly the same, and outputs are the target's."""
    target, draft = (str(model_folders[f"llama-{name}"]) for name in ("target", "draft"))
    plain = load_pair(target, draft, dtype=dtype)
    pair = load_pair(target, draft, dtype=dtype, draft_quantization=quantization)
    assert isinstance(pair.draft, ModelDraft) and isinstance(plain.draft, ModelDraft)
    model = pair.draft.model
    assert model.engine.head.format == "int8" and pair.target.engine.head.format == dtype
    error = prove_decoding(model).difference(prove_decoding(plain.draft.model))
    assert 0 < error < {"int8": 0.1, "int4": 0.7}[quantization]
    prompt = pair.encode("def add(a, b):")
    expected = autoregressive(plain.target, prompt, max_new_tokens=40)
    ours = speculative(pair.target, pair.draft, prompt, k=4, max_new_tokens=40)
    assert ours.token_ids == expected.token_ids
    assert sum(ours.drafted) > 0


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt_neo"])
def test_a_rounded_target_on_a_cpu_is_decoded_bit_exactly(
    architecture, quantization, model_folders
):
    """bitsandbytes' int8 mixes the rows of a call, and cannot be."""
    target, draft = (str(model_folders[f"{architecture}-{name}"]) for name in ("target", "draft"))
    pair = load_pair(target, draft, dtype="bfloat16", target_quantization=quantization)
    assert check_exactness(pair.target, None, capacity=120).is_exact
    prompt = pair.encode("def add(a, b):")
    expected = autoregressive(pair.target, prompt, max_new_tokens=24)
    for k in (1, 4, 7, 15):
        ours = speculative(pair.target, pair.draft, prompt, k=k, max_new_tokens=24)
        assert ours.token_ids == expected.token_ids


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's memory maps")
def test_packed_weights_do_not_keep_the_checkpoints_files_in_memory(tmp_path):
    """A norm's weight that was a view of its file kept the whole file: twice the memory."""
    make_model("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), torch.bfloat16, CPU)
    assert isinstance(model, KernelModel)
    maps = Path("/proc/self/maps").read_text().splitlines()
    files = [line for line in maps if str(tmp_path) in line]
    ranges = [[int(end, 16) for end in line.split()[0].split("-")] for line in files]
    layers = model.engine.layers
    kept = [*model.engine.tensors.values(), *(t for part in layers for t in part.norms.values())]
    for tensor in kept:
        assert not any(low <= tensor.data_ptr() < high for low, high in ranges)


@pytest.mark.parametrize("dtype, way_out", [("bfloat16", ""), ("float32", "--dtype bfloat16")])
def test_too_little_memory_is_told_before_a_model_is_read(dtype, way_out, folder, monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: 1000)
    monkeypatch.setattr(checkpoint, "read_model", None)
    message = error_line(ModelError, load_model, str(folder), getattr(torch, dtype), CPU)
    said = r"loading .* needs 0\.0 GB of memory \(available: 0\.0 GB\); close other programs, or"
    assert re.match(f"{said} choose a smaller model", message) and way_out in message


def test_a_prefills_mask_is_not_made_per_head():
    """1,000 tokens and 8 heads a key made a mask of 32 MB where 1 MB was needed."""
    options = {"kv_length": 200, "dtype": torch.float32, "allow_is_causal_skip": False}
    decode = grouped_mask(1, MAX_ROWS, group=8, **options)
    prefill = grouped_mask(1, MAX_ROWS + 1, group=8, **options)
    assert decode.shape[2] == 8 * MAX_ROWS
    assert prefill.shape[2] == MAX_ROWS + 1 and prefill.dtype == torch.bool


@pytest.mark.parametrize("architecture", ["llama", "gpt_neo", "gpt2", "qwen2"])
def test_first_layers_share_the_targets_tensors(architecture, model_of):
    target = model_of(architecture)
    shallow = first_layers(target, 1)
    assert shallow.config.num_hidden_layers == 1 and target.config.num_hidden_layers == 2
    mine = {parameter.data_ptr() for parameter in target.parameters()}
    assert all(parameter.data_ptr() in mine for parameter in shallow.parameters())
    exactness.require_decodable(shallow, "it")


# --- logits that are not finite --------------------------------------------------------


@contextmanager
def poisoned(model, position, value=float("nan")):
    """Makes a model's logits NaN from a position on."""
    honest = Session.score

    def poison(session, tokens, last):
        rows = honest(session, tokens, last).clone()
        if session.model is model:
            rows[max(position - (len(tokens) - last), 0) :] = value
        return rows

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "score", poison)
        yield


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0), Sampling(0.7, 5, 0.9)])
@pytest.mark.parametrize("width", [None, 8])
def test_logits_that_are_not_finite_end_a_text_in_an_error(value, sampling, width):
    """Greedy accepted 4 of 4 drafts of NaN and printed nothing; sampling raised IndexError."""
    model = make_model("llama", seed=5)

    def options() -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        of_text = {"max_new_tokens": 30, "sampling": sampling, "width": width}
        return of_text | {"generator": generator}

    with poisoned(model, 12, value):
        alone = autoregressive(model, [3, 4, 5], **options())
        drafted = speculative(model, NgramDraft(), [3, 4, 5], k=4, **options())
    for generation in (alone, drafted):
        assert generation.finish_reason == "error"
        assert "target's logits are not finite" in generation.error
        assert 0 < len(generation.token_ids) < 30
    if sampling == Sampling():
        assert alone.token_ids == drafted.token_ids


def test_a_drafts_logits_that_are_not_finite_are_the_drafts(model_of):
    draft = make_model("llama", seed=6)
    with poisoned(draft, 8):
        generation = speculative(
            model_of("llama"), ModelDraft(draft), [3, 4, 5], k=4, max_new_tokens=30
        )
    assert generation.finish_reason == "error" and "draft's logits" in generation.error


# --- where a text ends -----------------------------------------------------------------


def test_the_chat_templates_end_of_turn_ends_a_text(folder):
    """SmolLM2 with eos_token_id 0 ran past <|im_end|> into an invented next turn."""
    tokenizer = load(folder).tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|im_end|>\n{% endfor %}"
    )
    tokenizer.save_pretrained(folder)
    change_json(folder / "generation_config.json", eos_token_id=7)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert load(folder).eos_ids == {7, tokenizer.eos_token_id, end}


@pytest.mark.parametrize("is_special", [True, False])
@pytest.mark.parametrize(
    "separator",
    ["<|file_sep|>", "<|fim_pad|>", "<file_sep>", "<filename>", "<fim-middle>", "<|fim_middle|>"]
    + ["<｜fim▁hole｜>", "<|EOT|>", "▁<MID>", "▁<EOT>", "[SUFFIX]", "<|file_separator|>"],
)
def test_a_code_models_separator_ends_a_text(folder, separator, is_special):
    """Qwen2.5-Coder ran past <|file_sep|>, a token that is not special, into another file."""
    tokenizer = load(folder).tokenizer
    tokenizer.add_tokens([separator], special_tokens=is_special)
    tokenizer.save_pretrained(folder)
    end = tokenizer.convert_tokens_to_ids(separator)
    assert load(folder).eos_ids == {tokenizer.eos_token_id, end}


def test_a_separator_that_is_several_tokens_ends_nothing(folder):
    """Its first token is "<", which code is full of."""
    pair = load(folder)
    assert len(pair.encode("<|file_sep|>")) > 1
    assert pair.eos_ids == {pair.tokenizer.eos_token_id}


@pytest.mark.parametrize(
    ("name", "named", "told"),
    [
        ("generation_config.json", 100_000, "100000 in generation_config.json"),
        ("generation_config.json", [7, -1, "2", 400], "-1 in generation_config.json, '2' in gen"),
        ("generation_config.json", {"a": 1}, "{'a': 1} in generation_config.json"),
        ("config.json", [7, 400], "400 in config.json"),
    ],
)
def test_an_end_beyond_the_vocabulary_is_told_and_left_out(name, named, told, folder, caplog):
    """No text ever ended there, without a word; what could not be hashed was a traceback."""
    change_json(folder / name, eos_token_id=named)
    pair = load(folder)
    kept = {7} if name.startswith("gen") and isinstance(named, list) else set()
    assert pair.eos_ids == {pair.tokenizer.eos_token_id} | kept
    (line,) = [record.getMessage() for record in caplog.records]
    assert f"eos_token_id of {folder} must be an integer from 0 to 399" in line
    assert told in line and line.endswith("left out")


def test_without_any_end_left_texts_are_said_to_end_at_their_length(folder, caplog):
    tokenizer = load(folder).tokenizer
    tokenizer.eos_token = None
    model = make_model("llama", vocab_size=400)
    model.generation_config.eos_token_id = [-1, 400]
    assert end_ids(tokenizer, model) == set()
    assert "left out; texts end only at decoding.max_new_tokens" in caplog.text


def test_a_template_that_raises_is_no_reason_not_to_decode(folder):
    tokenizer = load(folder).tokenizer
    tokenizer.chat_template = "{{ raise_exception('no system, no tools, no chat') }}"
    tokenizer.save_pretrained(folder)
    assert load(folder).eos_ids == {tokenizer.eos_token_id}


def test_a_stop_string_that_is_a_special_token_fires(folder):
    """Special tokens were left out of the text that stop strings are looked for in."""
    pair = load(folder)
    ids = [*pair.encode("hello"), pair.tokenizer.eos_token_id]
    stops = StopStrings(["<eos>"], lambda ids: pair.decode(ids, skip_special_tokens=False))
    assert stops(ids) and not stops(ids[:-1])


def test_an_end_that_a_tokenizer_appends_is_not_the_prompts(folder):
    """T5's and some Llama tokenizers end every text; a prompt is to be continued."""
    tokenizer = load(folder).tokenizer
    plain = tokenizer("def f(x):")["input_ids"]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A <eos>", special_tokens=[("<eos>", tokenizer.eos_token_id)]
    )
    tokenizer.save_pretrained(folder)
    pair = load(folder)
    assert num_appended(pair.tokenizer) == 1
    assert pair.encode("def f(x):") == [tokenizer.eos_token_id, *plain]


def test_what_generate_would_do_and_we_do_not_is_said_once(folder, caplog):
    """Qwen2.5-Coder ships repetition_penalty 1.1: `generate` gives another text."""
    change_json(
        folder / "generation_config.json",
        repetition_penalty=1.1,
        suppress_tokens=[3],
        min_new_tokens=2,
        temperature=0.5,
    )
    load(folder)
    (line,) = [record.getMessage() for record in caplog.records]
    assert "repetition_penalty 1.1, min_new_tokens 2, suppress_tokens [3]" in line


def test_the_probability_of_tiny_temperatures_is_greedy():
    """Dividing by them overflowed to infinity and NaN."""
    logits = torch.tensor([[1.0, 3.0, 2.0], [-50.0, 40.0, 41.0]])
    for temperature in (1e-3, 1e-5, 1e-20, 1e-38, 1e-45, 5e-324):
        probs = [of.dense(3).tolist() for of in probs_from_logits(logits, Sampling(temperature))]
        assert probs == [[0, 1, 0], [0, 0, 1]], temperature


def test_load_model_alone_checks_too(folder):
    change_tensors(folder, without("lm_head"))
    with pytest.raises(ModelError, match="lm_head"):
        load_model(str(folder), torch.float32, CPU)
