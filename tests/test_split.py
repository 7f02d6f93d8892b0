"""Which part of a target goes on which GPU, and when that is refused."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig

from Benchmarks.plan import CONFIGS
from specsampling.models.errors import ModelError
from specsampling.models.estimate import outline, weight_bytes
from specsampling.models.split import device_map

GB = 10**9


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
    assert set(places(target, [40, 40]).values()) == {0}


def test_quantised_weights_are_counted_as_they_will_be(target):
    weights = weight_bytes(target, "int8", torch.device("cuda"))
    assert set(places(target, [12], weights=weights).values()) == {0}


def test_offloading_is_done_on_request_only(target):
    with pytest.raises(ModelError, match="auto-split-offload"):
        places(target, [6, 6])
    found = places(target, [6, 6], machine=64 * GB)
    assert set(found.values()) == {0, 1, "cpu"}
    with pytest.raises(ModelError):
        places(target, [6, 6], machine=1 * GB)
