"""Some models have a step of tensors alone; `decoding.compile` says what it makes of them."""

import pytest
from conftest import make_model

from specsampling.method.forward import runner_of
from specsampling.method.step import has_step
from specsampling.models.checkpoint import make_fast
from specsampling.models.errors import ModelError
from specsampling.models.static import make_static


def test_auto_says_why_it_stays_eager():
    model = make_model("llama")
    assert make_static(model, "off", 64, {1}, print) == "eager (decoding.compile: off)"
    assert make_static(model, "auto", 64, {1}, print) == "eager (nothing is captured on cpu)"
    with pytest.raises(ModelError, match=r"decoding.compile on cannot be had \(.*\); choose"):
        make_static(model, "on", 64, {1}, print)
    assert runner_of(model) is None


@pytest.mark.parametrize("mode", ["auto", "on"])
def test_a_model_in_the_kernel_needs_nothing_more(mode):
    model = make_fast(make_model("llama"))
    assert make_static(model, mode, 64, {1}, print).startswith("the CPU kernel (")


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
