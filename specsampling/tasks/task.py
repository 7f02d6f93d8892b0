"""What the runner asks of a task, and the stop strings that tasks share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol


class TaskError(ValueError):
    """A task's data cannot be had or are not what they must be, in one line with the way out."""


@dataclass(frozen=True)
class Example:
    """One prompt to decode, made from `text`."""

    id: str  # unique in its task; part of a row's key
    text: str
    task_id: str | None = None  # the benchmark's own name, where its scorer asks for one
    reference: str | None = None  # what a good answer looks like, where the task has one


@dataclass(frozen=True)
class Prompt:
    """What a model is given for an example."""

    token_ids: list[int]
    num_cut_tokens: int = 0  # of the example's text, left out so that the prompt fits


class Encoder(Protocol):
    """Turns prompts into ids and ids into text (`models.Pair`)."""

    def encode(self, text: str) -> list[int]: ...

    def encode_chat(self, message: str) -> list[int]: ...

    def decode(self, token_ids: Sequence[int]) -> str: ...


class Task(Protocol):
    """A benchmark: what to decode and what of it counts."""

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Texts that end a generation; the completion is cut before them."""

    def examples(self) -> list[Example]:
        """Every example, in a fixed order."""

    def prompt(
        self, example: Example, encoder: Encoder, max_tokens: int, max_new_tokens: int = 0
    ) -> Prompt:
        """The prompt, of at most `max_tokens` if the task knows what may be cut.

        `encoder` is the target's. `max_tokens` is the target's context less `max_new_tokens`,
        which the message needs if nothing fits.
        """

    def completion(self, example: Example, text: str) -> str:
        """What of the decoded new text is the answer."""


class StopStrings:
    """Asks after each new token whether a stop string has been completed.

    Decodes only the newest tokens: each holds at least one byte of text, so a stop string
    that the newest token completes lies within as many tokens as it has bytes.
    """

    MARGIN = 4  # whole characters before the string, should the first token start within one

    def __init__(self, strings: Sequence[str], decode: Callable[[Sequence[int]], str]):
        self._strings = tuple(strings)
        self._decode = decode
        self._num_tokens = max(len(string.encode()) for string in strings) + self.MARGIN

    def __call__(self, new_ids: Sequence[int]) -> bool:
        text = self._decode(new_ids[-self._num_tokens :])
        return any(string in text for string in self._strings)


def cut_at(text: str, stop_strings: Sequence[str]) -> str:
    """The text up to the first of the stop strings."""
    found = [text.find(string) for string in stop_strings]
    return text[: min((at for at in found if at >= 0), default=len(text))]
