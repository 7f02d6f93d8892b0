"""Compare our tokens per second with what a user would pick instead, on one pair and prompts.

    python Benchmarks/peers.py                      the demo pair
    python Benchmarks/peers.py --profile qwen-coder-cpu   Qwen2.5-Coder 1.5B with 0.5B

The script decodes a few HumanEval problems greedily. The contenders are:

- transformers' `generate`: eager, compiled over a static cache, assisted on two schedules, prompt
  lookup;
- flashspec over the same two models;
- llama.cpp on the GGUF file that our weights come from, through xllamacpp, whose wheel runs on many
  processors: alone, with n-grams, with the draft;
- llama.cpp on the same file through llama-cpp-python, built for this processor: alone, with prompt
  lookup;
- OpenVINO GenAI on the weights that optimum-intel rounded to 8 and to 4 bit: alone, with prompt
  lookup, with the draft;
- ours: baseline and speculative, in bfloat16, 8 bit and 4 bit.

Each way to speculate runs with two or three settings. A setting is a number of drafted tokens, or
`drafted tokens:length of the n-gram`. For a missing package, one line says how to get it:

    pip install ".[peers]"
    CMAKE_ARGS=-DGGML_NATIVE=ON pip install ".[peers-native]" --no-binary llama-cpp-python

The second command builds llama.cpp with your compiler. GCC 12 drops stores that set up AMX, and
the result ends with a segmentation fault on a processor that has AMX. With that compiler, set
CXXFLAGS="-fno-tree-dse -fno-dse" too.

optimum-intel needs an older transformers than ours. Give it an environment of its own, and name
that environment's interpreter. If torch there is a CPU build, uninstall torchvision, which expects
CUDA. The exported models are kept in the cache, so later runs need no `--exporter`:

    python -m venv exporter && exporter/bin/pip install "optimum-intel[openvino]>=2.2"
    python Benchmarks/peers.py --exporter exporter/bin/python

Contenders live in processes of their own. For the Qwen pair, they need more memory than many
machines have: `--hosts` takes some of them, and a rerun with others adds to the same rows. They
decode one at a time, in an order that rotates from problem to problem. Loading, compiling and a
first text are not counted. The prefill of transformers and flashspec is timed in a call of its own
and taken off the text's time, because their first call also verifies drafted tokens. A contender's
outputs are compared with the plain decoding of its family and format. A rerun continues where the
last one stopped. The figure goes beside the rows.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    from specsampling.edge import catch_signals

    catch_signals()

import pandas as pd
from tqdm import tqdm

from specsampling.config import Config, ConfigError, load_config, require_task
from specsampling.console import PROJECT, Parser, exit_code
from specsampling.draft_name import DraftName
from specsampling.method.text import Generation
from specsampling.models.errors import ModelError
from specsampling.results import metrics
from specsampling.results.figures import DARK, LIGHT, MIDDLE, new_figure, save_figure
from specsampling.results.records import Row, Source, read_run
from specsampling.results.runfile import RunFile, check_fresh, check_output
from specsampling.results.table_text import aligned
from specsampling.results.tables import shared_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Decode = Callable[[list[int]], Generation]
Contenders = Mapping[str, Decode]

Found = Iterator[tuple[str, Contenders]]  # a family and its contenders

NUM_CORES = os.cpu_count() or 1
BASELINES = {  # the plain decoding of each family
    "transformers": "generate",
    "llama.cpp": "alone",
    "OpenVINO": "alone",
    "ours": "autoregressive",
}
OURS = {"ours in 16 bit": "none", "ours in 8 bit": "int8", "ours in 4 bit": "int4"}
FAMILIES = ("transformers", "llama.cpp", "llama.cpp native", "OpenVINO", *OURS)
PACKAGES = {  # a family's package, and its installation
    "llama.cpp": ("xllamacpp", 'pip install ".[peers]"'),
    "llama.cpp native": (
        "llama_cpp",
        'CMAKE_ARGS=-DGGML_NATIVE=ON pip install ".[peers-native]" --no-binary llama-cpp-python',
    ),
    "OpenVINO": ("openvino_genai", 'pip install ".[peers]"'),
}
COLOURS = {"ours": DARK, "llama.cpp": MIDDLE, "OpenVINO": MIDDLE}  # the others: LIGHT
PYTORCH = ("transformers", "flashspec")
FIRST = 40  # first problem: earlier ones were looked at while the settings were chosen

# A setting is the number of drafted tokens and, for a lookup, the length of its n-gram.
Settings = dict[str, tuple[tuple[int, ...], ...]]  # a way to decode and its settings
SERVER_SETTINGS: Settings = {
    "alone": ((),),
    "n-grams": ((7, 3), (15, 3), (48, 12)),  # the last is llama.cpp's default
    "draft": ((3,), (7,), (15,)),
}
NATIVE_SETTINGS: Settings = {"alone": ((),), "prompt lookup": ((3, 2), (7, 2))}
OPENVINO_SETTINGS: Settings = {
    "alone": ((),),
    "prompt lookup": ((5, 3), (7, 3), (15, 3)),
    "draft": ((3,), (5,)),
}
# optimum-intel's options. Its defaults for 4 bit are written out, because it refuses a layer whose
# inputs 128 does not divide. Such a layer has the largest group that does (64 for SmolLM2).
OPENVINO_FORMATS: dict[str, tuple[str, ...]] = {
    "int8": (),  # a scale and an offset per output channel
    "int4": ("--ratio", "1.0", "--group-size", "128", "--group-size-fallback", "adjust"),
}


# --- the contenders, made in their own processes -------------------------------------


def ours(options: argparse.Namespace, family: str, quantization: str) -> Found:
    """Yield our own decoders, as a run of the profile would have them."""
    import torch

    from autoregressive import autoregressive
    from specsampling.experiment import bind_decoders
    from specsampling.loading import load_configured_pair, load_drafts, make_steps
    from speculative import speculative

    config = configured(options, quantization)
    pair = load_configured_pair(config)
    drafts = load_drafts(config, pair)
    longest = max(len(ids) for ids in prompts_of(config, options.now).values())
    longest += config.decoding.max_new_tokens
    pair, drafts, _ = make_steps(config, pair, drafts, longest)
    decoders = bind_decoders(config, pair, drafts, autoregressive, speculative)
    yield (
        family,
        {
            name: partial(decode, generator=torch.Generator(), is_stop=None)
            for name, decode in decoders.items()
        },
    )


def transformers_and_flashspec(options: argparse.Namespace) -> Found:
    """Yield transformers' own ways to decode, and flashspec over the same two models."""
    import torch
    from transformers import AutoModelForCausalLM, CompileConfig, GenerationConfig

    from specsampling.models.load import model_location, resolve_dtype
    from specsampling.models.tokenizer import end_ids, load_tokenizer

    config = configured(options, "none")
    device = torch.device("cpu")
    dtype = resolve_dtype(config.models.dtype, device)
    target, draft = (
        AutoModelForCausalLM.from_pretrained(model_location(spec), dtype=dtype).eval()
        for spec in (config.models.target, DraftName.parse(config.models.draft).model)
    )
    eos_ids = sorted(end_ids(load_tokenizer(config.models.target), target))
    for model in (target, draft):  # penalties would change the text
        model.generation_config = GenerationConfig(eos_token_id=eos_ids, pad_token_id=eos_ids[0])
    limit = config.decoding.max_new_tokens

    def generate(prompt: list[int], **how: Any) -> Generation:
        used = [target, draft] if "assistant_model" in how else [target]
        prefill_seconds = time_prefill(used, prompt)
        start = time.perf_counter()
        with torch.inference_mode():
            ids = target.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=limit,
                do_sample=False,
                **how,
            )[0, len(prompt) :].tolist()
        return timed(ids, start, start + prefill_seconds, limit)

    def assisted(prompt: list[int], num_tokens: int, confidence: float) -> Generation:
        draft.generation_config.num_assistant_tokens = num_tokens
        draft.generation_config.num_assistant_tokens_schedule = "constant"
        draft.generation_config.assistant_confidence_threshold = confidence
        return generate(prompt, assistant_model=draft)

    longest = max(len(ids) for ids in prompts_of(config, options.now).values())
    static: dict[str, Any] = {
        "cache_implementation": "static",
        "max_cache_len": longest + limit,
        "compile_config": CompileConfig(mode="default", fullgraph=False, dynamic=False),
    }
    static["compile_config"]._compile_all_devices = True
    yield (
        "transformers",
        {
            "generate": generate,
            "generate compiled": partial(generate, **static),
            "assisted, 3": partial(assisted, num_tokens=3, confidence=0.0),
            "assisted, confidence 0.4": partial(assisted, num_tokens=20, confidence=0.4),
            "prompt lookup": partial(generate, prompt_lookup_num_tokens=10),
        },
    )
    yield "flashspec", {"composite": flashspec_over(target, draft, eos_ids, limit)}


def flashspec_over(
    target: Any, draft: Any, eos_ids: list[int], limit: int
) -> Callable[[list[int]], Generation]:
    """Return flashspec's way to decode with two models of transformers."""
    import torch
    from flashspec import FlashSpecConfig, SamplingConfig, SpeculativeEngine
    from flashspec.engine import HuggingFaceDrafter, TargetModel

    engine = SpeculativeEngine(
        FlashSpecConfig(device="cpu", sampling=SamplingConfig(temperature=0.0)),
        [HuggingFaceDrafter("draft", draft.device, draft.dtype, model=draft)],
        TargetModel("target", target.device, target.dtype, model=target),
    )

    def composite(prompt: list[int]) -> Generation:
        prefill_seconds = time_prefill([target, draft], prompt)
        start = time.perf_counter()
        result = engine.generate(torch.tensor([prompt]), limit, eos_token_ids=eos_ids)
        ids = result.output_ids[0, : result.n_tokens_generated].tolist()
        return timed(ids, start, start + prefill_seconds, limit)

    return composite


def time_prefill(models: Sequence[Any], prompt: list[int]) -> float:
    """Return the seconds in which models take in a prompt without its newest token.

    That is what our own prefill is, and it is timed in calls of its own. A first call of assisted
    decoding or of a prompt lookup also verifies the first drafted tokens, so it is no prefill.
    """
    import torch

    ids = torch.tensor([prompt[:-1]])
    start = time.perf_counter()
    with torch.inference_mode():
        for model in models:
            model(ids, use_cache=True, logits_to_keep=1)
    return time.perf_counter() - start


def llama_cpp(
    options: argparse.Namespace,
    path: Path,
    draft: Path | None,
    kind: str,
    setting: tuple[int, ...],
) -> Found:
    """Yield a llama.cpp server, alone in its process: six in one had a third of the speed each."""
    import xllamacpp
    from xllamacpp import common_speculative_type as kinds

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel = 2048, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = NUM_CORES
    params.verbosity = 10  # at less it does not report its tokens
    speculative = params.speculative
    if kind == "n-grams":
        speculative.types = [kinds.COMMON_SPECULATIVE_TYPE_NGRAM_SIMPLE]
        speculative.ngram_simple.size_m, speculative.ngram_simple.size_n = setting
    if kind == "draft":
        speculative.types = [kinds.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE]
        speculative.draft.mparams.path = str(draft)
        (speculative.draft.n_max,) = setting
    decode = partial(llama_cpp_decode, xllamacpp.Server(params), int(options.max_new_tokens))
    yield f"llama.cpp {type_of(path)}", {with_setting(kind, setting): decode}


def llama_cpp_decode(server: Any, limit: int, prompt: list[int]) -> Generation:
    """Decode one greedy text. The prefill's time is the server's, the rest is the clock's."""
    request = {"prompt": prompt, "max_tokens": limit, "temperature": 0, "cache_prompt": False}
    start = time.perf_counter()
    answer = server.handle_completions(request | {"top_k": 1, "return_tokens": True})
    seconds = time.perf_counter() - start
    answer = json.loads(answer) if isinstance(answer, (str, bytes)) else answer
    prefill_seconds: float = answer["timings"]["prompt_ms"] / 1000
    return Generation(
        token_ids=answer["__verbose"]["tokens"],
        finish_reason=answer["choices"][0]["finish_reason"],
        prefill_seconds=prefill_seconds,
        decode_seconds=seconds - prefill_seconds,
    )


def llama_cpp_native(options: argparse.Namespace, path: Path, kind: str) -> Found:
    """Yield llama.cpp through llama-cpp-python, alone or with its prompt lookup.

    A lookup needs a context that keeps the logits of every token, so plain decoding has another.
    Flash attention is on, because llama.cpp's own programs choose it on a CPU too.
    """
    import llama_cpp
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    drafts = {
        with_setting(kind, setting): LlamaPromptLookupDecoding(*reversed(setting))
        if setting
        else None
        for setting in NATIVE_SETTINGS[kind]
    }
    model = llama_cpp.Llama(
        str(path),
        n_ctx=2048,
        n_threads=NUM_CORES,
        n_threads_batch=NUM_CORES,
        flash_attn=True,
        draft_model=next(iter(drafts.values())),
        verbose=False,
    )
    vocabulary = llama_cpp.llama_model_get_vocab(model.model)
    limit = int(options.max_new_tokens)

    def decode(prompt: list[int], draft: Any) -> Generation:
        model.draft_model = draft
        model.reset()  # else a common start of two prompts is computed once
        ids: list[int] = []
        start = end_of_prefill = time.perf_counter()
        for token in model.generate(prompt, temp=0.0):
            end_of_prefill = end_of_prefill if ids else time.perf_counter()
            ids.append(token)
            if len(ids) == limit or llama_cpp.llama_vocab_is_eog(vocabulary, token):
                break
        return timed(ids, start, end_of_prefill, limit)

    found = {name: partial(decode, draft=draft) for name, draft in drafts.items()}
    yield f"llama.cpp native {type_of(path)}", found


def openvino_genai(
    options: argparse.Namespace, weights: str, target: Path, draft: Path | None, kind: str
) -> Found:
    """Yield a pipeline of OpenVINO GenAI, with the settings that it can change.

    The pipeline's cache of earlier prompts is off, because every contender has the same prompts.
    With a draft model, the prefill contains the first cycle. Then only whole times can be compared.
    """
    import numpy as np
    import openvino
    import openvino_genai as genai

    scheduler = genai.SchedulerConfig()
    scheduler.enable_prefix_caching = False
    scheduler.max_num_batched_tokens = sys.maxsize  # a whole prompt at once, as by default
    how: dict[str, Any] = {"scheduler_config": scheduler, "INFERENCE_NUM_THREADS": NUM_CORES}
    if kind == "prompt lookup":
        how["prompt_lookup"] = True
    if kind == "draft":
        how["draft_model"] = genai.draft_model(str(draft), "CPU", INFERENCE_NUM_THREADS=NUM_CORES)
    pipeline = genai.LLMPipeline(str(target), "CPU", **how)
    own = pipeline.get_generation_config()
    limit = int(options.max_new_tokens)

    def decode(prompt: list[int], setting: tuple[int, ...]) -> Generation:
        config = genai.GenerationConfig()
        config.max_new_tokens, config.do_sample = limit, False
        config.eos_token_id, config.stop_token_ids = own.eos_token_id, own.stop_token_ids
        for field, value in zip(("num_assistant_tokens", "max_ngram_size"), setting):
            setattr(config, field, value)
        ids = np.array([prompt], dtype=np.int64)
        tensors = openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids))
        start = time.perf_counter()
        result = pipeline.generate(genai.TokenizedInputs(*tensors), config)
        seconds_to_first = result.perf_metrics.get_ttft().mean / 1000
        return timed(list(result.tokens[0]), start, start + seconds_to_first, limit)

    yield (
        f"OpenVINO {weights}",
        {
            with_setting(kind, setting): partial(decode, setting=setting)
            for setting in OPENVINO_SETTINGS[kind]
        },
    )


def with_setting(kind: str, setting: tuple[int, ...]) -> str:
    """Return a contender's name: a way to decode, and its setting if there is one."""
    return f"{kind}, {':'.join(map(str, setting))}" if setting else kind


# --- the contenders' model files -----------------------------------------------------


def exported(spec: str, weights: str, exporter: Path | None) -> Path:
    """Return a model's OpenVINO folder in the cache; let optimum-intel export it if missing.

    Args:
        spec: the spec of a model in a Hugging Face folder.
        weights: a name in `OPENVINO_FORMATS`.
        exporter: the Python interpreter of an environment that has optimum-intel.

    Raises:
        ConfigError: the folder is missing and no interpreter was given, or the export failed.
    """
    from specsampling.models.cache import cache_folder, made_once
    from specsampling.models.source import digest_of, is_gguf, model_location

    if is_gguf(spec):
        raise ConfigError(f"optimum-intel exports Hugging Face folders (got {spec}); name one")
    folder = cache_folder() / f"openvino-{weights}-{digest_of(spec)}"
    with made_once(folder) as made:
        if made is not None:
            if exporter is None:
                raise ConfigError(f"{spec} is not exported yet; give --exporter, see --help")
            print(f"exporting {spec} to OpenVINO in {weights}, once ...", flush=True)
            done = subprocess.run(
                [
                    *(str(exporter), "-m", "optimum.commands.optimum_cli", "export", "openvino"),
                    *("--model", model_location(spec), "--task", "text-generation-with-past"),
                    *("--weight-format", weights, *OPENVINO_FORMATS[weights], str(made)),
                ],
                capture_output=True,
                text=True,
            )
            if done.returncode != 0:
                last = done.stderr.strip().rpartition("\n")[2]
                raise ConfigError(f"{exporter} cannot export {spec}: {last}; see --help")
    return folder


def whole_draft(config: Config) -> str | None:
    """Return the draft's spec if it is a model of its own, not a part of its target; else None."""
    from specsampling.models.embedded import DRAFTS

    spec = DraftName.parse(config.models.draft).spec
    return None if not spec or spec.removeprefix("embedded:") in DRAFTS else spec


def gguf_of(spec: str) -> Path | None:
    """Return the GGUF file of a spec, fetched if it is embedded; None if there is no file."""
    from specsampling.models.cache import cache_folder
    from specsampling.models.embedded import MODELS
    from specsampling.models.fetch import fetch

    name = spec.removeprefix("embedded:")
    if name in MODELS:
        return fetch(MODELS[name].source, cache_folder() / f"{name}.gguf")
    return Path(spec) if spec.endswith(".gguf") else None


def files_of(path: Path) -> list[Path]:
    """Return a GGUF file. If it is small, add its weights in 8 bit and in bfloat16."""
    import gguf

    if path.stat().st_size > 200e6:  # in other formats, a large model cannot win
        return [path]
    files = [path]
    for kind in (gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.BF16):
        other = path.with_name(f"{path.stem}.{kind.name}.gguf")
        if not other.exists():
            requantize(path, other, kind)
        files.append(other)
    return files


def type_of(path: Path) -> str:
    """Return the type of most bytes in a file: Q4_K, Q8_0 or BF16, for example."""
    import gguf

    sizes: dict[str, int] = {}
    for tensor in gguf.GGUFReader(path).tensors:
        name = tensor.tensor_type.name
        sizes[name] = sizes.get(name, 0) + tensor.n_bytes
    return max(sizes, key=sizes.__getitem__)


def requantize(path: Path, other: Path, kind: Any) -> None:
    """Write a GGUF file's matrices in another type, by gguf's own quantiser."""
    import gguf

    reader = gguf.GGUFReader(path)
    scratch = other.with_suffix(".part")
    writer = gguf.GGUFWriter(scratch, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            element = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=element)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        chosen = kind if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(values, chosen)
        writer.add_tensor(tensor.name, data, raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    scratch.rename(other)


def timed(ids: list[int], start: float, end_of_prefill: float, limit: int) -> Generation:
    return Generation(
        token_ids=ids,
        finish_reason="length" if len(ids) == limit else "eos",
        prefill_seconds=end_of_prefill - start,
        decode_seconds=time.perf_counter() - end_of_prefill,
    )


def finders(config: Config, options: argparse.Namespace) -> dict[str, Callable[..., Found]]:
    """Return the functions that make each process's contenders, by the process's name."""
    found: dict[str, Callable[..., Found]] = {}
    for family in options.hosts:
        package, way_out = PACKAGES.get(family, (None, ""))
        if family == "transformers":
            found[family] = transformers_and_flashspec
        elif family in OURS:
            found[family] = partial(ours, family=family, quantization=OURS[family])
        elif package is not None and importlib.util.find_spec(package) is None:
            print(f"not compared: {package} ({way_out})")
        elif family == "OpenVINO":
            found |= openvino_finders(config, options)
        else:
            found |= gguf_finders(config, family)
    return found


def gguf_finders(config: Config, family: str) -> dict[str, Callable[..., Found]]:
    """Return llama.cpp's processes. A server's setting is fixed, so each setting has its own."""

    if (target := gguf_of(config.models.target)) is None:
        print(f"not compared: {family} (the target is no GGUF file)")
        return {}
    found: dict[str, Callable[..., Found]] = {}
    if family == "llama.cpp native":
        for path in files_of(target):
            for kind in NATIVE_SETTINGS:
                name = f"{family} {type_of(path)} {kind}"
                found[name] = partial(llama_cpp_native, path=path, kind=kind)
        return found
    spec = DraftName.parse(config.models.draft).spec
    draft = gguf_of(spec) if spec else None
    for path in files_of(target):
        for kind, settings in SERVER_SETTINGS.items():
            for setting in settings:
                if kind != "draft" or draft is not None:
                    name = f"{family} {type_of(path)} {with_setting(kind, setting)}"
                    found[name] = partial(
                        llama_cpp, path=path, draft=draft, kind=kind, setting=setting
                    )
    return found


def openvino_finders(
    config: Config, options: argparse.Namespace
) -> dict[str, Callable[..., Found]]:
    """Return OpenVINO's processes. A pipeline decodes in one way, with all settings of it."""
    found: dict[str, Callable[..., Found]] = {}
    draft_spec = whole_draft(config)
    for weights in OPENVINO_FORMATS:
        try:
            target = exported(config.models.target, weights, options.exporter)
            draft = exported(draft_spec, weights, options.exporter) if draft_spec else None
        except (ConfigError, ModelError) as error:
            print(f"not compared: OpenVINO {weights} ({error})")
            continue
        for kind in OPENVINO_SETTINGS:
            if kind != "draft" or draft is not None:
                found[f"OpenVINO {weights} {kind}"] = partial(
                    openvino_genai, weights=weights, target=target, draft=draft, kind=kind
                )
    return found


# --- the prompts ---------------------------------------------------------------------


def configured(options: argparse.Namespace, quantization: str) -> Config:
    overrides = [
        f"models.target_quantization={quantization}",
        f"decoding.max_new_tokens={options.max_new_tokens}",
        f"run.limit={options.limit}",
        f"decoding.compile={options.compile}",
        "sampling.temperature=0",
        "run.methods=[autoregressive, speculative]",
    ]
    return load_config(options.config, options.profile, overrides)


def prompts_of(config: Config, now: datetime) -> dict[str, list[int]]:
    """Return the problems' prompts by id, as a run that began `now` has them."""
    from specsampling.models.load import Pair
    from specsampling.models.tokenizer import load_tokenizer
    from specsampling.tasks.humaneval import HumanEval

    assert config.humaneval is not None
    task = HumanEval(config.humaneval)
    tokenizer: Any = load_tokenizer(config.models.tokenizer or config.models.target)
    models: dict[str, Any] = {"target": None, "draft": None}  # a prompt needs no models
    encoder = Pair(**models, tokenizer=tokenizer, eos_ids=frozenset(), now=now)
    chosen = task.examples()[FIRST:][: config.run.limit]
    return {example.id: task.prompt(example, encoder, 10**9).token_ids for example in chosen}


# --- processes -----------------------------------------------------------------------


class Host:
    """A process that keeps some contenders ready."""

    def __init__(self, name: str, find: Callable[..., Found], options: argparse.Namespace):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        arguments = (name, find, options, theirs)
        self._process = context.Process(target=serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        self.names: list[str] = []
        while (said := self._receive(name)) is not None:
            self.names.append(said) if isinstance(said, str) else print(said["problem"])

    def decode(self, contender: str, prompt: list[int]) -> Generation:
        with suppress(OSError):  # if its process ended, nothing is received
            self._pipe.send((contender, prompt))
        return Generation(**self._receive(contender))

    def close(self) -> None:
        self._pipe.close()  # this ends the process
        self._process.join(timeout=10)

    def _receive(self, name: str) -> Any:
        try:
            return self._pipe.recv()
        except (EOFError, OSError):
            raise ConfigError(f"the process of {name} ended; see above, and rerun") from None


def serve(
    name: str, find: Callable[..., Found], options: argparse.Namespace, pipe: Connection
) -> None:
    """Run a contender process: report its contenders, then decode what is asked for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent closes the pipe
    if name.startswith("llama.cpp"):  # it prints every token
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    contenders: dict[str, Decode] = {}
    try:
        for family, found in find(options):
            for kind, decode in found.items():
                contenders[f"{family}: {kind}"] = decode
                pipe.send(f"{family}: {kind}")
    except ImportError as error:
        pipe.send({"problem": f'not compared: {error.name} (pip install ".[peers]")'})
    except Exception as error:  # whatever fails in a contender, the others go on
        pipe.send({"problem": f"not compared: {name}: {in_one_line(error)}"})
    pipe.send(None)
    while True:
        try:
            contender, prompt = pipe.recv()
        except EOFError:
            return
        try:
            done = contenders[contender](prompt)
        except Exception as error:
            done = Generation([], "error", error=in_one_line(error))
        pipe.send(asdict(done))


def in_one_line(error: Exception) -> str:
    return traceback.format_exception_only(error)[-1].strip()


# --- the comparison ------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_options(arguments)
    config = configured(options, "none")
    require_task(config, "humaneval")
    from specsampling.experiment import read_existing_run  # it imports torch

    _, options.now = read_existing_run(options.output, options.fresh)  # for the contenders
    meta = meta_of(config, options.now)
    check_fresh(options.output) if options.fresh else check_output(options.output, meta)
    prompts = prompts_of(config, options.now)
    hosts: list[Host] = []
    try:
        for name, find in finders(config, options).items():
            if any(part in name for part in options.skip):
                continue
            print(f"starting {name} ...", flush=True)
            hosts.append(Host(name, find, options))
        decoders = {
            name: partial(host.decode, name)
            for host in hosts
            for name in host.names
            if not any(part in name for part in options.skip)
        }
        with RunFile.open(options.output, meta, fresh=options.fresh) as run_file:
            run_file.require_same_examples(
                {name: Source.of(prompt, None) for name, prompt in prompts.items()}
            )
            compare(prompts, decoders, run_file)
    finally:
        for host in hosts:
            host.close()
    rows = read_run(options.output).rows
    print("\n" + "\n".join(report(rows)))
    save_figure(figure(rows), options.output.parent / "figures", options.output.stem)
    return 1 if any(row.error for row in rows) else 0


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--config", metavar="FILE", type=Path, default=PROJECT / "config.yaml")
    parser.add_argument("--profile", metavar="NAME", help="a profile with a humaneval block")
    parser.add_argument("--limit", metavar="N", default="8", help="problems (default: 8)")
    parser.add_argument("--max-new-tokens", metavar="N", default="128", help="(default: 128)")
    parser.add_argument("--hosts", metavar="A,B", default=",".join(FAMILIES), help="(default: all)")
    parser.add_argument("--skip", metavar="A,B", default="", help="parts of contenders' names")
    parser.add_argument(
        "--exporter", metavar="PYTHON", type=Path, help="an interpreter that has optimum-intel"
    )
    parser.add_argument("--compile", choices=["auto", "on", "off"], default="auto")
    parser.add_argument("--output", metavar="PATH", type=Path, help="JSONL file for the rows")
    parser.add_argument("--fresh", action="store_true", help="start the output file over")
    options = parser.parse_args(arguments)
    options.hosts = [name.strip() for name in options.hosts.split(",")]
    options.skip = [part.strip() for part in options.skip.split(",") if part.strip()]
    for name in options.hosts:
        if name not in FAMILIES:
            raise ConfigError(f"--hosts must be of {', '.join(FAMILIES)} (got {name}); mend it")
    if options.output is None:
        options.output = Path("Results", options.profile or "", "peers.jsonl")
    return options


def meta_of(config: Config, now: datetime) -> dict[str, Any]:
    versions = {}
    for package in ("xllamacpp", "llama-cpp-python", "openvino-genai", "flashspec"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    from specsampling.provenance import run_meta

    meta = run_meta(config, config.decoding.compile, now)
    return {**meta, "versions": meta["versions"] | versions}


def compare(prompts: dict[str, list[int]], decoders: Contenders, run_file: RunFile) -> None:
    """Decode every missing row, by every contender that can decode a first text."""
    first = next(iter(prompts.values()))
    names = []
    for name in (bar := tqdm(decoders, unit="contender")):
        bar.set_description(f"warm-up: {name}")
        try:
            problem = decoders[name](first).error
        except ConfigError as error:  # the contender's process ended
            problem = str(error)
        if problem:
            tqdm.write(f"not compared: {name}: {problem}")
        else:
            names.append(name)
    jobs = [
        (example, name)
        for turn, example in enumerate(prompts)
        for name in names[turn % len(names) :] + names[: turn % len(names)]
        if (example, name, 0) not in run_file.done
    ]
    for example, name in (bar := tqdm(jobs, unit="row")):
        bar.set_description(f"{example} {name}")
        generation = decoders[name](prompts[example])
        run_file.append(
            Row(
                example_id=example,
                method=name,
                sample_index=0,
                completion="",
                seed=0,
                **Source.of(prompts[example], None)._asdict(),
                **vars(generation),
            )
        )


def report(all_rows: Sequence[Row]) -> list[str]:
    """Return a line per contender, and our best against the best of the others."""
    rows = shared_rows([row for row in all_rows if not row.error])
    lines = [f"{row.method}, {row.example_id}: {row.error}" for row in all_rows if row.error]
    lines += [*aligned(table_of(rows)), ""]
    sixteen, eight, _ = (f"{family}: autoregressive" for family in OURS)
    others = (("llama.cpp",), ("OpenVINO",), PYTORCH)
    pairs = [(best(rows, ("ours",)), best(rows, family)) for family in others]
    for mine, other in [*pairs, (eight, sixteen)]:
        if mine in rows and other in rows:
            ratio = metrics.speedup(rows[other], rows[mine]).of_totals
            total = metrics.speedup(rows[other], rows[mine], with_prefill=True).of_totals
            lines.append(f"{mine} / {other}: {total:.2f}, without prefill {ratio:.2f}")
    return lines


def table_of(rows: dict[str, list[Row]]) -> pd.DataFrame:
    """Make a table of text with a line per contender."""
    table = pd.DataFrame(
        {
            "n": {name: str(len(of)) for name, of in rows.items()},
            "tokens/s": {name: f"{metrics.tokens_per_second(of):.1f}" for name, of in rows.items()},
            "with prefill": {name: f"{rate_with_prefill(of):.1f}" for name, of in rows.items()},
            "equal to its own plain text": {name: equal_to_plain(name, rows) for name in rows},
        }
    )
    return table.rename_axis("contender").reset_index()


def figure(all_rows: Sequence[Row]) -> Figure:
    """Plot a bar per contender, the fastest at the top."""
    rows = shared_rows([row for row in all_rows if not row.error])
    rates = {name: rate_with_prefill(of) for name, of in rows.items()}
    names = sorted(rates, key=rates.__getitem__)
    drawn, axes = new_figure()
    colours = [COLOURS.get(name.split()[0].rstrip(":"), LIGHT) for name in names]
    bars = axes.barh(names, [rates[name] for name in names], color=colours)
    axes.bar_label(bars, [f"{rates[name]:.1f}" for name in names], padding=2)
    num_problems = max((len(of) for of in rows.values()), default=0)
    axes.set_title(f"What decodes fastest: {num_problems} problems, greedy")
    axes.set_xlabel("tokens per second, prefill counted")
    axes.margins(x=0.1)
    return drawn


def rate_with_prefill(rows: Sequence[Row]) -> float:
    return metrics.tokens_per_second(rows, with_prefill=True)


def best(rows: dict[str, list[Row]], families: tuple[str, ...]) -> str | None:
    """Return the contender of some families with the most tokens per second, with prefill."""
    names = [name for name in rows if name.startswith(families)]
    return max(names, key=lambda name: rate_with_prefill(rows[name]), default=None)


def equal_to_plain(name: str, rows: dict[str, list[Row]]) -> str:
    """Count a contender's texts that equal the plain decoding of its family and format.

    Returns:
        "7 of 8", or "" if the plain decoding has no rows.
    """
    family, _, _ = name.partition(": ")
    if family == "flashspec":  # decodes over transformers' models
        family = "transformers"
    plain = f"{family}: {BASELINES[family.split()[0]]}"
    if plain not in rows:
        return ""
    num_equal, num_compared = metrics.count_identical(rows[name], rows[plain])
    return f"{num_equal} of {num_compared}"


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
