"""speculative_generate.py: greedy tokens are those of `generate`; the rest is refused by name."""

import shutil

import pytest
import torch
from conftest import ARCHITECTURES, PROJECT
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from speculative_generate import GenerateError, speculative_generate

IDS = torch.tensor([[7, 3, 9, 3, 9, 3]])
DRAFTS = {
    "assistant": {},
    "assistant of 3": {"num_assistant_tokens": 3},
    "lookup": {"prompt_lookup_num_tokens": 4},
    "both": {"prompt_lookup_num_tokens": 4, "num_assistant_tokens": 2},
}


def expected(model, **options):
    ones = torch.ones_like(IDS)
    return model.generate(IDS, attention_mask=ones, pad_token_id=0, **options)


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_tokens_are_those_of_generate(model_of, architecture, draft):
    target = model_of(architecture)
    options = dict(DRAFTS[draft])
    if draft != "lookup":
        options["assistant_model"] = model_of(architecture, seed=1)
    ours = speculative_generate(target, IDS, do_sample=False, max_new_tokens=20, **options)
    assert torch.equal(ours, expected(target, do_sample=False, max_new_tokens=20))


def test_lengths_ends_and_configs_are_those_of_generate(model_of):
    target = model_of("llama")
    whole = expected(target, do_sample=False, max_new_tokens=20)[0].tolist()
    end = whole[len(IDS[0]) + 7]
    for options in ({"max_length": 15}, {"max_new_tokens": 20, "eos_token_id": [end, 1]}):
        ours = speculative_generate(target, IDS, prompt_lookup_num_tokens=3, **options)
        assert torch.equal(ours, expected(target, do_sample=False, **options))
    config = GenerationConfig(max_new_tokens=9, prompt_lookup_num_tokens=3)
    for options, length in (({}, 15), ({"max_new_tokens": 4}, 10)):
        ours = speculative_generate(target, inputs=IDS, generation_config=config, **options)
        assert ours.shape == (1, length)


def test_a_seed_has_one_text(model_of):
    target, small = model_of("llama"), model_of("llama", seed=1)
    options = {"do_sample": True, "temperature": 0.9, "top_k": 20, "max_new_tokens": 20}
    texts = [
        speculative_generate(
            *(target, IDS),
            assistant_model=small,
            num_assistant_tokens=3,
            generator=torch.Generator().manual_seed(seed),
            **options,
        )
        for seed in (0, 0, 1)
    ]
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])


class Collected(BaseStreamer):
    def __init__(self):
        self.parts, self.is_over = [], False

    def put(self, value):
        self.parts += value.flatten().tolist()

    def end(self):
        self.is_over = True


def test_a_streamer_gets_the_prompt_the_tokens_and_the_end(model_of):
    streamer = Collected()
    ours = speculative_generate(
        model_of("llama"), IDS, prompt_lookup_num_tokens=3, max_new_tokens=8, streamer=streamer
    )
    assert streamer.parts == ours[0].tolist() and streamer.is_over


def test_as_a_recipe_of_transformers(model_of, tmp_path, monkeypatch):
    """`get_cached_module_file` copies the recipe, so it must find the package by its name."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    shutil.copytree(PROJECT / "custom_generate", tmp_path / "recipe" / "custom_generate")
    target = model_of("llama")
    ours = target.generate(
        IDS,
        custom_generate=str(tmp_path / "recipe"),
        trust_remote_code=True,
        assistant_model=model_of("llama", seed=1),
        max_new_tokens=12,
    )
    assert torch.equal(ours, expected(target, do_sample=False, max_new_tokens=12))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_beams": 4}, "num_beams is not covered (got 4); pass num_beams=1"),
        ({"repetition_penalty": 1.1}, "repetition_penalty is not covered"),
        ({"min_p": 0.1}, "min_p is not covered"),
        ({"logits_processor": [1]}, "logits_processor is not covered"),
        ({"attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1]])}, "attention_mask must be all ones"),
        ({"prompt_lookup_num_tokens": None}, "assistant_model or prompt_lookup_num_tokens"),
        ({"max_new_tokens": None, "max_length": 6}, "max_length must exceed the prompt's 6 tokens"),
    ],
)
def test_what_is_not_covered_is_refused_by_name(model_of, options, words):
    given = {"prompt_lookup_num_tokens": 3, "max_new_tokens": 4} | options
    with pytest.raises(GenerateError) as caught:
        speculative_generate(model_of("llama"), IDS, **given)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("ids", [None, IDS[0], torch.cat([IDS, IDS])])
def test_one_text_at_a_time(model_of, ids):
    with pytest.raises(GenerateError, match=r"input_ids must be one text of shape \[1, n\]"):
        speculative_generate(model_of("llama"), ids, prompt_lookup_num_tokens=3)
