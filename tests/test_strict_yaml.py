"""strict_yaml.py: YAML 1.2's words and numbers, and nothing that runs, repeats or explodes."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest
import yaml

from specsampling.strict_yaml import YamlError, parse_yaml, scalar

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
        ("0b11", "0b11"),  # 3 in YAML 1.1
        ("1:30", "1:30"),  # 90 in YAML 1.1
        ("1:30:00", "1:30:00"),
        ("1_000", "1_000"),  # 1000 in YAML 1.1
        ("1,000", "1,000"),
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
        ("inf", "inf"),
        ("nan", "nan"),
        (".", "."),
        ("1.2.3", "1.2.3"),
        ("e3", "e3"),
        ("1e", "1e"),
        ("٣", "٣"),  # a digit to str.isdigit
        ("true", True),
        ("False", False),
        ("TRUE", True),
        ("tRUE", "tRUE"),
        ("yes", "yes"),  # true in YAML 1.1
        ("no", "no"),
        ("on", "on"),
        ("Off", "Off"),
        ("y", "y"),
        ("null", None),
        ("~", None),
        ("NULL", None),
        ("nUll", "nUll"),
        ("None", "None"),
        ("2024-05-01", "2024-05-01"),  # a date in YAML 1.1
        ("2024-13-01", "2024-13-01"),  # a traceback in PyYAML
        ("2024-05-01T10:00:00Z", "2024-05-01T10:00:00Z"),
        ("=", "="),
        ("'010'", "010"),
        ('"true"', "true"),
        ("'null'", "null"),
        ("''", ""),
        ("[010, yes, ~]", [10, "yes", None]),
        ("{a: 1, yes: 2}", {"a": 1, "yes": 2}),
        ("|\n 010", "010"),
        (">-\n a\n b", "a b"),
        ("", None),
        ("# only a comment", None),
        ("\ufeff7", 7),
        ("---\n7\n...", 7),
        ("%YAML 1.1\n---\n010", 10),
    ],
)
def test_words_and_numbers_are_those_of_yaml_1_2(text, value):
    """`--limit 010` ran 8 examples and `1:30` 90, without a word."""
    found = parse_yaml(text)
    assert found == value
    assert type(found) is type(value)


def test_not_a_number_is_a_number():
    assert math.isnan(parse_yaml(".nan"))
    assert scalar("nan") == "nan"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[", "line 1: "),
        ("a: [1, 2", "line 1: "),
        ("a: b: c", "line 1: mapping values are not allowed here"),
        ("a:\n\tb: 1", "line 2: found character '\\t'"),
        ("'open", "line 1: found unexpected end of stream"),
        ("@a", "line 1: found character '@'"),
        ("a: 1\na: 2", "line 2: key a stands twice"),
        ("{a: 1, 'a': 2}", "key a stands twice"),
        ("1: a", "key 1 is not a word"),
        ("true: a", "key true is not a word"),
        ("~: a", "key ~ is not a word"),
        ("{? : a}", "key (no word) is not a word"),
        ("? [a]\n: b", "is not a word"),
        ("? {a: b}\n: c", "is not a word"),
        ("a: &x {k: 1}\nb: {<<: *x}", "line 2: the merge key << is not read"),
        ("!!int '10'", "the tag tag:yaml.org,2002:int is not read"),
        ("!!float 1:30", "is not read"),
        ("!!binary aGk=", "is not read"),
        ("!!set {a, b}", "is not read"),
        ("!!timestamp 2024-13-01", "is not read"),
        ("!!python/object/apply:os.getcwd []", "is not read"),
        ("!!python/name:os.system", "is not read"),
        ("!mine {a: 1}", "the tag !mine is not read"),
        ("! a", "the tag ! is not read"),
        ("a: 1\n---\na: 2", "line 2: a second document begins"),
        ("*nowhere", "*nowhere stands before the end of an &nowhere"),
        ("&a [*a]", "*a stands before the end of an &a"),
        ("a: &a {b: *a}", "*a stands before the end of an &a"),
        ("&a {*a : 1}", "*a stands before the end of an &a"),
        (bomb(10), "more than 5000 values"),
        (bomb(60), "more than 5000 values"),
        (f"[{'1, ' * 30_000}]", "more than 5000 values"),
        ("[" * 100_000, "nested more than 20 deep"),
        ("[" * 21 + "]" * 21, "nested more than 20 deep"),
        ("{a: " * 3000 + "1" + "}" * 3000, "nested more than 20 deep"),
        ("- " * 500 + "1", "nested more than 20 deep"),
        ("9" * 1001, "a number has 1001 digits"),
        ("9" * 6000, "a number has 6000 digits"),
        ("0x" + "f" * 6000, "digits"),
        ("1." + "0" * 6000, "digits"),
        ("a\0b", "unacceptable character"),
        ("a: \x07", "unacceptable character"),
        ('"\\0"', "\\u0000 is no character"),
        ('"a\\ud800"', "\\ud800 is no character"),
        ("\udcff", "unacceptable character"),
        ('"\\xZZ"', "line 1: "),
        ("%YAML 2.0\n---\n1", "line 1: "),
        ("a: 'b' c", "line 1: "),
    ],
)
def test_what_is_no_configuration_is_one_short_line_at_once(text, problem):
    """Ten nested anchors took 11 GB in the error message; deep brackets were a traceback."""
    start = time.process_time()
    with pytest.raises(YamlError) as caught:
        parse_yaml(text)
    message = str(caught.value)
    assert problem in message
    assert "\n" not in message and len(message) < 200
    assert time.process_time() - start < 2


def test_an_alias_is_a_copy():
    """A `--set` on one of two blocks that share an anchor changed the other one too."""
    value = parse_yaml("a: &x {k: 1}\nb: *x")
    value["a"]["k"] = 2
    assert value["b"] == {"k": 1}


@pytest.mark.parametrize("path", ["config.yaml", "training/distill.yaml"])
def test_the_shipped_files_mean_the_same_in_yaml_1_1(path):
    text = (PROJECT / path).read_text(encoding="utf-8")
    assert parse_yaml(text) == yaml.safe_load(text)
