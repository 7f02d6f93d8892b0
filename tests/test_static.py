"""Some models have a step of tensors alone; `decoding.compile` says what it makes of them."""

import pytest
from conftest import make_model

from autoregressive import autoregressive
from specsampling.method.drafts import CompositeDraft, ModelDraft, NgramDraft
from specsampling.method.step import decode_step, has_step
from specsampling.models.checkpoint import make_fast
from specsampling.models.errors import ModelError
from specsampling.models.load import with_models
from specsampling.models.static import GraphRunner, _prove, make_static
from speculative import speculative


def test_auto_says_why_it_stays_eager():
    model = make_model("llama")
    assert make_static(model, "off", 64, {1}, print) == (model, "eager (decoding.compile: off)")
    eager = model, "eager (nothing is captured on cpu)"
    assert make_static(model, "auto", 64, {1}, print) == eager
    with pytest.raises(ModelError, match=r"decoding.compile on cannot be had \(.*\); choose"):
        make_static(model, "on", 64, {1}, print)


@pytest.mark.parametrize("mode", ["auto", "on"])
def test_a_model_in_the_kernel_needs_nothing_more(mode):
    model = make_fast(make_model("llama"))
    made, result = make_static(model, mode, 64, {1}, print)
    assert made is model and result.startswith("the CPU kernel (")


@pytest.fixture(params=[0.0, 0.5])
def shift(request, monkeypatch):
    """Graphs need a GPU. Here each call runs its operations one by one, and is off by a number."""

    def capture(self, ids, positions, buffers):
        return lambda *new: decode_step(self.model, *new, buffers) * (1 + request.param)

    monkeypatch.setattr(GraphRunner, "_capture", capture)
    return request.param


def test_a_model_and_its_draft_decode_the_same_in_their_runners(shift):
    target, small = make_model("llama"), make_model("llama", 1)
    runner, draft = GraphRunner(target, 64, {1, 8}), GraphRunner(small, 64, {1, 2, 8})
    if shift:
        with pytest.raises(RuntimeError, match="calls of 1 rows give other logits, by 50"):
            _prove(runner, print)
        return
    _prove(runner, print)
    ready = with_models(CompositeDraft(NgramDraft(), ModelDraft(small)), {small: draft})
    expected = autoregressive(target, [1, 4, 2], max_new_tokens=30).token_ids
    assert autoregressive(runner, [1, 4, 2], max_new_tokens=30).token_ids == expected
    assert speculative(runner, ready, [1, 4, 2], k=4, max_new_tokens=30).token_ids == expected


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt_neo", "gpt2"])
def test_which_models_have_a_step(architecture):
    assert has_step(make_model(architecture)) is (architecture != "gpt2")


def test_a_class_of_its_own_and_frequencies_that_change_have_none():
    """Such a forward may compute something of its own, which a step would pass over."""
    model, dynamic = make_model("llama"), make_model("llama")
    model.__class__ = type("Special", (type(model),), {})
    assert not has_step(model)
    dynamic.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert not has_step(dynamic)
