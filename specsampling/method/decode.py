"""Drives both decoders: the prefill, the cycles up to the text's end, and the clock.

A decoder brings one function, its cycle. This module knows nothing of sampling or verifying.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from specsampling.method.distribution import NonFiniteError
from specsampling.method.drafts import Proposer
from specsampling.method.evidence import Evidence
from specsampling.method.session import Session, synchronized_seconds
from specsampling.method.text import Generation, Text


class Cycle(NamedTuple):
    """One draft and verify round: of `num_drafted` tokens, `num_accepted` were accepted."""

    num_accepted: int
    num_drafted: int


def decode_text(
    text: Text,
    session: Session,
    cycle: Callable[[], Cycle | None],
    evidence: Evidence,
    proposer: Proposer | None = None,
) -> Generation:
    """Prefill the caches, and run cycles until the text ends.

    Logits that are not finite also end the text. The tokens decoded before are kept,
    `finish_reason` is "error", and `error` names the model whose logits they were.

    Args:
        text: the prompt; each cycle adds at least one token to it.
        session: the target's.
        cycle: runs one round. A decoder without a draft returns None.
        evidence: collected by the cycles, a number per new token.
        proposer: the draft's; None without a draft.
    """
    caches: list[Session | Proposer] = [session] if proposer is None else [session, proposer]
    cycles: list[Cycle] = []
    start = synchronized_seconds(session.device)
    for cache in caches:
        cache.prefill(text.tokens[:-1])
    prefilled = synchronized_seconds(session.device)
    prefills = [cache.forward_seconds for cache in caches]
    try:
        while text.finish_reason is None:
            done = cycle()
            if done is not None:
                cycles.append(done)
    except NonFiniteError as problem:
        text.fail(str(problem))
    end = synchronized_seconds(session.device)
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
