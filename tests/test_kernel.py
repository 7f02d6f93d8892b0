"""The kernel: rows never meet, logits are the model's own, wrong input is an error."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import threading
import time
from pathlib import Path

import kernel_models
import numpy as np
import pytest
import torch
from kernel_models import (
    CONFIGS,
    OTHERS,
    PLAIN_FORMATS,
    always,
    feed,
    make_model,
    pack,
    random_ids,
    random_widths,
    same_bits,
    score,
)

from specsampling.kernel import engine, weights

NAN = float("nan")


@pytest.fixture(autouse=True)
def one_thread():
    """Calls on one thread, unless a test asks for more."""
    engine.set_num_threads(1)
    yield
    engine.set_num_threads(0)


@pytest.fixture(scope="module")
def packed_of(library):
    """A packed model of a named configuration, each model packed once."""
    made: dict = {}

    def get(name: str, format: str = "float32") -> engine.Model:
        if (name, format) not in made:
            made[name, format] = pack(make_model((CONFIGS | OTHERS)[name]), library, format)
        return made[name, format]

    return get


# --- rows never meet ------------------------------------------------------------------------


def check_rows(model: engine.Model, num: int, seed: int, threads=(1, 2, 3, 4)) -> None:
    """A text's rows have the same bits, however they are grouped."""
    rng = np.random.default_rng(seed)
    ids = random_ids(model, num, seed)
    engine.set_num_threads(1)
    alone = feed(model, ids, always(1))
    assert torch.isfinite(alone).all()
    for num_threads in threads:
        engine.set_num_threads(num_threads)
        assert same_bits(feed(model, ids, random_widths(rng)), alone)
    assert same_bits(feed(model, ids, always(64)), alone)
    assert same_bits(feed(model, ids, always(num)), alone)


@pytest.mark.parametrize("format", PLAIN_FORMATS)
@pytest.mark.parametrize("name", CONFIGS)
def test_rows_do_not_depend_on_their_grouping(packed_of, name, format):
    check_rows(packed_of(name, format), 200, seed=len(name))


@pytest.mark.slow
@pytest.mark.parametrize("format", PLAIN_FORMATS)
@pytest.mark.parametrize("name", [*CONFIGS, *OTHERS])
def test_rows_of_long_texts_do_not_depend_on_their_grouping(packed_of, name, format):
    check_rows(packed_of(name, format), 2000, seed=7, threads=(1, 2, 4, 2, 1, 3))


@pytest.mark.parametrize("format", ["bfloat16", "int8"])
@pytest.mark.parametrize("name", CONFIGS)
def test_rows_do_not_depend_on_other_texts_in_the_call(packed_of, name, format):
    """Five texts at different positions, each call with some rows of some of them."""
    model = packed_of(name, format)
    rng = np.random.default_rng(1)
    texts = [random_ids(model, int(num), i) for i, num in enumerate(rng.integers(30, 150, 5))]
    alone = [feed(model, ids, always(1)) for ids in texts]
    engine.set_num_threads(2)
    caches = [model.make_cache(len(ids) + int(rng.integers(100))) for ids in texts]
    at = [0] * len(texts)
    while any(start < len(ids) for start, ids in zip(at, texts)):
        requests, of = [], []
        for i in rng.permutation(len(texts)):
            part = texts[i][at[i] : at[i] + int(rng.integers(0, 20))]
            last = int(rng.integers(len(part) + 1))
            requests.append((caches[i], part, at[i], last))
            of.append((i, at[i] + len(part) - last, at[i] + len(part)))
            at[i] += len(part)
        for found, (i, start, end) in zip(score(model, *requests), of):
            assert same_bits(found, alone[i][start:end])


@pytest.mark.parametrize("name", CONFIGS)
def test_rolled_back_rows_leave_nothing(packed_of, name):
    """Other tokens stood at a text's positions before: drafts that were rejected."""
    model = packed_of(name, "Q4_0")
    ids, others = random_ids(model, 120, 1), random_ids(model, 200, 2)
    alone = feed(model, ids, always(1))
    rng = np.random.default_rng(3)
    cache = model.make_cache(200)
    engine.set_num_threads(2)
    at = 0
    while at < len(ids):
        wrong = others[at : at + int(rng.integers(1, 80))]
        score(model, (cache, wrong, at, 0))
        part = ids[at : at + int(rng.integers(1, 9))]
        (found,) = score(model, (cache, part, at, len(part)))
        assert same_bits(found, alone[at : at + len(part)])
        at += len(part)


def test_rows_rejected_as_nan_leave_nothing(library):
    """A rejected token whose keys and values are nan, in the same block of 16 positions."""
    model = make_model(CONFIGS["llama"])
    model.model.embed_tokens.weight.data[3] = NAN
    model = pack(model, library, "float32")
    ids = [i for i in random_ids(model, 60) if i != 3]
    alone = feed(model, ids, always(1))
    cache = model.make_cache(64)
    feed(model, [3] * 64, always(64), cache)
    assert same_bits(feed(model, ids, always(5), cache), alone)


def test_models_that_share_threads_do_not_meet(packed_of):
    """A wide and a narrow model in turn, as a target and its draft."""
    models = [
        packed_of("qwen3", "int8"),
        packed_of("llama", "float32"),
        packed_of("gpt_neo", "Q4_0"),
    ]
    models.append(models[0].first_layers(1))
    texts = [random_ids(model, 90, i) for i, model in enumerate(models)]
    alone = [feed(model, ids, always(1)) for model, ids in zip(models, texts)]
    rng = np.random.default_rng(0)
    engine.set_num_threads(3)
    caches, at = [model.make_cache(90) for model in models], [0] * len(models)
    while any(start < 90 for start in at):
        i = int(rng.integers(len(models)))
        part = texts[i][at[i] : at[i] + int(rng.integers(1, 9))]
        (found,) = score(models[i], (caches[i], part, at[i], len(part)))
        assert same_bits(found, alone[i][at[i] : at[i] + len(part)])
        at[i] += len(part)


@pytest.mark.parametrize("name", ["llama", "yarn", "gpt_neo"])
def test_rows_do_not_depend_on_a_caches_capacity(packed_of, library, name):
    """The tables of positions grow with the longest cache, in the middle of another text."""
    model = pack(make_model((CONFIGS | OTHERS)[name]), library, "float32")
    ids = random_ids(model, 100)
    cache = model.make_cache(100)
    first = feed(model, ids[:50], always(3), cache)
    longer = model.make_cache(3000)
    rest = score(model, (cache, ids[50:], 50, 50))[0]
    assert same_bits(feed(model, ids, always(1), longer), torch.cat([first, rest]))


def test_first_layers_can_read_the_whole_models_cache(packed_of):
    """The first layers' model had no table of positions until it made a cache of its own."""
    model = packed_of("llama", "int8")
    ids = random_ids(model, 40)
    own = feed(model.first_layers(2), ids, always(4))
    cache = model.make_cache(40)
    feed(model, ids, always(8), cache)
    assert same_bits(feed(model.first_layers(2), ids, always(3), cache), own)


def test_a_call_may_score_nothing(packed_of):
    model = packed_of("qwen2")
    cache = model.make_cache(16)
    assert [len(rows) for rows in score(model, (cache, [1, 2, 3], 0, 0), (cache, [], 3, 0))] == [
        0,
        0,
    ]
    assert score(model) == []


# --- the model's own logits -----------------------------------------------------------------


@pytest.mark.parametrize("name", [*CONFIGS, *OTHERS])
def test_float32_logits_are_those_of_transformers(library, name):
    original = make_model((CONFIGS | OTHERS)[name], seed=1)
    model = pack(original, library, "float32")
    ids = random_ids(model, 300)
    with torch.inference_mode():
        expected = original(torch.tensor([ids])).logits[0]
    found = feed(model, ids, random_widths(np.random.default_rng(0)))
    assert ((found - expected).norm() / expected.norm()).item() < 1e-5
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    top = expected.topk(2).values
    is_clear = top[:, 0] - top[:, 1] > 1e-4
    assert torch.equal(found.argmax(-1)[is_clear], expected.argmax(-1)[is_clear])


@pytest.mark.parametrize("name", ["llama", "gpt_neo"])
def test_a_trimmed_head_scores_its_tokens_alone(library, packed_of, name):
    tokens = torch.randperm(60, generator=torch.Generator().manual_seed(0))[:35]
    trimmed = pack(make_model(CONFIGS[name]), library, "float32", head_tokens=tokens)
    ids = random_ids(trimmed, 40)
    whole, found = (feed(model, ids, always(7)) for model in (packed_of(name), trimmed))
    assert same_bits(found[:, tokens], whole[:, tokens])
    others = torch.ones(whole.shape[1], dtype=torch.bool)
    others[tokens] = False
    assert (found[:, others] == -torch.inf).all()


def test_layer_norm_of_a_large_mean_keeps_its_digits(library):
    """Padding was subtracted from the sum of squares, and took the digits of small variances."""
    original = make_model(CONFIGS["gpt_neo"])
    original.transformer.wte.weight.data += 3000.0
    model = pack(original, library, "float32")
    ids = random_ids(model, 20)
    with torch.inference_mode():
        expected = original.double()(torch.tensor([ids])).logits[0]
    found = feed(model, ids, always(20))
    assert ((found - expected).norm() / expected.norm()).item() < 3e-3


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("format", PLAIN_FORMATS)
def test_the_real_model(library, format):
    """SmolLM2: rows in any grouping, and float32 logits those of transformers."""
    from transformers import AutoModelForCausalLM

    from specsampling.models.load import model_location

    location = model_location("embedded:smollm2-135m")
    original = AutoModelForCausalLM.from_pretrained(
        location, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ids = np.random.default_rng(0).integers(0, 49152, 100).tolist()
    with torch.inference_mode():
        expected = original(torch.tensor([ids])).logits[0]
    model = pack(original, library, format)
    engine.set_num_threads(2)
    alone = feed(model, ids, always(1))
    for seed in range(3):
        assert same_bits(feed(model, ids, random_widths(np.random.default_rng(seed))), alone)
    assert same_bits(feed(model, ids, always(100)), alone)
    error = ((alone - expected).norm() / expected.norm()).item()
    most = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 0.03, "int8": 0.15, "Q4_0": 0.5}
    print(format, error)
    assert error < most[format]
    if format == "float32":
        assert torch.equal(alone.argmax(-1), expected.argmax(-1))


# --- wrong input ----------------------------------------------------------------------------


def test_rows_out_of_range_are_an_error(packed_of):
    model = packed_of("llama")
    cache = model.make_cache(32)
    for ids, start in (
        *(([75], 0), ([-1], 0), ([2**31], 0), ([2**32 + 1], 0), ([-(2**40)], 0)),
        *(([1], 32), ([1] * 5, 28), ([1], -1), ([1], 2**32), ([1], -(2**32))),
        (np.array([2**32 + 1]), 0),
    ):
        with pytest.raises(ValueError, match="out of range"):
            score(model, (cache, ids, start, 1))
    for last in (-1, 3):
        with pytest.raises(ValueError, match="cannot score"):
            score(model, (cache, [1, 2], 0, last))


def test_learned_positions_end(library):
    model = pack(make_model(CONFIGS["gpt_neo"]), library, "float32")
    cache = model.make_cache(kernel_models.CONTEXT + 16)
    score(model, (cache, [1], kernel_models.CONTEXT - 1, 1))
    with pytest.raises(ValueError, match="position is out of range"):
        score(model, (cache, [1], kernel_models.CONTEXT, 1))


def test_c_checks_rows_itself(packed_of, library):
    """step() is called with what Python would have refused."""
    model = packed_of("llama")
    cache = model.make_cache(32)
    pool = engine.pool_of(library)

    def problem(num_rows=1, **changed) -> int:
        rows = np.zeros(library.most_rows() + 1, engine.ROW)
        rows["cache"] = cache.address
        for name, value in changed.items():
            rows[name][num_rows - 1] = value
        return library.step(
            *(pool._pool, engine.ctypes.byref(model._structure), rows.ctypes.data, num_rows)
        )

    assert problem() == 0
    assert [problem(num) for num in (0, -1, library.most_rows() + 1, 10**6)] == [-1] * 4
    assert [problem(3, position=at) for at in (-1, 32, 2**31 - 1, -(2**31))] == [-2] * 4
    assert [problem(3, token=token) for token in (-1, 75, 2**31 - 1, -(2**31))] == [-3] * 4


def test_a_cache_of_another_model_is_an_error(packed_of):
    """A cache with fewer layers, narrower heads or fewer bytes would be written past its end."""
    model = packed_of("llama")
    halves = packed_of("llama", "bfloat16")
    for other in (packed_of("qwen2"), model.first_layers(1), halves):
        with pytest.raises(ValueError, match="same shape"):
            score(model, (other.make_cache(16), [1], 0, 1))


@pytest.mark.parametrize("format", PLAIN_FORMATS)
@pytest.mark.parametrize("value", [NAN, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_an_error(library, format, value):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        weight = torch.zeros(48, 40, dtype=dtype)
        weight[47, 39] = value
        with pytest.raises(ValueError, match="finite"):
            weights.Packer(library, 2).plain(weight, format)


@pytest.mark.parametrize(
    "format, fits, too_large",
    [("float16", 65504.0, 65520.0), ("bfloat16", 3.38e38, 3.4e38), ("Q4_0", 4.5e5, 5.3e5)],
)
def test_weights_too_large_for_a_format_are_an_error(library, format, fits, too_large):
    """They became infinite."""
    packer = weights.Packer(library, 1)
    packer.plain(torch.full((16, 32), fits), format)
    with pytest.raises(ValueError, match=f"too large for {format}"):
        packer.plain(torch.full((16, 32), too_large), format)


def test_shapes_that_cannot_be_packed_are_an_error(library):
    packer = weights.Packer(library, 1)
    weight = torch.zeros(20, 40)
    for arguments, message in (
        ((weight[0], "int8"), "must be a matrix"),
        ((weight.double(), "int8"), "must be float32"),
        ((weight, "Q6_K"), "format"),
        ((weight, "int8", torch.zeros(19)), "bias must have 20"),
        ((weight, "int8", None, torch.tensor([0, 20])), "rows must be"),
        ((weight, "int8", None, torch.tensor([-2])), "rows must be"),
        ((weight, "int8", None, None, torch.tensor([40])), "columns must be"),
    ):
        with pytest.raises(ValueError, match=message):
            packer.plain(*arguments)


def test_parts_that_do_not_fit_are_an_error(packed_of):
    model = packed_of("llama")
    parts = {
        "layers": model.layers,
        "head": model.head,
        "tensors": model.tensors,
        "sizes": model.sizes,
        "epsilon": 1e-6,
        "score_scale": 1.0,
    }

    def make(**changed):
        made = {**parts, **changed}
        return engine.Model(model.library, **{**made, "sizes": dict(made["sizes"])})

    make()
    first = model.layers[0]
    narrow = engine.Parts({**first.linears, "down": first.linears["up"]}, first.norms)
    missing = engine.Parts({k: v for k, v in first.linears.items() if k != "key"}, first.norms)
    for changed, message in (
        ({"layers": [narrow]}, "layer 0's down"),
        ({"layers": [missing]}, "layer 0 has no key"),
        ({"head": first.linears["up"], "sizes": model.sizes | {"head_rows": 96}}, "must score 75"),
        ({"sizes": model.sizes | {"head_rows": 70}}, "must score 75"),
        ({"tensors": model.tensors | {"head_tokens": torch.arange(1, 76).int()}}, "from 0 to 74"),
        ({"tensors": model.tensors | {"head_tokens": torch.arange(75)}}, "int32"),
        ({"tensors": model.tensors | {"head_tokens": torch.arange(9).int()}}, "must be 75"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**changed)


@pytest.mark.parametrize("format", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("parts", ["v_proj", "o_proj", "gate_proj", "embed", "down_proj up_proj"])
def test_what_overflows_reaches_the_logits_as_nan(library, parts, format):
    """Nothing infinite is taken for a number by a maximum, a minimum, a norm or a rounding."""
    original = make_model(CONFIGS["qwen3"])
    for name, weight in original.named_parameters():
        if any(part in name for part in parts.split()) and "layers.2" not in name:
            weight.data.mul_(1e30)
    model = pack(original, library, format)
    found = feed(model, random_ids(model, 20), always(20))
    assert found.isnan().all()


@pytest.mark.parametrize("format", PLAIN_FORMATS)
@pytest.mark.parametrize("value", [NAN, torch.inf, -torch.inf])
def test_inputs_that_are_not_finite_reach_the_logits_as_nan(library, format, value):
    """One number of one token's embedding: its own row and the later ones are nan, no others."""
    for name in ("llama", "gpt_neo"):
        original = make_model(CONFIGS[name])
        original.get_input_embeddings().weight.data[7, 33] = value
        model = pack(original, library, format)
        for width in (1, 20):
            found = feed(model, [1, 2, 3, 7, *range(8, 24)], always(width))
            assert torch.isfinite(found[:3]).all()
            assert found[3:].isnan().all()


# --- threads ---------------------------------------------------------------------------------


@pytest.mark.parametrize("num_threads", [1, 2, 3, 5, 8])
def test_thousands_of_tiny_calls_on_many_threads(packed_of, library, num_threads):
    """A thread that woke while the next call was written copied half of it, and crashed."""
    model = packed_of("llama")
    num, width = 48, model.sizes["vocabulary"]
    ids = random_ids(model, num)
    alone = feed(model, ids, always(1))
    engine.set_num_threads(num_threads)
    cache, logits = model.make_cache(num), torch.zeros(num, width)
    rows = np.zeros(num, engine.ROW)
    rows["cache"], rows["token"], rows["position"] = cache.address, ids, np.arange(num)
    rows["logits"] = logits.data_ptr() + 4 * width * np.arange(num, dtype=np.uint64)
    start, size = rows.ctypes.data, rows.itemsize
    pool, structure = engine.pool_of(library)._pool, engine.ctypes.byref(model._structure)
    assert library.step(pool, structure, start, num) == 0
    for i in range(3000):
        at = i % (num - 20)
        library.step(pool, structure, start + size * at, 1)
        library.step(pool, structure, start + size * at, 20)
        if i % 100 == 0:
            assert same_bits(logits, alone)
            logits.fill_(NAN)
            library.step(pool, structure, start, num)
    assert same_bits(logits, alone)


def test_models_may_go_while_threads_are_late(library):
    """Late threads looked at the model of a call that was over."""
    engine.set_num_threads(8)
    original = make_model(CONFIGS["llama"])
    rows = []
    for _ in range(20):
        model = pack(original, library, "float32")
        rows += score(model, (model.make_cache(16), [1, 2], 0, 2))
        del model
    assert all(same_bits(found, rows[0]) for found in rows)


def test_threads_end_and_begin_again(packed_of):
    model = packed_of("gpt_neo", "int8")
    ids = random_ids(model, 30)
    alone = feed(model, ids, always(1))
    tasks = Path("/proc/self/task")
    before = len(list(tasks.iterdir())) if tasks.is_dir() else 0
    for i in range(40):
        engine.set_num_threads(1 + i % 8)
        assert same_bits(feed(model, ids, always(1 + i)), alone)
    engine.set_num_threads(1)
    assert not tasks.is_dir() or len(list(tasks.iterdir())) == before
    with pytest.raises(ValueError, match="1 thread or more"):
        engine.set_num_threads(-1)


def test_calls_of_several_python_threads_do_not_meet(packed_of):
    models = [packed_of("llama", "int8"), packed_of("qwen3", "float32")] * 2
    alone = [feed(model, random_ids(model, 60, i), always(1)) for i, model in enumerate(models)]
    engine.set_num_threads(2)
    found: dict[int, torch.Tensor] = {}

    def run(i: int) -> None:
        found[i] = feed(models[i], random_ids(models[i], 60, i), always(3))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same_bits(found[i], alone[i]) for i in range(4))


def test_a_fork_has_threads_of_its_own(packed_of):
    """A child has the parent's memory, and none of its threads."""
    model = packed_of("qwen2", "int8")
    ids = random_ids(model, 40)
    engine.set_num_threads(3)
    alone = feed(model, ids, always(4))
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)

    def child() -> None:
        send.send(feed(model, ids, always(7)).numpy().tobytes())

    process = context.Process(target=child)
    process.start()
    assert receive.poll(60)
    assert receive.recv() == alone.numpy().tobytes()
    process.join(60)
    assert process.exitcode == 0
    assert same_bits(feed(model, ids, always(5)), alone)


@pytest.mark.parametrize("format", ["float32", "bfloat16"])
def test_subnormal_numbers_do_not_depend_on_the_call(library, format):
    """A caller that flushes them to zero had other bits than the threads of its pool."""
    original = make_model(CONFIGS["llama"])
    for name, weight in original.named_parameters():
        if "v_proj" in name or "up_proj" in name:
            weight.data.mul_(1e-38)
    original.model.embed_tokens.weight.data.mul_(1e-38)
    model = pack(original, library, format)
    ids = random_ids(model, 40)
    usual = feed(model, ids, always(5))
    assert same_bits(feed(model, ids, always(1)), usual)
    assert torch.set_flush_denormal(True)
    try:
        assert same_bits(feed(model, ids, always(5)), usual)
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.slow
def test_other_processes_do_not_hold_up_a_step(library):
    """Beside as many busy processes as cores a step is at most 3 times as slow as alone.

    Where still others have the cores, it is at least hardly slower than on one thread, which
    waits for none.
    """
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_attention_heads=9,
        num_key_value_heads=3,
        num_hidden_layers=30,
        vocab_size=49152,
        tie_word_embeddings=True,
    )
    model = pack(make_model(config), library, "int8")
    cache = model.make_cache(64)
    engine.set_num_threads(engine.num_cores())

    def median_seconds() -> float:
        taken = []
        for _ in range(50):
            start = time.perf_counter()
            score(model, (cache, [1], 0, 1))
            taken.append(time.perf_counter() - start)
        return float(np.median(taken))

    median_seconds()
    alone = median_seconds()
    spinning = [sys.executable, "-c", "while True: pass"]
    busy = [subprocess.Popen(spinning) for _ in range(engine.num_cores())]
    try:
        time.sleep(1)
        beside = median_seconds()
        engine.set_num_threads(1)
        single = median_seconds()
    finally:
        for process in busy:
            process.kill()
            process.wait()
    found = [round(1e3 * seconds, 1) for seconds in (alone, beside, single)]
    print("alone {} ms, beside others {} ms, there on one thread {} ms".format(*found))
    assert beside < max(3 * alone, 1.3 * single)
