"""Compiled steps decode what eager ones do, and nothing changes from call to call."""

import pytest
import torch
from conftest import VOCAB_SIZE, make_model

from autoregressive import autoregressive
from specsampling.method.drafts import CompositeDraft, ModelDraft, NgramDraft, first_layers
from specsampling.method.forward import runner_of
from specsampling.method.session import Session
from specsampling.method.step import has_step
from specsampling.models.checkpoint import make_fast
from specsampling.models.errors import ModelError
from specsampling.models.exactness import check_exactness
from specsampling.models.static import CompiledRunner, make_static, runner_kind
from speculative import speculative

STEPPED = ["llama", "qwen2", "gpt_neo"]
PROMPT = [(31 * i + 7) % VOCAB_SIZE for i in range(20)]
NEW = 60
has_compiler = runner_kind("auto", torch.device("cpu"))[0] is CompiledRunner
needs_compiler = pytest.mark.skipif(not has_compiler, reason="no C++ compiler")


def texts(target, draft):
    """Greedy texts by every method that a run has, and by each kind of draft."""
    options = {"max_new_tokens": NEW}
    decoded = {
        "autoregressive": autoregressive(target, PROMPT, **options),
        "reference": autoregressive(target, PROMPT, width=8, **options),
    }
    for name, proposes in {
        "ngram": NgramDraft(),
        "model": ModelDraft(draft),
        "composite": CompositeDraft(NgramDraft(3, 2), ModelDraft(draft, 4)),
    }.items():
        decoded[name] = speculative(target, proposes, PROMPT, k=7, width=8, **options)
    return {name: generation.token_ids for name, generation in decoded.items()}


@pytest.fixture(
    scope="module",
    params=[
        "llama in 8 bit",
        *(pytest.param(name, marks=[pytest.mark.slow] * (name != "llama")) for name in STEPPED),
    ],
)
def pair(request):
    """A fast pair, what it decodes eagerly, and then compiled."""
    architecture, _, is_int8 = request.param.partition(" in ")
    models = [make_model(architecture, seed) for seed in (0, 1)]
    for model in models:
        make_fast(model, to_8_bit=bool(is_int8))
    eager = texts(*models)
    said = [
        make_static(model, "on", len(PROMPT) + NEW, sizes, print)
        for model, sizes in zip(models, ({1, 8}, {1, 2, 8}))
    ]
    assert all(line.startswith("compiled for calls of 1 and") for line in said)
    return *models, eager


@needs_compiler
def test_compiled_texts_are_the_eager_ones(pair):
    target, draft, eager = pair
    assert runner_of(target) is not runner_of(draft) is not None
    assert texts(target, draft) == eager


@needs_compiler
def test_nothing_is_compiled_again_over_200_calls(pair):
    """That no number of a call is part of the function is what makes it capturable."""
    target, _, _ = pair
    with torch._dynamo.config.patch(error_on_recompile=True):
        for width, num_fed in ((None, 1), (8, 1), (8, 8), (8, 3)):
            session = Session(target, len(PROMPT) + NEW, width)
            session.prefill(PROMPT)
            length = len(PROMPT)
            for i in range(50):
                if length + num_fed > len(PROMPT) + NEW:
                    session.length = length = len(PROMPT)
                length += num_fed
                tokens = PROMPT + [(i * j) % VOCAB_SIZE for j in range(length - len(PROMPT))]
                session.length = length - num_fed
                session.score(tokens, last=1)


@needs_compiler
@pytest.mark.usefixtures("all_threads")
def test_compiled_decoding_is_bit_exact(pair):
    target, _, _ = pair
    assert check_exactness(target, 8, len(PROMPT) + NEW).is_exact


@needs_compiler
def test_a_text_longer_than_foreseen_is_decoded_all_the_same(pair):
    target, _, _ = pair
    longer = autoregressive(target, PROMPT, max_new_tokens=NEW + 20).token_ids
    assert longer[:NEW] == autoregressive(target, PROMPT, max_new_tokens=NEW).token_ids


@needs_compiler
def test_a_draft_that_missed_more_than_a_call_holds_catches_up(pair):
    """Lookups may propose for long; a call for every number of missed tokens was compiled."""
    _, draft, _ = pair
    rows = []
    for first in (2, 12):
        session = Session(draft, len(PROMPT) + NEW)
        session.prefill(PROMPT[:first])
        with torch._dynamo.config.patch(error_on_recompile=True):
            rows.append(session.score(PROMPT, last=1))
    torch.testing.assert_close(*rows, atol=1e-3, rtol=1e-3)


@needs_compiler
def test_first_layers_do_not_run_the_whole_models_function(pair):
    """A shallow copy of the model would take its runner along, and draft with all layers."""
    target, _, _ = pair
    shallow = first_layers(target, 1)
    assert runner_of(shallow) is None
    rows = []
    for model in (target, shallow):
        session = Session(model, 60)
        session.prefill(PROMPT[:-1])
        rows.append(session.score(PROMPT, last=1))
    assert not torch.allclose(*rows, atol=1e-2)


def test_auto_says_why_it_stays_eager(monkeypatch):
    from torch._inductor import cpp_builder, exc

    def nothing():
        raise exc.InvalidCxxCompiler

    model = make_model("gpt2")
    assert make_static(model, "off", 64, {1}, print) == "eager (decoding.compile: off)"
    assert "gpt2 models keep" in make_static(model, "auto", 64, {1}, print)
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", nothing)
    llama = make_model("llama")
    assert make_static(llama, "auto", 64, {1}, print) == "eager (no C++ compiler)"
    for mode, of in (("on", llama), ("on", model)):
        with pytest.raises(ModelError, match=r"decoding.compile on cannot be had \(.*\); choose"):
            make_static(of, mode, 64, {1}, print)
    assert runner_of(llama) is None


@needs_compiler
def test_a_function_that_computes_something_else_is_not_kept(monkeypatch):
    model = make_model("llama")
    honest = CompiledRunner.__call__
    monkeypatch.setattr(CompiledRunner, "__call__", lambda *a: honest(*a) * 1.5)
    said = make_static(model, "auto", 64, {1}, print)
    assert said == "eager (calls of 1 rows give other logits, by 50.0%)"
    assert runner_of(model) is None


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt_neo", "gpt2"])
def test_which_models_have_a_step(architecture):
    assert has_step(make_model(architecture)) is (architecture in STEPPED)


def test_a_class_of_its_own_has_none():
    """Its forward may compute something of its own, which a step would pass over."""
    model = make_model("llama")
    model.__class__ = type("Special", (type(model),), {})
    assert not has_step(model)


def test_frequencies_that_change_with_the_length_have_none():
    model = make_model("llama")
    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert not has_step(model)
