"""What a CUDA GPU must hold, on random weights: `python -m pytest -m gpu tests/test_gpu.py`."""

from __future__ import annotations

import statistics
import time

import pytest
import torch
from conftest import ARCHITECTURES, make_model
from transformers import Qwen2Config, Qwen2ForCausalLM

from autoregressive import autoregressive
from specsampling.method.drafts import CompositeDraft, ModelDraft, NgramDraft
from specsampling.method.session import Session
from specsampling.models.checkpoint import make_fast
from specsampling.models.exactness import check_exactness, prove_decoding, require_decodable
from speculative import speculative

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PROMPT = list(range(20, 60))


def on_gpu(architecture: str, dtype: torch.dtype, seed: int = 0):
    model = make_model(architecture, seed=seed).to("cuda", dtype).eval()
    make_fast(model)
    return model


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fast_layers_stay_and_decoding_is_bit_exact(architecture, dtype):
    """Grouped attention failed on every kernel but cuDNN's, and plain layers were kept."""
    model = make_model(architecture).to("cuda", dtype).eval()
    proof = require_decodable(model, architecture)
    make_fast(model)
    assert prove_decoding(model).difference(proof) < proof.tolerance
    assert check_exactness(model, width=8, capacity=100).is_exact


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_speculative_outputs_are_the_references(architecture, dtype):
    target, other = on_gpu(architecture, dtype), on_gpu(architecture, dtype, seed=1)
    expected = autoregressive(target, PROMPT, max_new_tokens=60, width=8)
    for draft in (
        NgramDraft(),
        ModelDraft(other),
        ModelDraft(target),
        CompositeDraft(NgramDraft(3, 2), ModelDraft(other)),
    ):
        ours = speculative(target, draft, PROMPT, k=7, max_new_tokens=60, width=8)
        assert ours.token_ids == expected.token_ids


def qwen2_of_400m() -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=1000,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    return Qwen2ForCausalLM(config).to("cuda", torch.bfloat16).eval()


def test_a_call_of_width_1_is_no_slower_than_one_of_width_8():
    """cuDNN's attention made a plan for every new number of keys: 50 ms a call instead of 12."""
    model = qwen2_of_400m()
    make_fast(model)

    def milliseconds(width: int | None) -> float:
        session, tokens, times = Session(model, 512, width), list(range(100)), []
        session.prefill(tokens)
        for _ in range(40):
            tokens = [*tokens[: session.length], 5]
            start = time.perf_counter()
            session.score(tokens, 1)
            times.append(time.perf_counter() - start)
        return 1000 * statistics.median(times[5:])

    milliseconds(None), milliseconds(8)
    assert milliseconds(None) < 1.5 * milliseconds(8)


def test_making_a_model_fast_needs_little_more_than_the_model():
    """A list of the replaced layers kept them all to the end: 24 GB for a model of 15."""
    model = qwen2_of_400m()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    make_fast(model)
    assert torch.cuda.max_memory_allocated() < 1.2 * before
