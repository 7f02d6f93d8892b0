"""Texts and generations as both decoders see them: where a text ends, and what it cost.

The decoders see only token ids and counts. The caller passes a function of the new ids that says
where a text stops. This module also lists the separators that code models write between two texts.
The tokenizer's end ids and the scoring use them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

_PARTS = ("prefix", "middle", "suffix", "pad", "repo")
_FILES = ("file_sep", "file_separator", "filename", "repo_name", "reponame", "gh_stars")
_PAGES = (
    *(f"issue_{part}" for part in ("start", "comment", "closed")),
    *(f"commit_{part}" for part in ("before", "msg", "after")),
    *(f"jupyter_{part}" for part in ("start", "text", "code", "output", "script")),
    "empty_output",
)
SEPARATORS: tuple[str, ...] = (
    # Qwen-Coder, CodeGemma, Granite; StarCoder, SmolLM2, StableCode; SantaCoder; Seed-Coder.
    *(f"<|{name}|>" for name in (*(f"fim_{part}" for part in _PARTS), *_FILES)),
    *(f"<{name}>" for name in (*(f"fim_{part}" for part in _PARTS), *_FILES, *_PAGES)),
    *(f"<fim-{part}>" for part in _PARTS),
    *(f"<[fim-{part}]>" for part in _PARTS),
    # DeepSeek-Coder, with its own bars and blanks and as people type them.
    *(f"<｜fim▁{part}｜>" for part in ("begin", "hole", "end")),
    *(f"<|fim▁{part}|>" for part in ("begin", "hole", "end")),
    *(f"<|fim_{part}|>" for part in ("begin", "hole", "end")),
    "<|EOT|>",
    # CodeLlama (its vocabulary has a blank before each); GLM; InCoder, CodeGen2; Codestral.
    *("<PRE>", "<SUF>", "<MID>", "<EOT>", "<REPO>"),
    *(f"<|{kind}{part}|>" for kind in ("code_", "") for part in ("prefix", "middle", "suffix")),
    *("<|/ file |>", "<|endofmask|>", "<eom>"),
    *("[PREFIX]", "[MIDDLE]", "[SUFFIX]"),
)
"""The separators that code models write between files or parts of a file, never within code."""


class PromptError(ValueError):
    """The error, in one line, for a prompt that is empty or too long for the context."""


StopCheck = Callable[[Sequence[int]], bool]
"""A function of the new ids so far, which says whether the text ends with the newest of them."""


@dataclass
class Generation:
    """One decoded text and what it cost.

    Attributes:
        token_ids: the new ids only; an end-of-text id that ended the text is the last.
        finish_reason: "eos", "stop" (a stop string), "length" (max_new_tokens), "context", or
            "error" (see `error`).
        accepted: draft tokens accepted, one entry per cycle. The last cycle's count
            includes accepted tokens that were cut because the text had ended before them.
        drafted: draft tokens proposed, one entry per cycle.
        target_calls: target forward calls after the prefill.
        draft_calls: draft forward calls after the prefill.
        prefill_seconds: time until the prompt, without its newest token, is in the caches.
        decode_seconds: time from the end of the prefill to the last token.
        forward_seconds: the part of prefill_seconds and decode_seconds spent in the models' calls.
        target_call_seconds: the part of decode_seconds that the target's calls took.
        draft_call_seconds: the part of decode_seconds that the draft's calls took.
        transforms: one number per new token of a sampled text: evidence of the distribution that
            the token was drawn from (`evidence.transform`).
        gaps: one number per new token of a greedy text: its logit minus the largest other logit.
        error: why the text could not be decoded further, in one line; None in all other cases.
    """

    token_ids: list[int]
    finish_reason: str
    accepted: list[int] = field(default_factory=list)
    drafted: list[int] = field(default_factory=list)
    target_calls: int = 0
    draft_calls: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    forward_seconds: float = 0.0
    target_call_seconds: float = 0.0
    draft_call_seconds: float = 0.0
    transforms: list[float] | None = None
    gaps: list[float] | None = None
    error: str | None = None

    def kinds(self) -> list[str]:
        """Name each token's origin: "accepted", "correction", "bonus"; "target" without drafts."""
        if not self.drafted:
            return ["target"] * len(self.token_ids)
        cycles = zip(self.accepted, self.drafted, strict=True)
        return [kind for cycle in cycles for kind in kinds_of(*cycle)][: len(self.token_ids)]


def kinds_of(num_accepted: int, num_drafted: int) -> list[str]:
    """Name the origin of each token that a cycle of a speculative decoder yields."""
    return ["accepted"] * num_accepted + ["bonus" if num_accepted == num_drafted else "correction"]


class Text:
    """A prompt and the tokens decoded after it, up to the text's end.

    Both decoders add tokens through `extend`, one by one. So a text ends at the same token, whether
    this token came alone or in the middle of a cycle.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        context: int,
        eos_ids: Collection[int] = (),
        is_stop: StopCheck | None = None,
    ):
        """Start from `prompt`.

        Args:
            prompt: at least one id, fewer than `context`.
            max_new_tokens: exact limit on the new tokens, at least 1.
            context: exact limit on prompt and new tokens together.
            eos_ids: every id that ends a text.
            is_stop: asked after each new token.

        Raises:
            PromptError: an empty prompt, or one that fills the context.
            ValueError: max_new_tokens below 1.
        """
        if not prompt:
            raise PromptError("the prompt must have at least one token (got 0)")
        if len(prompt) >= context:
            raise PromptError(
                f"the prompt must be shorter than the context of {context} tokens "
                f"(got {len(prompt)}); shorten it, or choose a model with a longer context"
            )
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be >= 1 (got {max_new_tokens})")
        self.tokens = list(prompt)
        self.num_prompt_tokens = len(prompt)
        self.limit = min(len(prompt) + max_new_tokens, context)
        self._limit_reason = "length" if len(prompt) + max_new_tokens <= context else "context"
        self._eos_ids = frozenset(eos_ids)
        self._is_stop = is_stop
        self.finish_reason: str | None = None
        self.error: str | None = None

    @property
    def new_tokens(self) -> list[int]:
        return self.tokens[self.num_prompt_tokens :]

    @property
    def num_left(self) -> int:
        """Return the number of tokens that may still be added."""
        return self.limit - len(self.tokens)

    def fail(self, error: str) -> None:
        """End the text where it is, because of an error in one line."""
        self.finish_reason, self.error = "error", error

    def extend(self, tokens: Sequence[int]) -> None:
        """Add tokens until the text ends, and drop the tokens behind its end."""
        for token in tokens:
            self.tokens.append(token)
            if token in self._eos_ids:
                self.finish_reason = "eos"
            elif self._is_stop is not None and self._is_stop(self.new_tokens):
                self.finish_reason = "stop"
            elif not self.num_left:
                self.finish_reason = self._limit_reason
            if self.finish_reason:
                return
