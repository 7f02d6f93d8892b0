"""The runner with decoders that only count: order, warm-up, resuming, seeds."""

from __future__ import annotations

import pytest
import torch

from specsampling.method.text import Generation, PromptError
from specsampling.models.load import Pair, load_pair
from specsampling.results.records import RecordsError, Source, read_rows
from specsampling.results.runfile import RunFile
from specsampling.runner import check_prompt, encode_prompts, run, sample_seed
from specsampling.tasks.task import Example, Prompt

META = {"config_hash": "x", "precision": "float32", "device": "cpu"}


class Words:
    """A task over four short texts, with one stop string."""

    stop_strings = ("stop",)
    reference = "r"

    def examples(self):
        return [Example(id=name, text=name, reference=self.reference) for name in "abcd"]

    def prompt(self, example, encoder, max_tokens, max_new_tokens=0):
        return Prompt(encoder.encode(self.prompted(example.text)))

    def prompted(self, text):
        return text

    def completion(self, example, text):
        return f"{example.id}:{text}"


class Prompts(Words):
    """A task whose prompts are made of an example's id."""

    def __init__(self, prompt_of):
        self.prompt_of = prompt_of

    def prompt(self, example, encoder, max_tokens, max_new_tokens=0):
        return self.prompt_of(example.id, max_tokens)


@pytest.fixture(scope="module")
def pair(model_folders) -> Pair:
    return load_pair(str(model_folders["llama-target"]), dtype="float32", device="cpu")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "r.jsonl"


def counting(calls, name, finish_reason="length"):
    def decode(prompt, *, generator, is_stop):
        calls.append((name, tuple(prompt), generator.initial_seed(), is_stop is not None))
        return Generation([40, 41], finish_reason, decode_seconds=1.0)

    return decode


def run_words(pair, path, methods=("one", "two", "three"), limit=None, task=None, **options):
    calls = []
    decoders = {name: counting(calls, name) for name in methods}
    return calls, run_with(pair, path, decoders, limit, task, **options)


def run_with(pair, path, decoders, limit=None, task=None, max_new_tokens=2, **options):
    task = task or Words()
    prompts = encode_prompts(task, pair, limit, max_new_tokens)
    with RunFile.open(path, META) as run_file:
        run(pair, task, prompts, decoders, run_file, seed=0, **options)
        return list(run_file.rows)


def test_warm_up_decodes_every_method_and_leaves_no_row(pair, path):
    """Without one, the first method pays for what the machine does only once."""
    calls, rows = run_words(pair, path, limit=2, warmup=1)
    assert [call[0] for call in calls[:3]] == ["one", "two", "three"]
    assert len(calls) == 3 + 6 and len(rows) == 6
    calls, rows = run_words(pair, path, limit=2, warmup=1)  # nothing is left to do
    assert calls == [] and len(rows) == 6


def test_the_order_of_methods_rotates(pair, path):
    _, rows = run_words(pair, path)
    assert [row.method for row in rows[::3]] == ["one", "two", "three", "one"]


def test_finished_rows_are_skipped_and_the_rest_is_done(pair, path):
    run_words(pair, path, methods=("two",), limit=3)
    calls, rows = run_words(pair, path, methods=("one", "two"))
    assert [call[0] for call in calls].count("two") == 1
    assert {row.key for row in rows} == {(e, m, 0) for e in "abcd" for m in ("one", "two")}


def test_rows_of_other_data_are_not_mixed_in(pair, path):
    """A data file edited between a run and its continuation has the same configuration."""
    run_words(pair, path, limit=2)
    written = path.read_bytes()
    corrected, longer, as_long = Words(), Words(), Words()
    corrected.reference = "corrected"
    longer.prompted = lambda text: f"a longer {text}"
    as_long.prompted = lambda text: text.replace("a", "b")
    prompt = r"prompt of a: the data, the tokenizer or the chat template"
    changes = {corrected: "reference of a: the data", longer: prompt, as_long: prompt}
    for task, what in changes.items():
        with pytest.raises(RecordsError, match=f"another {what} have changed since; .*--fresh"):
            run_words(pair, path, task=task)
    assert path.read_bytes() == written
    assert len(run_words(pair, path)[1]) == 12


def test_samples_have_streams_of_their_own(pair, path):
    calls, _ = run_words(pair, path, num_samples=3)
    seeds = [call[2] for call in calls]
    assert len(set(seeds)) == len(seeds) == 36
    assert sample_seed(0, "a", "one", 0) in seeds
    assert sample_seed(0, "a", "one", 0) != sample_seed(1, "a", "one", 0)


@pytest.mark.parametrize(
    "problem",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        MemoryError(),
    ],
)
def test_a_text_that_lacks_memory_is_an_error_row_and_a_rerun_tries_again(problem, pair, path):
    failing = [True]

    def decode(prompt, *, generator, is_stop):
        if failing and tuple(prompt) == tuple(pair.encode("b")):
            raise problem
        return Generation(token_ids=[40], finish_reason="length", decode_seconds=1.0)

    def run_all():
        run_with(pair, path, {"one": decode, "two": decode})
        return {row.key: row for row in read_rows(path)}

    rows = run_all()
    assert len(rows) == 8
    failed = [key for key, row in rows.items() if row.finish_reason == "error"]
    assert failed == [("b", "two", 0), ("b", "one", 0)]
    error = rows[failed[0]].error
    assert error.startswith("out of memory (") and "a rerun" in error
    kept = path.read_text().splitlines()
    failing.clear()
    again = run_all()
    assert again.keys() == rows.keys() and not any(row.error for row in again.values())
    assert [line for line in kept if '"b"' not in line] == path.read_text().splitlines()[:6]


def test_other_errors_end_the_run(pair, path):
    def decode(prompt, *, generator, is_stop):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        run_with(pair, path, {"one": decode})


def test_rows_hold_what_the_task_and_the_decoder_say(pair, path):
    calls, (row,) = run_words(pair, path, ("one",), limit=1)
    assert all(call[3] for call in calls)  # the stop strings reach the decoder
    assert row.completion == "a:" + pair.decode([40, 41])
    assert row.source == Source.of(pair.encode("a"), "r") and row.reference == "r"


def test_a_prompt_beyond_the_context_is_told_before_anything_is_decoded(pair):
    """An empty prompt is no reason for a longer context."""
    foreign = Prompts(lambda name, _: Prompt([1, 10_000]))
    too_long = Prompts(lambda name, _: Prompt([1] * (1024 if name == "c" else 5)))
    for task, max_new_tokens, message in (
        (foreign, 2, r"prompt of a must have token ids below 400"),
        (too_long, 2, r"prompt of c must have at most 1023 tokens.*got 1024"),
        (Words(), 1024, r"decoding.max_new_tokens must be below .* 1024 tokens"),
    ):
        with pytest.raises(PromptError, match=message):
            encode_prompts(task, pair, None, max_new_tokens)
    assert len(encode_prompts(too_long, pair, 2, 2)) == 2
    with pytest.raises(PromptError, match=r"at least one token \(got 0: the tokenizer drops"):
        check_prompt("the prompt", [], pair)


def test_a_task_hears_how_long_a_prompt_may_be_and_rows_say_what_was_cut(pair, path):
    """A summary of half an article was scored like any other, and no one could tell."""

    def cut(name, max_tokens):
        assert max_tokens == 1024 - 24  # the target's context less the new tokens
        return Prompt([1, 2, 3], num_cut_tokens=7 if name == "b" else 0)

    run_words(pair, path, ("one",), 2, Prompts(cut), max_new_tokens=24)
    rows = read_rows(path)
    assert [(row.num_prompt_tokens, row.num_cut_tokens) for row in rows] == [(3, None), (3, 7)]


def test_an_end_that_is_no_special_token_is_no_part_of_the_completion(pair, path):
    """Qwen2.5-Coder's <|file_sep|> ends a text, is not special, and stood behind its last line."""
    (row,) = run_with(pair, path, {"one": counting([], "one", "eos")}, limit=1)
    assert row.completion == "a:" + pair.decode([40])
    assert row.token_ids == [40, 41]
