"""A user's message in a model's chat template, as it reads on a given day.

Some templates print today's date by `strftime_now`, which transformers defines by the clock. A run
that takes two days, or is compared with one of another day, needs the same prompts on all days.
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
    """Token ids of a user's message in the chat template, up to where the answer begins.

    The template sees `now` as the local time; None is the clock's.

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
    except Exception as error:  # a template is a program of the model's maker: any may come
        failure = f"the chat template of {tokenizer.name_or_path} fails"
        way_out = "choose prompt_style: completion, or mend the template"
        raise model_error(failure, error, way_out) from error
    return encoded["input_ids"]


@contextmanager
def _clock_at(now: datetime) -> Iterator[None]:
    """Let `strftime_now` read this time: a variable of its name would reach templates as text."""
    clock: Any = chat_template_utils.datetime
    module: Any = chat_template_utils
    module.datetime = SimpleNamespace(now=lambda: now)
    try:
        yield
    finally:
        module.datetime = clock
