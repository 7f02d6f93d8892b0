"""Puts a user's message into a model's chat template, at a given time.

Some templates print today's date by `strftime_now`, which transformers takes from the clock. A run
that takes two days needs the same prompts on both. So do two runs that are compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from types import SimpleNamespace
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from specsampling.models.errors import ModelError, model_error
from specsampling.models.tokenizer import QUIET


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, message: str, now: datetime | None
) -> list[int]:
    """Encode a user's message in the chat template, up to where the answer begins.

    The template takes `now` for the local time. None stands for the clock's time.

    Raises:
        ModelError: the tokenizer has no chat template, or one that fails.
    """
    if not tokenizer.chat_template:
        raise ModelError(
            "prompt_style chat needs a tokenizer with a chat template "
            f"({tokenizer.name_or_path} has none); choose prompt_style: completion"
        )
    chat = [{"role": "user", "content": message}]
    try:
        with _clock_at(now or datetime.now()):
            encoded: Any = tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, tokenizer_kwargs=QUIET
            )
    except Exception as error:  # a template is a program, which may raise anything
        failure = f"the chat template of {tokenizer.name_or_path} fails"
        way_out = "choose prompt_style: completion, or mend the template"
        raise model_error(failure, error, way_out) from error
    return encoded["input_ids"]


@contextmanager
def _clock_at(now: datetime) -> Iterator[None]:
    """Let `strftime_now` read this time. A variable of that name would reach templates as text."""
    clock: Any = chat_template_utils.datetime
    module: Any = chat_template_utils
    module.datetime = SimpleNamespace(now=lambda: now)
    try:
        yield
    finally:
        module.datetime = clock
