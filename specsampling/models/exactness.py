"""Checks, by a few calls, that a model can be decoded, and whether decoding is bit-exact.

`require_decodable` looks at a model when it is loaded. With a cache that is rolled back, the model
must give the same logits as without one. Architectures that keep a running state, ignore the cache
or look ahead would decode noise without a word.

`check_exactness` looks at a target before a run, at the lengths to come. With one fixed width, a
row's bits should not depend on how tokens were grouped into calls. Calls of another width, another
number of keys, or layers that mix rows, such as LLM.int8() with its outlier columns, break this.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, LinearAttentionCacheLayerMixin

from specsampling.method.batch import BatchRunner, decode_together
from specsampling.method.drafts import num_logits
from specsampling.method.forward import Model
from specsampling.method.session import Session, attention_windows, context_limit
from specsampling.models.errors import ModelError, is_out_of_memory, model_error

WIDTH = 8
NUM_PREFILLED = 40
NUM_KEPT = 2  # rows of a call that stay when the rest is rolled back
NUM_ALONE = 4

# How far rounding may part two computations of the same logits: norm of the difference / norm.
TOLERANCES = {torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.1}
QUANTIZED_TOLERANCE = 0.2
WAY_OUT = "choose another architecture"


@dataclass(frozen=True)
class Proof:
    """Logits of some fixed tokens, scored, rolled back and scored again."""

    rows: Tensor  # [n, V] float32
    tolerance: float  # the largest difference that rounding may make

    def difference(self, other: Proof) -> float:
        """Return the median relative distance of the rows; nan if logits are nan.

        The median ignores the single rows that rounding may send to other experts.
        """
        is_scored = other.rows.isfinite()  # a trimmed head leaves tokens out
        away = (self.rows - other.rows).masked_fill(~is_scored, 0.0).norm(dim=-1)
        return float((away / other.rows.masked_fill(~is_scored, 0.0).norm(dim=-1)).median())


@dataclass(frozen=True)
class ExactnessCheck:
    """The result of the self-check. Differences are the largest between two logits."""

    is_exact: bool  # every row had the same bits alone and in one call with others
    num_rows: int  # rows compared
    largest_difference: float  # among logits that should be equal; nan if some are not finite
    num_tokens: int  # the longest text that was looked at
    num_texts: int = 1  # decoded at once
    from_alone: float = 0.0  # between one text among several and the same text by itself

    def __str__(self) -> str:
        if self.is_exact:
            if self.num_texts == 1:
                where, alone = "alone and in one call, in texts", ""
            else:
                where = f"alone, in one call, and beside {self.num_texts - 1} other texts,"
                near = f"within {self.from_alone:.3g} of" if self.from_alone else "bitwise"
                alone = f"; {near} those of run.batch_size 1"
            return (
                f"confirmed ({self.num_rows} rows {where} of up to {self.num_tokens} tokens: "
                f"bitwise equal{alone})"
            )
        if math.isnan(self.largest_difference):
            return "NOT confirmed (some logits of random text are NaN or infinite)"
        return (
            f"NOT confirmed (rows alone and in one call differ by up to "
            f"{self.largest_difference:.3g}): outputs may differ from the reference at near-ties"
        )


def prove_without_cache(model: PreTrainedModel, name: str) -> Proof:
    """Compute a loaded model's logits without a cache, or raise a ModelError about `name`."""
    with _one_line(*_blame(model, name)):
        if why := _why_not_rolled_back(model):
            raise ModelError(f"{_refusal(model, name)} {why}; {WAY_OUT}")
        first, second, start = _proof_tokens(model)
        with torch.inference_mode():  # the rows of `prove_decoding`, each text in one call
            texts = torch.tensor([first, second], device=model.device)
            one, other = (model(input_ids=text[None], use_cache=False).logits[0] for text in texts)
        truth = _proof(model, torch.cat([one[start:], other[start + NUM_KEPT :]] * 2))
    if not truth.rows.max(dim=-1).values.isfinite().all():
        is_half = model.dtype == torch.float16
        way_out = "choose bfloat16 or float32" if is_half else "download or convert it again"
        raise ModelError(
            f"cannot decode with {name}: its logits are not finite in "
            f"{str(model.dtype).removeprefix('torch.')}; {way_out}"
        )
    return truth


def require_decodable(model: PreTrainedModel, name: str, truth: Proof | None = None) -> Proof:
    """Refuse a model whose cache cannot be rolled back, by a ModelError about `name`.

    Its logits without a cache are `truth`, if they are known, and are returned.
    """
    truth = truth or prove_without_cache(model, name)
    refusal = _refusal(model, name)
    with _one_line(f"{refusal} do not take a preallocated cache", WAY_OUT):
        error = prove_decoding(model).difference(truth)
    if not error < truth.tolerance:
        raise ModelError(
            f"{refusal} give other logits with a cache that is rolled back than without one "
            f"(off by {error:.0%}, more than rounding); {WAY_OUT}"
        )
    return truth


@contextlib.contextmanager
def _one_line(refusal: str, way_out: str) -> Iterator[None]:
    """Raise a ModelError for whatever goes wrong in a model's calls."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ModelError) or is_out_of_memory(error):
            raise
        raise model_error(refusal, error, way_out) from error


def _refusal(model: PreTrainedModel, name: str) -> str:
    return f"cannot decode with {name}: {model.config.model_type} models"


def _blame(model: PreTrainedModel, name: str) -> tuple[str, str]:
    """Return what to say if a model fails, and the way out.

    That is another quantisation for a quantised model: 4 bit takes only layers of some widths.
    """
    method = getattr(model, "quantization_method", None)
    if method is None:
        return f"{_refusal(model, name)} fail here", WAY_OUT
    kind = str(getattr(method, "value", method))
    if kind == "bitsandbytes":
        settings = getattr(model.config, "quantization_config", None)
        kind = "nf4" if getattr(settings, "load_in_4bit", False) else "int8"
    way_out = "set models.target_quantization, or the draft's, to none"
    way_out += "" if kind == "int8" else " or int8"
    return f"cannot decode with {name} in {kind}: its layers fail here", way_out


def _why_not_rolled_back(model: PreTrainedModel) -> str:
    """Say what in a model's architecture forbids rolling back; "" if nothing does."""
    if model.config.is_encoder_decoder:
        return "are encoder-decoders"
    if getattr(model, "_is_stateful", False):
        return "keep a running state that cannot be rolled back"
    for layer in DynamicCache(config=model.config).layers:
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            return "have layers with a running state that cannot be rolled back"
        if isinstance(layer, DynamicLayer) and type(layer).__module__ != DynamicLayer.__module__:
            return f"have a cache of their own ({type(layer).__name__})"
    return ""


def prove_decoding(model: Model) -> Proof:
    """Score tokens, roll back and score others, first at any width and then at a fixed one."""
    first, second, start = _proof_tokens(model)
    rows = []
    for width in (None, WIDTH):
        session = Session(model, len(first), width)
        session.prefill(first[:start])
        rows.append(session.score(first, last=len(first) - start))
        session.length = start + NUM_KEPT
        rows.append(session.score(second, last=len(second) - start - NUM_KEPT))
    return _proof(model, torch.cat(rows))


def _proof(model: Model, rows: Tensor) -> Proof:
    is_quantized = getattr(model, "quantization_method", None) is not None
    return Proof(rows.float(), QUANTIZED_TOLERANCE if is_quantized else TOLERANCES[model.dtype])


def _proof_tokens(model: Model) -> tuple[list[int], list[int], int]:
    """Make two texts that part `NUM_KEPT` tokens behind a start; return them and the start."""
    context = context_limit(model)
    start = min(NUM_PREFILLED, context - WIDTH)
    if start < 1:
        raise ValueError(f"a context of {context} tokens is too short")
    tokens = _random_tokens(model, start + 2 * WIDTH)
    first = tokens[: start + WIDTH]
    return first, first[: start + NUM_KEPT] + tokens[start + WIDTH + NUM_KEPT :], start


def _random_tokens(model: Model, num_tokens: int) -> list[int]:
    embeddings = model.get_input_embeddings()
    known = min(num_logits(model), getattr(embeddings, "num_embeddings", num_logits(model)))
    generator = torch.Generator().manual_seed(0)
    return torch.randint(known, (num_tokens,), generator=generator).tolist()


def check_exactness(target: Model, width: int | None, capacity: int) -> ExactnessCheck:
    """Feed the same tokens one by one and in one call, and compare the logits' bits.

    This is done near the beginning, around the edge of each attention window, and at the end of
    the longest text to come. Where several texts are decoded at once, the tokens are also fed in a
    call with other texts' tokens, and their logits are compared with those of one text at a time.

    Args:
        target: the loaded model.
        width: rows of every decode call. Decoding with None is not exact.
        capacity: the longest text of the run to come, in tokens.

    Raises:
        ModelError: rows alone and together differ by far more than rounding.
    """
    together = width or WIDTH
    longest = min(max(capacity, NUM_PREFILLED + together), context_limit(target))
    last = max(longest - together, 1)
    edges = {edge - together // 2 for edge in attention_windows(target)}
    starts = sorted({min(NUM_PREFILLED, last), last, *(edge for edge in edges if 0 < edge < last)})
    tokens = _random_tokens(target, longest)

    all_together, all_alone = _together_and_alone(target, tokens, starts, width)
    num_texts, from_alone = 1, 0.0
    if isinstance(target, BatchRunner):
        num_texts = target.num_places
        among = [_among_others(target, num_texts, tokens, start, last, width) for start in starts]
        one_text, _ = _together_and_alone(target.model, tokens, starts, width)
        from_alone = _largest(torch.cat(all_together), torch.cat(one_text))
        all_together, all_alone = all_together + among, all_alone + all_together
    one, other = torch.cat(all_together), torch.cat(all_alone)
    error = _proof(target, one).difference(_proof(target, other))
    if math.isnan(error):
        return ExactnessCheck(False, len(one), math.nan, longest, num_texts)
    if error >= TOLERANCES[torch.bfloat16]:
        raise ModelError(
            f"{target.config.model_type} models give other logits for a token alone than in a call "
            f"with others (off by {error:.0%}, more than rounding); {WAY_OUT}"
        )
    is_exact, difference = torch.equal(one, other), _largest(one, other)
    return ExactnessCheck(is_exact, len(one), difference, longest, num_texts, from_alone)


def _largest(one: Tensor, other: Tensor) -> float:
    """Return the largest difference between two logits."""
    return (one.float() - other.float()).nan_to_num().abs().max().item()


def _together_and_alone(
    target: Model, tokens: list[int], starts: list[int], width: int | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Score the first rows behind each start, in one call and in a call each."""
    session = Session(target, len(tokens), width)
    session.prefill(tokens[: starts[-1]])
    all_together, all_alone = [], []
    for start in reversed(starts):  # what lies before a start stays as it was prefilled
        rows = _together(session, tokens, start, width)
        session.length = start
        alone = [session.score(tokens[: start + i + 1], last=1) for i in range(len(rows))]
        all_together.append(rows)
        all_alone.append(torch.cat(alone))
    return all_together[::-1], all_alone[::-1]


def _together(session: Session, tokens: list[int], start: int, width: int | None) -> Tensor:
    """Score the first rows behind a start in one call."""
    end = min(start + (width or WIDTH), len(tokens))
    session.length = start
    return session.score(tokens[:end], last=end - start)[:NUM_ALONE]


def _among_others(
    target: Model, num_texts: int, tokens: list[int], start: int, prefilled: int, width: int | None
) -> Tensor:
    """Score the first rows behind a start while other texts of other lengths are open too."""

    def score(tokens: list[int], start: int, prefilled: int) -> Tensor:
        session = Session(target, len(tokens), width)
        session.prefill(tokens[:prefilled])
        return _together(session, tokens, start, width)

    jobs = [partial(score, tokens, start, prefilled)]
    for i in range(1, num_texts):
        others = tokens[i % len(tokens) :]
        theirs = min(start, len(others) - 1)
        jobs.append(partial(score, others, theirs, theirs))
    results = {done.index: done.result for done in decode_together(jobs, num_texts)}
    return results[0]
