"""A checkpoint is whole, proved and asked before it decodes: never wrong in silence."""

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
INT8 = {"target_quantization": "int8"}
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
    assert words in error_line(ModelError, load_model, str(folder), torch.float32, CPU)


def test_a_tied_head_needs_no_tensor(folder):
    change_tensors(folder, without("lm_head"))
    change_json(folder / "config.json", tie_word_embeddings=True)
    target = load(folder, compile="off").target
    assert target.lm_head.weight is target.model.embed_tokens.weight


INDEX = "model.safetensors.index.json"
AUTO_MAP = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
EMPTY_GGUF = b"GGUF\x03\0\0\0" + bytes(40)
LATER = {"version": "9.0", "model": {"type": "Later"}}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        *(("model.safetensors", content, "cannot load") for content in (b"", b"x" * 100)),
        *(("m.gguf", content, "cannot load") for content in (b"", EMPTY_GGUF, b"nope" * 50)),
        *((f"{part}.json", b"{", "cannot load") for part in ("config", "tokenizer")),
        ("config.json", {"model_type": "nonsense"}, "cannot load"),
        ("config.json", {"model_type": "its-own", "auto_map": AUTO_MAP}, "auto_map"),
        ("tokenizer.json", LATER, "cannot load"),
        ("tokenizer.json", {"pre_tokenizer": {"type": "Later"}}, "pip install -U tokenizers"),
        # "check the name and the network" was said of a folder with a file too few.
        (INDEX, {"weight_map": {"a": "model-1.safetensors"}}, "1.safetensors is missing, which"),
        (INDEX, {}, "is no index of weights (KeyError('weight_map'))"),
        (INDEX, b"[1]", "is no index of weights"),
    ],
)  # fmt: skip
def test_broken_files_are_one_line(name, content, words, folder, monkeypatch):
    """transformers asked on stdin whether to run a checkpoint's code, and waited."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on stdin"))
    path = folder / name
    if name == INDEX:
        (folder / "model.safetensors").unlink()
    if isinstance(content, dict):
        whole = json.loads(path.read_text()) if path.exists() else {}
        content = json.dumps(whole | content).encode()
    path.write_bytes(content)
    message = refusal(path if name == "m.gguf" else folder)
    assert words in message and (name != INDEX or message.endswith("download it again"))


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
        (ImportError("a.so: failed to map segment from shared file"), ": out of memory (a", LIMIT),
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


def test_tokenizers_are_compared_before_weights_are_read(folder, model_folders, tmp_path):
    """Gigabytes were loaded before a draft of another family was refused."""
    other = tmp_path / "other"
    shutil.copytree(model_folders["llama-draft"], other)
    (other / "model.safetensors").unlink()
    change_json(other / "tokenizer.json", pre_tokenizer={"type": "Whitespace"})
    message = refusal(folder, str(other))
    assert "must share its tokenizer" in message and str(other) in message


# --- what can be decoded ---------------------------------------------------------------


def test_a_model_that_ignores_its_cache_is_refused():
    """RWKV and OpenAI-GPT take a cache and decode noise without a word."""
    model = make_model("gpt2")
    forward, ignored = model.forward, dict.fromkeys(("past_key_values", "position_ids"))
    ignored["use_cache"] = False
    model.forward = lambda *args, **options: forward(*args, **{**options, **ignored})
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
    large = ("up_proj", "down_proj")
    change_tensors(
        folder, lambda t: {n: x * (3e3 if any(p in n for p in large) else 1) for n, x in t.items()}
    )
    assert "choose bfloat16 or float32" in refusal(folder, dtype="float16")


@pytest.mark.parametrize("context", [8, 9, 16, 47])
def test_short_contexts_are_served_if_they_have_room_for_a_call(context, folder):
    """The self-check asked for 48 tokens of every model."""
    change_json(folder / "config.json", max_position_embeddings=context)
    if context == 8:
        assert "context of 8 tokens is too short" in refusal(folder)
        return
    pair, options = load(folder), {"max_new_tokens": 99, "width": 8}
    assert check_exactness(pair.target, 8, capacity=context).is_exact
    reference = autoregressive(pair.target, [5, 6], **options)
    assert reference.finish_reason == "context" and len(reference.token_ids) == context - 2
    drafted = speculative(pair.target, pair.draft, [5, 6], k=4, **options)
    assert drafted.token_ids == reference.token_ids


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_texts_end_where_the_frequencies_of_all_positions_change(kind, folder, caplog):
    """A call's largest position, padding included, chose the table: 3 of 6 outputs differed."""
    rope = {"rope_type": kind, "rope_theta": 10000.0, "original_max_position_embeddings": 40}
    rope["factor"] = 4.0
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 6, "long_factor": [4.0] * 6}
    change_json(folder / "config.json", max_position_embeddings=160, rope_parameters=rope)
    pair = load(folder)
    assert context_limit(pair.target) == 40
    assert "end at 40 tokens, not at 160" in caplog.text
    prompt, options = list(range(3, 30)), {"max_new_tokens": 99, "width": 8}
    reference = autoregressive(pair.target, prompt, **options)
    decoded = speculative(pair.target, NgramDraft(), prompt, k=7, **options)
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


@pytest.mark.parametrize("mistake", ["fails", "computes something else", None])
def test_faster_layers_stay_where_they_agree(mistake, folder, monkeypatch, caplog):
    """JetMoE, Doge and LongCat worked until their layers were made fast, then crashed."""
    honest = attention.grouped_sdpa
    wrong = lambda *a, **o: (1.3 * honest(*a, **o)[0], None)  # noqa: E731
    if mistake == "fails":
        monkeypatch.setattr(checkpoint, "group_heads", lambda model: 1 / 0)
    elif mistake:
        monkeypatch.setattr(attention, "grouped_sdpa", wrong)
    target = load(folder, compile="off").target
    is_fast = target.config._attn_implementation.startswith("grouped")
    assert is_fast == (mistake is None) and bool(caplog.records) == (not is_fast)
    if mistake == "fails":
        (line,) = [m for m in caplog.messages if "keeps transformers" in m]
        assert "ZeroDivisionError" in line and str(folder) in line
    elif mistake:
        assert "give other logits" in caplog.text
    else:
        assert isinstance(load(folder).target, KernelModel) and not caplog.records


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"hidden_act": "gelu"}, "the activation gelu"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "dynamic",
        ),
        ({}, "there is no C compiler; install gcc"),
    ],
)
def test_a_model_that_the_kernel_cannot_decode_keeps_pytorch(
    change, why, folder, monkeypatch, caplog
):
    def nothing(*_: Any) -> None:
        raise KernelError(why)

    if not change:
        monkeypatch.setattr(kernel_model, "kernel_library", nothing)
    change_json(folder / "config.json", **change)
    assert not isinstance(load(folder).target, KernelModel)
    (line,) = [message for message in caplog.messages if "without the CPU kernel" in message]
    assert why in line
    for options, way_out in (({"compile": "on"}, "decoding.compile"), (INT8, "none")):
        with pytest.raises(ModelError, match=rf"needs the CPU kernel \(.*\); choose {way_out}"):
            load(folder, **options)


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


@pytest.mark.parametrize("is_special", [True, False, None])
@pytest.mark.parametrize(
    "separator",
    ["<|file_sep|>", "<|fim_pad|>", "<file_sep>", "<filename>", "<fim-middle>", "<|fim_middle|>"]
    + ["<｜fim▁hole｜>", "<|EOT|>", "▁<MID>", "▁<EOT>", "[SUFFIX]", "<|file_separator|>"],
)
def test_a_code_models_separator_ends_a_text_if_it_is_a_token(folder, separator, is_special):
    """Qwen2.5-Coder ran past <|file_sep|>, a token that is not special, into another file."""
    tokenizer = load(folder).tokenizer
    ends = {tokenizer.eos_token_id}
    if is_special is None:  # several tokens, of which the first is "<": code is full of it
        assert len(tokenizer(separator)["input_ids"]) > 1
    else:
        tokenizer.add_tokens([separator], special_tokens=is_special)
        tokenizer.save_pretrained(folder)
        ends.add(tokenizer.convert_tokens_to_ids(separator))
    assert load(folder).eos_ids == ends


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
    tokenizer, model = load(folder).tokenizer, make_model("llama", vocab_size=400)
    tokenizer.eos_token = None
    model.generation_config.eos_token_id = [-1, 400]
    assert end_ids(tokenizer, model) == set()
    assert "left out; texts end only at decoding.max_new_tokens" in caplog.text


def test_a_stop_string_that_is_a_special_token_fires(folder):
    """Special tokens were left out of the text that stop strings are looked for in."""
    pair = load(folder)
    ids = [*pair.encode("hello"), pair.tokenizer.eos_token_id]
    stops = StopStrings(["<eos>"], lambda ids: pair.decode(ids, skip_special_tokens=False))
    assert stops(ids) and not stops(ids[:-1])


def test_an_end_that_a_tokenizer_appends_is_not_the_prompts(folder):
    """T5's and some Llama tokenizers end every text; a prompt is to be continued."""
    tokenizer = load(folder).tokenizer
    plain, end = tokenizer("def f(x):")["input_ids"], tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A <eos>", special_tokens=[("<eos>", end)]
    )
    tokenizer.chat_template = "{{ raise_exception('no system, no tools, no chat') }}"
    tokenizer.save_pretrained(folder)
    pair = load(folder)
    assert num_appended(pair.tokenizer) == 1 and pair.encode("def f(x):") == [end, *plain]
    assert pair.eos_ids == {end}  # a template that raises is no reason not to decode


def test_what_generate_would_do_and_we_do_not_is_said_once(folder, caplog):
    """Qwen2.5-Coder ships repetition_penalty 1.1: `generate` gives another text."""
    settings = {"repetition_penalty": 1.1, "suppress_tokens": [3], "min_new_tokens": 2}
    change_json(folder / "generation_config.json", **settings, temperature=0.5)
    load(folder)
    (line,) = caplog.messages
    assert "repetition_penalty 1.1, min_new_tokens 2, suppress_tokens [3]" in line


def test_the_probability_of_tiny_temperatures_is_greedy():
    """Dividing by them overflowed to infinity and NaN."""
    logits = torch.tensor([[1.0, 3.0, 2.0], [-50.0, 40.0, 41.0]])
    for temperature in (1e-3, 1e-5, 1e-20, 1e-38, 1e-45, 5e-324):
        probs = [of.dense(3).tolist() for of in probs_from_logits(logits, Sampling(temperature))]
        assert probs == [[0, 1, 0], [0, 0, 1]], temperature
