"""The baseline: autoregressive sampling (Chen et al. 2023, Algorithm 1).

The decoder makes one target call per token, with a KV cache. Speedups are measured against the
decoder's fastest form, `width=None`. The method `reference` of a run makes calls of the speculative
decoder's width, and speculative outputs must equal its outputs.

    python autoregressive.py --prompt "def is_prime(n):"

This command decodes one prompt and shows the text as it grows.
"""

from __future__ import annotations

if __name__ == "__main__":
    from specsampling.edge import catch_signals, check_address_space

    catch_signals()
    check_address_space()

from collections.abc import Collection, Sequence

from specsampling.method.decode import Steps, decode_text, to_the_end
from specsampling.method.evidence import Evidence
from specsampling.method.forward import Model
from specsampling.method.sampling import GREEDY, Randomness, Sampling, probs_from_logits, sample
from specsampling.method.session import Session, context_limit
from specsampling.method.text import StopCheck, Text


def autoregressive_stream(
    target: Model,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    generator: Randomness = None,
    width: int | None = None,
    eos_ids: Collection[int] = (),
    is_stop: StopCheck | None = None,
) -> Steps:
    """Decode one text, one token per target call.

    `autoregressive` has the same arguments and returns the finished `Generation`.

    Args:
        target: the model.
        prompt: token ids, at least one.
        max_new_tokens: exact limit on the new tokens.
        sampling: temperature, top-k and top-p; greedy by default.
        generator: source of randomness, on the model's device, or `Noise`.
        width: rows of every call (see `Session`); None for one row, the fastest.
        eos_ids: ids that end the text.
        is_stop: asked after each token whether the text ends there.

    Yields:
        A `Step` for each token.

    Raises:
        ValueError: the prompt is empty or leaves no room in the context.
    """
    text = Text(
        prompt,
        max_new_tokens=max_new_tokens,
        context=context_limit(target),
        eos_ids=eos_ids,
        is_stop=is_stop,
    )
    session = Session(target, capacity=text.limit, width=width)
    evidence = Evidence(sampling, generator)

    def cycle() -> None:
        logits = session.score(text.tokens, last=1)
        target_probs = probs_from_logits(logits, sampling)  # one
        token = sample(target_probs[0], generator, len(text.tokens))
        evidence.add([token], logits, target_probs)
        text.extend([token])

    return (yield from decode_text(text, session, cycle, evidence))


autoregressive = to_the_end(autoregressive_stream)


if __name__ == "__main__":
    from functools import partial

    from specsampling.console import decode_one_prompt, exit_code

    raise SystemExit(exit_code(partial(decode_one_prompt, None, autoregressive_stream)))
