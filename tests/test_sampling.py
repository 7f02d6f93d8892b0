import math

import pytest
import torch
import transformers as hf
from helpers import error_line

from specsampling.method.distribution import Few, Full, one_hot
from specsampling.method.sampling import GREEDY, Sampling, probs_from_logits, sample


def warped(logits, sampling) -> torch.Tensor:
    """[n, V] float32."""
    return torch.stack([of.dense(logits.shape[-1]) for of in probs_from_logits(logits, sampling)])


LOGITS = torch.tensor([[2.0, 1.0, 0.5, -1.0], [0.0, 3.0, 3.5, 1.0]])


def test_temperature_divides_the_logits_and_zero_is_one_hot_at_the_argmax():
    assert warped(LOGITS, GREEDY).tolist() == [[1, 0, 0, 0], [0, 0, 1, 0]]
    assert [of.dense(3).tolist() for of in one_hot([2, 0])] == [[0, 0, 1], [1, 0, 0]]
    assert torch.allclose(warped(LOGITS, Sampling(1.0)), LOGITS.softmax(-1))
    assert torch.allclose(warped(LOGITS, Sampling(0.5)), (LOGITS * 2).softmax(-1))


def test_top_k_keeps_the_k_most_probable():
    probs = warped(LOGITS, Sampling(1.0, top_k=2))
    kept = LOGITS[0, :2].softmax(-1)
    assert torch.allclose(probs[0], torch.tensor([*kept, 0, 0]))
    assert (probs > 0).sum(-1).tolist() == [2, 2]


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.62, 0.9, 0.999])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p):
    probs = LOGITS.softmax(-1)
    rows = warped(LOGITS, Sampling(1.0, top_p=top_p))
    for row, full in zip(rows, probs, strict=True):
        kept = row > 0
        mass = full[kept].sum()
        assert mass >= top_p
        assert mass - full[kept].min() < top_p  # without its least probable it would not reach it
        assert torch.allclose(row[kept], full[kept] / mass)


@pytest.mark.parametrize("scale", [0.1, 3.0, 6.0])
def test_top_p_is_the_same_in_a_large_vocabulary(scale):
    """The tokens above a floor are ordered, and all of them where these do not suffice."""
    logits = torch.randn(2, 20_000, generator=torch.Generator().manual_seed(2)) * scale
    ordered, order = logits.double().softmax(-1).sort(descending=True)
    kept = ordered * (ordered.cumsum(-1) - ordered < 0.9)
    expected = torch.zeros_like(kept).scatter(-1, order, kept / kept.sum(-1, keepdim=True))
    assert torch.allclose(warped(logits, Sampling(1.0, top_p=0.9)).double(), expected, atol=1e-6)
    size = int((expected > 0).sum(-1).max())
    assert (size > 4096, size > 256) == (scale < 1, scale < 5)  # each of the ways is taken


def test_warp_agrees_with_hugging_face():
    """The warp's order (temperature, top-k, top-p) is the one that users know."""
    logits = torch.randn(16, 50, generator=torch.Generator().manual_seed(1)) * 3
    warpers = (hf.TemperatureLogitsWarper(0.7), hf.TopKLogitsWarper(20), hf.TopPLogitsWarper(0.8))
    theirs = logits.clone()
    for warper in warpers:
        theirs = warper(torch.zeros(16, 1, dtype=torch.long), theirs)
    assert torch.allclose(warped(logits, Sampling(0.7, 20, 0.8)), theirs.softmax(-1), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_probabilities_are_finite_at_extreme_logits(dtype):
    """A half-precision softmax underflows to 0/0 = nan, and min(1, nan) accepts."""
    logits = torch.tensor([[60000.0, -60000.0, 0.0, 59000.0]]).to(dtype)
    for sampling in (GREEDY, Sampling(1.0), Sampling(0.1, 2, 0.5)):
        probs = warped(logits, sampling)
        assert torch.isfinite(probs).all()
        assert probs.sum(-1) == pytest.approx(1)


def test_samples_have_the_distribution():
    """A chi-squared test with 3 degrees of freedom: 27 is exceeded once in 200,000 seeds."""
    generator, num = torch.Generator().manual_seed(0), 20_000
    probs = torch.tensor([0.5, 0.0, 0.3, 0.001, 0.199])
    drawn = torch.tensor([sample(Full(probs), generator) for _ in range(num)])
    counts = torch.bincount(drawn, minlength=5)
    assert counts[1] == 0
    expected = num * probs[probs > 0]
    assert ((counts[probs > 0] - expected) ** 2 / expected).sum() < 27


@pytest.mark.parametrize("uniform", [0.0, 1e-17, 0.5, 1 - 2**-53])
def test_the_ends_of_the_uniform_stay_within_the_distribution(uniform, monkeypatch):
    """Rounding must lead neither past the last token nor to one without probability."""
    monkeypatch.setattr(torch, "rand", lambda *s, **o: torch.tensor(uniform, dtype=torch.float64))
    for probs in ([0.0, 0.5, 0.0, 0.5, 0.0], [1 / 3] * 3, [0.0, 1.0, 0.0], [1e-30, 1.0]):
        assert probs[sample(Full(torch.tensor(probs)), None)] > 0
        assert probs[sample(Few({i: prob for i, prob in enumerate(probs) if prob}), None)] > 0


def test_a_row_of_nan_leaves_the_other_rows_nuclei_whole():
    """A flat row beside one of NaN kept its first 64 tokens only."""
    logits = torch.zeros(2, 1000)
    alone = warped(logits[:1], Sampling(1.0, top_p=0.9))
    logits[1] = torch.nan
    beside = warped(logits, Sampling(1.0, top_p=0.9))
    assert int((alone > 0).sum()) in range(899, 903)
    assert torch.equal(beside[:1], alone) and beside[1].isnan().any()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"temperature": -1}, "temperature must be >= 0 (got -1)"),
        ({"temperature": math.nan}, "temperature must be >= 0 (got nan)"),
        ({"temperature": 1, "top_k": -3}, "top_k must be >= 0 (got -3)"),
        ({"temperature": 1, "top_p": 1.5}, "top_p must be > 0 and <= 1 (got 1.5)"),
        ({"temperature": 1, "top_p": 0}, "top_p must be > 0 and <= 1 (got 0)"),
    ],
)
def test_values_out_of_range_are_refused(values, words):
    """A negative temperature preferred the least probable tokens, without a word."""
    assert words in error_line(ValueError, Sampling, **values)
