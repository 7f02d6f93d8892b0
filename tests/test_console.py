"""console.py: sizes against the loaded model and machine; what one prompt looks like."""

import os
from functools import partial
from pathlib import Path

import pytest
from helpers import error_line

from autoregressive import autoregressive_stream
from specsampling.config import ConfigError, load_config
from specsampling.console import COLOURS, PLAIN, decode_one_prompt, exit_code, painted, show
from specsampling.loading import baselines, load_configured_pair
from specsampling.method.decode import Step
from specsampling.method.session import context_limit
from specsampling.method.text import Generation
from specsampling.method.verify import VERIFIERS
from specsampling.models.errors import ModelError
from specsampling.models.load import Pair
from speculative import speculative_stream

SHIPPED = Path(__file__).parents[1] / "config.yaml"
CONTEXT = 1024  # of the tiny Llama's folder


def tiny(model_folders, *overrides):
    """The demo profile over the tiny Llama, with changes."""
    folder = str(model_folders["llama-target"])
    models = f"models.target={folder}", "models.draft=ngram", "models.dtype=float32"
    return load_config(SHIPPED, "demo", [*models, "models.device=cpu", *overrides])


@pytest.mark.parametrize(
    ("field", "least", "far"),
    [("speculation.k", 1024, 1024), ("decoding.width", 1032, 2048)]
    + [("decoding.max_new_tokens", 1024, 10_000_000)],
)
def test_sizes_beyond_the_context_are_refused(model_folders, field, least, far):
    """k=65536 hung, k=3000 took 49 seconds for 8 tokens, on a context of 2,048."""
    for size in (least, far):
        config = tiny(model_folders, f"{field}={size}")
        message = error_line(ConfigError, load_configured_pair, config)
        assert f"{field} must fit the target's context of {CONTEXT} tokens (got " in message
    most = least - (8 if field == "decoding.width" else 1)
    pair = load_configured_pair(tiny(model_folders, f"{field}={most}"))
    assert context_limit(pair.target) == CONTEXT


@pytest.mark.parametrize(
    ("architecture", "override", "has_reference"),
    [
        ("llama", "run.limit=1", False),  # rows never meet in the kernel
        ("gpt_neo", "run.limit=1", False),
        ("gpt2", "run.limit=1", True),  # which the kernel does not know
        ("llama", "decoding.compile=off", True),
        ("gpt2", "decoding.bit_exact=false", False),
    ],
)
def test_reference_is_decoded_where_rows_meet(model_folders, architecture, override, has_reference):
    config = tiny(
        model_folders, f"models.target={model_folders[f'{architecture}-target']}", override
    )
    assert baselines(config) == ["autoregressive", *["reference"] * has_reference]


def test_more_threads_than_the_machine_can_use_are_refused(model_folders):
    """5,000,000 threads ended the process inside of OpenMP."""
    most = 8 * (os.cpu_count() or 1)
    if most < 1024:
        with pytest.raises(ConfigError, match=f"run.threads must be <= {most} here"):
            load_configured_pair(tiny(model_folders, f"run.threads={most + 1}"))


@pytest.mark.parametrize(
    "template",
    [
        *("{{ raise_exception('roles must alternate') }}", "{{ messages[7]['content'] }}"),
        *("{{ 1 / 0 }}", "{% for m in messages %}", "{{ messages | no_such_filter }}"),
        *("{{ messages + 1 }}", "{{ 'x'.encode() + 'y' }}", "{% include 'other' %}"),
    ],
)
def test_a_chat_template_that_fails_is_one_line(llama, tokenizer, monkeypatch, template):
    monkeypatch.setattr(tokenizer, "chat_template", template)
    pair = Pair(llama, None, tokenizer, frozenset())
    message = error_line(ModelError, pair.encode_chat, "hello")
    assert "the chat template of" in message and "prompt_style: completion" in message


@pytest.fixture
def options(model_folders):
    """A tiny target on the command line, and a draft that is a lookup."""
    target = ["--target", model_folders["llama-target"], "--dtype", "float32", "--device", "cpu"]
    return [*map(str, target), "--draft", "ngram"]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "--prompt must be a text in UTF-8"),
        ("a\udcff", "--prompt must be a text in UTF-8"),
        ("word " * 3000, "the prompt must have at most 1023 tokens"),
    ],
)
def test_a_prompt_that_cannot_be_decoded_is_one_line(options, prompt, message, capsys):
    main = partial(decode_one_prompt, None, None)
    assert exit_code(main, [*options, "--prompt", prompt]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("rule", ["token", "block"])
def test_one_prompt_is_decoded_by_the_configured_rule(rule, options, capsys):
    """It was the token by token one, whatever speculation.verifier said."""
    given = {}

    def decode(target, draft, prompt, **options):
        given.update(options)
        return steps_of(Generation([65], "length", accepted=[0], drafted=[0], decode_seconds=1.0))

    options += ["--prompt", "word", "--raw", "--set", f"speculation.verifier={rule}"]
    assert exit_code(partial(decode_one_prompt, decode, decode), options) == 0
    assert given["verifier"] is VERIFIERS[rule]
    assert "speculative: 1 tokens (length)" in capsys.readouterr().err


@pytest.mark.parametrize("temperature", ["0", "0.9"])
def test_a_comparison_ends_with_the_verdict(temperature, options, model_folders, capsys):
    """Sampled texts are the same too if draft and target share their noise."""
    options += ["--prompt", "def f(x):", "--compare", "--max-new-tokens", "20", "--k", "3"]
    options += ["--temperature", temperature, "--set", "speculation.verifier=coupled"]
    options += ["--draft", str(model_folders["llama-draft"])]
    main = partial(decode_one_prompt, speculative_stream, autoregressive_stream)
    assert exit_code(main, options) == 0
    printed, errors = capsys.readouterr()
    assert printed.strip() and "\033" not in printed  # this is no terminal
    assert "autoregressive: 20 tokens" in errors and "speculative: 20 tokens" in errors
    assert errors.splitlines()[-1].startswith("identical: yes; speedup: ")


def test_a_text_without_a_draft_loads_none(options, capsys):
    options += ["--prompt", "def f(x):", "--max-new-tokens", "5", "--draft", "no/such-model"]
    assert exit_code(partial(decode_one_prompt, None, autoregressive_stream), options) == 0
    told = "autoregressive: 5 tokens (length), 1.00 for each of 5 target calls"
    assert told in capsys.readouterr().err


def steps_of(generation):
    """A generation as a decoder's steps, one for each cycle."""
    kinds, at = generation.kinds(), 0
    for accepted in generation.accepted:
        yield Step(generation.token_ids[at : at + accepted + 1], kinds[at : at + accepted + 1])
        at += accepted + 1
    return generation


def test_each_token_has_its_origins_colour(monkeypatch, capsys):
    generation = Generation(
        token_ids=[ord(c) for c in "abcdefg"],
        finish_reason="length",
        accepted=[2, 0, 2],
        drafted=[2, 2, 3],
    )
    kinds = generation.kinds()
    assert kinds == ["accepted", "accepted", "bonus", "correction", *["accepted"] * 2, "correction"]
    monkeypatch.setenv("FORCE_COLOR", "1")
    shown = show(steps_of(generation), lambda ids: "".join(map(chr, ids)))
    assert shown is generation
    assert capsys.readouterr().out.rstrip("\n") == "".join(
        f"{COLOURS[kind]}{letter}{PLAIN}" for kind, letter in zip(kinds, "abcdefg", strict=True)
    )


def test_colours_are_for_terminals_and_can_be_switched_off(monkeypatch):
    assert painted(("bonus", "a")) == "a"
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert painted(("bonus", "a")) == f"{COLOURS['bonus']}a{PLAIN}"
    assert painted(("target", "a")) == "a"
    monkeypatch.setenv("NO_COLOR", "1")
    assert painted(("bonus", "a")) == "a"


def test_a_character_of_several_tokens_is_shown_once_it_is_whole(tokenizer, capsys):
    ids = tokenizer("é東x")["input_ids"]
    assert len(ids) > 3
    show(steps_of(Generation(ids, "length", [0] * len(ids), [1] * len(ids))), tokenizer.decode)
    assert capsys.readouterr().out == "é東x\n"


def test_kinds_of_a_cut_text_and_of_one_without_a_draft():
    assert Generation([1, 2], "eos", accepted=[4], drafted=[4]).kinds() == ["accepted"] * 2
    assert Generation([1, 2], "eos").kinds() == ["target", "target"]
