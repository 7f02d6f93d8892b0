"""Benchmarks/peers.py as a user runs it, over a tiny pair: rows, resuming, what is missing."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import time
from datetime import datetime
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import PROJECT, write_config
from test_end_to_end import run
from test_records import ROW
from transformers.generation import candidate_generator

from Benchmarks import peers
from specsampling.results.records import Row, read_meta, read_rows

SCRIPT = "Benchmarks/peers.py"
OURS = [f"ours in 16 bit: {kind}" for kind in ("autoregressive", "speculative")]
THEIRS = [
    f"transformers: {kind}"
    for kind in ("generate", "assisted, 3", "assisted, confidence 0.4", "prompt lookup")
]


@pytest.fixture(scope="module")
def config(tmp_path_factory, model_folders) -> Path:
    folder = tmp_path_factory.mktemp("config")
    return write_config(folder, "demo", "llama", model_folders, {})


def compare(config: Path, output: Path, hosts: str, *more: object) -> tuple[int, str, str]:
    return run(
        *("--config", config, "--output", output, "--hosts", hosts, "--compile", "off"),
        *("--skip", "compiled,flashspec", "--limit", 2, "--max-new-tokens", 12, *more),
        script=SCRIPT,
    )


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    output = tmp_path_factory.mktemp("peers") / "peers.jsonl"
    hosts = "transformers,llama.cpp,llama.cpp native,OpenVINO,ours in 16 bit"
    code, printed, errors = compare(config, output, hosts)
    assert code == 0, errors
    return output, printed, errors


def test_every_contender_has_a_row_per_problem_and_a_line(finished):
    output, printed, errors = finished
    rows = read_rows(output)
    assert sorted({row.method for row in rows}) == sorted(OURS + THEIRS)
    assert len(rows) == 2 * len(OURS + THEIRS)
    assert {row.example_id for row in rows} == {"HumanEval/40", "HumanEval/41"}
    for row in rows:
        assert 1 <= row.num_new_tokens <= 12 and row.prefill_seconds > 0 and not row.error
    for name in OURS + THEIRS:
        assert any(line.strip().startswith(name) for line in printed.splitlines()), printed
    assert "leaked" not in errors and "Traceback" not in errors
    assert (output.parent / "figures" / "peers.png").stat().st_size > 10_000


def test_in_float32_all_decode_the_same_tokens(finished):
    output, printed, _ = finished
    texts: dict[str, set[tuple[int, ...]]] = {}
    for row in read_rows(output):
        texts.setdefault(row.example_id, set()).add(tuple(row.token_ids))
    assert all(len(different) == 1 for different in texts.values())
    assert "own plain text" in printed
    assert printed.count("2 of 2") == len(OURS + THEIRS)


SLOW_SECONDS = 0.5
DRAFTERS = {
    "assisted, 3": candidate_generator.AssistedCandidateGenerator,
    "prompt lookup": candidate_generator.PromptLookupCandidateGenerator,
}


@pytest.mark.parametrize("kind", DRAFTERS)
def test_no_prefill_contains_a_cycle(kind, config, monkeypatch):
    """The time to the end of the first call had the first drafts in it, so decoding had not."""
    drafter, calls = DRAFTERS[kind], []
    propose = drafter.get_candidates

    def slowly(self, *arguments, **options):
        calls.append(time.sleep(SLOW_SECONDS))
        return propose(self, *arguments, **options)

    monkeypatch.setattr(drafter, "get_candidates", slowly)
    options = peers.parse_options(["--config", str(config), "--limit", "1"])
    options.max_new_tokens = "4"
    options.now = datetime.now()
    (prompt,) = peers.prompts_of(peers.configured(options, "none"), options.now).values()
    _, contenders = next(peers.transformers_and_flashspec(options))
    contenders[kind](prompt)
    calls.clear()
    generation = contenders[kind](prompt)
    assert 0 < generation.prefill_seconds < SLOW_SECONDS
    assert generation.decode_seconds > (len(calls) - 0.5) * SLOW_SECONDS and calls


def test_what_is_not_there_is_one_line(finished):
    _, printed, _ = finished
    if importlib.util.find_spec("flashspec") is None:
        assert 'not compared: flashspec (pip install ".[peers]")' in printed
    if importlib.util.find_spec("xllamacpp") is None:
        assert 'not compared: xllamacpp (pip install ".[peers]")' in printed
    else:
        assert "not compared: llama.cpp (the target is no GGUF file)" in printed
    if importlib.util.find_spec("llama_cpp") is None:
        assert "not compared: llama_cpp (CMAKE_ARGS=-DGGML_NATIVE=ON pip install" in printed
    else:
        assert "not compared: llama.cpp native (the target is no GGUF file)" in printed
    if importlib.util.find_spec("openvino_genai") is None:
        assert 'not compared: openvino_genai (pip install ".[peers]")' in printed
    else:
        assert "is not exported yet; give --exporter, see --help)" in printed


def test_a_rerun_decodes_only_what_is_missing(finished, config):
    output, _, _ = finished
    lines = output.read_text().splitlines(keepends=True)
    output.write_text("".join(lines[:-2]))
    code, _, errors = compare(config, output, "transformers,ours in 16 bit")
    assert code == 0, errors
    again = output.read_text().splitlines(keepends=True)
    assert again[:-2] == lines[:-2] and len(again) == len(lines)
    assert len(read_meta(output)["resumed"]) == 1


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--hosts", "vllm"], "--hosts must be of transformers, llama.cpp"),
        (["--limit", "0"], "limit"),
        (["--max-new-tokens", "x"], "max_new_tokens"),
        (["--config", PROJECT / "config.yaml", "--profile", "gpt-neo-rtx3050"], "humaneval"),
    ],
)
def test_mistakes_are_one_line(more, words, config, tmp_path):
    code, _, errors = compare(config, tmp_path / "peers.jsonl", "ours in 16 bit", *more)
    assert code == 2 and words in errors and len(errors.splitlines()) == 1
    assert not (tmp_path / "peers.jsonl").exists()


@pytest.fixture
def everything(monkeypatch, tmp_path):
    """Makes the packages seem installed, and the models' files seem to be there."""
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda package: package)
    monkeypatch.setattr(peers, "gguf_of", lambda spec: Path(spec) if "qwen" in spec else None)
    monkeypatch.setattr(peers, "files_of", lambda path: [path])
    monkeypatch.setattr(peers, "type_of", lambda path: "Q4_K")
    monkeypatch.setattr(peers, "exported", lambda spec, weights, exporter: Path(spec))


def names_of(profile: str, hosts: str) -> list[str]:
    options = peers.parse_options(["--profile", profile, "--hosts", hosts])
    return list(peers.finders(peers.configured(options, "none"), options))


def test_each_way_to_speculate_has_two_or_three_settings(everything):
    assert names_of("qwen-coder-cpu", "llama.cpp,llama.cpp native,OpenVINO") == [
        *(f"llama.cpp Q4_K {kind}" for kind in ("alone", "n-grams, 7:3", "n-grams, 15:3")),
        *(f"llama.cpp Q4_K {kind}" for kind in ("n-grams, 48:12", "draft, 3", "draft, 7")),
        "llama.cpp Q4_K draft, 15",
        *(f"llama.cpp native Q4_K {kind}" for kind in ("alone", "prompt lookup")),
        *(f"OpenVINO int8 {kind}" for kind in ("alone", "prompt lookup", "draft")),
        *(f"OpenVINO int4 {kind}" for kind in ("alone", "prompt lookup", "draft")),
    ]
    for ways in (peers.SERVER_SETTINGS, peers.NATIVE_SETTINGS, peers.OPENVINO_SETTINGS):
        assert ways["alone"] == ((),)
        assert all(2 <= len(settings) <= 3 for kind, settings in ways.items() if kind != "alone")
    assert peers.with_setting("prompt lookup", (5, 3)) == "prompt lookup, 5:3"
    assert peers.with_setting("draft", (3,)) == "draft, 3"
    assert peers.with_setting("alone", ()) == "alone"


def test_a_draft_of_the_targets_own_layers_is_no_model_for_others(everything, capsys):
    assert not any("draft" in name for name in names_of("demo", "OpenVINO"))
    assert names_of("demo", "llama.cpp native") == []
    assert "not compared: llama.cpp native (the target is no GGUF file)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("draft", "whole"),
    [
        ("ngram", None),
        ("target-layers:3", None),
        ("ngram+target-layers:3", None),
        ("ngram+embedded:smollm2-135m-draft", None),
        ("ngram+embedded:qwen2.5-coder-0.5b", "embedded:qwen2.5-coder-0.5b"),
        ("somewhere/draft", "somewhere/draft"),
    ],
)
def test_which_drafts_are_whole_models(draft, whole):
    options = peers.parse_options([])
    config = peers.load_config(options.config, "demo", [f"models.draft={draft}"])
    assert peers.whole_draft(config) == whole


def test_a_model_is_exported_once(model_folders, tmp_path, monkeypatch):
    commands = []

    def run_exporter(command, **_):
        commands.append(command)
        Path(command[-1]).mkdir()
        Path(command[-1], "openvino_model.xml").write_text("<net/>")
        return peers.subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setenv("SPECSAMPLING_CACHE", str(tmp_path))
    monkeypatch.setattr(peers.subprocess, "run", run_exporter)
    spec = str(model_folders["llama-target"])
    with pytest.raises(peers.ConfigError, match="is not exported yet; give --exporter"):
        peers.exported(spec, "int4", None)
    folder = peers.exported(spec, "int4", Path("its-python"))
    assert (folder / "openvino_model.xml").exists() and folder.parent == tmp_path
    assert peers.exported(spec, "int4", None) == folder
    assert peers.exported(spec, "int8", Path("its-python")) != folder
    four, eight = commands
    assert four[0] == "its-python" and four[four.index("--model") + 1] == spec
    assert four[four.index("--group-size") + 1] == "128" and "--group-size" not in eight


def test_an_export_that_fails_is_one_line(model_folders, tmp_path, monkeypatch):
    def fail(command, **_):
        return peers.subprocess.CompletedProcess(command, 1, "", "Traceback\nNo module named x\n")

    monkeypatch.setenv("SPECSAMPLING_CACHE", str(tmp_path))
    monkeypatch.setattr(peers.subprocess, "run", fail)
    spec = str(model_folders["llama-target"])
    with pytest.raises(peers.ConfigError, match="cannot export .*: No module named x; see --help"):
        peers.exported(spec, "int8", Path("its-python"))
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def row(method: str, seconds: float, error: str | None = None, example: str = "a") -> Row:
    values = {"example_id": example, "method": method, "error": error, "accepted": []}
    values |= {"token_ids": [] if error else [1, 2, 3], "drafted": [], "target_calls": 3}
    values |= {"prefill_seconds": 1.0, "decode_seconds": seconds, "forward_seconds": seconds}
    return dataclasses.replace(ROW, finish_reason="error" if error else "length", **values)


def test_ratios_are_our_best_against_the_best_of_each_kind():
    rows = [
        row(method, seconds, example=example)
        for example in ("a", "b")
        for method, seconds in {
            "ours in 16 bit: autoregressive": 9.0,
            "ours in 8 bit: autoregressive": 4.0,
            "ours in 8 bit: speculative": 1.0,
            "llama.cpp Q4_K: alone": 3.0,
            "llama.cpp Q4_K: n-grams, 7:3": 2.0,
            "llama.cpp native Q4_K: alone": 2.5,
            "OpenVINO int4: prompt lookup, 5:3": 0.5,
            "transformers: generate": 11.0,
            "flashspec: composite": 5.0,
        }.items()
    ]
    rows.append(row("transformers: prompt lookup", 1.0, error="broken"))
    printed = "\n".join(peers.report(rows))
    ours = "ours in 8 bit: speculative / "
    assert ours + "llama.cpp Q4_K: n-grams, 7:3: 1.50 [1.50, 1.50], without prefill 2.00" in printed
    assert ours + "OpenVINO int4: prompt lookup, 5:3: 0.75 [0.75, 0.75]" in printed
    assert ours + "flashspec: composite: 3.00 [3.00, 3.00]" in printed
    assert "ours in 8 bit: autoregressive / ours in 16 bit: autoregressive: 2.00" in printed
    assert "transformers: prompt lookup, a: broken" in printed


def test_texts_are_compared_with_the_same_familys_and_formats_plain_ones():
    alone, lookup = "OpenVINO int8: alone", "OpenVINO int8: prompt lookup, 5:3"
    rows = [row(name, 1.0, example=example) for name in (alone, lookup) for example in ("a", "b")]
    rows[-1].token_ids[-1] = 7
    rows += [row("OpenVINO int4: draft, 3", 1.0, example=example) for example in ("a", "b")]
    above, header, _, *lines = (line for line in peers.report(rows) if line.strip())
    assert above.endswith("equal to its") and header.endswith("own plain text")
    words = {line.strip().split("  ")[0]: line.split()[-3:] for line in lines}
    assert words[alone] == ["2", "of", "2"] and words[lookup] == ["1", "of", "2"]
    assert "of" not in words["OpenVINO int4: draft, 3"]  # no plain text of 4 bit


def broken(options):
    yield "sound", {"one": lambda prompt: 1 / 0}
    raise ValueError("its file is torn")


def dead(options):
    raise SystemExit(3)
    yield


def test_a_contender_that_fails_does_not_stop_the_others(capsys):
    host = peers.Host("broken", broken, options=None)
    assert host.names == ["sound: one"]
    assert host.decode("sound: one", [1]).error == "ZeroDivisionError: division by zero"
    host.close()
    assert capsys.readouterr().out == "not compared: broken: ValueError: its file is torn\n"


def mortal(options):
    yield "mortal", {"one": lambda prompt: os._exit(3), "two": lambda prompt: None}


def test_a_process_that_ends_in_its_first_text_does_not_stop_the_others(capsys, tmp_path):
    """A contender's library crashed in its first text, and the whole comparison ended."""
    host = peers.Host("mortal", mortal, options=None)
    decoders = {name: partial(host.decode, name) for name in host.names}
    decoders["sound"] = lambda prompt: peers.Generation([1, 2], "length")
    kept: list[Row] = []
    run_file = SimpleNamespace(done=set(), append=kept.append)
    peers.compare({"a": [1]}, decoders, run_file)
    host.close()
    assert [kept_row.method for kept_row in kept] == ["sound"]
    printed = capsys.readouterr().out
    for name in ("one", "two"):
        assert f"not compared: mortal: {name}: the process of mortal: {name} ended" in printed
    with pytest.raises(peers.ConfigError, match="the process of dead ended"):
        peers.Host("dead", dead, options=None)


def test_weights_are_written_again_in_another_type(tmp_path):
    import gguf

    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    weights = np.random.default_rng(0).standard_normal((32, 64)).astype(np.float32)
    quantised = gguf.quants.quantize(weights, gguf.GGMLQuantizationType.Q4_1)
    writer.add_tensor("matrix", quantised, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    writer.add_tensor("norm", np.ones(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    files = {peers.type_of(path): path for path in peers.files_of(path)}
    assert list(files) == ["Q4_1", "Q8_0", "BF16"]
    for kind, bound in (("Q8_0", 0.02), ("BF16", 0.02)):
        reader = gguf.GGUFReader(files[kind])
        matrix, norm = reader.tensors
        values = gguf.quants.dequantize(matrix.data, matrix.tensor_type)
        wanted = gguf.quants.dequantize(quantised, gguf.GGMLQuantizationType.Q4_1)
        assert np.abs(values - wanted).max() < bound
        assert norm.tensor_type is gguf.GGMLQuantizationType.F32
        assert reader.fields["tokenizer.ggml.tokens"].contents() == ["a", "b"]
        assert reader.fields["llama.context_length"].contents() == 64
