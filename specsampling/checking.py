"""Builds dataclasses from plain values, and checks each value by its field's type hint.

A type hint is the rule: `int`, `float | None`, `Literal[...]`, `tuple[str, ...]`, and `Annotated`
with any number of `Rule`s. The checks and the error messages are made from the hints.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from difflib import get_close_matches
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

MAX_SHOWN = 80  # characters of a value or a name in an error


class ConfigError(ValueError):
    """A mistake in the configuration, in one line: field, rule, value, way out."""


def mistake(field: str, rule: str, got: object, way_out: str = "") -> ConfigError:
    """Return the error of a field; `got` is the field's value as the file has it."""
    return ConfigError(f"{field} must be {rule} (got {got}){f'; {way_out}' if way_out else ''}")


class Rule(NamedTuple):
    """A condition on a value beyond its type. In an error, its `words` follow the type's words."""

    words: str
    check: Callable[[Any], object]
    way_out: str = ""  # advice if the rule is broken
    is_word: bool = False  # capitals and surrounding blanks are typing slips

    def way_out_for(self, value: Any) -> str:
        """Return the way out for a value that breaks the rule."""
        is_path = not self.is_word or set(value) & set("/\\")  # a path may need its capitals
        if not is_path and self.check(mended := value.strip().lower()):
            return f"did you mean {mended}?"
        return self.way_out


def at_least(minimum: int, way_out: str = "") -> Rule:
    return Rule(f" >= {minimum}", lambda value: value >= minimum, way_out)


def at_most(maximum: int, why: str) -> Rule:
    return Rule(f" <= {maximum}", lambda value: value <= maximum, why)


def within(minimum: int, maximum: int, why: str, way_out: str = "") -> tuple[Rule, Rule]:
    """Return the rules of both bounds. `why` says why nobody needs more than the maximum."""
    return at_least(minimum, way_out), at_most(maximum, f"{why}; {way_out}" if way_out else why)


def rules_of(hint: Any) -> list[Rule]:
    """Return the rules of an `Annotated` hint."""
    found = get_args(hint)[1:]
    return [rule for item in found for rule in ([item] if isinstance(item, Rule) else item)]


def build(cls: Any, values: dict[str, Any], path: str = "", **given: Any) -> Any:
    """Make an instance of a config dataclass from its block and from the `given` fields."""
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


@dataclass
class _Misfit(Exception):
    """A mismatch of a value and its type hint; `rule` is the broken rule, if there is one."""

    way_out: str
    rule: Rule | None = None


def checked(hint: Any, value: Any, path: str) -> Any:
    """Convert the value to its type hint; a ConfigError names `path` if the value does not fit."""
    try:
        return _convert(hint, value, path)
    except _Misfit as misfit:
        raise mistake(path, _words(hint, misfit.rule), shown(value), misfit.way_out) from None


def _convert(hint: Any, value: Any, path: str) -> Any:
    """Return a list as a tuple, and an integer as a float; raise `_Misfit` if nothing fits."""
    kind, args = get_origin(hint) or hint, get_args(hint)
    if kind is Annotated:
        converted = _convert(args[0], value, path)
        for rule in rules_of(hint):
            if not rule.check(converted):
                raise _Misfit(rule.way_out_for(converted), rule)
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
    if kind in (str, int, bool, dict) and type(value) is kind:  # True is no int here
        return value
    raise _Misfit(_TYPES[kind][1] if kind in _TYPES else nearest(str(value), _allowed(hint)))


def _convert_to_one(hints: Sequence[Any], value: Any, path: str) -> Any:
    """Return `value` as the first of the hints that it fits.

    If it fits none, the error has a broken rule, else the nearest word, else all ways out.
    """
    misfits = []
    for hint in hints:
        try:
            return _convert(hint, value, path)
        except _Misfit as misfit:
            misfits.append(misfit)
    words = [word for hint in hints for word in _allowed(hint)]
    ways_out = [misfit.way_out for hint, misfit in zip(hints, misfits) if not _allowed(hint)]
    way_out = nearest(str(value), words) or ", or ".join([*ways_out, *words])
    raise next((misfit for misfit in misfits if misfit.rule), _Misfit(way_out))


def _allowed(hint: Any) -> Sequence[str]:
    """Return the words that a hint allows as values."""
    if hint is type(None):
        return ("null",)
    return get_args(hint) if get_origin(hint) is Literal else ()


def _words(hint: Any, broken: Rule | None = None) -> str:
    """Describe a type hint: `null or an integer >= 1`. Of several rules, describe `broken`."""
    kind, args = get_origin(hint) or hint, get_args(hint)
    if kind is Annotated:
        rules = rules_of(hint)
        rule = broken if broken and broken in rules else rules[0]
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


_TYPES = {  # the type in words, and advice if another type is given
    str: ("a string", "text in quotes is always a string"),
    int: ("an integer", "write digits 0 to 9 only, without quotes"),
    float: ("a number", "write it as 0.5 or 1.0e-3, without quotes"),
    bool: ("true or false", "write one of these two words, without quotes"),
    tuple: ("a list", "write it in brackets: [a, b]"),
    dict: ("a block of `key: value` lines", "indent its keys below it"),
}


def nearest(word: str, known: Iterable[str], path: str = "") -> str:
    """Return "did you mean NAME?" for the nearest known name, in any case; "" if none is near."""
    spellings = {name.casefold(): name for name in known}
    near = get_close_matches(word[:MAX_SHOWN].strip().casefold(), spellings, n=1)
    return "".join(f"did you mean {path}{shown_name(spellings[name])}?" for name in near)


def shown(value: Any) -> str:
    """Return a value as a config file writes it, on one line, cut if it is long."""
    return _cut(json.dumps(value, default=str, ensure_ascii=False))


def shown_name(key: str) -> str:
    """Return a key without quotes, on one line, cut if it is long."""
    return _cut(json.dumps(key, ensure_ascii=False)[1:-1])


def _cut(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."
