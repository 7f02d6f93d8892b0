"""Which part of a target goes on which GPU, and when that is refused."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig

from autoregressive import autoregressive
from Benchmarks.plan import CONFIGS
from specsampling.method.drafts import ModelDraft
from specsampling.method.step import has_step
from specsampling.models.checkpoint import load_model
from specsampling.models.errors import ModelError
from specsampling.models.estimate import Lengths, Planned, outline, weight_bytes
from specsampling.models.exactness import check_exactness
from specsampling.models.load import resolve_device
from specsampling.models.split import device_map, split_target
from speculative import speculative

GB = 10**9
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def target():
    return outline(AutoConfig.for_model(**CONFIGS["deepseek-coder-6.7b"]), torch.float16)


def places(target, free, **changes):
    weights = weight_bytes(target, "none", torch.device("cuda"))
    options = {"reserved": 3 * GB, "caches": 1 * GB, "weights": weights} | changes
    return device_map(target, {i: size * GB for i, size in enumerate(free)}, **options)


def test_two_gpus_hold_what_one_does_not(target):
    found = places(target, [12, 12])
    assert set(found.values()) == {0, 1}
    on_first = [name for name, where in found.items() if where == 0]
    assert 5 < len(on_first) < 25  # room is left for the draft
    with pytest.raises(ModelError, match="GPUs have 9.0 GB free beside the draft"):
        places(target, [12])


def test_one_that_holds_all_gets_all(target):
    """Quantised weights are counted as they will be."""
    assert set(places(target, [40, 40]).values()) == {0}
    weights = weight_bytes(target, "int8", torch.device("cuda"))
    assert set(places(target, [12], weights=weights).values()) == {0}


def test_offloading_is_done_on_request_only(target):
    with pytest.raises(ModelError, match="auto-split-offload"):
        places(target, [6, 6])
    found = places(target, [6, 6], machine=64 * GB)
    assert set(found.values()) == {0, 1, "cpu"}
    with pytest.raises(ModelError):
        places(target, [6, 6], machine=1 * GB)


def test_the_draft_stays_whole_on_the_first(target):
    draft = outline(AutoConfig.for_model(**CONFIGS["deepseek-coder-1.3b"]), torch.float16)
    arguments = Planned(target, "none"), [Planned(draft, "none")], Lengths(900, 640, 8)
    assert split_target(*arguments, {0: 40 * GB}, "auto-split") is None
    found = split_target(*arguments, {0: 10 * GB, 1: 10 * GB}, "auto-split")
    assert found is not None
    on_first = [name for name, where in found.items() if where == 0 and ".layers." in name]
    on_second = [name for name, where in found.items() if where == 1 and ".layers." in name]
    assert 0 < len(on_first) < len(on_second)


@pytest.fixture(scope="module")
def in_parts(model_folders):
    """A whole target, and one as accelerate dispatches it: here in memory and on the disk."""
    folder = str(model_folders["llama-target"])
    whole = load_model(folder, torch.float32, CPU)
    around = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0")
    places: dict[str, int | str] = dict.fromkeys(around, "cpu")
    for i in range(1, whole.config.num_hidden_layers):
        places[f"model.layers.{i}"] = "disk"
    return whole, load_model(folder, torch.float32, CPU, device_map=places)


def test_a_target_in_parts_says_the_same(in_parts):
    whole, parts = in_parts
    assert len(set(parts.hf_device_map.values())) == 2 and not has_step(parts)
    for prompt in ([1, 4, 2, 1, 4], list(range(30))):
        expected = autoregressive(whole, prompt, max_new_tokens=20, width=8).token_ids
        assert autoregressive(parts, prompt, max_new_tokens=20, width=8).token_ids == expected
        drafted = speculative(parts, ModelDraft(whole, 3), prompt, k=4, max_new_tokens=20, width=8)
        assert drafted.token_ids == expected and sum(drafted.accepted) > 0
    assert check_exactness(parts, 8, 60).is_exact


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_one_line():
    with pytest.raises(ModelError, match="models.device auto-split is not there"):
        resolve_device("auto-split")
