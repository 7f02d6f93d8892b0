"""Defines what the runner asks of a task, and the stop strings that tasks share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol


class TaskError(ValueError):
    """A mistake in a task's data or their place, in one line with the way out."""


@dataclass(frozen=True)
class Example:
    """One prompt to decode, made from `text`."""

    id: str  # unique in its task; part of a row's key
    text: str
    task_id: str | None = None  # the benchmark's own name, if its scorer needs one
    reference: str | None = None  # a good answer, if the task has one


@dataclass(frozen=True)
class Prompt:
    """The input that a model gets for an example."""

    token_ids: list[int]
    num_cut_tokens: int = 0  # cut from the example's text so that the prompt fits


class Encoder(Protocol):
    """A translator of prompts into ids and of ids into text, such as `models.Pair`."""

    def encode(self, text: str) -> list[int]: ...

    def encode_chat(self, message: str) -> list[int]: ...

    def decode(self, token_ids: Sequence[int]) -> str: ...


class Task(Protocol):
    """A benchmark: what to decode, and which part of the text counts."""

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Texts that end a generation; the completion is cut before them."""

    def examples(self) -> list[Example]:
        """Return every example, in a fixed order."""

    def prompt(
        self, example: Example, encoder: Encoder, max_tokens: int, max_new_tokens: int = 0
    ) -> Prompt:
        """Return the prompt, of at most `max_tokens` if the task knows what may be cut.

        `encoder` is the target's. `max_tokens` is the target's context less `max_new_tokens`,
        which only the error message needs.
        """

    def completion(self, example: Example, text: str) -> str:
        """Return the part of the decoded new text that is the answer."""


class StopStrings:
    """A check, after each new token, whether a stop string is complete.

    Only the newest tokens are decoded. Each token holds at least one byte of text. So a stop
    string that was just completed lies within as many tokens as it has bytes.
    """

    MARGIN = 4  # tokens before the string, in case the first one starts inside a character

    def __init__(self, strings: Sequence[str], decode: Callable[[Sequence[int]], str]):
        self._strings = tuple(strings)
        self._decode = decode
        self._num_tokens = max(len(string.encode()) for string in strings) + self.MARGIN

    def __call__(self, new_ids: Sequence[int]) -> bool:
        text = self._decode(new_ids[-self._num_tokens :])
        return any(string in text for string in self._strings)


def cut_at(text: str, stop_strings: Sequence[str]) -> str:
    """Return the text up to the first of the stop strings."""
    found = [text.find(string) for string in stop_strings]
    return text[: min((at for at in found if at >= 0), default=len(text))]
