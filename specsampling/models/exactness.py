"""Is decoding bit-exact on this target, here? A self-check of a few calls.

With one fixed width, a row's bits should not depend on how the tokens were grouped into
calls. That holds for the kernels it was seen to hold for, so it is looked at on the loaded
target before it is promised. What breaks it: calls of another width, attention over another
number of keys, and layers that mix rows, such as LLM.int8() with its outlier columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from specsampling.method.drafts import num_logits
from specsampling.method.session import Session
from specsampling.models.embedded import ModelError

NUM_PREFILLED = 40
NUM_ALONE = 4


@dataclass(frozen=True)
class ExactnessCheck:
    """What the self-check saw.

    Attributes:
        is_exact: every row had the same bits alone and in one call with others.
        num_rows: rows compared.
        largest_difference: the largest difference between two logits that should be equal.
    """

    is_exact: bool
    num_rows: int
    largest_difference: float

    def __str__(self) -> str:
        if self.is_exact:
            return f"confirmed ({self.num_rows} rows alone and in one call: bitwise equal)"
        return (
            f"NOT confirmed (rows alone and in one call differ by up to "
            f"{self.largest_difference:.3g}): outputs may differ from the reference at near-ties"
        )


def check_exactness(target: PreTrainedModel, width: int | None, capacity: int) -> ExactnessCheck:
    """Feed the same tokens one by one and in one call, and compare the logits' bits.

    Args:
        target: the loaded model.
        width: rows of every decode call, or None: not exact then, but the cache is checked.
        capacity: tokens of cache, about as many as in the run to come.

    Raises:
        ModelError: the cache gives other logits than the model without one, by far more
            than rounding: this architecture cannot be decoded here.
    """
    generator = torch.Generator().manual_seed(0)
    num_together = width or 8
    num_tokens = NUM_PREFILLED + num_together
    capacity = max(capacity, num_tokens)
    tokens = torch.randint(num_logits(target), (num_tokens,), generator=generator).tolist()

    together = Session(target, capacity, width)
    together.prefill(tokens[:NUM_PREFILLED])
    logits_together = together.score(tokens, last=num_together)[:NUM_ALONE]

    alone = Session(target, capacity, width)
    alone.prefill(tokens[:NUM_PREFILLED])
    rows = [alone.score(tokens[: NUM_PREFILLED + i + 1], last=1) for i in range(NUM_ALONE)]
    logits_alone = torch.cat(rows)

    with torch.inference_mode():
        ids = torch.tensor([tokens], device=target.device)
        uncached = target(input_ids=ids, use_cache=False).logits[0, NUM_PREFILLED:][:NUM_ALONE]
    error = (logits_together - uncached).float().norm() / uncached.float().norm()
    if not error < 0.1:
        raise ModelError(
            f"{target.config.model_type} models cannot be decoded with a preallocated cache "
            f"(its logits are off by {error:.0%}); choose another architecture"
        )
    difference = (logits_alone - logits_together).float().abs().max().item()
    is_exact = torch.equal(logits_alone, logits_together)
    return ExactnessCheck(is_exact, NUM_ALONE, difference)
