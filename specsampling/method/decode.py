"""Drives both decoders: the prefill, the cycles up to the text's end, and the clock.

A decoder brings one function, its cycle. This module knows nothing of sampling or verifying.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from functools import wraps
from typing import NamedTuple, ParamSpec

from specsampling.method.distribution import NonFiniteError
from specsampling.method.drafts import Proposer
from specsampling.method.evidence import Evidence
from specsampling.method.session import Session, synchronized_seconds
from specsampling.method.text import Generation, Text, kinds_of

Parameters = ParamSpec("Parameters")


class Cycle(NamedTuple):
    """The counts of one draft and verify round: tokens drafted, and tokens accepted."""

    num_accepted: int
    num_drafted: int


class Step(NamedTuple):
    """The tokens that a cycle added to its text.

    Attributes:
        token_ids: the new ids, at least one.
        kinds: the origin of each token, as `Generation.kinds` names it.
    """

    token_ids: list[int]
    kinds: list[str]


Steps = Generator[Step, None, Generation]
"""A text under way: a step after each cycle, and at the end the generation."""


def to_the_end(decoder: Callable[Parameters, Steps]) -> Callable[Parameters, Generation]:
    """Make a decoder of whole texts from one that yields its steps."""

    @wraps(decoder)
    def decode(*args: Parameters.args, **options: Parameters.kwargs) -> Generation:
        steps = decoder(*args, **options)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                return end.value

    return decode


def decode_text(
    text: Text,
    session: Session,
    cycle: Callable[[], Cycle | None],
    evidence: Evidence,
    proposer: Proposer | None = None,
) -> Steps:
    """Prefill the caches, and run cycles until the text ends. The clock stops between steps.

    Logits that are not finite also end the text. The tokens decoded before are kept. Then
    `finish_reason` is "error", and `error` names the model that computed these logits.

    Args:
        text: the prompt; each cycle adds at least one token to it.
        session: the target's session.
        cycle: runs one round. A decoder without a draft returns None.
        evidence: a number for each new token, which the cycles collect.
        proposer: the draft's proposer; None without a draft.
    """
    caches: list[Session | Proposer] = [session] if proposer is None else [session, proposer]
    cycles: list[Cycle] = []
    start = synchronized_seconds(session.device)
    for cache in caches:
        cache.prefill(text.tokens[:-1])
    prefilled = synchronized_seconds(session.device)
    prefills = [cache.forward_seconds for cache in caches]
    paused = 0.0
    while text.finish_reason is None:
        num_before = len(text.tokens)
        try:
            done = cycle()
        except NonFiniteError as problem:
            text.fail(str(problem))
            break
        if done is not None:
            cycles.append(done)
        token_ids = text.tokens[num_before:]
        kinds = ["target"] if done is None else kinds_of(*done)[: len(token_ids)]
        stopped = time.perf_counter()
        yield Step(token_ids, kinds)
        paused += time.perf_counter() - stopped
    end = synchronized_seconds(session.device) - paused
    target_seconds, *draft_seconds = (
        cache.forward_seconds - before for cache, before in zip(caches, prefills)
    )
    return Generation(
        token_ids=text.new_tokens,
        finish_reason=text.finish_reason or "",
        error=text.error,
        accepted=[cycle.num_accepted for cycle in cycles],
        drafted=[cycle.num_drafted for cycle in cycles],
        target_calls=session.num_calls,
        draft_calls=proposer.num_calls if proposer else 0,
        prefill_seconds=prefilled - start,
        decode_seconds=end - prefilled,
        forward_seconds=sum(cache.forward_seconds for cache in caches),
        target_call_seconds=target_seconds,
        draft_call_seconds=sum(draft_seconds),
        transforms=evidence.transforms[: len(text.new_tokens)] or None,
        gaps=evidence.gaps[: len(text.new_tokens)] or None,
    )
