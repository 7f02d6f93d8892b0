"""bitsandbytes' 8 and 4 bit, which run on a CPU too: outputs are the reference's, or we say not."""

import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from helpers import error_line
from transformers import AutoModelForCausalLM, LlamaConfig

from autoregressive import autoregressive
from specsampling.method.drafts import ModelDraft
from specsampling.models import checkpoint
from specsampling.models.errors import ModelError
from specsampling.models.exactness import check_exactness
from speculative import speculative

PROMPTS = ([1, 4, 2, 1, 4], [7] * 9, list(range(30)))
NEW, WIDTH = 24, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    sizes = {"vocab_size": 120, "hidden_size": 64, "intermediate_size": 128}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128}
    config = LlamaConfig(**sizes, initializer_range=0.3)
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    path = tmp_path_factory.mktemp("llama")
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module", params=["int8", "nf4"])
def quantised(request, folder):
    """As a GPU would load it: our own 8 bit for CPUs is left out."""
    cpu = torch.device("cpu")
    model = checkpoint._read(folder, torch.bfloat16, cpu, request.param)
    checkpoint.require_decodable(model, folder)
    return model


@pytest.fixture(scope="module")
def whole(folder):
    return checkpoint.load_model(folder, torch.float32, torch.device("cpu"), compile="off")


def test_its_layers_are_quantised_and_say_about_the_same(quantised, whole):
    layers = {type(module).__name__ for module in quantised.modules()}
    assert layers & {"Linear8bitLt", "Linear4bit"}
    ids = torch.tensor([PROMPTS[2]])
    with torch.inference_mode():
        found, expected = (model(ids).logits.float() for model in (quantised, whole))
    assert 0 < (found - expected).norm() / expected.norm() < 0.8  # unrelated ones: 1.4


def test_greedy_texts_are_the_references_or_the_check_says_not(quantised, whole):
    check = check_exactness(quantised, WIDTH, 64)
    options = {"max_new_tokens": NEW, "width": WIDTH}
    texts = [
        (
            autoregressive(quantised, prompt, **options).token_ids,
            speculative(quantised, ModelDraft(whole), prompt, k=4, **options).token_ids,
        )
        for prompt in PROMPTS
    ]
    if check.is_exact:
        assert all(reference == drafted for reference, drafted in texts)
    else:
        assert "NOT confirmed" in str(check) and check.largest_difference > 0
    assert all(len(drafted) == NEW for _, drafted in texts)


@pytest.mark.parametrize("quantised", ["int8"], indirect=True)
def test_rows_of_8_bit_layers_do_not_meet(quantised):
    """With a threshold of 6 a call's rows chose its columns of outliers together."""
    assert check_exactness(quantised, WIDTH, 64).is_exact


def test_four_bit_is_had_by_its_name_on_a_cpu(folder):
    model = checkpoint.load_model(folder, torch.bfloat16, torch.device("cpu"), "nf4")
    assert "Linear4bit" in {type(module).__name__ for module in model.modules()}


@pytest.mark.skipif(not has_avx512bf16(), reason="needs a CPU with AVX-512 BF16")
def test_four_bit_computes_in_bfloat16_whatever_was_asked(folder):
    """As the docstring of `load_model` says."""
    model = checkpoint.load_model(folder, torch.float32, torch.device("cpu"), "nf4")
    layer = next(layer for layer in model.modules() if type(layer).__name__ == "Linear4bit")
    with torch.inference_mode():
        found = layer(torch.randn(3, 64))
    assert layer.compute_dtype == found.dtype == torch.float32
    assert torch.equal(found, found.bfloat16().float())


def test_layers_that_four_bit_does_not_take_name_four_bit(folder, monkeypatch):
    """A width that is no multiple of a block was told to choose another architecture."""

    def fail(*_, **__):
        raise AssertionError("N must be divisible by block_n")

    model = checkpoint._read(folder, torch.bfloat16, torch.device("cpu"), "nf4")
    monkeypatch.setattr(model, "forward", fail)
    assert error_line(ModelError, checkpoint.require_decodable, model, "it") == (
        "cannot decode with it in nf4: its layers fail here (AssertionError: N must be divisible "
        "by block_n); set models.target_quantization, or the draft's, to none or int8"
    )
