"""checking.py: YAML 1.2's words, and nothing that runs, repeats or explodes; strict numbers."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from specsampling.checking import Block, ConfigError, build, parse_yaml

PROJECT = Path(__file__).parents[1]


def bomb(levels: int, width: int = 9) -> str:
    """A few hundred bytes that stand for width ** levels values."""
    lines = ["a0: &a0 [x, x]"]
    for level in range(1, levels):
        lines.append(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * width)}]")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("10", 10),
        ("010", 10),  # 8 in YAML 1.1
        ("0", 0),
        ("-0", 0),
        ("+7", 7),
        ("-7", -7),
        ("0008", 8),  # text in YAML 1.1
        ("0o10", 8),  # text in YAML 1.1
        ("0x10", 16),
        ("0xfF", 255),
        ("1e3", 1000.0),  # text in YAML 1.1
        ("1e-3", 0.001),
        ("1E+3", 1000.0),
        ("1.0e3", 1000.0),
        ("1.", 1.0),
        (".5", 0.5),
        ("-.5", -0.5),
        ("+.inf", math.inf),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("true", True),
        ("False", False),
        ("TRUE", True),
        *((text, None) for text in ("null", "~", "NULL", "", "# only a comment")),
        # Numbers, words and dates of YAML 1.1, and a digit to str.isdigit.
        *((text, text) for text in ("1:30", "1:30:00", "1,000", "yes", "no", "on", "Off", "y")),
        *((text, text) for text in ("2024-05-01", "2024-13-01", "2024-05-01T10:00:00Z", "٣")),
        *(
            (text, text)
            for text in ("inf", "nan", ".", "1.2.3", "e3", "1e", "tRUE", "nUll", "None")
        ),
        ("'010'", "010"),
        ('"true"', "true"),
        ("'null'", "null"),
        ("''", ""),
        ("[010, yes, ~]", [10, "yes", None]),
        ("{a: 1, yes: 2}", {"a": 1, "yes": 2}),
        ("|\n 010", "010"),
        (">-\n a\n b", "a b"),
        ("\ufeff7", 7),
        ("---\n7\n...", 7),
    ],
)
def test_words_and_numbers_are_those_of_yaml_1_2(text, value):
    """`--limit 010` ran 8 examples and `1:30` 90, without a word."""
    found = parse_yaml(text, "config.yaml")
    assert found == value
    assert type(found) is type(value)


def test_not_a_number_is_a_number():
    assert math.isnan(parse_yaml(".nan", "--set"))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[", "line 1: "),
        ("a: [1, 2", "line 1: "),
        ("a: b: c", "line 1: mapping values are not allowed here"),
        ("a:\n\tb: 1", "line 2: found character '\\t'"),
        ("'open", "line 1: found unexpected end of stream"),
        ("@a", "line 1: found character '@'"),
        ("a: 1\na: 2", "line 2: found duplicate key"),
        ("{a: 1, 'a': 2}", "found duplicate key"),
        ("? [a]\n: b", "keys must be str"),
        ("? {a: b}\n: c", "found unhashable key"),
        ("!!float 1:30", "could not convert string to float: '1:30'"),
        ("!!binary aGk=", "bytes is not JSON"),
        ("!!set {a, b}", "set is not JSON"),
        ("!!python/object/apply:os.getcwd []", "could not determine a constructor for the tag"),
        ("!!python/name:os.system", "could not determine a constructor for the tag"),
        ("!mine {a: 1}", "line 1: could not determine a constructor for the tag '!mine'"),
        ("a: 1\n---\na: 2", "line 2: but found another document"),
        ("*nowhere", "line 1: found undefined alias 'nowhere'"),
        ("&a [*a]", "Circular reference detected"),
        ("a: &a {b: *a}", "Circular reference detected"),
        ("&a {*a : 1}", "found unhashable key"),
        (bomb(10), "too many values"),
        (bomb(60), "too many values"),
        (f"[{'1, ' * 30_000}]", "too many values"),
        ("[" * 100_000, "nested too deep"),
        ("{a: " * 3000 + "1" + "}" * 3000, "nested too deep"),
        ("- " * 5000 + "1", "nested too deep"),
        ("9" * 6000, "value has 6000 digits"),
        ("0x" + "f" * 6000, "(4300 digits)"),
        ("a\0b", "unacceptable character"),
        ("a: \x07", "unacceptable character"),
        ('"a\\ud800"', "surrogates not allowed"),
        ("\udcff", "unacceptable character"),
        ('"\\xZZ"', "line 1: "),
        ("%YAML 2.0\n---\n1", "line 1: "),
        ("a: 'b' c", "line 1: "),
    ],
)
def test_what_is_no_configuration_is_one_short_line_at_once(text, problem):
    """Ten nested anchors took 11 GB in the error message; deep brackets were a traceback."""
    start = time.process_time()
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "config.yaml")
    message = str(caught.value)
    assert problem in message
    assert message.startswith("config.yaml must be valid YAML (got ")
    assert "\n" not in message and len(message) < 250
    assert time.process_time() - start < 2


def test_an_alias_is_a_copy():
    """A `--set` on one of two blocks that share an anchor changed the other one too."""
    value = parse_yaml("a: &x {k: 1}\nb: *x", "config.yaml")
    value["a"]["k"] = 2
    assert value["b"] == {"k": 1}


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_number_is_finite(number):
    @dataclass
    class Sizes(Block):
        share: float

    with pytest.raises(ConfigError, match="^share must be a number \\(got "):
        build(Sizes, {"share": number})
    assert build(Sizes, {"share": 1}).share == 1


@pytest.mark.parametrize("path", ["config.yaml", "training/distill.yaml"])
def test_the_shipped_files_mean_the_same_in_yaml_1_1(path):
    text = (PROJECT / path).read_text(encoding="utf-8")
    reader = YAML(typ="safe", pure=True)
    reader.version = 1, 1
    assert parse_yaml(text, path) == reader.load(text)
