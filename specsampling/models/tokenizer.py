"""Loads the tokenizer that a pair shares, compares it, and finds the ids that end texts.

A chat template may print today's date by `strftime_now`, which transformers takes from the clock. A
run that takes two days needs the same prompts on both. So do two runs that are compared.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from types import SimpleNamespace
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from specsampling.method.drafts import num_logits
from specsampling.method.text import SEPARATORS
from specsampling.models.errors import ModelError, model_error, way_out_of
from specsampling.models.folder import PROBES
from specsampling.models.source import read_tokenizer

log = logging.getLogger("specsampling")

QUIET = {"verbose": False}  # no warning of a long text, which the caller cuts or reports

SPECIAL_PROBE = "<|endoftext|> <s> </s> <|im_start|>user\nhi<|im_end|>\n"


def load_tokenizer(spec: str) -> PreTrainedTokenizerBase:
    """Load one tokenizer, or raise a ModelError that says why it cannot be loaded."""
    try:
        tokenizer = read_tokenizer(spec)
        is_empty = not tokenizer(PROBES[0])["input_ids"]  # made when there are no files
    except ModelError:
        raise
    except Exception as error:  # the tokenizers library raises plain Exceptions
        way_out = f"set models.tokenizer if it ships without one, or {way_out_of(error, spec)}"
        raise model_error(f"cannot load the tokenizer of {spec}", error, way_out) from error
    if is_empty:
        raise ModelError(f"{spec} ships without a tokenizer; set models.tokenizer to one that fits")
    return tokenizer


def require_same_tokenizer(
    target: PreTrainedTokenizerBase, draft: PreTrainedTokenizerBase, spec: str
) -> None:
    """Raise a ModelError if the draft `spec` encodes some text otherwise than the target."""
    for probe in (*PROBES, SPECIAL_PROBE):
        if target(probe)["input_ids"] == draft(probe)["input_ids"]:
            continue
        way_out = "choose a draft of the target's family, or draft: ngram"
        if probe == SPECIAL_PROBE:
            way_out = (
                "only special tokens differ, so if they are one family's, set models.tokenizer to "
                f"the target's, {target.name_or_path}; or {way_out}"
            )
        raise ModelError(
            f"the draft {spec} must share its tokenizer with the target: that in "
            f"{draft.name_or_path} and that in {target.name_or_path} encode {probe[:24]!r} "
            f"differently; {way_out}"
        )


def num_appended(tokenizer: PreTrainedTokenizerBase) -> int:
    """Count the special tokens that the tokenizer puts behind a text, as no prompt may have."""
    bare = tokenizer(PROBES[1], add_special_tokens=False)["input_ids"]
    dressed = tokenizer(PROBES[1])["input_ids"]
    added = len(dressed) - len(bare)
    starts = (i for i in range(added + 1) if dressed[i : i + len(bare)] == bare)
    return added - next(starts, added)


def end_ids(tokenizer: PreTrainedTokenizerBase, model: Any) -> frozenset[int]:
    """Collect every id that ends a text.

    A checkpoint names its ends in up to three places that need not agree: the generation config,
    the tokenizer's end of text, and the token that the chat template puts behind an answer. If one
    were ignored, a model could go on with an invented next turn. A code model writes a separator
    and goes on with another file, and no checkpoint names the separators.

    An id that is not in the vocabulary is left out, and a warning names it.
    """
    size = num_logits(model)
    config = model.config.get_text_config(decoder=True)
    in_config, named = (
        ends if isinstance(ends := getattr(part, "eos_token_id", None), list) else [ends]
        for part in (config, model.generation_config)
    )

    def is_id(token: Any) -> bool:
        return type(token) is int and 0 <= token < size

    places = [(token, "config.json") for token in in_config]
    places += [(token, "generation_config.json") for token in named if token not in in_config]
    invalid = [f"{t!r:.40} in {place}" for t, place in places if t is not None and not is_id(t)]
    vocabulary = tokenizer.get_vocab()  # token -> id, added tokens included
    # SentencePiece writes a blank before a token as "▁": CodeLlama's separator is "▁<MID>".
    separators = (f"{blank}{name}" for name in SEPARATORS for blank in ("", "▁"))
    others = (tokenizer.eos_token_id, _end_of_turn(tokenizer), *map(vocabulary.get, separators))
    ids = {*filter(is_id, named), *(token for token in others if token is not None)}
    if invalid:
        has_end = min(ids, default=size) < size
        log.warning(
            "eos_token_id of %s must be an integer from 0 to %d, for its vocabulary has %d tokens "
            "(got %s): left out%s",
            *(model.name_or_path, size - 1, size, ", ".join(invalid)),
            "" if has_end else "; texts end only at decoding.max_new_tokens",
        )
    return frozenset(ids)


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Find the special token that the chat template puts right behind an answer, if any."""
    if not tokenizer.chat_template:
        return None
    answer = "specsampling"
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False)
    except Exception:  # a template may refuse this chat; that is no reason not to decode
        return None
    assert isinstance(text, str)
    behind = text.rpartition(answer)[2].lstrip()
    ids: list[int] = tokenizer(behind, add_special_tokens=False)["input_ids"]
    known = tokenizer.added_tokens_decoder  # id -> token
    return ids[0] if ids and ids[0] in known and known[ids[0]].special else None


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, message: str, now: datetime | None
) -> list[int]:
    """Encode a user's message in the chat template, up to where the answer begins.

    The template takes `now`, or the clock's time, for the local time. A ModelError says that there
    is no template, or that it fails.
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
