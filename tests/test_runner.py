"""The runner with decoders that only count: order, warm-up, resuming, seeds."""

from __future__ import annotations

from dataclasses import replace

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

    def examples(self):
        return [Example(id=name, text=name, reference="r") for name in ("a", "b", "c", "d")]

    def prompt(self, example, encoder, max_tokens, max_new_tokens=0):
        return Prompt(encoder.encode(example.text))

    def completion(self, example, text):
        return f"{example.id}:{text}"


@pytest.fixture
def pair(model_folders) -> Pair:
    return load_pair(str(model_folders["llama-target"]), dtype="float32", device="cpu")


def counting(calls, name):
    def decode(prompt, *, generator, is_stop):
        calls.append((name, tuple(prompt), generator.initial_seed(), is_stop is not None))
        return Generation(token_ids=[40, 41], finish_reason="length", decode_seconds=1.0)

    return decode


def run_words(pair, path, methods=("one", "two", "three"), limit=None, task=None, **options):
    calls, task = [], task or Words()
    prompts = encode_prompts(task, pair, limit, max_new_tokens=2)
    with RunFile.open(path, META) as run_file:
        decoders = {name: counting(calls, name) for name in methods}
        run(pair, task, prompts, decoders, run_file, seed=0, **options)
        return calls, list(run_file.rows)


def test_warm_up_decodes_every_method_and_leaves_no_row(pair, tmp_path):
    """Without one, the first method pays for what the machine does only once."""
    calls, rows = run_words(pair, tmp_path / "r.jsonl", limit=2, warmup=1)
    assert [call[0] for call in calls[:3]] == ["one", "two", "three"]
    assert len(calls) == 3 + 6
    assert len(rows) == 6


def test_no_warm_up_when_nothing_is_left_to_do(pair, tmp_path):
    run_words(pair, tmp_path / "r.jsonl", warmup=1)
    calls, rows = run_words(pair, tmp_path / "r.jsonl", warmup=1)
    assert calls == []
    assert len(rows) == 12


def test_the_order_of_methods_rotates(pair, tmp_path):
    _, rows = run_words(pair, tmp_path / "r.jsonl")
    firsts = [row.method for row in rows[::3]]
    assert firsts == ["one", "two", "three", "one"]


def test_finished_rows_are_skipped_and_the_rest_is_done(pair, tmp_path):
    run_words(pair, tmp_path / "r.jsonl", methods=("two",), limit=3)
    calls, rows = run_words(pair, tmp_path / "r.jsonl", methods=("one", "two"))
    assert [call[0] for call in calls].count("two") == 1
    assert {row.key for row in rows} == {(e, m, 0) for e in "abcd" for m in ("one", "two")}


def test_rows_of_other_data_are_not_mixed_in(pair, tmp_path):
    """A data file edited between a run and its continuation has the same configuration."""

    class Corrected(Words):
        def examples(self):
            return [replace(example, reference="corrected") for example in super().examples()]

    class Longer(Words):
        def prompt(self, example, encoder, max_tokens, max_new_tokens=0):
            return Prompt(encoder.encode(f"a longer {example.text}"))

    class AsLong(Words):
        def prompt(self, example, encoder, max_tokens, max_new_tokens=0):
            return Prompt(encoder.encode({"a": "b"}.get(example.text, example.text)))

    run_words(pair, tmp_path / "r.jsonl", limit=2)
    written = (tmp_path / "r.jsonl").read_bytes()
    prompt = r"prompt of a: the data, the tokenizer or the chat template"
    changes = {Corrected(): "reference of a: the data", Longer(): prompt, AsLong(): prompt}
    for task, what in changes.items():
        with pytest.raises(RecordsError, match=f"another {what} have changed since; .*--fresh"):
            run_words(pair, tmp_path / "r.jsonl", task=task)
    assert (tmp_path / "r.jsonl").read_bytes() == written
    assert len(run_words(pair, tmp_path / "r.jsonl")[1]) == 12


def test_samples_have_streams_of_their_own(pair, tmp_path):
    calls, _ = run_words(pair, tmp_path / "r.jsonl", num_samples=3)
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
def test_a_text_that_lacks_memory_is_an_error_row_and_a_rerun_tries_again(problem, pair, tmp_path):
    path, failing = tmp_path / "r.jsonl", [True]

    def decode(prompt, *, generator, is_stop):
        if failing and tuple(prompt) == tuple(pair.encode("b")):
            raise problem
        return Generation(token_ids=[40], finish_reason="length", decode_seconds=1.0)

    def run_all():
        prompts = encode_prompts(Words(), pair, None, max_new_tokens=2)
        with RunFile.open(path, META) as run_file:
            run(pair, Words(), prompts, {"one": decode, "two": decode}, run_file, seed=0)
        return {row.key: row for row in read_rows(path)}

    rows = run_all()
    assert len(rows) == 8
    failed = [key for key, row in rows.items() if row.finish_reason == "error"]
    assert failed == [("b", "two", 0), ("b", "one", 0)]
    assert (
        rows[failed[0]].error.startswith("out of memory (") and "a rerun" in rows[failed[0]].error
    )
    kept = path.read_text().splitlines()
    failing.clear()
    again = run_all()
    assert again.keys() == rows.keys() and not any(row.error for row in again.values())
    assert [line for line in kept if '"b"' not in line] == path.read_text().splitlines()[:6]


def test_other_errors_end_the_run(pair, tmp_path):
    def decode(prompt, *, generator, is_stop):
        raise RuntimeError("shapes do not match")

    prompts = encode_prompts(Words(), pair, None, max_new_tokens=2)
    with (
        RunFile.open(tmp_path / "r.jsonl", META) as run_file,
        pytest.raises(RuntimeError, match="shapes"),
    ):
        run(pair, Words(), prompts, {"one": decode}, run_file, seed=0)


def test_rows_hold_what_the_task_and_the_decoder_say(pair, tmp_path):
    calls, rows = run_words(pair, tmp_path / "r.jsonl", limit=1)
    assert all(call[3] for call in calls)  # the stop strings reach the decoder
    assert rows[0].completion == "a:" + pair.decode([40, 41])
    assert rows[0].reference == "r"
    assert rows[0].source == Source.of(pair.encode("a"), "r")


def test_a_prompt_beyond_the_context_is_told_before_anything_is_decoded(pair, tmp_path):
    class TooLong(Words):
        def prompt(self, example, encoder, max_tokens, max_new_tokens=0):
            return Prompt([1] * (1024 if example.id == "c" else 5))

    class Foreign(Words):
        def prompt(self, example, encoder, max_tokens, max_new_tokens=0):
            return Prompt([1, 10_000])

    with pytest.raises(PromptError, match=r"prompt of a must have token ids below 400"):
        encode_prompts(Foreign(), pair, None, 2)
    with pytest.raises(PromptError, match=r"prompt of c must have at most 1023 tokens.*got 1024"):
        encode_prompts(TooLong(), pair, None, 2)
    assert len(encode_prompts(TooLong(), pair, 2, 2)) == 2
    with pytest.raises(PromptError, match=r"decoding.max_new_tokens must be below .* 1024 tokens"):
        encode_prompts(Words(), pair, None, 1024)


def test_an_empty_prompt_is_no_reason_for_a_longer_context(pair):
    with pytest.raises(PromptError, match=r"at least one token \(got 0: the tokenizer drops"):
        check_prompt("the prompt", [], pair)


def test_a_task_hears_how_long_a_prompt_may_be_and_rows_say_what_was_cut(pair, tmp_path):
    """A summary of half an article was scored like any other, and no one could tell."""

    class Cut(Words):
        def prompt(self, example, encoder, max_tokens, max_new_tokens=0):
            assert max_tokens == 1024 - 24  # the target's context less the new tokens
            return Prompt([1, 2, 3], num_cut_tokens=7 if example.id == "b" else 0)

    prompts = encode_prompts(Cut(), pair, 2, max_new_tokens=24)
    with RunFile.open(tmp_path / "r.jsonl", META) as run_file:
        run(pair, Cut(), prompts, {"one": counting([], "one")}, run_file, seed=0)
    rows = read_rows(tmp_path / "r.jsonl")
    assert [(row.num_prompt_tokens, row.num_cut_tokens) for row in rows] == [(3, None), (3, 7)]


def test_an_end_that_is_no_special_token_is_no_part_of_the_completion(pair, tmp_path):
    """Qwen2.5-Coder's <|file_sep|> ends a text, is not special, and stood behind its last line."""

    def ends(prompt, *, generator, is_stop):
        return Generation(token_ids=[40, 41], finish_reason="eos", decode_seconds=1.0)

    prompts = encode_prompts(Words(), pair, 1, max_new_tokens=2)
    with RunFile.open(tmp_path / "r.jsonl", META) as run_file:
        run(pair, Words(), prompts, {"one": ends}, run_file, seed=0)
        assert run_file.rows[0].completion == "a:" + pair.decode([40])
        assert run_file.rows[0].token_ids == [40, 41]
