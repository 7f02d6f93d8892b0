"""YAML text -> plain values, as the YAML 1.2 core schema reads it, within bounds.

PyYAML's own reading is YAML 1.1, where `010` is 8, `1:30` is 90 and `no` is false. It also keeps
a repeated key's last value, builds objects from tags, and expands aliases without an end. Here
its parser's events are turned into dicts, lists and scalars, and whatever is none of these is an
error. Knows nothing of what the values are for.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

import yaml

MAX_DEPTH = 20
MAX_VALUES = 5000  # each value behind an alias counted as often as it stands there
MAX_DIGITS = 1000

_WORDS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
}
_INTEGER = re.compile(r"(?P<decimal>[-+]?[0-9]+)|0o(?P<octal>[0-7]+)|0x(?P<hex>[0-9a-fA-F]+)")
_BASES = {"decimal": 10, "octal": 8, "hex": 16}
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INFINITY = re.compile(r"(?P<sign>[-+]?)\.(inf|Inf|INF)")
# What no file name and no text can hold: NUL, and halves of a surrogate pair.
_NO_TEXT = re.compile("[\0\ud800-\udfff]")


class YamlError(ValueError):
    """The text is no YAML of the kind that is read here; one line that says where and why."""


def parse_yaml(text: str) -> Any:
    """The value of a YAML document; None for an empty one.

    Raises:
        YamlError: a syntax error, a key twice, a key that is no word, a tag, a merge key, an
            alias to its own parent, or more depth, values or digits than any configuration has.
    """
    try:
        return _Builder(yaml.parse(text, Loader=yaml.SafeLoader)).document()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise YamlError(line + problem) from None


def scalar(text: str) -> Any:
    """What a plain word stands for: null, true, a number, or the text itself.

    Raises:
        YamlError: a number of more digits than any is written with.
    """
    if text in _WORDS:
        return _WORDS[text]
    if infinity := _INFINITY.fullmatch(text):
        return float(f"{infinity['sign']}inf")
    integer = _INTEGER.fullmatch(text)
    if not integer and not _FLOAT.fullmatch(text):
        return text
    if len(text) > MAX_DIGITS:
        raise YamlError(f"a number has {len(text)} digits; at most {MAX_DIGITS} are read")
    if not integer:
        return float(text)
    kind = str(integer.lastgroup)
    return int(integer[kind], _BASES[kind])


@dataclass
class _Builder:
    """Turns the events of one document into its value."""

    events: Iterator[Any]
    anchors: dict[str, tuple[Any, int]] = field(default_factory=dict)  # value, values in it
    num_values: int = 0

    def document(self) -> Any:
        self._next(yaml.StreamStartEvent)
        event = next(self.events)
        if isinstance(event, yaml.StreamEndEvent):
            return None
        value = self._value(next(self.events), 0)
        self._next(yaml.DocumentEndEvent)
        event = next(self.events)
        if not isinstance(event, yaml.StreamEndEvent):
            _fail(event, "a second document begins (---), and one is read")
        return value

    def _next(self, kind: type) -> None:
        event = next(self.events)
        assert isinstance(event, kind), event  # the parser's grammar says so

    def _value(self, event: Any, depth: int) -> Any:
        before = self.num_values
        self._count(event, 1)
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event)
        if event.tag is not None:
            _fail(event, f"the tag {event.tag} is not read; put a text in quotes instead")
        if depth == MAX_DEPTH:
            _fail(event, f"values are nested more than {MAX_DEPTH} deep")
        if isinstance(event, yaml.ScalarEvent):
            value = self._scalar(event)
        elif isinstance(event, yaml.SequenceStartEvent):
            value = self._sequence(depth)
        else:
            value = self._mapping(depth)
        if event.anchor is not None:
            self.anchors[event.anchor] = value, self.num_values - before
        return value

    def _count(self, event: Any, number: int) -> None:
        self.num_values += number
        if self.num_values > MAX_VALUES:
            _fail(event, f"more than {MAX_VALUES} values, those behind aliases (*) included")

    def _alias(self, event: Any) -> Any:
        if event.anchor not in self.anchors:
            _fail(event, f"*{event.anchor} stands before the end of an &{event.anchor}")
        value, number = self.anchors[event.anchor]
        self._count(event, number)
        return copy.deepcopy(value)  # a change of the one must not change the other

    def _scalar(self, event: Any) -> Any:
        if odd := _NO_TEXT.search(event.value):
            _fail(event, f"\\u{ord(odd[0]):04x} is no character that a text may hold")
        if event.style is not None:  # in quotes, or a block: text, whatever it looks like
            return event.value
        try:
            return scalar(event.value)
        except YamlError as error:
            _fail(event, str(error))

    def _sequence(self, depth: int) -> list[Any]:
        items = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            items.append(self._value(event, depth + 1))
        return items

    def _mapping(self, depth: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            name = event.value if isinstance(event, yaml.ScalarEvent) else ""
            if name == "<<" and event.style is None:
                _fail(event, "the merge key << is not read; write the keys out")
            key = self._value(event, depth + 1)
            if not isinstance(key, str) or not key:
                _fail(event, f"key {_start(name) or '(no word)'} is not a word")
            if key in values:
                _fail(event, f"key {_start(key)} stands twice")
            values[key] = self._value(next(self.events), depth + 1)
        return values


def _start(text: str) -> str:
    return " ".join(text[:60].split())


def _fail(event: Any, problem: str) -> NoReturn:
    raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
