"""Speculative sampling (Chen et al. 2023, Algorithm 2).

A draft proposes k tokens, the target scores them in one call, and a rejection rule
(`specsampling/method/verify.py`) keeps exactly the target's distribution. Greedy decoding
gives the very tokens that the target alone would give.

    python speculative.py --prompt "def is_prime(n):"

This command decodes one prompt and shows live which tokens are accepted, corrections and bonus
tokens. With `--compare` the target first decodes the prompt alone.
"""

from __future__ import annotations

if __name__ == "__main__":
    from specsampling.edge import catch_signals, check_address_space

    catch_signals()
    check_address_space()

from collections.abc import Collection, Sequence

from specsampling.method.decode import Cycle, Steps, decode_text, to_the_end
from specsampling.method.drafts import Draft, DraftTerms
from specsampling.method.evidence import Evidence
from specsampling.method.forward import Model
from specsampling.method.noise import Noise
from specsampling.method.sampling import GREEDY, Randomness, Sampling, probs_from_logits
from specsampling.method.session import Session, context_limit
from specsampling.method.text import StopCheck, Text
from specsampling.method.verify import Verifier, verify, verify_coupled


def speculative_stream(
    target: Model,
    draft: Draft,
    prompt: Sequence[int],
    *,
    k: int,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    generator: Randomness = None,
    width: int | None = None,
    verifier: Verifier = verify,
    eos_ids: Collection[int] = (),
    is_stop: StopCheck | None = None,
) -> Steps:
    """Decode one text, up to k + 1 tokens per target call.

    `speculative` has the same arguments and returns the finished `Generation`.

    Differs from the paper: the draft may propose fewer than k tokens, for example near the end of
    the text. The rule is exact for every k.

    Args:
        target: the model whose distribution the output has.
        draft: one of those in `specsampling/method/drafts.py`.
        prompt: token ids, at least one.
        k: draft tokens per cycle, at least 1.
        max_new_tokens: exact limit on the new tokens.
        sampling: temperature, top-k and top-p of both models; greedy by default.
        generator: source of randomness, on the model's device; `Noise` for `verify_coupled`.
        width: rows of every target call, more than k (see `Session`); if None, a call has as many
            rows as it needs.
        verifier: the rule: `verify`, `verify_block` or `verify_coupled`.
        eos_ids: ids that end the text.
        is_stop: asked after each token whether the text ends there.

    Yields:
        A `Step` for each cycle.

    Raises:
        TypeError: the draft is a bare model.
        ValueError: k or the width is out of range, the prompt is empty or leaves no room, or only
            one of `Noise` and `verify_coupled` is given.
    """
    if isinstance(generator, Noise) != (verifier is verify_coupled):
        raise ValueError("verify_coupled needs Noise; the other rules a torch.Generator or None")
    if not hasattr(draft, "start"):
        raise TypeError(f"draft must be a Draft, as ModelDraft(model) is (got {type(draft)})")
    if k < 1 or (width is not None and width <= k):
        raise ValueError(f"k must be >= 1 and below the width (got k {k}, width {width})")
    text = Text(
        prompt,
        max_new_tokens=max_new_tokens,
        context=context_limit(target),
        eos_ids=eos_ids,
        is_stop=is_stop,
    )
    session = Session(target, capacity=text.limit, width=width)
    proposer = draft.start(DraftTerms.of(target, text.limit, sampling, generator))
    evidence = Evidence(sampling, generator)

    def cycle() -> Cycle:
        draft_tokens, draft_probs = proposer.propose(text.tokens, min(k, text.num_left - 1))
        logits = session.score(text.tokens + draft_tokens, last=len(draft_tokens) + 1)
        target_probs = probs_from_logits(logits, sampling)  # k + 1 of them
        verdict = verifier(target_probs, draft_probs, draft_tokens, generator, len(text.tokens))
        new_tokens = [*draft_tokens[: verdict.num_accepted], verdict.token]
        evidence.add(new_tokens, logits, target_probs, draft_probs)
        text.extend(new_tokens)
        session.length = min(session.length, len(text.tokens) - 1)
        proposer.rollback(len(text.tokens) - 1)
        return Cycle(verdict.num_accepted, len(draft_tokens))

    return (yield from decode_text(text, session, cycle, evidence, proposer))


speculative = to_the_end(speculative_stream)


if __name__ == "__main__":
    from functools import partial

    from autoregressive import autoregressive_stream
    from specsampling.console import decode_one_prompt, exit_code

    main = partial(decode_one_prompt, speculative_stream, autoregressive_stream)
    raise SystemExit(exit_code(main))
