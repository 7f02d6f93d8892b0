"""checking.py: YAML 1.2's words, and nothing that runs, repeats or explodes; strict numbers."""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers import error_line
from ruamel.yaml import YAML

from specsampling.checking import Block, ConfigError, build, parse_yaml

PROJECT = Path(__file__).parents[1]


def bomb(levels: int, width: int = 9) -> str:
    """A few hundred bytes that stand for width ** levels values."""
    lines = ["a0: &a0 [x, x]"]
    for level in range(1, levels):
        lines.append(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * width)}]")
    return "\n".join(lines)


# How a value is written. In YAML 1.1 the word 010 is 8, and 0008, 0o10 and 1e3 are texts.
WORDS = {10: "10 010", 0: "0 -0", 7: "+7 07", -7: "-7", 8: "0008 0o10", 16: "0x10", 255: "0xfF"}
WORDS |= {1000.0: "1e3 1E+3 1.0e3", 0.001: "1e-3", 2.0: "2.", 0.5: ".5", -0.5: "-.5"}
WORDS |= {math.inf: "+.inf .inf", -math.inf: "-.INF", None: "null ~ NULL"}
# Numbers, words and dates of YAML 1.1, and a digit to str.isdigit.
TEXTS = "1:30 1:30:00 1,000 yes no on Off y 2024-05-01 2024-13-01 2024-05-01T10:00:00Z ٣ "
TEXTS += "inf nan . 1.2.3 e3 1e tRUE nUll None"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((text, value) for value, texts in WORDS.items() for text in texts.split()),
        *((text, text) for text in TEXTS.split()),
        *((text, text.lower() == "true") for text in ("true", "False", "TRUE")),
        *((f"'{text}'", text) for text in ("010", "true", "null", "")),
        *((text, None) for text in ("", "# only a comment")),
        ('"true"', "true"),
        ("[010, yes, ~]", [10, "yes", None]),
        ("{a: 1, yes: 2}", {"a": 1, "yes": 2}),
        ("|\n 010", "010"),
        (">-\n a\n b", "a b"),
        *((text, 7) for text in ("\ufeff7", "---\n7\n...")),
    ],
)
def test_words_and_numbers_are_those_of_yaml_1_2(text, value):
    """`--limit 010` ran 8 examples and `1:30` 90, without a word."""
    found = parse_yaml(text, "config.yaml")
    assert found == value
    assert type(found) is type(value)
    assert math.isnan(parse_yaml(".nan", "--set"))


PROBLEMS = {
    "line 1: ": ["[", "a: [1, 2", '"\\xZZ"', "%YAML 2.0\n---\n1", "a: 'b' c"],
    "line 1: mapping values are not allowed here": ["a: b: c"],
    "line 2: found character '\\t'": ["a:\n\tb: 1"],
    "line 1: found unexpected end of stream": ["'open"],
    "line 1: found character '@'": ["@a"],
    "line 2: found duplicate key": ["a: 1\na: 2"],
    "found duplicate key": ["{a: 1, 'a': 2}"],
    "keys must be str": ["? [a]\n: b"],
    "found unhashable key": ["? {a: b}\n: c", "&a {*a : 1}"],
    "could not convert string to float: '1:30'": ["!!float 1:30"],
    "bytes is not JSON": ["!!binary aGk="],
    "set is not JSON": ["!!set {a, b}"],
    "could not determine a constructor for the tag": [
        *("!!python/object/apply:os.getcwd []", "!!python/name:os.system", "!mine {a: 1}")
    ],
    "line 2: but found another document": ["a: 1\n---\na: 2"],
    "line 1: found undefined alias 'nowhere'": ["*nowhere"],
    "Circular reference detected": ["&a [*a]", "a: &a {b: *a}"],
    "too many values": [bomb(10), bomb(60), f"[{'1, ' * 30_000}]"],
    "nested too deep": ["[" * 100_000, "{a: " * 3000 + "1" + "}" * 3000, "- " * 5000 + "1"],
    "value has 6000 digits": ["9" * 6000],
    "(4300 digits)": ["0x" + "f" * 6000],
    "unacceptable character": ["a\0b", "a: \x07", "\udcff"],
    "surrogates not allowed": ['"a\\ud800"'],
}


@pytest.mark.parametrize(
    ("text", "problem"), [(text, problem) for problem, texts in PROBLEMS.items() for text in texts]
)
def test_what_is_no_configuration_is_one_short_line_at_once(text, problem):
    """Ten nested anchors took 11 GB in the error message; deep brackets were a traceback."""
    start = time.process_time()
    message = error_line(ConfigError, parse_yaml, text, "config.yaml")
    assert problem in message and len(message) < 250
    assert message.startswith("config.yaml must be valid YAML (got ")
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
