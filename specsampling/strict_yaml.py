"""Reads YAML text into plain values, by the YAML 1.2 core schema and within bounds.

PyYAML reads YAML 1.1, where `010` is 8, `1:30` is 90 and `no` is false. PyYAML also keeps the last
value of a repeated key, builds objects from tags, and expands aliases without an end. This module
turns the events of PyYAML's parser into dicts, lists and scalars, and refuses everything else.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any, NoReturn

import yaml

MAX_DEPTH = 20
MAX_VALUES = 5000  # an alias counts the values behind it each time
MAX_DIGITS = 1000

_WORDS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
    **dict.fromkeys((".inf", ".Inf", ".INF", "+.inf", "+.Inf", "+.INF"), float("inf")),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), float("-inf")),
}
_INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
# Neither a file name nor a text can hold NUL or half of a surrogate pair.
_NO_TEXT = re.compile("[\0\ud800-\udfff]")


class YamlError(ValueError):
    """A text that this module refuses to read, with the place and the reason in one line."""


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML document; None for an empty one.

    Raises:
        YamlError: a syntax error, a repeated key, a key that is no word, a tag, a merge key, an
            alias to its own parent, or more depth, values or digits than any configuration has.
    """
    try:
        return _Builder(text).document()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise YamlError(line + problem) from None


def scalar(text: str) -> Any:
    """Return what a plain word stands for: null, true, false, a number, or the text itself.

    Raises:
        YamlError: a number has more than `MAX_DIGITS` digits.
    """
    if text in _WORDS:
        return _WORDS[text]
    is_integer = _INTEGER.fullmatch(text)
    if not is_integer and not _FLOAT.fullmatch(text):
        return text
    if len(text) > MAX_DIGITS:
        raise YamlError(f"a number has {len(text)} digits; at most {MAX_DIGITS} are read")
    return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10)) if is_integer else float(text)


class _Builder:
    """A builder of one document's value from PyYAML's events."""

    def __init__(self, text: str):
        self._events: Any = yaml.parse(text, Loader=yaml.SafeLoader)
        self._anchors: dict[str, tuple[Any, int]] = {}  # a value, and its number of values
        self._num_values = 0

    def document(self) -> Any:
        next(self._events)  # the stream begins
        if isinstance(next(self._events), yaml.StreamEndEvent):
            return None
        value = self._value(next(self._events), 0)
        next(self._events)  # the document ends
        if not isinstance(event := next(self._events), yaml.StreamEndEvent):
            _fail(event, "a second document begins (---), and only one is read")
        return value

    def _value(self, event: Any, depth: int) -> Any:
        before = self._num_values
        self._count(event, 1)
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in self._anchors:
                _fail(event, f"*{event.anchor} stands before the end of an &{event.anchor}")
            value, number = self._anchors[event.anchor]
            self._count(event, number)
            return copy.deepcopy(value)  # a change of one copy must not change another
        if event.tag is not None:
            _fail(event, f"the tag {event.tag} is not read; put a text in quotes instead")
        if depth == MAX_DEPTH:
            _fail(event, f"values are nested more than {MAX_DEPTH} deep")
        value = self._content(event, depth + 1)
        if event.anchor is not None:
            self._anchors[event.anchor] = value, self._num_values - before
        return value

    def _count(self, event: Any, number: int) -> None:
        self._num_values += number
        if self._num_values > MAX_VALUES:
            _fail(event, f"more than {MAX_VALUES} values, those behind aliases (*) included")

    def _content(self, event: Any, depth: int) -> Any:
        if isinstance(event, yaml.SequenceStartEvent):
            return [self._value(item, depth) for item in self._items()]
        if isinstance(event, yaml.MappingStartEvent):
            return self._mapping(depth)
        if odd := _NO_TEXT.search(event.value):
            _fail(event, f"\\u{ord(odd[0]):04x} is no character that a text may hold")
        if event.style is not None:  # in quotes or a block, 42 is a text, too
            return event.value
        try:
            return scalar(event.value)
        except YamlError as error:
            _fail(event, str(error))

    def _items(self) -> Iterator[Any]:
        while not isinstance(event := next(self._events), yaml.CollectionEndEvent):
            yield event

    def _mapping(self, depth: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for event in self._items():
            name = event.value if isinstance(event, yaml.ScalarEvent) else ""
            if name == "<<" and event.style is None:
                _fail(event, "the merge key << is not read; write the keys out")
            key = self._value(event, depth)
            if not isinstance(key, str) or not key:
                _fail(event, f"key {_start(name) or '(no word)'} is not a word")
            if key in values:
                _fail(event, f"key {_start(key)} stands twice")
            values[key] = self._value(next(self._events), depth)
        return values


def _start(text: str) -> str:
    return " ".join(text[:60].split())


def _fail(event: Any, problem: str) -> NoReturn:
    raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
