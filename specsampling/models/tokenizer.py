"""The tokenizer that a pair shares: loaded, compared, and asked where a turn ends."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from specsampling.method.drafts import num_logits
from specsampling.method.text import SEPARATORS
from specsampling.models.errors import ModelError, model_error, way_out_of
from specsampling.models.source import PROBES, read_tokenizer

log = logging.getLogger("specsampling")

QUIET = {"verbose": False}  # no warning of a long text: the caller cuts it or says so

SPECIAL_PROBE = "<|endoftext|> <s> </s> <|im_start|>user\nhi<|im_end|>\n"


def load_tokenizer(spec: str) -> PreTrainedTokenizerBase:
    """Load one tokenizer.

    Raises:
        ModelError: it cannot be found or loaded.
    """
    try:
        tokenizer = read_tokenizer(spec)
        is_empty = not tokenizer(PROBES[0])["input_ids"]  # what is made where no files are
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
    """Compare what two tokenizers encode, not only how many tokens they have.

    Raises:
        ModelError: they encode a probe differently, so the ids of the draft `spec` mean nothing
            to the target.
    """
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
    """How many special tokens the tokenizer puts behind a text (an end of text, say).

    A prompt is to be continued, so what is put behind it does not belong to it.
    """
    bare = tokenizer(PROBES[1], add_special_tokens=False)["input_ids"]
    dressed = tokenizer(PROBES[1])["input_ids"]
    for start in range(len(dressed) - len(bare) + 1):
        if dressed[start : start + len(bare)] == bare:
            return len(dressed) - len(bare) - start
    return 0


def end_ids(tokenizer: PreTrainedTokenizerBase, model: Any) -> frozenset[int]:
    """Every id that ends a text, wherever it is written down.

    A checkpoint names its ends in up to three places that need not agree: the generation config,
    the tokenizer's end of text, and the token that the chat template puts behind an answer. A
    model that was tuned on the last runs into an invented next turn if only the first is heeded.
    A code model goes on to another file behind a separator, which no checkpoint names.

    An id of the first that the model cannot say is left out, and a line tells of it.
    """
    size = num_logits(model)
    config = model.config.get_text_config(decoder=True)
    in_config = _listed(getattr(config, "eos_token_id", None))
    named = _listed(getattr(model.generation_config, "eos_token_id", None))
    places = {
        "config.json": in_config,
        "generation_config.json": [token for token in named if token not in in_config],
    }
    ids = {token for token in named if _is_id(token, size)}
    ids |= {tokenizer.eos_token_id, _end_of_turn(tokenizer)} - {None}
    ids |= separator_ids(tokenizer)
    odd = [
        f"{token!r:.40} in {place}"
        for place, tokens in places.items()
        for token in tokens
        if token is not None and not _is_id(token, size)
    ]
    if odd:
        log.warning(
            "eos_token_id of %s must be an integer from 0 to %d, for its vocabulary has %d tokens "
            "(got %s): left out%s",
            model.name_or_path,
            size - 1,
            size,
            ", ".join(odd),
            "" if min(ids, default=size) < size else "; texts end only at decoding.max_new_tokens",
        )
    return frozenset(ids)


def _listed(named: Any) -> list[Any]:
    return named if isinstance(named, list) else [named]


def _is_id(token: Any, size: int) -> bool:
    return type(token) is int and 0 <= token < size


def separator_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The ids of the separators of code models that are one token in this vocabulary.

    SentencePiece writes a blank before a token as "▁": CodeLlama's is "▁<MID>".
    """
    vocabulary = tokenizer.get_vocab()  # token -> id, added tokens included
    spellings = (f"{blank}{name}" for name in SEPARATORS for blank in ("", "▁"))
    return frozenset(vocabulary[token] for token in spellings if token in vocabulary)


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the chat template puts right behind an answer, if there is one."""
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
    ids: Sequence[int] = tokenizer(behind, add_special_tokens=False)["input_ids"]
    known = tokenizer.added_tokens_decoder  # id -> token
    return ids[0] if ids and ids[0] in known and known[ids[0]].special else None
