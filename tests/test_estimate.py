"""Memory from configurations alone: the sizes that everybody knows, and who fits where."""

import pytest
import torch
from architectures import ARCHITECTURES
from transformers import AutoConfig

from Benchmarks.plan import CONFIGS
from specsampling.models.estimate import (
    WORKSPACE_BYTES,
    Lengths,
    Need,
    Planned,
    need_of,
    outline,
    ways_out,
    weight_bytes,
)

CUDA = torch.device("cuda")
CPU = torch.device("cpu")
GB = 1e9
LENGTHS = Lengths(longest=900, prompt=640, width=8)


def outlined(name: str):
    return outline(AutoConfig.for_model(**CONFIGS[name]), torch.float16)


@pytest.mark.parametrize(
    ("name", "quantization", "expected"),
    [
        ("gpt-neo-1.3b", "none", 2.63),
        ("gpt-neo-125m", "none", 0.25),
        ("deepseek-coder-6.7b", "none", 13.48),
        ("deepseek-coder-6.7b", "int8", 6.98),
        ("deepseek-coder-6.7b", "nf4", 4.2),
        ("deepseek-coder-1.3b", "none", 2.69),
    ],
)
def test_weights(name, quantization, expected):
    size = weight_bytes(outlined(name), quantization, CUDA) / GB
    assert size == pytest.approx(expected, rel=0.03)


def planned(name: str, quantization: str = "none") -> Planned:
    return Planned(outlined(name), quantization)


def pair_need(target: str, draft: str, quantization: str) -> Need:
    return need_of(planned(target, quantization), [planned(draft)], CUDA, LENGTHS)


GPT_NEO, DEEPSEEK = ("gpt-neo-1.3b", "gpt-neo-125m"), ("deepseek-coder-6.7b", "deepseek-coder-1.3b")


@pytest.mark.parametrize(
    ("pair", "memory", "fitting"),
    [
        (GPT_NEO, 6, {"none", "int8", "nf4"}),
        (GPT_NEO, 3, {"int8", "nf4"}),
        (DEEPSEEK, 15, {"int8", "nf4"}),
        (DEEPSEEK, 9, {"nf4"}),
    ],
)
def test_who_fits_where(pair, memory, fitting):
    free = (memory - 0.4) * GB  # the driver's context is there already
    needs = {of: pair_need(*pair, of).total for of in ("none", "int8", "nf4")}
    assert {of for of, need in needs.items() if need <= free} == fitting


def test_the_ways_out_are_those_that_fit():
    deepseek = planned("deepseek-coder-6.7b"), [planned("deepseek-coder-1.3b")]
    found = ways_out(*deepseek, CUDA, LENGTHS, int(14.6 * GB))
    assert [way.partition(" (")[0] for way in found] == [
        "models.target_quantization=int8",
        "models.target_quantization=nf4",
        "models.draft=ngram",
    ]
    assert ways_out(*deepseek, CUDA, LENGTHS, int(4 * GB)) == []
    many = Lengths(longest=900, prompt=640, width=8, num_texts=64)
    found = ways_out(planned("gpt-neo-1.3b", "int8"), [], CUDA, many, int(4 * GB))
    assert any(way.startswith("run.batch_size=1 (") for way in found)


def test_texts_and_lengths_are_counted():
    model = outlined("gpt-neo-125m")
    one, long, many = (
        need_of(Planned(model, "none"), [], CUDA, lengths)
        for lengths in (Lengths(600, 64, 8), Lengths(1256, 64, 8), Lengths(600, 64, 8, 16))
    )
    assert long.caches == pytest.approx(2 * one.caches, rel=0.1)
    assert many.caches == 16 * one.caches
    assert many.calls - WORKSPACE_BYTES > 8 * (one.calls - WORKSPACE_BYTES)
    assert one.weights == many.weights


def test_on_a_cpu_the_checkpoint_is_there_while_it_is_brought_into_its_form():
    model = outline(AutoConfig.for_model(**CONFIGS["gpt-neo-125m"]), torch.bfloat16)
    read = sum(weight.numel() for weight in model.parameters()) * 2  # its head is its embedding
    mapped, gguf = (
        need_of(planned, [], CPU, LENGTHS)
        for planned in (Planned(model, "none"), Planned(model, "none", is_mapped=False))
    )
    assert mapped.loading == mapped.total == read + mapped.weights
    assert mapped.least == mapped.decoding  # pages of files can be read again
    assert gguf.least == gguf.total == mapped.total


@pytest.mark.parametrize(
    ("quantization", "bytes_of_a_weight"), [("none", 2), ("int8", 1), ("int4", 0.5625)]
)
def test_the_cpu_kernels_weights(quantization, bytes_of_a_weight):
    model = outline(AutoConfig.for_model(**CONFIGS["deepseek-coder-1.3b"]), torch.bfloat16)
    tables = 2 * model.get_input_embeddings().weight.numel()
    head = model.get_output_embeddings().weight.numel() * min(2, max(1, bytes_of_a_weight))
    layers = sum(weight.numel() for weight in model.model.layers.parameters())
    size = weight_bytes(model, quantization, CPU)
    assert size == pytest.approx(tables + head + bytes_of_a_weight * layers, rel=0.01)


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
def test_every_kind_of_model_can_be_estimated(architecture):
    """RWKV's configuration has no heads: a traceback, before the line that refuses it."""
    if not architecture.exists or architecture.has_encoder:
        pytest.skip("no decoder of this transformers")
    need = need_of(Planned(outline(architecture.config(), torch.float32), "none"), [], CPU, LENGTHS)
    assert 0 < need.weights <= need.total


def test_what_is_small_is_not_listed():
    assert str(Need(weights=int(2 * GB), caches=1000, calls=0)) == "2.0 GB (weights 2.0 GB)"
    assert str(Need(1, 1, 1)) == "0.0 GB (all of it small)"
