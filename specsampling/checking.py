"""Builds dataclasses from YAML 1.2, and says in one line which value breaks which rule.

A type hint is the rule: `int`, `float | None`, `Literal[...]`, `tuple[str, ...]`, and `Annotated`
with any number of `Rule`s. ruamel.yaml reads the text, pydantic checks the values, and the error
lines are made from the hints.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import is_dataclass
from difflib import get_close_matches
from functools import cache
from itertools import islice
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError, core_schema
from ruamel.yaml import YAML, YAMLError
from ruamel.yaml.constructor import SafeConstructor

MAX_SHOWN = 80  # characters of a value or a name in an error
MAX_PROBLEM = 120  # characters of what ruamel.yaml says
MAX_PIECES = 10_000  # pieces of a text's JSON: about two for each value, and again for each alias
_BLOCK = "a block of `key: value` lines", "indent its keys below it"
_TYPES = {  # by pydantic's name of the error: the type in words, and advice
    "string_type": ("a string", "text in quotes is always a string"),
    "int_type": ("an integer", "write digits 0 to 9 only, without quotes"),
    "float_type": ("a number", "write it as 0.5 or 1.0e-3, without quotes"),
    "bool_type": ("true or false", "write one of these two words, without quotes"),
    "tuple_type": ("a list", "write it in brackets: [a, b]"),
    "dict_type": _BLOCK,
    "dataclass_type": _BLOCK,
}


class ConfigError(ValueError):
    """A mistake in the configuration, in one line: field, rule, value, way out."""


def mistake(field: str, rule: str, got: object, way_out: str = "") -> ConfigError:
    """Return the error of a field; `got` is the field's value as the file has it."""
    return ConfigError(f"{field} must be {rule} (got {got}){f'; {way_out}' if way_out else ''}")


def parse_yaml(text: str, source: str) -> Any:
    """Return a YAML document as the plain values of JSON; None for an empty document.

    A ConfigError names a syntax error, a repeated key, what JSON cannot hold, an alias to its own
    parent, or more depth, values or digits than any configuration has.
    """
    reader = YAML(typ="safe", pure=True)
    reader.Constructor = _Constructor
    try:
        value = reader.load(text)
        pieces = list(islice(json.JSONEncoder(ensure_ascii=False).iterencode(value), MAX_PIECES))
        if len(pieces) == MAX_PIECES:
            raise ValueError("too many values, those behind aliases (*) included")
        return json.loads("".join(pieces).encode())  # half a surrogate pair cannot be encoded
    except (YAMLError, ValueError, TypeError, RecursionError) as error:
        problem = getattr(error, "problem", None) or str(error)
        if isinstance(error, RecursionError):
            problem = "values are nested too deep"
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        got = line + _cut(" ".join(problem.split()), MAX_PROBLEM)
        way_out = "mend it, or put a text with special characters in quotes"
        raise mistake(source, "valid YAML", got, way_out) from None


class _Constructor(SafeConstructor):
    """A constructor to which a date is a text, as YAML 1.2 has it."""


_Constructor.add_constructor("tag:yaml.org,2002:timestamp", SafeConstructor.construct_yaml_str)


class Block:
    """A base of config dataclasses: no type is converted, and an unknown key is an error."""

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class Rule(NamedTuple):
    """A condition on a value beyond its type. In an error, its `words` follow the type's words."""

    words: str
    check: Callable[[Any], object]
    way_out: str = ""  # advice if the rule is broken
    is_word: bool = False  # capitals and surrounding blanks are typing slips

    def __get_pydantic_core_schema__(self, hint: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(self._checked, handler(hint))

    def _checked(self, value: Any) -> Any:
        if self.check(value):
            return value
        way_out = self.way_out
        is_path = not self.is_word or set(value) & set("/\\")  # a path may need its capitals
        if not is_path and self.check(mended := value.strip().lower()):
            way_out = f"did you mean {mended}?"
        raise PydanticCustomError("rule", "broken", {"rule": self, "way_out": way_out})


def within(minimum: int, maximum: int, way_out: str) -> Rule:
    """Return the rule of a number between two bounds."""
    words = f" >= {minimum} and <= {maximum}"
    return Rule(words, lambda value: minimum <= value <= maximum, way_out)


def build(cls: Any, values: dict[str, Any]) -> Any:
    """Make an instance of a config dataclass from its keys and values, or raise a ConfigError."""
    try:
        return _adapter(cls).validate_json(json.dumps(values))
    except ValidationError as error:
        raise _first_mistake(cls, values, error.errors(include_url=False)) from None


_adapter = cache(TypeAdapter)


def block_of(value: Any, path: str) -> dict[str, Any]:
    """Return a value that must be a block; a ConfigError names `path` if it is none."""
    if not isinstance(value, dict):
        raise mistake(path, _BLOCK[0], shown(value), _BLOCK[1])
    return value


def _first_mistake(cls: Any, values: Any, errors: Sequence[Any]) -> ConfigError:
    """Return the error of the first unknown key, or else of the first field that is wrong."""
    first = min(errors, key=lambda error: error["type"] != "unexpected_keyword_argument")
    hint, value, path, hints = cls, values, [], {}
    for key in first["loc"]:
        blocks = [kind for kind in (hint, *get_args(hint)) if is_dataclass(kind)]
        if not blocks:  # the rest of the path is an item's index, or one of several types
            break
        hints = get_type_hints(blocks[0], include_extras=True)
        hint, value = hints.get(key), value.get(key)
        path.append(key)
    *parents, key = map(shown_name, path)
    field = ".".join([*parents, key])
    if first["type"] == "unexpected_keyword_argument":
        way_out = nearest(key, hints, "".join(f"{name}." for name in parents))
        way_out = way_out or f"the keys there are {', '.join(hints)}"
        return ConfigError(f"{field} is not a known key; {way_out}")
    if first["type"] == "missing":
        return ConfigError(f"{field} is missing; it must be {_words(hint)}")
    found = [error for error in errors if list(error["loc"][: len(path)]) == path]
    for broken in (error["ctx"] for error in found if error["type"] == "rule"):
        return mistake(field, _words(hint, broken["rule"]), shown(value), broken["way_out"])
    words, advice = _allowed(hint), [_TYPES[e["type"]][1] for e in found if e["type"] in _TYPES]
    way_out = nearest(str(value), words) or ", or ".join(advice and [*advice, *words])
    return mistake(field, _words(hint), shown(value), way_out)


def _allowed(hint: Any) -> list[str]:
    """Return the words that a hint allows as values."""
    if hint is NoneType:
        return ["null"]
    args = get_args(hint)
    return [*args] if get_origin(hint) is Literal else [w for arg in args for w in _allowed(arg)]


def _words(hint: Any, broken: Rule | None = None) -> str:
    """Describe a type hint: `null or an integer >= 1`. Of several rules, describe `broken`."""
    kind, args = get_origin(hint) or hint, get_args(hint)
    if kind is Annotated:
        rule = broken if broken and broken in args else args[1]
        return f"{_words(args[0], broken)}{rule.words}"
    if kind in (Union, UnionType):
        null = ["null"] * (NoneType in args)
        return " or ".join([*null, *(_words(arg, broken) for arg in args if arg is not NoneType)])
    if kind is Literal:
        return f"one of {', '.join(args)}" if len(args) > 1 else args[0]
    if kind is tuple:
        return f"a list, each item {_words(args[0], broken)}"
    name = "dataclass" if is_dataclass(kind) else {str: "string"}.get(kind, kind.__name__)
    return _TYPES[f"{name}_type"][0]


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


def _cut(text: str, most: int = MAX_SHOWN) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."
