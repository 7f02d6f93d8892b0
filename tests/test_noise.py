"""Noise of a position and a token: the publication's numbers, and races that follow p."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from specsampling.kernel import engine
from specsampling.method.distribution import Few, Full, NonFiniteError
from specsampling.method.noise import Noise, philox, race, uniforms_at

ALL = 0xFFFFFFFF
# Known answers that are published with the algorithm (Random123, philox4x32, 10 rounds).
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ALL, ALL, ALL, ALL), (ALL, ALL), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
PROBS = np.array([0.4, 0.25, 0.0, 0.2, 0.1, 0.049, 0.001])


@pytest.fixture(params=["NumPy", "C"])
def run_race(request, library):
    return race if request.param == "NumPy" else partial(engine.race, library)


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_gives_the_published_words(counter, key, words):
    assert philox(counter, key) == words
    arrays = [np.array([word, word], np.uint64) for word in counter]
    assert [word.tolist() for word in philox(arrays, key)] == [[word, word] for word in words]


def test_uniforms_are_those_of_single_tokens_and_never_0_or_1():
    found = uniforms_at((1, 2), 3, np.arange(5000, dtype=np.uint64))
    assert found.tolist() == [uniforms_at((1, 2), 3, token) for token in range(5000)]
    assert 0 < found.min() < 0.001 and 0.999 < found.max() < 1
    assert len(set(found)) == 5000


def test_a_race_follows_its_probabilities(run_race):
    num = 20_000
    winners = [run_race((5, 6), position, None, PROBS) for position in range(num)]
    observed = np.bincount(winners, minlength=len(PROBS))
    assert observed[2] == 0
    kept = PROBS > 0
    statistic = ((observed - num * PROBS)[kept] ** 2 / (num * PROBS[kept])).sum()
    assert statistic < chi2.isf(1e-4, kept.sum() - 1)


@pytest.mark.parametrize("spread", [0.1, 3.0, 30.0])
def test_the_compiled_race_has_the_same_winners(library, spread):
    rng = np.random.default_rng(0)
    for size in (1, 2, 7, 255, 256, 257, 5000):
        logits = torch.from_numpy(rng.normal(size=size) * spread)
        probs = logits.float().softmax(-1).numpy()
        tokens = np.sort(rng.choice(151_936, size, replace=False))
        for position in (0, 1, 2**31, 2**40 + 3):
            key = tuple(int(word) for word in rng.integers(0, 2**32, 2))
            for ids in (None, tokens):
                winner = race(key, position, ids, probs)
                for kind in (np.float32, np.float64):
                    found = engine.race(library, key, position, ids, probs.astype(kind))
                    assert found == winner


def test_the_winner_is_the_smallest_time_of_all(run_race):
    """A bound leaves most tokens out; a plain look at every time finds the same winner."""
    rng = np.random.default_rng(1)
    for position in range(200):
        probs = rng.dirichlet(np.full(40, 0.2))
        times = [
            (-math.log1p(-uniforms_at((7, 8), position, token)) / prob, token)
            for token, prob in enumerate(probs)
            if prob > 0
        ]
        assert run_race((7, 8), position, None, probs) == min(times)[1]


@pytest.mark.parametrize("size", [3, 13, 400])
def test_padding_and_the_kind_of_distribution_change_nothing(run_race, size):
    """A nucleus is a dictionary, a softmax a tensor, and a padded vocabulary a longer one."""
    noise = Noise.of(0, "text", 0, race=run_race)
    rng = np.random.default_rng(size)
    for position in range(50):
        probs = torch.from_numpy(rng.dirichlet(np.ones(size))).float()
        few = Few(dict(enumerate(probs.tolist())))
        padded = torch.nn.functional.pad(probs, (0, 77))
        winner = noise.winner(few, position)
        assert winner == noise.winner(Full(probs), position)
        assert winner == noise.winner(Full(padded), position)


def test_names_make_the_key():
    keys = {Noise.of(seed, name, i).key for seed in (0, 1) for name in "ab" for i in (0, 1)}
    assert len(keys) == 8
    assert Noise.of(0, "a", 1) == Noise.of(0, "a", 1)


NANS = [Full(torch.tensor(of)) for of in ([0.5, math.nan, 0.5], [math.nan] * 20)]


@pytest.mark.parametrize("probs", [Few({0: math.nan}), Few({0: 0.5, 1: math.nan}), Few({}), *NANS])
def test_what_is_no_distribution_is_refused(probs):
    with pytest.raises(NonFiniteError):
        Noise((0, 0)).winner(probs, 0)
