"""Plain values -> dataclasses whose field types say what may stand there.

A type hint is the rule: `int`, `float | None`, `Literal[...]`, `tuple[str, ...]`, and `Annotated`
with any number of `Rule`s, in words and in code. The checks and the error messages follow from
these. Knows nothing of what is configured.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from types import UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

MAX_SHOWN = 80  # characters of a value or a name in an error


class ConfigError(ValueError):
    """A mistake in the configuration, in one line: field, rule, value, way out."""


class Rule(NamedTuple):
    """What a value must hold beyond its type: in words that follow the type's, and as a test.

    Attributes:
        words: the rule, in words.
        check: the rule, as a test.
        way_out: what may help where it is broken.
        is_word: whether a value may be a word of ours in capitals, or with blanks around it.
    """

    words: str
    check: Callable[[Any], object]
    way_out: str = ""
    is_word: bool = False

    def misfit(self, value: Any) -> _Misfit:
        """What is wrong with a value that breaks the rule."""
        is_path = not self.is_word or set(value) & set("/\\")  # its capitals are its own
        if not is_path and self.check(mended := value.strip().lower()):
            return _Misfit(f"did you mean {mended}?", self)
        return _Misfit(self.way_out, self)


def at_least(minimum: int, way_out: str = "") -> Rule:
    return Rule(f" >= {minimum}", lambda value: value >= minimum, way_out)


def at_most(maximum: int, why: str) -> Rule:
    return Rule(f" <= {maximum}", lambda value: value <= maximum, why)


def build(cls: Any, values: dict[str, Any], path: str = "", **given: Any) -> Any:
    """An instance of a config dataclass from its block; `given` fields come from elsewhere."""
    schema = {item.name: item for item in fields(cls) if item.name not in given}
    hints = get_type_hints(cls, include_extras=True)
    for key in values:
        if key not in schema:
            way_out = nearest(key, schema, path) or f"the keys there are {', '.join(schema)}"
            raise ConfigError(f"{path}{shown_name(key)} is not a known key; {way_out}")
    for name, item in schema.items():
        if name in values:
            given[name] = checked(hints[name], values[name], path + name)
        elif item.default is MISSING:
            raise ConfigError(f"{path}{name} is missing; it must be {_words(hints[name])}")
    return cls(**given)


class _Misfit(Exception):
    """A value does not fit its type hint: the way out, where there is one, and the rule."""

    def __init__(self, way_out: str, rule: Rule | None = None):
        self.way_out = way_out
        self.rule = rule


def checked(hint: Any, value: Any, path: str) -> Any:
    try:
        return _convert(hint, value, path)
    except _Misfit as misfit:
        way_out = f"; {misfit.way_out}" if misfit.way_out else ""
        rule = f"{path} must be {_words(hint, misfit.rule)} (got {shown(value)})"
        raise ConfigError(rule + way_out) from None


def _convert(hint: Any, value: Any, path: str) -> Any:
    """`value` as the type hint holds it: lists become tuples, an int may stand for a float."""
    kind, args = get_origin(hint) or hint, get_args(hint)
    if kind is Annotated:
        converted = _convert(args[0], value, path)
        for rule in args[1:]:
            if not rule.check(converted):
                raise rule.misfit(converted)
        return converted
    if value is None and type(None) in args:
        return None
    if kind in (Union, UnionType):
        return _convert_to_one(args, value, path)
    if is_dataclass(kind):
        return build(kind, checked(dict, value, path), f"{path}.")
    if kind is tuple and type(value) is list:
        return tuple(_convert(args[0], item, path) for item in value)
    if kind is float and type(value) in (int, float) and abs(value) <= sys.float_info.max:
        return float(value)
    if kind is Literal and value in args:
        return value
    if kind in (str, int, bool, dict) and type(value) is kind:  # isinstance: True were an int
        return value
    words = _allowed_words(hint)
    raise _Misfit(nearest(str(value), words) if words else _TYPES[kind][1])


def _convert_to_one(hints: Sequence[Any], value: Any, path: str) -> Any:
    """`value` as the first of the hints that it fits.

    Where it fits none, a broken rule is told first, then the word that was meant, then all ways.
    """
    misfits = []
    for hint in hints:
        try:
            return _convert(hint, value, path)
        except _Misfit as misfit:
            misfits.append(misfit)
    for found in misfits:
        if found.rule is not None:
            raise found
    words = [word for hint in hints for word in _allowed_words(hint)]
    ways_out = [_TYPES[kind][1] for hint in hints if (kind := _plain_kind(hint)) in _TYPES]
    raise _Misfit(nearest(str(value), words) or ", or ".join([*ways_out, *words]))


def _plain_kind(hint: Any) -> Any:
    """A hint's kind without its rules."""
    plain = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    return get_origin(plain) or plain


def _allowed_words(hint: Any) -> Sequence[str]:
    """The words that a hint lets stand for themselves."""
    if hint is type(None):
        return ("null",)
    return get_args(hint) if get_origin(hint) is Literal else ()


def _words(hint: Any, broken: Rule | None = None) -> str:
    """A type hint in words: `null or an integer >= 1`; of several rules the first or the broken."""
    kind, args = get_origin(hint) or hint, get_args(hint)
    if kind is Annotated:
        rule = broken if broken and broken in args[1:] else args[1]
        return f"{_words(args[0], broken)}{rule.words}"
    if type(None) in args:
        return f"null or {_words(args[0], broken)}"
    if kind in (Union, UnionType):
        return " or ".join(_words(arg, broken) for arg in args)
    if kind is Literal:
        return f"one of {', '.join(args)}" if len(args) > 1 else args[0]
    if kind is tuple:
        return f"a list, each item {_words(args[0], broken)}"
    return _TYPES[dict if is_dataclass(kind) else kind][0]


_TYPES = {  # the type in words, and what may help where something else is given
    str: ("a string", "text in quotes is always a string"),
    int: ("an integer", "write digits 0 to 9 only, without quotes"),
    float: ("a number", "write it as 0.5 or 1.0e-3, without quotes"),
    bool: ("true or false", "write one of these two words, without quotes"),
    tuple: ("a list", "write it in brackets: [a, b]"),
    dict: ("a block of `key: value` lines", "indent its keys below it"),
}


def nearest(word: str, known: Iterable[str], path: str = "") -> str:
    """A question for the one of `known` that was meant, in any case; empty when none is near."""
    spellings = {name.casefold(): name for name in known}
    near = get_close_matches(word[:MAX_SHOWN].strip().casefold(), spellings, n=1)
    return "".join(f"did you mean {path}{shown_name(spellings[name])}?" for name in near)


def shown_name(key: str) -> str:
    """A key on one line, cut where it grows long."""
    text = json.dumps(key, ensure_ascii=False)[1:-1]
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."


def shown_names(keys: Iterable[str], most: int = 10) -> str:
    """The first few of several keys."""
    names = [shown_name(key) for key in keys]
    return ", ".join(names[:most] + ["..."] * (len(names) > most))


def shown(value: Any) -> str:
    """A value as the file would have it, on one line, cut where it grows long."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."
